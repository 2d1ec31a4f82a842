"""A ``WorldModel`` over a diffusers image-to-video pipeline in a folder on disk: Wan, Cosmos, CogVideoX, LTX, HunyuanVideo.

Nothing is downloaded, no code of the folder runs, weights are safetensors only. A call of the pipeline makes one sample, with a generator
of that sample's seed: several of these pipelines would repeat one picture for a whole batch, and so a sample is the same wherever it
stands.

Wan pipelines with one time step a token (``expand_timesteps``: Wan2.2-TI2V-5B) also return features of their blocks, so that a feature
decoder of the published size can be trained and used on such a folder.
"""

from __future__ import annotations

import json
import math
import time
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from physisforcing.core.digests import file_sha256
from physisforcing.core.errors import UserError, check_at_least, unknown_name
from physisforcing.core.requests import check_request
from physisforcing.core.results import config_hash
from physisforcing.core.types import FeatureRequest, Rollout, RolloutRequest, ViewLayout, WorldModelSpec

from ..features import check_asked, denoiser_features
from .fitting import POLICIES, place, take_back
from .pipeline_classes import CLASSES, IMAGE_TO_VIDEO, PipelineClass, check_size, read_class

#: The settings of a pipeline folder, beside its ``model_index.json``.
SETTINGS_NAME = "physis_pipeline.json"
#: Tokens that Wan's pipelines give a sentence, and how many sentences' embeddings are kept.
PROMPT_TOKENS, REMEMBERED = 512, 256
#: Settings that features depend on.
SEEN_BY_FEATURES = (
    "height", "width", "frames", "fps", "prompt", "view_height", "view_width", "camera", "resize", "dtype",
)  # fmt: skip
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
        offers = offers_features(pipeline)
        seen = {name: getattr(config, name) for name in SEEN_BY_FEATURES} if offers else {}
        #: What embeds instructions for a feature decoder: the pipeline's own encoder, where it offers features.
        self.text = PipelineSentences(pipeline) if offers else None
        self._spec = WorldModelSpec(
            name=config.name or type(pipeline).__name__.removesuffix("Pipeline"),
            views=ViewLayout(names=(config.camera,), height=config.view_height, width=config.view_width),
            context_frames=1,
            horizons=(config.frames,),
            frame_dt=1.0 / config.fps,
            conditions=frozenset({"text"}),
            returns=frozenset({"frames", "features"} if offers else {"frames"}),
            fingerprint=config_hash(parts),
            features_fingerprint=config_hash({"weights": weights_fingerprint, "settings": seen}) if offers else "",
            blocks=len(pipeline.transformer.blocks) if offers else 0,
        )

    @property
    def spec(self) -> WorldModelSpec:
        return self._spec

    def rollout(self, request: RolloutRequest) -> Rollout:
        """See core's ``WorldModel``."""
        check_request(request, self._spec)
        begun = time.perf_counter()
        check_asked(request, self._spec.blocks)
        contexts, videos, features, calls = request.context_BVTHWC[:, 0, 0], [], [], 0.0
        for context, instruction, seeds in zip(contexts, request.instructions, request.seeds_BS, strict=True):
            picture = place(context, self.config.height, self.config.width, self.config.resize)
            if request.features is not None:
                features += self._features(picture, instruction, seeds.tolist(), request.features)
                calls += len(seeds) * request.features.taps[-1] / self._spec.blocks
            if "frames" in request.returns:
                videos += [self._sample(picture, instruction, int(seed)) for seed in seeds]
                calls += self.config.steps * len(seeds)
        shape = request.seeds_BS.shape
        return Rollout(
            times_T=np.arange(request.horizon) * self._spec.frame_dt,
            frames_BSVTHWC=np.stack(videos).reshape(*shape, 1, *videos[0].shape) if videos else None,
            features_BSKFhwD=np.stack(features).reshape(*shape, *features[0].shape) if features else None,
            cost={"seconds": time.perf_counter() - begun, "denoiser_calls": calls},
        )

    @torch.no_grad()
    def _features(
        self, picture_HWC: NDArray[np.uint8], instruction: str, seeds: Sequence[int], request: FeatureRequest
    ) -> list[NDArray[np.float32]]:
        """Features [K,F,h,w,D] a seed, from the pipeline's own first latent, noise and sentence."""
        from diffusers.utils.torch_utils import randn_tensor
        from PIL import Image

        pipe, config = self.pipeline, self.config
        device, size = pipe._execution_device, {"height": config.height, "width": config.width}
        assert self.text is not None
        # a trainer's autocast is not to reach into the frozen pipeline
        with torch.autocast(device.type, enabled=False):
            context = self.text.embed(config.prompt.replace("{instruction}", instruction))
            image = pipe.video_processor.preprocess(Image.fromarray(picture_HWC), **size).to(device, torch.float32)
            latents, first, _ = pipe.prepare_latents(
                image, 1, pipe.vae.config.z_dim, **size, num_frames=config.frames, dtype=torch.float32, device=device,
                generator=torch.Generator(),  # a trainer's dropout draws from the global one
            )  # fmt: skip
            made = []
            for seed in seeds:
                generator = torch.Generator().manual_seed(int(seed))  # the noise that ``_sample`` starts from
                noise = randn_tensor(latents.shape, generator=generator, device=device, dtype=torch.float32)
                found = denoiser_features(pipe.transformer, first, noise, context, request)
                made.append(found[0].float().cpu().numpy())
        return made

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


class PipelineSentences:
    """Sentences as a Wan pipeline's transformer reads them: each embedded by itself, the last ones remembered. It does not keep the
    pipeline alive: a decoder that was given it may outlive the model."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = weakref.ref(pipeline)
        self._known: dict[str, Tensor] = {}

    def embed(self, sentence: str) -> Tensor:
        """[1,512,D] on the pipeline's device in its precision, zeros behind the sentence."""
        pipe = self._pipeline()
        assert pipe is not None, "the world model is gone"
        tokens_LD = self._tokens(sentence)
        padded = F.pad(tokens_LD, (0, 0, 0, PROMPT_TOKENS - len(tokens_LD)))
        return padded[None].to(pipe._execution_device, pipe.transformer.dtype)

    def batch(self, sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(tokens float32 [B,L,D], mask [B,L], True on a sentence's tokens), on the CPU; L is the longest sentence's."""
        rows = [self._tokens(sentence).float() for sentence in sentences]
        mask = [torch.ones(len(row), dtype=torch.bool) for row in rows]
        return pad_sequence(rows, batch_first=True), pad_sequence(mask, batch_first=True)

    @torch.no_grad()
    def _tokens(self, sentence: str) -> Tensor:
        """[L,D] on the CPU, without the zeros."""
        if sentence not in self._known:
            pipe = self._pipeline()
            assert pipe is not None, "the world model is gone"
            device = pipe._execution_device
            with torch.autocast(device.type, enabled=False):
                found, _ = pipe.encode_prompt(
                    sentence, do_classifier_free_guidance=False, max_sequence_length=PROMPT_TOKENS, device=device
                )
            used = int(found[0].any(1).nonzero().max()) + 1
            self._known[sentence] = found[0, :used].cpu()
            if len(self._known) > REMEMBERED:
                del self._known[next(iter(self._known))]
        return self._known[sentence]


def is_pipeline(path: Path) -> bool:
    """Whether ``open_pipeline`` is meant: a diffusers folder, or a settings file."""
    return (path.is_file() and path.suffix == ".json") or (path / "model_index.json").is_file()


def pipeline_folder(path: Path) -> Path:
    """The diffusers folder of what ``open_pipeline`` opens: ``path`` itself, or what a settings file names. ``UserError`` for no settings."""
    return _settings(path)[0] if path.is_file() else path


def open_pipeline(path: Path, device: str) -> PipelineWorldModel:
    """A pipeline folder with ``physis_pipeline.json`` in it, or such a file that says ``pipeline: FOLDER``. ``UserError`` without one."""
    from physisforcing.core.config import build

    folder, values = _settings(path)
    return load_pipeline(folder, build(PipelineConfig, values), device)


def _settings(path: Path) -> tuple[Path, dict[str, Any]]:
    """The diffusers folder and the settings of a pipeline."""
    file = path if path.is_file() else path / SETTINGS_NAME
    if not file.is_file():
        fix = f"write {file} with height, width, frames, fps and steps: docs/bring_your_world_model.md"
        raise UserError("world_model", got=f"{path} without {SETTINGS_NAME}", wanted="the pipeline's settings", fix=fix)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError("world_model", got=str(file), wanted="a JSON object of settings", fix=str(error)) from error
    if not isinstance(values, dict):
        fix = '{"height": 480, "width": 640, ...}'
        raise UserError("world_model", got=str(file), wanted="a JSON object of settings", fix=fix)
    return file.parent / str(values.pop("pipeline", ".")), values


def offers_features(pipeline: Any) -> bool:
    """Whether the transformer takes a clean first frame beside noise, a time step for each, and patches of one latent frame."""
    config = getattr(getattr(pipeline, "transformer", None), "config", None)
    expands = getattr(getattr(pipeline, "config", None), "expand_timesteps", False) is True
    return expands and type(pipeline).__name__ == IMAGE_TO_VIDEO and config is not None and config.patch_size[0] == 1


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
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
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
