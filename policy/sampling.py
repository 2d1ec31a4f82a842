"""From noise to actions: Euler steps of the policy's flow, in ``first_frame`` and ``idm`` over keys that are computed once a plan (reference,
section 3). The steps of ``joint``, and those by which ``idm`` imagines a future, run the whole model, also what in it never changes.

Conventions are those of ``worldmodel.flow_matching``; actions and imagined latents stay float32 from the noise to the end. What a plan does is
two functions of tensors alone, ``begin`` (everything that does not change between action steps) and ``steps``, so that each can be captured
as one CUDA graph (``graphs.py``).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from physisforcing.core.errors import UserError, unknown_name
from physisforcing.worldmodel.flow_matching import sampling_sigmas

from .model import WorldActionModel

#: What a policy of each mode can do: the first is what it does where nothing else is asked for.
WAYS = {"first_frame": ("first_frame",), "joint": ("joint",), "idm": ("idm",), "optional_idm": ("idm", "first_frame")}


@dataclass(slots=True, kw_only=True)
class SamplingConfig:
    """``steps``: denoising steps of the actions (in ``joint`` of video and actions together). ``video_steps``: those of the imagined future,
    where the actions see one. ``mode``: ``first_frame`` or ``idm`` for a policy that was trained for both; empty: its own."""

    steps: int = 10
    video_steps: int = 10
    mode: str = ""

    def __post_init__(self) -> None:
        for name in ("steps", "video_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"policy.{name}", got=getattr(self, name), wanted="at least 1", fix=f"policy.{name}=10")


class Joint(NamedTuple):
    """What the steps of ``joint`` begin with: first latent frame, context, noise of the future."""

    first_BC1hw: Tensor
    context_BLD: Tensor
    noise_BCFhw: Tensor


def plan_seed(episode_seed: int, plan: int, seed: int = 0) -> int:
    """Seed of a plan's noise, from what it is for and nothing else: 63 bits of a hash. ``seed``: the policy's own, whatever the scene's; 0
    draws what there was before there was one."""
    own = f":{seed}" if seed else ""
    digest = hashlib.sha256(f"policy:{episode_seed}:{plan}{own}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def draw_noise(
    seeds_B: Sequence[int], actions: tuple[int, int], future: tuple[int, ...] | None
) -> tuple[Tensor, Tensor | None]:
    """-> (actions [B,P,A], future [B,C,F,h,w] or None), float32 on the CPU. A sample's noise depends on its seed alone, and that of its actions
    not on whether there is a future. ``actions``: (P, A); ``future``: (C, F, h, w)."""
    drawn = []
    for seed in seeds_B:
        generator = torch.Generator().manual_seed(int(seed))
        own = torch.randn(actions, generator=generator)
        drawn.append((own, None if future is None else torch.randn(future, generator=generator)))
    noise, later = zip(*drawn, strict=True)
    return torch.stack(noise), None if future is None else torch.stack(later)


def euler(velocity: Callable[[int, Tensor], Tensor], noise: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Integrate ``velocity(step, x)`` over the noise levels with the Euler rule, in float32."""
    x = noise.float()
    for step, (now, after) in enumerate(itertools.pairwise(sigmas)):
        x = x + (after - now) * velocity(step, x).float()
    return x


class Sampler:
    """Plans of one model in one way. ``frames``: latent frames of its window, the first included.

    ``UserError`` for a ``mode`` that the policy was not trained for.
    """

    def __init__(self, model: WorldActionModel, config: SamplingConfig, *, frames: int) -> None:
        self.model, self.config, self.frames = model, config, frames
        ways = WAYS[model.config.mode]
        self.way = config.mode or ways[0]
        if self.way not in ways:
            raise unknown_name("policy.mode", self.way, ways, see=f"a policy that was trained as {model.config.mode}")
        own = model.config
        self.sigmas: list[float] = sampling_sigmas(config.steps, own.action_shift).tolist()
        count = config.steps if self.way == "joint" else config.video_steps
        self.video_sigmas: list[float] = sampling_sigmas(count, own.video_shift).tolist()
        device = next(model.parameters()).device
        with torch.no_grad():
            # of all steps at once, a row each: they are the same in every plan
            temb_ND, modulation_N16D = model.action_times(torch.tensor(self.sigmas[:-1], device=device))
        self.times = list(zip(temb_ND.split(1), modulation_N16D.split(1), strict=True))

    @property
    def imagines(self) -> bool:
        """Whether a plan needs noise for a future."""
        return self.way != "first_frame"

    def begin(self, first_BC1hw: Tensor, text_BLD: Tensor, state: Tensor, noise_BCFhw: Tensor | None) -> Any:
        """What the action steps read: ``Joint``, or what ``prefill`` makes. ``state``: as ``WorldActionModel.context`` takes it. ``noise_BCFhw``: of the future, its first frame is
        not read; None where nothing is imagined."""
        context = self.model.context(text_BLD, state)
        clean = first_BC1hw.new_zeros(len(first_BC1hw), dtype=torch.float32)
        if self.way == "first_frame":
            return self.prefill(first_BC1hw, clean, context)
        assert noise_BCFhw is not None
        if self.way == "joint":
            return Joint(first_BC1hw, context, noise_BCFhw)
        return self.prefill(self.imagine(first_BC1hw, context, noise_BCFhw), clean, context)

    def prefill(self, latents_BCFhw: Tensor, sigma_B: Tensor, context_BLD: Tensor) -> Any:
        """``WorldActionModel.prefill``, or what another sampler has for it."""
        return self.model.prefill(latents_BCFhw, sigma_B, context_BLD)

    def imagine(self, first_BC1hw: Tensor, context_BLD: Tensor, noise_BCFhw: Tensor) -> Tensor:
        """The future that ``idm`` reads its actions out of: latents [B,C,F,h,w] float32, by steps of the video alone."""

        def velocity(step: int, later: Tensor) -> Tensor:
            sigma = later.new_full((len(later),), self.video_sigmas[step])
            return self.model(_behind(first_BC1hw, later), sigma, None, None, context_BLD)[0][:, :, 1:]

        return _behind(first_BC1hw, euler(velocity, noise_BCFhw[:, :, 1:], self.video_sigmas))

    def steps(self, begun: Any, noise_BPA: Tensor) -> Tensor:
        """Normalised actions [B,P,A] float32. ``begun``: of ``begin``."""
        if isinstance(begun, Joint):
            return self._joint(begun, noise_BPA)
        return euler(lambda step, x: self.model.act(x, self.times[step], begun), noise_BPA, self.sigmas)

    def _joint(self, begun: Joint, noise_BPA: Tensor) -> Tensor:
        """Video and actions step together, each at its own noise level."""
        first, context, noise = begun
        later, actions = noise[:, :, 1:].float(), noise_BPA.float()
        for step in range(self.config.steps):
            video_now, now = self.video_sigmas[step], self.sigmas[step]
            video_level, level = (actions.new_full((len(actions),), sigma) for sigma in (video_now, now))
            video, acted, _ = self.model(_behind(first, later), video_level, actions, level, context)
            later = later + (self.video_sigmas[step + 1] - video_now) * video[:, :, 1:].float()
            actions = actions + (self.sigmas[step + 1] - now) * acted
        return actions


def _behind(first_BC1hw: Tensor, later_BCFhw: Tensor) -> Tensor:
    """The clean first frame and what comes behind it."""
    return torch.cat([first_BC1hw.float(), later_BCFhw], dim=2)
