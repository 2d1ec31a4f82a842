"""A ``WorldModel`` over a diffusers image-to-video pipeline in a folder on disk: Wan, Cosmos, CogVideoX, LTX, HunyuanVideo.

Nothing is downloaded, no code of the folder runs, weights are safetensors only. A call of the pipeline makes one sample, with a generator
of that sample's seed: several of these pipelines would repeat one picture for a whole batch, and so a sample is the same wherever it
stands.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from physisforcing.core.digests import file_sha256
from physisforcing.core.errors import UserError, check_at_least, unknown_name
from physisforcing.core.requests import check_request
from physisforcing.core.results import config_hash
from physisforcing.core.types import Rollout, RolloutRequest, ViewLayout, WorldModelSpec

from .fitting import POLICIES, place, take_back
from .pipeline_classes import CLASSES, PipelineClass, check_size, read_class

#: The settings of a pipeline folder, beside its ``model_index.json``.
SETTINGS_NAME = "physis_pipeline.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(slots=True, kw_only=True)
class PipelineConfig:
    """How a pipeline is used. What the pipeline would choose by itself has to be said: ``height``, ``width``, ``frames``, ``fps``, ``steps``.

    ``prompt``: a template around the instruction, such as WorldArena's prefix. ``guidance``, ``negative_prompt``: the pipeline's own where
    null. ``shift``: of the flow-matching schedule (null: the folder's; Wan's converter writes 3.0 for A14B where Wan itself uses 5.0).
    ``view_height``, ``view_width``, ``camera``: the picture that the world model takes and gives, resized to the pipeline's size and back by
    ``resize`` (stretch or letterbox). ``dtype``: float32, bfloat16 or float16. ``safety_checker=false`` leaves out Cosmos3's.
    """

    height: int
    width: int
    frames: int
    fps: float
    steps: int
    prompt: str = "{instruction}"
    negative_prompt: str | None = None
    guidance: float | None = None
    shift: float | None = None
    view_height: int = 120
    view_width: int = 160
    camera: str = "head"
    resize: str = "stretch"
    dtype: str = "float32"
    safety_checker: bool = True
    name: str = ""

    def check(self) -> None:
        """``UserError`` for what cannot be."""
        check_at_least(self, height=8, width=8, frames=2, steps=1, view_height=1, view_width=1)
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise UserError("fps", got=self.fps, wanted="frames a second, above 0", fix="fps=16")
        if "{instruction}" not in self.prompt:
            fix = 'prompt="... {instruction}"'
            raise UserError("prompt", got=self.prompt, wanted="a template that holds {instruction}", fix=fix)
        if self.dtype not in DTYPES:
            raise unknown_name("dtype", self.dtype, DTYPES, see="PipelineConfig")
        if self.resize not in POLICIES:
            raise unknown_name("resize", self.resize, POLICIES, see="PipelineConfig")


class PipelineWorldModel:
    """Imagines ``config.frames`` frames from one picture and an instruction with a diffusers pipeline (see the module's docstring)."""

    def __init__(self, pipeline: Any, kind: PipelineClass, config: PipelineConfig, *, weights_fingerprint: str) -> None:
        self.pipeline, self.kind, self.config = pipeline, kind, config
        parts = {"weights": weights_fingerprint, "settings": asdict(config), "class": type(pipeline).__name__}
        self._spec = WorldModelSpec(
            name=config.name or type(pipeline).__name__.removesuffix("Pipeline"),
            views=ViewLayout(names=(config.camera,), height=config.view_height, width=config.view_width),
            context_frames=1,
            horizons=(config.frames,),
            frame_dt=1.0 / config.fps,
            conditions=frozenset({"text"}),
            returns=frozenset({"frames"}),
            fingerprint=config_hash(parts),
        )

    @property
    def spec(self) -> WorldModelSpec:
        return self._spec

    def rollout(self, request: RolloutRequest) -> Rollout:
        """See core's ``WorldModel``."""
        check_request(request, self._spec)
        begun = time.perf_counter()
        contexts, videos = request.context_BVTHWC[:, 0, 0], []
        for context, instruction, seeds in zip(contexts, request.instructions, request.seeds_BS, strict=True):
            picture = place(context, self.config.height, self.config.width, self.config.resize)
            videos += [self._sample(picture, instruction, int(seed)) for seed in seeds]
        frames = np.stack(videos).reshape(*request.seeds_BS.shape, 1, *videos[0].shape)
        seconds, calls = time.perf_counter() - begun, float(self.config.steps * len(videos))
        return Rollout(
            times_T=np.arange(request.horizon) * self._spec.frame_dt,
            frames_BSVTHWC=frames,
            cost={"seconds": seconds, "denoiser_calls": calls},
        )

    def _sample(self, picture_HWC: NDArray[np.uint8], instruction: str, seed: int) -> NDArray[np.uint8]:
        from PIL import Image

        config, kind = self.config, self.kind
        arguments: dict[str, Any] = {
            "image": Image.fromarray(picture_HWC),
            "prompt": config.prompt.replace("{instruction}", instruction),
            "num_frames": config.frames,
            "num_inference_steps": config.steps,
            "generator": torch.Generator().manual_seed(seed),  # on the CPU: the same noise on every device
            "output_type": "np",
        }
        if kind.sized:
            arguments |= {"height": config.height, "width": config.width}
        if kind.rate:
            arguments[kind.rate] = config.fps
        if config.guidance is not None:
            arguments[kind.guidance] = config.guidance
        if config.negative_prompt is not None:
            arguments["negative_prompt"] = config.negative_prompt
        made = np.asarray(getattr(self.pipeline(**arguments), kind.output))
        video = made[0] if made.ndim == 5 else made
        wanted = (config.frames, config.height, config.width, 3)
        if video.shape != wanted:
            fix = "set height, width and frames to what this pipeline makes"
            raise UserError("height, width, frames", got=list(video.shape), wanted=f"{list(wanted)}, as asked", fix=fix)
        if not np.isfinite(video).all():
            got = f"pictures with numbers that are not finite in {config.dtype}"
            raise UserError("dtype", got=got, wanted="finite pictures", fix="dtype=bfloat16 or float32")
        pixels = (video.clip(0, 1) * 255).round().astype(np.uint8)
        return take_back(pixels, config.view_height, config.view_width, config.resize)


def load_pipeline(folder: Path | str, config: PipelineConfig, device: str = "cpu") -> PipelineWorldModel:
    """Open a pipeline folder. Raises ``UserError`` for a class that is not in the list, a missing part and settings that do not fit it."""
    import diffusers

    path = Path(folder)
    config.check()
    name = read_class(path)
    kind = CLASSES[name]
    _check_fits(config, kind, name)
    options: dict[str, Any] = {}
    if kind.switch and not config.safety_checker:
        options[kind.switch] = False
    try:
        pipeline = getattr(diffusers, name).from_pretrained(
            str(path), local_files_only=True, use_safetensors=True, dtype=DTYPES[config.dtype], **options
        )
    except (OSError, ValueError, ImportError) as error:
        fix = "the whole folder with *.safetensors weights, and the packages that the message names"
        raise UserError("pipeline", got=f"{path}: {_first(error)}", wanted=f"a complete {name}", fix=fix) from error
    check_size(kind, pipeline, config.height, config.width, config.frames)
    if config.shift is not None:
        pipeline.scheduler = shifted(pipeline.scheduler, config.shift)
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    return PipelineWorldModel(pipeline, kind, config, weights_fingerprint=folder_fingerprint(path))


def _check_fits(config: PipelineConfig, kind: PipelineClass, name: str) -> None:
    if config.guidance is not None and not kind.guidance:
        fix = "leave guidance out, or set it in the folder's guider"
        raise UserError("guidance", got=config.guidance, wanted=f"none: {name} takes it from its folder", fix=fix)
    if not config.safety_checker and not kind.switch:
        wanted = f"true: {name} has no switch for one" if kind.guarded else f"true: {name} has none"
        raise UserError("safety_checker", got=False, wanted=wanted, fix="leave safety_checker out")


def shifted(scheduler: Any, shift: float) -> Any:
    """The same scheduler with another shift. Raises ``UserError`` for one that has none."""
    for field in ("flow_shift", "shift"):
        if field in scheduler.config:
            return type(scheduler).from_config(scheduler.config, **{field: shift})
    raise UserError("shift", got=shift, wanted=f"nothing: {type(scheduler).__name__} has no shift", fix="shift=null")


def folder_fingerprint(folder: Path) -> str:
    """12 hex digits over names and contents of every file that decides what a pipeline makes (not the settings beside it)."""
    kept = {".safetensors", ".json", ".txt", ".model"}
    files = sorted(p for p in folder.rglob("*") if p.suffix in kept and p.is_file() and p.name != SETTINGS_NAME)
    return config_hash({path.relative_to(folder).as_posix(): file_sha256(path) for path in files})[:12]


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
