"""From noise to latents with a ``VideoBackbone``: explicit noise levels, Euler or UniPC, one or two experts, guidance by name.

Two traps of diffusers are avoided here. ``FlowMatchEulerDiscreteScheduler(shift=s).set_timesteps(n)`` shifts twice, so its levels
are always given. Guidance of two experts is called high and low, because Wan writes (low, high) and diffusers (high, low).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from physisforcing.core.errors import UserError, check_at_least, unknown_name

from .backbones.protocol import VideoBackbone, pin
from .flow_matching import TIMESTEP_SCALE, sampling_sigmas

SAMPLERS = ("euler", "unipc")
#: What makes UniPC's levels those of its ``flow_shift``: with Karras levels, as in published folders of Cosmos3, it reads no shift.
PLAIN_LEVELS = {
    "use_flow_sigmas": True, "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
    "use_dynamic_shifting": False, "shift_terminal": None, "final_sigmas_type": "zero", "num_train_timesteps": 1000,
}  # fmt: skip
#: Noise level from which on A14B's high-noise expert works.
BOUNDARY = 0.9


@dataclass(slots=True, kw_only=True)
class SamplerConfig:
    """``sampler``: ``euler`` or ``unipc``. ``steps``, ``shift``: of the noise levels. ``guidance``: classifier-free guidance, of the
    high-noise expert where there are two; ``guidance_low``: of the low-noise expert (None: the same). 1 switches guidance off.
    ``boundary``: noise level at and above which the high-noise expert works."""

    sampler: str = "unipc"
    steps: int = 40
    shift: float = 5.0
    guidance: float = 5.0
    guidance_low: float | None = None
    boundary: float = BOUNDARY

    def check(self) -> None:
        """``UserError`` for what cannot be."""
        if self.sampler not in SAMPLERS:
            raise unknown_name("sampler", self.sampler, SAMPLERS, see="docs/paper_scale.md")
        check_at_least(self, steps=1)
        for name in ("shift", "guidance", "guidance_low"):
            value = getattr(self, name)
            if not (name == "guidance_low" and value is None) and not 0 < value < math.inf:
                raise UserError(name, got=value, wanted="a number above 0", fix=f"leave {name} out")
        if not 0.0 <= self.boundary <= 1.0:
            raise UserError("boundary", got=self.boundary, wanted="a noise level in [0, 1]", fix=f"boundary={BOUNDARY}")


def make_scheduler(config: SamplerConfig, like: Any = None) -> Any:
    """A diffusers scheduler with its timesteps set.

    Euler: the levels of ``flow_matching.sampling_sigmas``, shifted once. UniPC: diffusers' own flow levels with this shift; the
    settings of ``like``, the folder's scheduler, that are not about levels, where that is a UniPC. Raises ``UserError`` where ``like`` is one that
    does not predict a flow.
    """
    import diffusers

    config.check()
    if config.sampler == "euler":
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
        scheduler.set_timesteps(sigmas=sampling_sigmas(config.steps, config.shift)[:-1].tolist())
        return scheduler
    if like is None or type(like) is not diffusers.UniPCMultistepScheduler:
        scheduler = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=config.shift
        )
    else:
        if like.config.prediction_type != "flow_prediction":
            fix = "sampler=euler, or a scheduler_config.json of this model"
            raise UserError(
                "scheduler", got=like.config.prediction_type, wanted="prediction_type flow_prediction", fix=fix
            )
        scheduler = type(like).from_config(like.config, flow_shift=config.shift, **PLAIN_LEVELS)
    scheduler.set_timesteps(config.steps)
    return scheduler


def seed_noise(seed: int, shape_CFhw: tuple[int, int, int, int]) -> Tensor:
    """Noise of one sample, float32 [1,C,F,h,w] on the CPU: a function of its seed and shape alone, on every device."""
    return torch.randn((1, *shape_CFhw), generator=torch.Generator().manual_seed(seed))


@dataclass(slots=True, kw_only=True)
class Experts:
    """One backbone for the whole schedule, or a second one for noise levels below ``boundary``.

    ``UserError`` where the two show the first latent frame in different ways: what one leaves in it, the other cannot read.
    """

    high: VideoBackbone
    low: VideoBackbone | None = None
    boundary: float = BOUNDARY

    def __post_init__(self) -> None:
        if self.low is not None and self.low.first_latent != self.high.first_latent:
            got = f"{self.high.first_latent} (high-noise expert), {self.low.first_latent} (low-noise expert)"
            fix = "experts=high, or say first_latent= for both"
            raise UserError("first_latent", got=got, wanted="one way for both experts", fix=fix)

    def at(self, timestep: float) -> tuple[str, VideoBackbone]:
        """(``high`` or ``low``, the backbone) for a timestep in 0..1000."""
        if self.low is None or timestep >= self.boundary * TIMESTEP_SCALE:
            return "high", self.high
        return "low", self.low


@torch.no_grad()
def sample(
    experts: Experts,
    config: SamplerConfig,
    noise_BCFhw: Tensor,
    text: tuple[Tensor, Mapping[str, Tensor]],
    negative: tuple[Tensor, Mapping[str, Tensor]] | None = None,
    *,
    like: Any = None,
    place: Callable[[VideoBackbone], AbstractContextManager] = nullcontext,
    advance: Callable[[], object] = lambda: None,
) -> Tensor:
    """Latents float32 like ``noise_BCFhw``; with a pinned first latent, frame 0 is the clean one.

    ``text``, ``negative``: what the backbone takes as text, and its conditions for it; guidance above 1 needs ``negative``. ``like``:
    see ``make_scheduler``. ``place(backbone)`` is entered around the steps of an expert: it may move it to a device and away.
    ``advance()`` is called after every step. Raises ``UserError`` for guidance without ``negative``.
    """
    scheduler = make_scheduler(config, like)
    guidance = {"high": config.guidance, "low": config.guidance if config.guidance_low is None else config.guidance_low}
    x = noise_BCFhw.float()
    pinned = experts.high.first_latent == "pinned"
    if pinned:
        x = pin(x, text[1]["first_BC1hw"].to(x))
    for (name, backbone), timesteps in _stages(experts, scheduler.timesteps):
        scale = guidance[name]
        if scale != 1.0 and negative is None:
            raise UserError("guidance", got=scale, wanted="a negative prompt beside it", fix="guidance=1, or embed one")
        with place(backbone):
            for timestep in timesteps:
                velocity = guided(backbone, x, timestep, text, negative if scale != 1.0 else None, scale)
                x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
                advance()
    return pin(x, text[1]["first_BC1hw"].to(x)) if pinned else x


def guided(
    backbone: VideoBackbone,
    x_BCFhw: Tensor,
    timestep: Tensor,
    text: tuple[Tensor, Mapping[str, Tensor]],
    negative: tuple[Tensor, Mapping[str, Tensor]] | None,
    scale: float,
) -> Tensor:
    """Velocity with classifier-free guidance: ``u + scale (c - u)`` from two passes, or the first alone without ``negative``."""
    sigma_B = (timestep.double() / TIMESTEP_SCALE).expand(len(x_BCFhw)).to(x_BCFhw.device)
    velocity = backbone(x_BCFhw, sigma_B, text[0], text[1])[0].to(x_BCFhw.dtype)
    if negative is None:
        return velocity
    without = backbone(x_BCFhw, sigma_B, negative[0], negative[1])[0].to(x_BCFhw.dtype)
    return without + scale * (velocity - without)


def _stages(experts: Experts, timesteps: Tensor) -> Iterator[tuple[tuple[str, VideoBackbone], list[Tensor]]]:
    """Consecutive timesteps of one expert."""
    for (name, backbone), group in itertools.groupby(timesteps, key=lambda t: experts.at(float(t))):
        yield (name, backbone), list(group)
