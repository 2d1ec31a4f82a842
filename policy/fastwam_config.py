"""``config.json`` of a Fast-WAM release -> settings of ours and back: what the tensors do not say of the weights.

The names are those of LeRobot's port (``FastWAMConfig``). Rate, canvas and mode are in no such file: a policy whose own differ from what a
release is read as is written with a note (``differences``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from physisforcing.core.errors import UserError
from physisforcing.core.types import RATE_TOLERANCE
from physisforcing.worldmodel.convert.configs import read_jsonc, wan_original
from physisforcing.worldmodel.data.canvas import canvas_layout
from physisforcing.worldmodel.text import ENCODER as SMALL_ENCODER

from .checkpoint import INSTRUCTION, PolicyInfo
from .config import PolicyModelConfig, fastwam_compat

NAME = "config.json"
ENCODER = "umt5-xxl"
#: Stands for the sentence of an episode in the port's template.
TASK = "{task}"
#: Pictures between two latent frames, of Wan2.2's autoencoder.
PICTURES_PER_LATENT = 4
#: Of the video expert: what no shape says.
VIDEO = {"num_heads": int, "eps": float}
#: How weights were first drawn, which they do not depend on any more.
_DRAWN = ("initial", "published_initial")
_FIX = "use the config that was released with these weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What no file of a release says. ``hz``: actions a second; ``normalization``: kind of its statistics."""

    action_dim: int
    state_dim: int
    hz: float
    normalization: str


#: By the name of its canvas. RoboTwin records every 15th of 250 physics steps a second; LIBERO is controlled at 20 Hz.
LAYOUTS = {
    "robotwin": Layout(action_dim=14, state_dim=14, hz=50.0 / 3.0, normalization="zscore"),
    "libero": Layout(action_dim=7, state_dim=8, hz=20.0, normalization="minmax"),
}


@dataclass(slots=True, kw_only=True)
class ReleaseSettings:
    """What weights were trained with; the defaults are the published values. ``tokens``: of a sentence."""

    chunk: int = 32
    video_shift: float = 5.0
    action_shift: float = 5.0
    frames: int = 9
    frame_stride: int = 4
    tokens: int = 128
    template: str = INSTRUCTION

    @property
    def model(self) -> dict[str, Any]:
        """Fields of ``PolicyModelConfig``."""
        own = {name: getattr(self, name) for name in ("chunk", "video_shift", "action_shift")}
        return own | {"steps_per_latent": float(PICTURES_PER_LATENT * self.frame_stride)}

    def info(self, name: str, width: int) -> dict[str, Any]:
        """Fields of ``PolicyInfo``. ``name``: of the layout; ``width``: of a token."""
        canvas = canvas_layout(name)
        text = {"encoder": ENCODER, "tokens": self.tokens, "width": width, "template": self.template}
        return {
            "canvas": name, "size": (canvas.height, canvas.width), "frames": self.frames, "frame_stride": self.frame_stride,
            "control_hz": LAYOUTS[name].hz, "text": text,
        }  # fmt: skip


def read(source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """-> (fields of ``ReleaseSettings``, of ``VIDEO``) that the config beside a checkpoint says; both empty without one. ``UserError`` for a value
    that cannot be."""
    path = (source if source.is_dir() else source.parent) / NAME
    if not path.is_file():
        return {}, {}
    values, found = read_jsonc(path), dict[str, Any]()
    for ours, theirs in (
        ("chunk", "action_horizon"),
        ("frame_stride", "action_video_freq_ratio"),
        ("tokens", "context_len"),
    ):
        if theirs in values:
            found[ours] = _number(values[theirs], f"{path}: {theirs}", int)
    for ours, theirs in (("video_shift", "video_scheduler"), ("action_shift", "action_scheduler")):
        if theirs in values:
            found[ours] = _shift(values[theirs], f"{path}: {theirs}")
    if "num_video_frames" in values:
        where = f"{path}: num_video_frames"
        steps = _number(values["num_video_frames"], where, int) - 1
        stride = found.get("frame_stride", ReleaseSettings().frame_stride)
        if not steps or steps % (stride * PICTURES_PER_LATENT):
            wanted = f"1 and a multiple of {stride * PICTURES_PER_LATENT}, for pictures {stride} steps apart"
            raise UserError(where, got=steps + 1, wanted=wanted, fix=_FIX)
        found["frames"] = 1 + steps // stride
    if "prompt_template" in values:
        template = values["prompt_template"]
        if not isinstance(template, str) or TASK not in template:
            raise UserError(f"{path}: prompt_template", got=template, wanted=f"{TASK} in it", fix=_FIX)
        found["template"] = template.replace(TASK, INSTRUCTION)
    video = values.get("video_dit_config")
    shapes = video if isinstance(video, dict) else {}
    where = f"{path}: video_dit_config"
    return found, {
        name: _number(shapes[name], f"{where}.{name}", kind) for name, kind in VIDEO.items() if name in shapes
    }


def _number(value: Any, where: str, kind: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)) or not value > 0:
        raise UserError(where, got=value, wanted="a whole number above 0" if kind is int else "more than 0", fix=_FIX)
    return kind(value)


def _shift(value: Any, where: str) -> float:
    """The one shift of a schedule, in training and use."""
    found = value if isinstance(value, dict) else {}
    train, use = (_number(found.get(name), f"{where}.{name}", float) for name in ("train_shift", "infer_shift"))
    if train != use:
        fix = "a policy here has one; make them equal in the file"
        raise UserError(where, got=f"train_shift {train:g}, infer_shift {use:g}", wanted="one shift", fix=fix)
    return float(train)


def agreed(told: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``told``: by the file; ``given``: by the command, None where it says nothing. ``UserError`` where they contradict each other."""
    asked = {name: value for name, value in given.items() if value is not None}
    for name, value in asked.items():
        if told.get(name, value) != value:
            wanted = f"{told[name]}, as the {NAME} beside the weights says"
            fix = f"leave {name} out, or take the file away if it is not that of these weights"
            raise UserError(name, got=value, wanted=wanted, fix=fix)
    return {**asked, **told}


def write(config: PolicyModelConfig, info: PolicyInfo, video: Mapping[str, Any]) -> dict[str, Any]:
    """Content of the file. ``video``: config of the policy's transformer."""
    wan = wan_original(video)
    shared = {name: wan[name] for name in ("num_heads", "num_layers", "freq_dim", "eps")}
    shared |= {"attn_head_dim": video["attention_head_dim"], "text_dim": video["text_dim"]}
    written = {
        "video_dit_config": {
            **shared, "hidden_dim": wan["dim"], "ffn_dim": wan["ffn_dim"], "in_dim": wan["in_dim"], "out_dim": wan["out_dim"],
            "patch_size": list(video["patch_size"]),
        },
        "action_dit_config": {
            **shared, "hidden_dim": config.width, "ffn_dim": config.ffn_dim, "action_dim": config.action_dim,
        },
        "proprio_dim": config.state_dim,
        "action_horizon": config.chunk,
        "num_video_frames": 1 + (info.frames - 1) * info.frame_stride,
        "action_video_freq_ratio": info.frame_stride,
        "video_scheduler": {"train_shift": config.video_shift, "infer_shift": config.video_shift},
        "action_scheduler": {"train_shift": config.action_shift, "infer_shift": config.action_shift},
        "prompt_template": info.text.get("template", INSTRUCTION).replace(INSTRUCTION, TASK),
    }  # fmt: skip
    return written | ({"context_len": info.text["tokens"]} if "tokens" in info.text else {})


def differences(config: PolicyModelConfig, info: PolicyInfo) -> list[str]:
    """What a policy has that its release cannot say, with what ``kind=fastwam`` reads instead; empty where nothing changes."""
    said = ReleaseSettings(
        chunk=config.chunk, video_shift=config.video_shift, action_shift=config.action_shift, frames=info.frames,
        frame_stride=info.frame_stride, template=info.text.get("template", INSTRUCTION),
    )  # fmt: skip
    widths = {"action_dim": config.action_dim, "state_dim": config.state_dim}
    back = dataclasses.replace(fastwam_compat(**widths, width=config.width, ffn_dim=config.ffn_dim), **said.model)
    names = [one.name for one in dataclasses.fields(config) if one.name not in _DRAWN]
    pairs = {name: (getattr(config, name), getattr(back, name)) for name in names}
    layout = next(
        (name for name, one in LAYOUTS.items() if (one.action_dim, one.state_dim) == tuple(widths.values())), None
    )
    text, tokens = info.text, info.text.get("tokens", said.tokens)
    pairs["text.encoder"] = (text.get("encoder", SMALL_ENCODER), ENCODER)
    pairs["text.padded"] = (text.get("padded", tokens), tokens)
    pairs["text.fingerprint"] = (text.get("fingerprint"), None)
    if layout is None:
        pairs["canvas"] = (info.canvas, f"what layout= says ({', '.join(LAYOUTS)})")
    else:
        read = said.info(layout, 0)
        pairs |= {name: (getattr(info, name), read[name]) for name in ("canvas", "size")}
        if abs(info.control_hz / read["control_hz"] - 1.0) > RATE_TOLERANCE:
            pairs["control_hz"] = (info.control_hz, read["control_hz"])
    return [
        f"{name} {_told(mine)}, read back as {_told(theirs)}"
        for name, (mine, theirs) in pairs.items()
        if mine != theirs
    ]


def _told(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
