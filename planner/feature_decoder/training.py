"""Training of the feature decoder on a frozen world model: live or stored features, score matching, held-out errors.

Features are made of the first picture of each window with fresh noise in every step; or once, with a few noises a window, and kept in
memory (``stored``; one noise a window is what WorldArena's released code trains on). Windows are drawn at random; the averaged weights
are kept. Held-out errors are against the drive targets that the head is trained on, and against the joints as measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from physisforcing.core.errors import UserError, check_at_least
from physisforcing.core.types import FeatureRequest

from ..decoder_fit import Fit, FitConfig, Log
from ..decoder_windows import DecoderWindows
from ..frame_store import episode_counts, split_episodes
from ..idm_training import noisy_start, statistics
from ..inverse_dynamics import chunk_errors
from .config import FeatureDecoderConfig
from .decoder import FeatureInverseDynamics, chunk_of
from .goal import TextEncoder
from .sampling import training_sigmas


@dataclass(slots=True, kw_only=True)
class FeatureTrainConfig:
    """``stored``: windows whose features are made once (0: live features); ``noises``: of each of them. ``scale_floor``: smallest
    deviation by which a target is divided. ``state_noise``: as the pixel decoder's, where proprioception is read."""

    model: FeatureDecoderConfig = field(default_factory=FeatureDecoderConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    stored: int = 0
    noises: int = 1
    validation_share: float = 0.05
    validation_windows: int = 128
    start_share: float = 0.15
    scale_floor: float = 0.05
    state_noise: float = 0.03


@dataclass(slots=True, kw_only=True)
class FeatureBatch:
    """Features of B windows, instruction tokens with their mask, drive targets now, target rows (row 0: now)."""

    features_BKFhwD: Tensor
    goal: tuple[Tensor, Tensor]
    state_BA: Tensor
    rows_BRA: Tensor


class FeatureModel(Protocol):
    """A world model that is not trained with the decoder: ``decoder_windows.FrozenWorldModel``, ``offered_features.OfferedFeatures``."""

    windows: DecoderWindows

    @property
    def text(self) -> TextEncoder: ...

    def feature_shape(self, request: FeatureRequest) -> tuple[int, int, int, int]: ...

    def check_window(self, frames: int, steps_per_frame: int, *, field: str) -> None: ...

    def features(
        self, episode_B: Tensor, start_B: Tensor, request: FeatureRequest, generator: torch.Generator
    ) -> Tensor: ...


class FeatureSource(Protocol):
    def draw(self, count: int, generator: torch.Generator) -> FeatureBatch:
        """A random batch."""
        ...


class LiveFeatures:
    """Windows of ``allowed_E`` drawn at random, features made on the spot with fresh noise."""

    def __init__(
        self, frozen: FeatureModel, config: FeatureDecoderConfig, allowed_E: Tensor, start_share: float
    ) -> None:
        self.frozen, self.config, self.allowed_E, self.start_share = frozen, config, allowed_E, start_share

    def draw(self, count: int, generator: torch.Generator) -> FeatureBatch:
        places = self.frozen.windows.store.draw(
            count, allowed_E=self.allowed_E, start_share=self.start_share, generator=generator
        )
        return self.of(*places, generator)

    def of(self, episode_B: Tensor, start_B: Tensor, generator: torch.Generator) -> FeatureBatch:
        """The batch of given windows."""
        windows, request = self.frozen.windows, self.config.needs.features
        assert request is not None
        rows = windows.rows(episode_B, start_B)
        return FeatureBatch(
            features_BKFhwD=self.frozen.features(episode_B, start_B, request, generator),
            goal=windows.goal(episode_B),
            state_BA=rows[:, 0],
            rows_BRA=rows,
        )


class StoredFeatures:
    """``windows`` windows of a source, ``noises`` features each, made once. Kept in bfloat16 on a GPU, in float32 on a CPU."""

    def __init__(
        self, live: LiveFeatures, *, windows: int, noises: int, generator: torch.Generator, together: int = 32
    ) -> None:
        store = live.frozen.windows.store
        drawn = {"allowed_E": live.allowed_E, "start_share": live.start_share, "generator": generator}
        episode, start = store.draw(windows, **drawn)  # type: ignore[arg-type]
        parts = []
        for rows in torch.arange(windows, device=episode.device).repeat(noises).split(together):
            parts.append(live.of(episode[rows], start[rows], generator))
        kept = torch.bfloat16 if parts[0].features_BKFhwD.is_cuda else torch.float32
        self.features = torch.cat([part.features_BKFhwD.to(kept) for part in parts])
        self.goal = tuple(torch.cat([part.goal[place] for part in parts]) for place in range(2))
        self.rows = torch.cat([part.rows_BRA for part in parts])

    def draw(self, count: int, generator: torch.Generator) -> FeatureBatch:
        at = torch.randint(len(self.rows), (count,), generator=generator, device=generator.device).to(self.rows.device)
        rows = self.rows[at]
        goal = self.goal[0][at], self.goal[1][at]
        return FeatureBatch(features_BKFhwD=self.features[at].float(), goal=goal, state_BA=rows[:, 0], rows_BRA=rows)


def score_matching(
    model: FeatureInverseDynamics, batch: FeatureBatch, generator: torch.Generator, *, state_noise: float = 0.0
) -> dict[str, Tensor]:
    """The loss of one step, with levels and noise of ``generator``."""
    device = batch.rows_BRA.device
    sigma = training_sigmas(len(batch.rows_BRA), model.config.sampling, generator).to(device)
    noise = torch.randn(batch.rows_BRA.shape, generator=generator, device=generator.device).to(device)
    state = noisy_start(batch.state_BA, state_noise, generator) if model.config.proprioception else batch.state_BA
    return {"loss": model.loss(batch.features_BKFhwD, batch.goal, state, batch.rows_BRA, sigma, noise)}


def train_feature_decoder(
    config: FeatureTrainConfig,
    frozen: FeatureModel,
    *,
    folder: Path,
    resume: bool = False,
    log: Log = lambda row: None,
) -> tuple[FeatureInverseDynamics, dict[str, Any]]:
    """Train on the windows of ``frozen``. Returns the averaged weights and the held-out errors."""
    check_at_least(config, stored=0, noises=1, validation_windows=1)
    check_geometry(config.model, frozen)
    store = frozen.windows.store
    train_E, validation_E = split_episodes(store, share=config.validation_share)
    torch.manual_seed(config.fit.seed)
    model = FeatureInverseDynamics(config.model, frozen.text).to(store.first_E.device)
    model.set_statistics(*statistics(store, train_E, chunk=config.model.rows - 1, floor=config.scale_floor))
    source: FeatureSource = LiveFeatures(frozen, config.model, train_E, config.start_share)
    if config.stored:
        generator = torch.Generator(store.first_E.device).manual_seed(config.fit.seed + 1)
        assert isinstance(source, LiveFeatures)
        source = StoredFeatures(source, windows=config.stored, noises=config.noises, generator=generator)

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        batch = source.draw(config.fit.batch, generator)
        return score_matching(model, batch, generator, state_noise=config.state_noise)

    steps = Fit(model, loss, config.fit, folder=folder, resume=resume, settings=config).run(log)
    live = LiveFeatures(frozen, config.model, validation_E, 0.0)
    metrics = evaluate_features(model, live, windows=config.validation_windows, seed=config.fit.seed + 2)
    metrics |= {"steps": steps, "episodes": episode_counts(store, train_E, validation_E)}
    return model, metrics


@torch.no_grad()
def evaluate_features(
    model: FeatureInverseDynamics, live: LiveFeatures, *, windows: int, seed: int, together: int = 16
) -> dict[str, Any]:
    """Held-out errors (``chunk_errors``) at the start of every episode of ``live`` once and at ``windows`` random frames.

    ``model`` against drive targets, ``model_measured`` against measured joints; ``hold`` repeats the start joints; ``drive_measured``:
    the recorded drive targets themselves against measured joints, the least that can be reached. ``now_deg``: error of row 0;
    ``spread_deg``: mean spread; one number each beside the errors.
    """
    frozen, device = live.frozen, live.allowed_E.device
    generator = torch.Generator(device).manual_seed(seed)
    anywhere = frozen.windows.store.draw(windows, allowed_E=live.allowed_E, start_share=0.0, generator=generator)
    places = {"start": (live.allowed_E, torch.zeros_like(live.allowed_E)), "anywhere": anywhere}
    out: dict[str, Any] = {"windows": {place: len(episode) for place, (episode, _) in places.items()}}
    measures = frozen.windows.store.measured_NA is not None
    for place, (episode, start) in places.items():
        found, now, spread, drive = [], [], [], []
        for rows in torch.arange(len(episode), device=device).split(together):
            batch = live.of(episode[rows], start[rows], generator)
            noise = model.draw_noise(rows.tolist())
            draws = model.rows(batch.features_BKFhwD, batch.goal, batch.state_BA, noise).cpu().numpy()
            chunks = [chunk_of(entry) for entry in draws]
            found.append(np.stack([chunk.actions_PA for chunk in chunks]))
            spread += [float(chunk.spread_P.mean()) for chunk in chunks if chunk.spread_P is not None]
            now.append(draws[:, :, 0].mean(1))
            drive.append(batch.rows_BRA.cpu().numpy())
        made, wanted = np.concatenate(found), np.concatenate(drive)
        out[place] = {"model": chunk_errors(made, wanted[:, 1:])}
        hold = np.repeat(wanted[:, :1], wanted.shape[1] - 1, axis=1)
        out[place]["hold"] = chunk_errors(hold, wanted[:, 1:])
        if measures:
            joints = frozen.windows.rows(episode, start, measured=True).cpu().numpy()[:, 1:]
            out[place]["model_measured"] = chunk_errors(made, joints)
            out[place]["drive_measured"] = chunk_errors(wanted[:, 1:], joints)
        out.setdefault("now_deg", {})[place] = chunk_errors(np.concatenate(now)[:, None], wanted[:, :1])["joint_deg"]
        if spread:
            out.setdefault("spread_deg", {})[place] = float(np.degrees(np.mean(spread)))
    return out


def check_geometry(config: FeatureDecoderConfig, frozen: FeatureModel) -> None:
    """``UserError`` where the decoder's sizes or its time base are not those of the world model's features."""
    frozen.check_window(config.frames, config.steps_per_frame, field="feature.model")
    request = config.needs.features
    assert request is not None
    frames, rows, columns, width = frozen.feature_shape(request)
    found: dict[str, tuple[object, object]] = {
        "feature_dim": (config.feature_dim, width),
        "latent_frames": (config.latent_frames, frames),
        "grid": (tuple(config.grid), (rows, columns)),
        "goal_dim": (config.goal_dim, frozen.windows.goal_SLD.shape[2]),
        "action_dim": (config.action_dim, frozen.windows.store.states_NA.shape[1]),
    }
    for name, (got, wanted) in found.items():
        if got != wanted:
            fix = f"feature.model.{name}={list(wanted) if isinstance(wanted, tuple) else wanted}"
            raise UserError(f"feature.model.{name}", got=got, wanted=f"{wanted}, as the world model has", fix=fix)
