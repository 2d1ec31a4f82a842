"""A policy's folder: what it takes to act but the encoders of pictures and sentences, which it identifies.

``policy.json`` (settings, window, canvas, text encoder, latents, where the weights came from), ``transformer/`` (the video backbone as a
plain diffusers folder, which stock diffusers loads), ``expert.safetensors`` (action expert and proprioception) and ``statistics.json``
(normalisation of states and actions). Every tensor must be there once and fit; nothing is pickled. A policy whose backbone stayed the
packaged world model's has no ``transformer/``; its fingerprint stands in ``policy.json`` instead.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from physisforcing.core.errors import UserError, unknown_name
from physisforcing.core.files import replace_text
from physisforcing.core.paths import weights_root
from physisforcing.worldmodel.backbones.loading import check_entries, file_entries, load_transformer
from physisforcing.worldmodel.backbones.wan import ConditionerConfig, ProprioceptionConditioner
from physisforcing.worldmodel.storage import WEIGHTS_NAME, as_dtype, fingerprint, read_json, save_tensors

from .config import PolicyModelConfig
from .model import WorldActionModel

SETTINGS, EXPERT, TRANSFORMER = "policy.json", "expert.safetensors", "transformer"
#: Stands for the sentence of an episode in a template.
INSTRUCTION = "{instruction}"
#: Of the folder's layout; another one is refused.
FORMAT = 1
#: What ``policy.json`` says beside the model's settings and ``PolicyInfo``, and of which kind it is.
EXTRA: dict[str, tuple[type, ...]] = {"tap": (int,), "packaged": (str,), "conditioner": (dict, type(None))}


@dataclass(slots=True, kw_only=True)
class PolicyInfo:
    """What belongs to a policy beside its weights.

    ``canvas``: how pictures become one (``canvas.py``), with its height and width; ``frames``, ``frame_stride``: pictures of a training
    window and control steps between two. ``text``: encoder and tokens of a sentence, and the ``template`` that it is put into. ``latents``: fingerprint of the autoencoder;
    ``autoencoder``: where it lies, a folder or ``shipped``. ``control_hz``: actions a second. ``source``: which weights were taken from
    where (``backbone.py``). ``tasks``: what it was trained on.
    """

    canvas: str = "head"
    size: tuple[int, int] = (120, 160)
    frames: int = 17
    frame_stride: int = 2
    text: dict[str, Any] = field(default_factory=dict)
    latents: str = ""
    autoencoder: str = "shipped"
    control_hz: float = 50.0 / 3.0
    source: dict[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()


def save_policy(
    folder: Path,
    model: WorldActionModel,
    info: PolicyInfo,
    dtype: torch.dtype | None = None,
    *,
    state: Mapping[str, Tensor] | None = None,
    packaged: str = "",
) -> None:
    """Write everything but ``statistics.json``, which ``normalization`` writes. ``dtype``: of the stored weights; None keeps them bit-exact.
    ``state``: of the model, where its weights are put together from several processes. ``packaged``: ``packaged_backbone()`` where the
    transformer's weights are those, which are not written again then."""
    state = model.state_dict() if state is None else state
    folder.mkdir(parents=True, exist_ok=True)
    if not packaged:
        (folder / TRANSFORMER).mkdir(exist_ok=True)
        prefix = f"{TRANSFORMER}."
        video = {
            name.removeprefix(prefix): value
            for name, value in state.items()
            if name.startswith(prefix) and ".action." not in name
        }
        model.transformer.save_config(folder / TRANSFORMER)
        save_tensors(as_dtype(video, dtype), folder / TRANSFORMER / WEIGHTS_NAME, metadata={"format": "pt"})
    save_tensors(as_dtype(expert_state(state), dtype), folder / EXPERT)
    conditioner = getattr(model.proprioception, "config", None)
    write_settings(folder, model.config, info, tap=model.tap, conditioner=conditioner, packaged=packaged)


def packaged_backbone() -> str:
    """Identifies the transformer of the world model that ships with the package."""
    return fingerprint(weights_root() / "worldmodel" / TRANSFORMER)


def transformer_folder(folder: Path, packaged: str) -> Path:
    """Where the transformer of the policy in ``folder`` lies. ``UserError`` where it is the packaged one and the package has another."""
    if not packaged:
        return folder / TRANSFORMER
    if (found := packaged_backbone()) != packaged:
        fix = "use the version of the package that the policy came with, or export it with its backbone (freeze_video=false)"
        raise UserError(
            "policy", got=f"the packaged transformer {found}", wanted=f"{packaged}, on which it was trained", fix=fix
        )
    return weights_root() / "worldmodel" / TRANSFORMER


def write_settings(
    folder: Path,
    config: PolicyModelConfig,
    info: PolicyInfo,
    *,
    tap: int,
    conditioner: ConditionerConfig | None = None,
    packaged: str = "",
) -> None:
    """Write ``policy.json``, for weights that are written another way than by ``save_policy``."""
    settings = {
        "format": FORMAT,
        "model": dataclasses.asdict(config),
        "tap": tap,
        "packaged": packaged,
        "conditioner": None if conditioner is None else dataclasses.asdict(conditioner),
        **dataclasses.asdict(info),
    }
    replace_text(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")


def expert_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a model's tensors those that the video backbone does not have."""
    own = ("expert.", "proprioception.")
    return {name: value for name, value in state.items() if ".action." in name or name.startswith(own)}


def load_policy(
    folder: Path | str, device: str | torch.device = "cpu", dtype: torch.dtype | None = torch.float32
) -> tuple[WorldActionModel, PolicyInfo]:
    """What ``save_policy`` wrote, in ``dtype`` (None: as stored). ``UserError`` names the file and the field or tensor that does not fit."""
    from accelerate import init_empty_weights
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    folder = Path(folder)
    config, info, extra = read_settings(folder)
    transformer = load_transformer(transformer_folder(folder, extra["packaged"]), WanTransformer3DModel, device, dtype)
    with init_empty_weights(include_buffers=False):
        stored = extra["conditioner"]
        conditioner = None if stored is None else ProprioceptionConditioner(ConditionerConfig.of(stored))
        # drawn instead of interpolated: both are overwritten, and this is quicker
        model = WorldActionModel(
            transformer, dataclasses.replace(config, initial="random"), tap=extra["tap"], conditioner=conditioner
        )
    model.config = config
    place_expert(model, folder / EXPERT, torch.device(device), dtype)
    return model.eval(), info


def read_settings(folder: Path) -> tuple[PolicyModelConfig, PolicyInfo, dict[str, Any]]:
    """-> (model settings, what belongs to the policy, {tap, packaged, conditioner}) of a policy's folder. ``UserError`` for one that is none."""
    path = folder / SETTINGS
    if not path.is_file():
        fix = "give the export of physis train policy, or convert a released checkpoint: physis convert --help"
        raise UserError("policy", got=str(folder), wanted=f"a folder with {SETTINGS}", fix=fix)
    values = read_json(path)
    if values.pop("format", None) != FORMAT:
        raise UserError(
            str(path),
            got="another format",
            wanted=f"format {FORMAT}",
            fix="train or convert it again with this version",
        )
    extra = {name: _typed(values, name, kinds, path) for name, kinds in EXTRA.items()}
    model = _strict(PolicyModelConfig, values.pop("model", {}), path)
    info = _strict(PolicyInfo, values, path)
    return model, dataclasses.replace(info, size=tuple(info.size), tasks=tuple(info.tasks)), extra


def _typed(values: dict[str, Any], name: str, kinds: tuple[type, ...], path: Path) -> Any:
    """Take a setting out, which must be there and of one of these kinds."""
    got = values.pop(name, ...)
    if type(got) not in kinds:
        wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        fix = "export the policy again with this version"
        raise UserError(f"{path}: {name}", got="nothing" if got is ... else got, wanted=wanted, fix=fix)
    return got


def policy_name(folder: Path) -> str:
    """What a policy is called in results: its folder, or the run that exported it."""
    return folder.name if folder.name != "export" else folder.parent.name


def policy_fingerprint(folder: Path | str) -> str:
    """Identifies weights and settings in results."""
    return fingerprint(Path(folder))


def _strict(kind: Any, values: dict[str, Any], path: Path) -> Any:
    """``kind(**values)``: every field must be there, and no other."""
    known = [one.name for one in dataclasses.fields(kind)]
    for name in values:
        if name not in known:
            raise unknown_name(str(path), name, known, see="docs/policy.md")
    for name in known:
        if name not in values:
            raise UserError(
                str(path), got=f"no {name}", wanted=", ".join(known), fix="export the policy again with this version"
            )
    return kind(**values)


def place_expert(
    model: WorldActionModel,
    path: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    names: Iterable[str] | None = None,
) -> None:
    """Put tensors of ``path``, an action expert's file, into the model, those with ``names`` or all of them after a look that each is there and
    fits. ``UserError`` names the one that is not."""
    from safetensors import safe_open

    if names is None:
        wanted = expert_state(model.state_dict())
        check_entries(file_entries(path), {name: tuple(value.shape) for name, value in wanted.items()}, path)
        names = wanted
    with safe_open(path, framework="pt") as opened:
        for name in names:
            holder, _, leaf = name.rpartition(".")
            module, value = model.get_submodule(holder), opened.get_tensor(name).to(device, dtype)
            if leaf in module._buffers:
                module._buffers[leaf] = value
            else:
                module._parameters[leaf] = torch.nn.Parameter(value)
    for name, buffer in model.named_buffers():
        if buffer.device != device and not buffer.is_meta:
            holder, _, leaf = name.rpartition(".")
            model.get_submodule(holder)._buffers[leaf] = buffer.to(device)
