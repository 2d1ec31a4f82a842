"""From a diffusers folder to a ``VideoBackbone``: which class it needs is read from its ``config.json``."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from physisforcing.core.errors import UserError, unknown_name
from physisforcing.core.files import replace_text

from .cosmos3 import COSMOS3_FPS, COSMOS3_LORA_TARGETS, Cosmos3Backbone
from .loading import load_transformer
from .protocol import VideoBackbone
from .wan_paper import WAN_LORA_TARGETS, WanBackbone, has_condition

#: Class in ``config.json`` -> what LoRA is put on.
LORA_TARGETS = {"WanTransformer3DModel": WAN_LORA_TARGETS, "Cosmos3OmniTransformer": COSMOS3_LORA_TARGETS}
#: What weights were trained with and their config does not say: beside the transformer's ``config.json``.
SETTINGS_NAME, SETTINGS = "physis_backbone.json", ("first_latent", "tap", "fps")
#: Latent channels -> stride of the autoencoder that makes them, where no autoencoder lies beside the transformer.
STRIDES = {16: (4, 8, 8), 48: (4, 16, 16)}


def load_backbone(
    folder: Path | str,
    *,
    first_latent: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    tap: int | None = None,
    part: str = "transformer",
    stride: tuple[int, int, int] | None = None,
    fps: float | None = None,
    exact_times: bool = False,
) -> VideoBackbone:
    """The backbone in a transformer's folder, or in the folder ``part`` of a pipeline (``transformer_2`` is A14B's low-noise expert).

    ``first_latent``: see ``protocol.FIRST_LATENT``; None is what ``physis_backbone.json`` says (``save_settings``), and without one ``mask``
    for transformers with conditioning channels, ``pinned`` for others. ``tap``: None is that file's, or the middle block. ``stride``: of the autoencoder; None is read from ``vae`` beside the transformer, or known by
    the latents' channels. ``fps``: of the videos, for Cosmos3; None is what that file says, or 24. Parts that diffusers keeps in float32 stay
    there.

    Raises ``UserError`` for a folder that is none, a class that is not in ``LORA_TARGETS``, and weights that do not fit.
    """
    found = describe_backbone(folder, first_latent=first_latent, tap=tap, part=part, stride=stride)
    transformer = load_transformer(found.path, found.kind, device, dtype).eval()
    return wrap_transformer(transformer, found, fps=fps, exact_times=exact_times)


@dataclass(slots=True, kw_only=True)
class Described:
    """What a transformer's folder says before its weights are read. ``kind``: the diffusers class; ``path``: the folder with
    ``config.json``; ``stride``: of its autoencoder; ``conditioned``: whether it has conditioning channels; ``tap``: None is the middle;
    ``fps``: of the videos that Cosmos3 was trained on here, or None."""

    kind: Any
    path: Path
    first_latent: str
    tap: int | None
    stride: tuple[int, int, int]
    channels: int
    conditioned: bool
    fps: float | None = None

    @property
    def cosmos(self) -> bool:
        return self.kind.__name__ == "Cosmos3OmniTransformer"

    @property
    def lora_targets(self) -> tuple[str, ...]:
        return LORA_TARGETS[self.kind.__name__]


def describe_backbone(
    folder: Path | str,
    *,
    first_latent: str | None = None,
    tap: int | None = None,
    part: str = "transformer",
    stride: tuple[int, int, int] | None = None,
) -> Described:
    """What ``load_backbone`` would load, without its weights; arguments and errors as there."""
    import diffusers

    path = transformer_folder(Path(folder), part)
    name, config = _declared(path)
    known = read_settings(path)
    cosmos = name == "Cosmos3OmniTransformer"
    conditioned = not cosmos and has_condition(config)
    channels = int(config.latent_channel if cosmos else config.out_channels)
    first = known.get("first_latent") if first_latent is None else first_latent
    return Described(
        kind=getattr(diffusers, name),
        path=path,
        first_latent=first or ("mask" if conditioned else "pinned"),
        tap=known.get("tap") if tap is None else tap,
        stride=stride or _stride(path, channels),
        channels=channels,
        conditioned=conditioned,
        fps=known.get("fps"),
    )


def wrap_transformer(
    transformer: Any, found: Described, *, fps: float | None = None, exact_times: bool = False
) -> VideoBackbone:
    """A stock transformer behind the protocol; ``fps`` as in ``load_backbone``. ``UserError`` for a ``first_latent`` or ``tap`` that it cannot have."""
    common: dict[str, Any] = {"stride": found.stride, "first_latent": found.first_latent, "tap": found.tap}
    if found.cosmos:
        fps = found.fps if fps is None else fps
        return Cosmos3Backbone(transformer, fps=COSMOS3_FPS if fps is None else fps, exact_times=exact_times, **common)
    return WanBackbone(transformer, exact_times=exact_times, **common)


def save_settings(folder: Path, *, first_latent: str, tap: int | None = None, fps: float | None = None) -> None:
    """Note beside a transformer in ``folder`` how its first latent is shown and, where it was trained so, at which block it was tapped and,
    of Cosmos3, how many frames a second its videos had."""
    values = {"first_latent": first_latent, "tap": tap, "fps": fps}
    values = {name: value for name, value in values.items() if value is not None}
    replace_text(folder / SETTINGS_NAME, json.dumps(values, indent=2) + "\n")


def read_settings(folder: Path) -> dict[str, Any]:
    """What ``save_settings`` wrote, or nothing. ``UserError`` for a file that says something else."""
    path = folder / SETTINGS_NAME
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        unknown = sorted(set(values) - set(SETTINGS))
    except (ValueError, TypeError) as error:
        raise UserError("model", got=str(path), wanted="a JSON object", fix=str(error)) from error
    if unknown:
        raise unknown_name(str(path), unknown[0], SETTINGS, see="docs/paper_scale.md")
    fps = values.get("fps", COSMOS3_FPS)
    if not isinstance(fps, int | float) or not 0 < fps < math.inf:
        raise UserError(f"{path}: fps", got=fps, wanted="frames a second, above 0", fix="leave fps out of the file")
    return values


def transformer_folder(folder: Path, part: str = "transformer") -> Path:
    """The folder with the transformer's ``config.json``: ``folder`` itself or its ``part``. ``UserError`` where there is none."""
    for path in (folder, folder / part):
        if (path / "config.json").is_file():
            return path
    fix = "a diffusers folder: the pipeline's or its transformer's; physis convert makes one of other layouts"
    raise UserError(
        "model", got=f"{folder} without {part}/config.json", wanted="a transformer in diffusers format", fix=fix
    )


def _declared(folder: Path) -> tuple[str, SimpleNamespace]:
    """The class that ``config.json`` names, and its settings with the defaults of that class."""
    import diffusers

    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = values.get("_class_name")
    except (ValueError, AttributeError) as error:
        raise UserError("model", got=str(folder / "config.json"), wanted="a JSON object", fix=str(error)) from error
    if kind not in LORA_TARGETS:
        raise unknown_name("model._class_name", str(kind), LORA_TARGETS, see="docs/paper_scale.md")
    parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters.values()
    defaults = {item.name: item.default for item in parameters if item.default is not item.empty}
    return kind, SimpleNamespace(**defaults | values)


def _stride(folder: Path, channels: int) -> tuple[int, int, int]:
    """Stride of the autoencoder beside the transformer, or of the one known to make so many channels."""
    config = folder.parent / "vae" / "config.json"
    if config.is_file():
        values = json.loads(config.read_text(encoding="utf-8"))
        side = int(values.get("scale_factor_spatial") or 8)
        return int(values.get("scale_factor_temporal") or 4), side, side
    if channels not in STRIDES:
        wanted = f"vae/config.json beside it, or latents of {' or '.join(map(str, STRIDES))} channels"
        raise UserError(
            "model", got=f"{folder}, {channels} channels", wanted=wanted, fix="use the whole pipeline folder"
        )
    return STRIDES[channels]
