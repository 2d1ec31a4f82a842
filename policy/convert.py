"""Released Fast-WAM checkpoints to policy folders, and which way to go: settings in, report out. Tensors keep the type of their file; the
video's pass one at a time, the action expert's together."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from physisforcing.core.errors import UserError, unknown_name
from physisforcing.core.results import config_hash
from physisforcing.worldmodel.convert.command import SHARD_BYTES
from physisforcing.worldmodel.convert.configs import read_jsonc
from physisforcing.worldmodel.convert.parts import Part
from physisforcing.worldmodel.convert.writing import check_space, plan_shards, workplace, write_part
from physisforcing.worldmodel.storage import latents_fingerprint, save_tensors

from . import fastwam, fastwam_config, fastwam_export, fastwam_statistics
from .backbone import autoencoder_in
from .checkpoint import EXPERT, INSTRUCTION, TRANSFORMER, PolicyInfo, write_settings
from .config import MODES
from .fastwam_config import LAYOUTS, Layout, ReleaseSettings
from .normalization import KINDS as NORMALIZATIONS

KINDS = ("fastwam", "to_fastwam")


@dataclass(slots=True, kw_only=True)
class ConvertPolicyConfig:
    """Settings of ``physis convert kind=fastwam`` and ``kind=to_fastwam``.

    ``source``: a released ``.pt``, LeRobot's ``model.safetensors`` or its folder; for the way back a policy's folder. ``output``: folder to
    write. ``layout``: one of ``LAYOUTS``; auto goes by the widths of actions and states. ``statistics``: the released
    ``dataset_stats.json``; null takes the one beside the weights, ``none`` does without. ``normalization``: which of
    them the weights were trained with, ``zscore`` or ``minmax``; auto is that of the layout, since the file does not say it. ``autoencoder``: folder of the converted
    Wan2.2 autoencoder, or the pipeline with it in ``vae``; the fingerprint of its latents is kept, and acting needs it. ``template``: what is put round the instruction, with
    ``{instruction}`` in it: released weights know the sentence that their training data begins with. ``mode``, ``chunk``, ``action_shift``: what the weights were trained with, which they do
    not say. ``template``, ``chunk``, ``action_shift``: null is what the ``config.json`` beside the weights says, else the published value
    (``fastwam_config``). ``config``: JSON with what the video expert's shapes do not say. ``sha256``: file name -> checksum.
    """

    source: str = ""
    output: str = ""
    kind: str = "fastwam"
    layout: str = "auto"
    statistics: str | None = None
    normalization: str = "auto"
    autoencoder: str | None = None
    template: str | None = None
    mode: str = "first_frame"
    chunk: int | None = None
    action_shift: float | None = None
    config: str | None = None
    sha256: dict[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """``UserError`` for what cannot be."""
        for name, known in (
            ("kind", KINDS),
            ("layout", ("auto", *LAYOUTS)),
            ("mode", MODES),
            ("normalization", ("auto", *NORMALIZATIONS)),
        ):
            if getattr(self, name) not in known:
                raise unknown_name(name, getattr(self, name), known, see="docs/policy_weights.md")
        if self.template is not None and INSTRUCTION not in self.template:
            raise UserError(
                "template", got=self.template, wanted=f"{INSTRUCTION} in it", fix=f"template='... {INSTRUCTION}'"
            )
        for name in ("source", "output"):
            if not getattr(self, name):
                raise UserError(name, got="", wanted="a path", fix=f"{name}=PATH; see docs/policy_weights.md")


def run(config: ConvertPolicyConfig) -> dict[str, Any]:
    """Convert, and return the report that is also ``conversion.json``. ``UserError`` before anything is written, or for a tensor with
    numbers that are not finite, after which nothing has the output's name."""
    config.check()
    source, output = Path(config.source).expanduser(), Path(config.output).expanduser()
    return _import(config, source, output) if config.kind == "fastwam" else fastwam_export.export(source, output)


def _import(config: ConvertPolicyConfig, path: Path, output: Path) -> dict[str, Any]:
    source, left_out = fastwam.open_released(path, config.sha256)
    for name in config.sha256:
        if name not in source.digests:
            raise unknown_name("sha256", name, source.digests, see="the files of the source")
    told, video_told = fastwam_config.read(path)
    asked = {name: getattr(config, name) for name in ("chunk", "action_shift")}
    # how a sentence is put is the user's choice: it is no contradiction
    words = {} if config.template is None else {"template": config.template}
    settings = ReleaseSettings(**(fastwam_config.agreed(told, asked) | words))
    given = fastwam_config.agreed(video_told, {} if config.config is None else read_jsonc(Path(config.config)))
    released = fastwam.match_released(source, given, mode=config.mode, **settings.model)
    name, layout = _layout(config.layout, released.config.action_dim, released.config.state_dim)
    statistics, sums = _statistics(config, path, layout, released.config)
    video = _video_part(released)
    shards = plan_shards(video, SHARD_BYTES)
    expert = [name for name in released.origin if fastwam.is_expert(name)]
    check_space(output, sum(shard.bytes for shard in shards) + sum(_bytes(released, name) for name in expert))
    report = _report(released, left_out)
    info = PolicyInfo(
        **settings.info(name, released.video["text_dim"]),
        latents=latents_fingerprint(autoencoder_in(Path(config.autoencoder))) if config.autoencoder else "",
        autoencoder=Path(config.autoencoder).name if config.autoencoder else "", source=report,
    )  # fmt: skip
    report = report | {"canvas": name, "statistics": "none" if sums is None else sums.name}
    report |= {
        "config": fastwam_config.NAME if told or video_told else "none",
        "notes": _notes(config, told.get("template", ""), sums),
    }
    plan = config_hash(
        {"info": dataclasses.asdict(info), "shards": [shard.header.decode("latin-1") for shard in shards]}
    )
    with workplace(output, report | {"plan": plan}) as folder:
        (folder / TRANSFORMER).mkdir(exist_ok=True)
        write_part(video, shards, folder / TRANSFORMER, lambda _bytes: None)
        save_tensors({name: _finite(released, name) for name in expert}, folder / EXPERT)
        write_settings(folder, released.config, info, tap=released.model.tap)
        if statistics is not None and sums is not None:
            statistics.save(folder)
            shutil.copyfile(sums, folder / fastwam_statistics.NAME)
    size = sum(path.stat().st_size for path in output.rglob("*.safetensors"))
    return report | {"output": str(output), "bytes": size}


def _layout(asked: str, action_dim: int, state_dim: int) -> tuple[str, Layout]:
    if asked != "auto":
        return asked, LAYOUTS[asked]
    for name, layout in LAYOUTS.items():
        if (layout.action_dim, layout.state_dim) == (action_dim, state_dim):
            return name, layout
    got = f"auto, with {action_dim} numbers an action and {state_dim} a state"
    wanted = ", ".join(f"{name} ({x.action_dim} and {x.state_dim})" for name, x in LAYOUTS.items())
    raise UserError("layout", got=got, wanted=wanted, fix="layout=robotwin or libero, whose canvas it was trained on")


def _statistics(config: ConvertPolicyConfig, source: Path, layout: Layout, model: Any) -> tuple[Any, Path | None]:
    """-> (statistics, their file), or twice None where the user said ``none``."""
    if config.statistics == "none":
        return None, None
    path = Path(config.statistics).expanduser() if config.statistics else fastwam_statistics.find_statistics(source)
    if path is None:
        fix = "statistics=FILE, or statistics=none for a folder that neither acts nor is trained further"
        raise UserError("statistics", got=None, wanted=f"{fastwam_statistics.NAME} of the release", fix=fix)
    widths = {"action_dim": model.action_dim, "state_dim": model.state_dim}
    kind = layout.normalization if config.normalization == "auto" else config.normalization
    return fastwam_statistics.read_released(path, kind, **widths), path


def _video_part(released: fastwam.Released) -> Part:
    """The video expert as a plain diffusers folder."""
    prefix = "transformer."
    names = [name for name in released.origin if not fastwam.is_expert(name)]
    shapes = released.shapes
    return Part(
        name=TRANSFORMER,
        library="diffusers",
        class_name="WanTransformer3DModel",
        source=released.source,
        origin={name.removeprefix(prefix): released.origin[name] for name in names},
        shapes={name.removeprefix(prefix): shapes[name] for name in names},
        config=json.loads(released.model.transformer.to_json_string()),
    )


def _bytes(released: fastwam.Released, name: str) -> int:
    entry = released.source.entries[released.origin[name]]
    return torch.Size(entry.shape).numel() * entry.dtype.itemsize


def _finite(released: fastwam.Released, name: str) -> Tensor:
    value = released.read(name).contiguous()
    if not bool(value.isfinite().all()):
        where = f"{released.source.path}: {released.origin[name]}"
        fix = "use another checkpoint: this one is damaged"
        raise UserError(where, got="NaN or infinity", wanted="finite numbers", fix=fix)
    return value.clone()


def _report(released: fastwam.Released, left_out: dict[str, int]) -> dict[str, Any]:
    parts: dict[str, dict[str, Any]] = {}
    shapes = released.shapes
    for name, shape in shapes.items():
        part = "action_expert" if fastwam.is_expert(name) else "video"
        part = "proprioception" if name.startswith("proprioception.") else part
        told = parts.setdefault(part, {"tensors": 0, "parameters": 0, "dtypes": []})
        told["tensors"] += 1
        told["parameters"] += torch.Size(shape).numel()
        dtype = str(released.source.entries[released.origin[name]].dtype).removeprefix("torch.")
        told["dtypes"] = sorted({*told["dtypes"], dtype})
    return {
        "kind": "fastwam",
        "source": released.source.path.name,
        "sha256": dict(released.source.digests),
        "parts": parts,
        "left_out": left_out,
    }


def _notes(config: ConvertPolicyConfig, told: str, statistics: Path | None) -> list[str]:
    """``told``: the template in the file beside the weights, "" where there is none."""
    notes = []
    if statistics is None:
        notes.append(
            "without statistics the policy cannot act: normalisation is that of the data it is trained on next"
        )
    if not config.autoencoder:
        notes.append("autoencoder= was not given: acting needs the fingerprint of its latents, convert again with it")
    if told and config.template not in (None, told):
        notes.append(f"template: {config.template!r}, in place of the file's {told!r}")
    if not told and config.template is None:
        notes.append(
            "template= was not given: released weights were trained with a sentence before the instruction (DEFAULT_PROMPT in Fast-WAM's dataset)"
        )
    return notes
