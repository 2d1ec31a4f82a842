"""Videos from a first picture and a sentence with Wan2.2-I2V-A14B, Wan2.2-TI2V-5B or Cosmos3, from a pipeline folder on disk.

One sample is computed at a time, with noise of its own seed: a seed gives the same video wherever it stands among others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from physisforcing.core.errors import UserError, check_at_least, unknown_name

from .adapters.pipeline_classes import read_class, takes_text_alone
from .backbones.cosmos3 import Cosmos3Backbone
from .backbones.folder import load_backbone, read_settings, transformer_folder
from .backbones.wan_paper import WanBackbone
from .pipeline_vae import load_vae, picture_tensor
from .placement import Placement
from .sampling import BOUNDARY, Experts, SamplerConfig, sample, seed_noise
from .storage import read_json
from .text_encoders import CosmosText, UMT5Text

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPILE = ("none", "blocks")
EXPERTS = ("both", "high")


@dataclass(slots=True, kw_only=True)
class Recipe:
    """What a model's authors generate with; ``KINDS`` has one each."""

    frames: int
    fps: float
    sampler: SamplerConfig


#: Wan2.2's own settings (its pipeline folders may say another shift, which is not read), those of the released PF_Wan for one expert that
#: is used alone, and those of Cosmos3's pipeline.
KINDS: dict[str, Recipe] = {
    "a14b": Recipe(
        frames=81, fps=16.0, sampler=SamplerConfig(sampler="unipc", steps=40, shift=5.0, guidance=3.5, guidance_low=3.5)
    ),
    "a14b_one": Recipe(frames=81, fps=16.0, sampler=SamplerConfig(sampler="euler", steps=40, shift=5.0, guidance=5.0)),
    "ti2v": Recipe(frames=121, fps=24.0, sampler=SamplerConfig(sampler="unipc", steps=50, shift=5.0, guidance=5.0)),
    "cosmos3": Recipe(frames=189, fps=24.0, sampler=SamplerConfig(sampler="unipc", steps=35, shift=10.0, guidance=6.0)),
}


@dataclass(slots=True, kw_only=True)
class PaperConfig:
    """``transformer``: a folder with other weights for the (high-noise) transformer, such as an export of training. ``codec``: another
    autoencoder's. ``first_latent``: see ``backbones.protocol``; None is what ``load_backbone`` finds. ``experts``: ``both`` or ``high``;
    None is both where the folder has two. ``exact_times``: embed noise levels once a token where diffusers does (TI2V-5B, Cosmos3, what
    is pinned): slower, with more memory, and bit-equal to it, which the usual way is but for rounding. ``boundary``: None is the folder's, 0.9 where it
    has none. ``fps``: None is that of the videos that a Cosmos3 was trained on here. None elsewhere: ``KINDS``."""

    transformer: str = ""
    codec: str = ""
    first_latent: str | None = None
    experts: str | None = None
    device: str = "cpu"
    dtype: str = "fp32"
    offload: str = "none"
    compile: str = "none"
    exact_times: bool = False
    frames: int | None = None
    fps: float | None = None
    height: int = 480
    width: int = 640
    sampler: str | None = None
    steps: int | None = None
    shift: float | None = None
    guidance: float | None = None
    guidance_low: float | None = None
    boundary: float | None = None
    negative_prompt: str = ""
    text_cache: Path | None = field(default=None)

    def check(self) -> None:
        """``UserError`` for what cannot be in any model."""
        check_at_least(self, height=8, width=8)
        for name, known in (("dtype", DTYPES), ("compile", COMPILE)):
            if getattr(self, name) not in known:
                raise unknown_name(name, getattr(self, name), known, see="docs/paper_scale.md")
        if self.experts is not None and self.experts not in EXPERTS:
            raise unknown_name("experts", self.experts, EXPERTS, see="docs/paper_scale.md")
        if self.fps is not None and not 0 < self.fps < inf:
            raise UserError("fps", got=self.fps, wanted="frames a second, above 0", fix="leave fps out")


class PaperGenerator:
    """A pipeline folder, loaded once. Raises ``UserError`` for a folder that is none and settings that do not fit it."""

    def __init__(self, folder: Path | str, config: PaperConfig) -> None:
        config.check()
        self.folder, self.config = Path(folder), config
        self.placement = Placement(config.device, config.offload)
        self.cosmos = read_class(self.folder, config.transformer) == "Cosmos3OmniPipeline"
        index = read_json(self.folder / "model_index.json")
        self.vae = load_vae(Path(config.codec) if config.codec else self.folder / "vae")
        self.experts = self._experts(index)
        made, wanted = int(self.vae.vae.config.z_dim), self.experts.high.latent_channels
        if made != wanted:
            fix = "use the autoencoder that these weights were trained with"
            raise UserError("codec", got=f"latents of {made} channels", wanted=f"{wanted}, as the transformer", fix=fix)
        self.kind = self._kind()
        recipe = KINDS[self.kind]
        self.frames = recipe.frames if config.frames is None else config.frames
        trained = read_settings(transformer_folder(Path(config.transformer or self.folder))).get("fps", recipe.fps)
        self.fps = trained if config.fps is None else config.fps
        self.sampler = self._sampler(recipe.sampler)
        self.sampler.check()
        self._check_size()
        self.scheduler = _folder_scheduler(self.folder)
        if isinstance(self.experts.high, Cosmos3Backbone):
            self.experts.high.fps = self.fps
        self.text = CosmosText(self.folder) if self.cosmos else self._wan_text()
        if config.compile == "blocks":
            for backbone in (self.experts.high, self.experts.low):
                for block in backbone.blocks if backbone is not None else ():
                    block.compile()

    def generate(
        self,
        picture_HWC: NDArray[np.uint8],
        prompt: str,
        seeds: list[int],
        *,
        advance: Callable[[], object] = lambda: None,
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """(seed, frames uint8 [T,H,W,3]) for each seed. ``advance()`` is called after every denoising step."""
        for seed, latents in self.latents(picture_HWC, prompt, seeds, advance=advance):
            with self.placement.use(self.vae.vae):
                frames = self.vae.frames(latents)
            yield seed, frames

    def latents(
        self,
        picture_HWC: NDArray[np.uint8],
        prompt: str,
        seeds: list[int],
        *,
        advance: Callable[[], object] = lambda: None,
    ) -> Iterator[tuple[int, Tensor]]:
        """(seed, normalised latents float32 [1,C,F,h,w]) for each seed."""
        device, config = self.placement.device, self.config
        picture = picture_tensor(picture_HWC, config.height, config.width, crop=self.cosmos)
        shape = self.vae.latent_shape(self.frames, config.height, config.width)
        with self.placement.use(self.vae.vae):
            encoded = self.vae.encode_first(self.experts.high, picture.to(device), self.frames)
        texts = [self._conditions(text, encoded, shape[1]) for text in self._texts(prompt)]
        for seed in seeds:
            noise = seed_noise(seed, shape).to(device)
            negative = texts[1] if len(texts) > 1 else None
            yield (
                seed,
                sample(
                    self.experts, self.sampler, noise, texts[0], negative,
                    like=self.scheduler, place=self.placement.use_backbone, advance=advance,
                ),
            )  # fmt: skip

    def describe(self) -> str:
        """Everything that decides the videos beside picture, sentence, seed and weights, for their metadata."""
        used, config = self.sampler, self.config
        guidance = f"{used.guidance:g}"
        if self.experts.low is not None:
            low = used.guidance if used.guidance_low is None else used.guidance_low
            guidance = f"{guidance} (high) {low:g} (low), boundary {self.experts.boundary:g}"
        said = [f"{used.steps} steps {used.sampler}", f"shift {used.shift:g}", f"guidance {guidance}"]
        said += [f"first latent {self.experts.high.first_latent}", config.dtype]
        if self._guided and config.negative_prompt:
            said.append(f"negative prompt {config.negative_prompt!r}")
        said += ["times embedded as diffusers does"] * config.exact_times
        return ", ".join(said)

    @property
    def _guided(self) -> bool:
        return self.sampler.guidance != 1.0 or self.sampler.guidance_low not in (None, 1.0)

    def _texts(self, prompt: str) -> list[Tensor]:
        """What the backbone reads: of the prompt and, where guidance is on, of the negative prompt."""
        config, device = self.config, self.placement.device
        guided = self._guided
        if isinstance(self.text, CosmosText):
            size = {"frames": self.frames, "height": config.height, "width": config.width, "fps": self.fps}
            both = self.text.pair(prompt, config.negative_prompt, **size)
        else:
            both = tuple(self.text.batch([text]) for text in (prompt, config.negative_prompt)[: 1 + guided])
        return [text.to(device) for text in both[: 1 + guided]]

    def _conditions(self, text: Tensor, encoded: dict[str, Tensor], latents: int) -> tuple[Tensor, dict[str, Tensor]]:
        first, *rest = encoded["first_BC1hw"], encoded.get("condition_BCFhw")
        return text, self.experts.high.conditions(first, text, latents, condition_BCFhw=rest[0])

    def _experts(self, index: dict[str, Any]) -> Experts:
        config = self.config
        common: dict[str, Any] = {
            "first_latent": config.first_latent, "dtype": DTYPES[config.dtype], "exact_times": config.exact_times,
            "stride": self.vae.stride,
        }  # fmt: skip
        two = (self.folder / "transformer_2" / "config.json").is_file()
        if config.experts == "both" and not two:
            got = f"{self.folder} without transformer_2/"
            raise UserError("experts", got=got, wanted="a folder with two experts", fix="experts=high")
        both = two and config.experts != "high"
        if both and takes_text_alone(index) and not read_settings(self.folder / "transformer_2").get("first_latent"):
            got = f"both of {self.folder}, whose transformer_2 was never shown a first frame"
            raise UserError("experts", got=got, wanted="the one that transformer= gives", fix="experts=high")
        high = load_backbone(config.transformer or self.folder, **common)
        low = load_backbone(self.folder, part="transformer_2", **common) if both else None
        boundary = index.get("boundary_ratio") if config.boundary is None else config.boundary
        return Experts(high=high, low=low, boundary=BOUNDARY if boundary is None else float(boundary))

    def _kind(self) -> str:
        if self.cosmos:
            return "cosmos3"
        high = self.experts.high
        assert isinstance(high, WanBackbone)
        if not high.conditioned and self.vae.stride[1] == 16:
            return "ti2v"
        return "a14b" if self.experts.low is not None else "a14b_one"

    def _sampler(self, recipe: SamplerConfig) -> SamplerConfig:
        config = self.config
        if config.guidance_low is not None and self.experts.low is None:
            fix = "leave guidance_low out"
            raise UserError("guidance_low", got=config.guidance_low, wanted="nothing: there is one expert", fix=fix)
        low = recipe.guidance_low if config.guidance is None else config.guidance
        return SamplerConfig(
            sampler=recipe.sampler if config.sampler is None else config.sampler,
            steps=recipe.steps if config.steps is None else config.steps,
            shift=recipe.shift if config.shift is None else config.shift,
            guidance=recipe.guidance if config.guidance is None else config.guidance,
            guidance_low=low if config.guidance_low is None else config.guidance_low,
            boundary=self.experts.boundary,
        )

    def _check_size(self) -> None:
        """``UserError`` for a size or length that does not divide into latent cells and tokens."""
        time, *sides = self.vae.stride
        if self.frames < time + 1 or (self.frames - 1) % time:
            near = max(1, round((self.frames - 1) / time)) * time + 1
            raise UserError("frames", got=self.frames, wanted=f"{time}k+1, k at least 1", fix=f"frames={near}")
        for name, side, patch in zip(("height", "width"), sides, self.experts.high.patch[1:], strict=True):
            value, step = getattr(self.config, name), side * patch
            if value % step:
                fix = f"size with {name} {max(step, round(value / step) * step)}"
                raise UserError(name, got=value, wanted=f"a multiple of {step}", fix=fix)

    def _wan_text(self) -> UMT5Text:
        placement = self.placement  # not self: models that hold themselves would stay until Python looks for cycles

        def run(encoder: torch.nn.Module, call: Callable[[], Tensor]) -> Tensor:
            with placement.use(encoder):
                return call()

        return UMT5Text(self.folder, dtype=DTYPES[self.config.dtype], cache=self.config.text_cache, run=run)


def _folder_scheduler(folder: Path) -> Any:
    """The scheduler that the folder names, for its settings; its shift is never used."""
    import diffusers

    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return None
    kind = read_json(path).get("_class_name")
    known = {"UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"}
    if kind not in known:
        raise unknown_name("scheduler", str(kind), known, see="docs/paper_scale.md")
    return getattr(diffusers, kind).from_pretrained(str(path.parent), local_files_only=True)
