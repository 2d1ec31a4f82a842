"""``physis convert``: checkpoints as others release them -> a plain diffusers folder or a policy's folder, every tensor accounted for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

HELP = """Convert a released checkpoint to a plain diffusers folder, or check one.

settings (field=value):
source=PATH      Wan2.2-TI2V-5B, Wan2.2-I2V-A14B or Wan2.2-T2V-A14B as Wan-AI releases them, one of their files (transformer,
                 Wan2.1_VAE.pth, Wan2.2_VAE.pth, models_t5_umt5-xxl-enc-bf16.pth), the authors' PF_Wan and PF_Cosmos, or a diffusers
                 folder, which is checked and left as it is
output=FOLDER    must not exist; a killed conversion leaves none, and the same command continues it
kind=auto        or wan | pf_wan | pf_cosmos | diffusers; to_wan: the transformers of a diffusers folder under Wan's own names;
                 fastwam: a released Fast-WAM policy; to_fastwam: a policy folder under the names of those (see below)
dtype=bf16       of the transformers: bf16 | fp16 | fp32 | keep; autoencoder and text encoder keep the type of their files
config=null      JSON with what the tensors' shapes do not say (docs/convert.md)
tokenizer=null   folder of a tokenizer, for a release that has none (PF_Cosmos) or in place of its own
sha256={}        checksums that files must have: sha256={Wan2.1_VAE.pth:38071ab5...}
flags: --json prints the report that is also in FOLDER/conversion.json

settings with kind=fastwam (docs/policy_weights.md), where dtype is that of the file:
source=FILE      a released .pt, or the model.safetensors of LeRobot's port
layout=auto      or robotwin | libero: canvas and control rate, by the widths of actions and states
statistics=null  the dataset_stats.json beside the weights; a path, or none
normalization=auto   or zscore | minmax: which of them the weights were trained with; auto is that of the layout
autoencoder=null the converted Wan2.2 pipeline, or its vae: acting needs the fingerprint of its latents
mode=first_frame with which the weights were trained, as chunk=null and action_shift=null: what the config.json beside them says,
                 else 32 and 5; one that contradicts the file is refused
template=null    what is put round an instruction: null is what that file says; template='{instruction}' puts nothing

Nothing is downloaded. A missing shard, a file that was cut off, and a tensor that is missing, unknown, of another shape or quantised are
errors that name file and tensor, before anything is written.

examples:
  physis convert source=Wan2.2-TI2V-5B output=models/wan22_5b
  physis convert source=Wan2.2-I2V-A14B output=models/wan22_a14b dtype=bf16
  physis convert source=PF_Wan output=models/pf_wan
  physis convert source=models/wan22_5b
  physis convert kind=fastwam source=robotwin_uncond_3cam_384.pt output=models/fastwam_robotwin
  physis convert kind=to_fastwam source=models/fastwam_robotwin output=models/fastwam_back"""


def main(argv: Sequence[str]) -> int:
    """Entry of ``physis convert``."""
    if not argv or "-h" in argv or "--help" in argv:
        print(HELP)
        return 0 if argv else 2
    words = [word for word in argv if word != "--json"]
    report = _converted(words)
    print(json.dumps(report, indent=2) if "--json" in argv else told(report))
    return 0


def _converted(words: list[str]) -> dict[str, Any]:
    """The report of the conversion that the overrides ask for: of a policy or of a world model."""
    from physisforcing.core.config import compose

    if any(word in ("kind=fastwam", "kind=to_fastwam") for word in words):
        from physisforcing.policy import convert as policy

        return policy.run(compose("convert_policy", words, policy.ConvertPolicyConfig))
    from physisforcing.worldmodel.convert.command import ConvertConfig, run

    return run(compose("convert", words, ConvertConfig))


def told(report: dict[str, Any]) -> str:
    """The report in lines for people."""
    lines = [f"{report['source']}: {report['kind']}"]
    for name, part in report["parts"].items():
        of = f"{part['class']}, " if "class" in part else ""
        what = (
            f"{part['tensors']} tensors"
            if "tensors" in part
            else "not checked: another class than those of the backbones"
        )
        if "parameters" in part:
            what += f", {part['parameters'] / 1e9:.3f} B parameters, {', '.join(part['dtypes'])}"
        lines.append(f"  {name}: {of}{what}")
        lines += [f"    left out: {count} tensors of {why}" for why, count in part.get("left_out", {}).items()]
    lines += [f"  left out: {count} tensors of {why}" for why, count in report.get("left_out", {}).items()]
    if "canvas" in report:
        lines.append(f"  canvas: {report['canvas']}; statistics: {report['statistics']}; config: {report['config']}")
    elif "statistics" in report:
        lines.append(f"  statistics: {report['statistics']}")
    lines += [f"  note: {note}" for note in report["notes"]]
    if "output" in report:
        lines.append(f"  written: {report['output']}, {report['bytes'] / 1e9:.2f} GB")
    return "\n".join(lines)
