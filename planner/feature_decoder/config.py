"""Sizes of the feature decoder: WorldArena's published one, the same with three taps, and a small one for pico.

Published (WorldArena, `embodied_task`, an adaptation of Video Prediction Policy): 45 pictures one control step apart, 12 latent
frames of 15x20 tokens, two taps of width 3072, 228 latents, 45 rows of 14 targets.

Parameters: published are 20.47 M in the resampler and 28.13 M in the head, 48.60 M together; here they are 20.48 M and 27.86 M, 48.34 M.
The resampler is the published one and 13 440 numbers more, the learned row and column of a token (without them 20.47 M). The head is
0.27 M smaller than the published one, of which no description by layers was at hand; what is known of it is in it (width, layers, heads,
feed-forward, FiLM, goal). The published one also carries an embedding of proprioception that is frozen and never called; two layers
of twice the width, as heads of this family have, are 0.31 M. It is left out here, and 0.04 M of the difference stay unexplained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from physisforcing.core.errors import UserError, unknown_name
from physisforcing.core.types import DT, DecoderNeeds, FeatureRequest


@dataclass(slots=True, kw_only=True)
class ResamplerConfig:
    """``latents_per_frame`` learned queries for each latent frame; ``hidden``: factor of the feed-forward layers."""

    width: int = 192
    depth: int = 3
    heads: int = 4
    head_dim: int = 48
    latents_per_frame: int = 16
    hidden: int = 4


@dataclass(slots=True, kw_only=True)
class ActionHeadConfig:
    """``width`` is shared by encoder, decoder and noise embedding. Dropout: attention weights, residual branches, feed-forward layers."""

    width: int = 192
    encoder_layers: int = 2
    decoder_layers: int = 3
    heads: int = 6
    hidden: int = 4
    attention_dropout: float = 0.1
    residual_dropout: float = 0.1
    feed_forward_dropout: float = 0.05


@dataclass(slots=True, kw_only=True)
class SamplingConfig:
    """EDM noise levels. ``sigma_data``: deviation of the data that the preconditioning assumes. Training draws from a log-logistic
    density round it in [``sigma_min``, ``sigma_max``], a share ``coarse`` evenly in the logarithm of [``sigma_data``, ``sigma_max``] instead:
    which chunk it will be is decided at levels that exceed the distance between chunks (sigma_data times the root of their numbers, 11 at
    pico size), where the density alone puts less than one draw in four hundred and features are hardly learned. Sampling takes ``steps`` DDIM steps from ``sigma_max`` to ``last_sigma``, then jumps to the
    denoised value (a large ``last_sigma`` gives something near the mean of what the head thinks possible). ``draws``: samples a decode;
    their deviation is the spread. ``seed``: of their noise, together with the noise seed of the rollout that is decoded."""

    sigma_data: float = 0.5
    sigma_min: float = 0.001
    sigma_max: float = 80.0
    coarse: float = 0.4
    steps: int = 20
    last_sigma: float = 0.05
    draws: int = 4
    seed: int = 0


@dataclass(slots=True, kw_only=True)
class FeatureDecoderConfig:
    """Everything that the weights depend on, and how they are sampled. Defaults: pico.

    ``taps``, ``tap_sigma``, ``first_frame_mask``: which features (``core.types.FeatureRequest``). ``feature_dim``: width of one tap;
    ``latent_frames``, ``grid``: tokens of a rollout. ``frames`` pictures ``steps_per_frame`` control steps apart make
    ``(frames - 1) * steps_per_frame + 1`` rows, the first of which is the pose already reached. ``goal_tokens``: the instruction's token
    embeddings of width ``goal_dim`` are cut and padded to so many, in training and in use alike. ``prompt``: what is embedded.
    ``normalise``: targets per dimension to deviation ``sigma_data``. ``proprioception``: the drive targets now are a token too, and rows
    are changes from them. ``features_fingerprint``: of the world model whose features it was trained on; training fills it in.
    """

    taps: tuple[int, ...] = (2, 4, 6)
    tap_sigma: float = 1.0
    first_frame_mask: str = "correct"
    feature_dim: int = 256
    latent_frames: int = 5
    grid: tuple[int, int] = (15, 20)
    frames: int = 17
    steps_per_frame: int = 2
    action_dim: int = 14
    goal_dim: int = 384
    goal_tokens: int = 32
    prompt: str = "{instruction}"
    normalise: bool = True
    proprioception: bool = False
    features_fingerprint: str = ""
    resampler: ResamplerConfig = field(default_factory=ResamplerConfig)
    head: ActionHeadConfig = field(default_factory=ActionHeadConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        self.taps = tuple(self.taps)  # YAML and JSON only know lists
        high, wide = self.grid
        self.grid = (high, wide)

    @property
    def rows(self) -> int:
        """Rows that the head makes (R); the chunk is all but the first."""
        return (self.frames - 1) * self.steps_per_frame + 1

    @property
    def needs(self) -> DecoderNeeds:
        request = FeatureRequest(taps=self.taps, sigma=self.tap_sigma, first_frame_mask=self.first_frame_mask)
        returns, dt = frozenset({"features"}), self.steps_per_frame * DT
        return DecoderNeeds(
            returns=returns,
            features=request,
            horizons=(self.frames,),
            frame_dt=dt,
            features_fingerprint=self.features_fingerprint,
        )


def paper_size(**changes: Any) -> FeatureDecoderConfig:
    """The published geometry with taps l-4, l, l+4 round block 15 of 30; ``changes`` to single fields."""
    values: dict[str, Any] = {
        "taps": (11, 15, 19),
        "feature_dim": 3072,
        "latent_frames": 12,
        "frames": 45,
        "steps_per_frame": 1,
        "goal_dim": 4096,
        "goal_tokens": 30,
        "resampler": ResamplerConfig(width=384, depth=6, heads=8, head_dim=64, latents_per_frame=19),
        "head": ActionHeadConfig(width=384, encoder_layers=4, decoder_layers=4, heads=8, attention_dropout=0.3),
    }
    return FeatureDecoderConfig(**(values | changes))


def worldarena(**changes: Any) -> FeatureDecoderConfig:
    """What WorldArena released: the inputs of blocks 15 and 16, their first-frame mask, joints as they are, the log-logistic density alone,
    DDIM from 80 to 1, one sample. Their constant sentence in front of every instruction goes into ``prompt``.

    Their blocks are assumed to be counted from 0, as their code indexes them: the inputs of blocks 15 and 16 of 0..29 are the outputs of
    blocks 15 and 16 of 1..30, which is how taps count here. Were they counted from 1, the taps would be (14, 15).
    """
    values: dict[str, Any] = {
        "taps": (15, 16),
        "first_frame_mask": "worldarena_compat",
        "normalise": False,
        "sampling": SamplingConfig(coarse=0.0, last_sigma=1.0, draws=1),
    }
    return paper_size(**(values | changes))


PRESETS: dict[str, Callable[[], FeatureDecoderConfig]] = {
    "pico": FeatureDecoderConfig,
    "paper": paper_size,
    "worldarena": worldarena,
}


def preset(name: str) -> FeatureDecoderConfig:
    """A fresh configuration by name. Raises ``UserError`` with the nearest name."""
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS, see="planner/feature_decoder/config.py")
    return PRESETS[name]()


def check_config(config: FeatureDecoderConfig) -> FeatureDecoderConfig:
    """``config`` again, or ``UserError`` for the first value that makes no sense."""
    s, head, resampler = config.sampling, config.head, config.resampler
    if head.width % head.heads:
        fix = "heads that divide the width"
        raise UserError("head.width", got=head.width, wanted=f"a multiple of {head.heads} heads", fix=fix)
    if resampler.width != head.width:
        fix = "the head's encoder reads the resampler's latents as they are"
        raise UserError("resampler.width", got=resampler.width, wanted=f"head.width={head.width}", fix=fix)
    if not 0 < s.sigma_min < s.sigma_max or not 0 < s.last_sigma < s.sigma_max or s.sigma_data <= 0:
        wanted = "0 < sigma_min, last_sigma < sigma_max and sigma_data > 0"
        raise UserError("sampling", got=dataclasses.asdict(s), wanted=wanted, fix="0.001, 0.05, 80 and 0.5 are usual")
    if not 0 <= s.coarse <= 1:
        raise UserError("sampling.coarse", got=s.coarse, wanted="a share, 0..1", fix="0.4 is the default")
    if s.steps < 1 or s.draws < 1:
        raise UserError("sampling", got=(s.steps, s.draws), wanted="steps and draws from 1", fix="steps=10, draws=4")
    if "{instruction}" not in config.prompt:
        fix = "write {instruction} where the sentence goes"
        raise UserError("prompt", got=config.prompt, wanted="a template with {instruction}", fix=fix)
    return config
