"""Training batches assembled on the device from resident tensors, and the sampler that decides what is drawn.

Draws depend on (seed, step) alone: resuming at a step needs no stored position, and the stream does not depend on how many
processes share it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from physisforcing.core.errors import UserError

from ..codec import VideoCodec
from ..physics.config import PhysicsConfig
from ..teachers.online import OnlineTeachers
from ..teachers.selection import TeachersConfig
from ..text import TextEmbedder
from .targets import resolve_recipe
from .window_targets import WindowTargets, load_window_targets
from .windows import Episode, FrameStore, WindowTable, lagged_states, window_actions

#: Windows count as near the end from so many control steps before their episode's last window up to so many before it. In an
#: ``expert+random`` episode at least 20 of the 32 targets of such a window are random, and the still end is not most of it.
END_STEPS = (56, 16)


@dataclass(slots=True, kw_only=True)
class WindowSampler:
    """Rows of a window table. ``start_fraction`` of the draws are windows at an episode's first step, each episode equally likely;
    ``end_fraction`` of them (decided last, so that fewer are at the start) are windows near the end (``END_STEPS``)."""

    first_W: Tensor
    end_W: Tensor
    count: int
    start_fraction: float
    end_fraction: float

    @classmethod
    def build(cls, table: WindowTable, start_fraction: float, end_fraction: float = 0.0) -> WindowSampler:
        last_E = torch.zeros(int(table.episode_W.max()) + 1, dtype=torch.int64)
        last_E.scatter_reduce_(0, table.episode_W, table.start_W, "amax")
        before_W = last_E[table.episode_W] - table.start_W
        near_W = (before_W <= END_STEPS[0]) & (before_W >= END_STEPS[1])
        if end_fraction and not near_W.any():
            fix = "data.end_fraction=0, or longer episodes"
            raise UserError("data.end_fraction", got="short episodes only", wanted="windows near an end", fix=fix)
        return cls(
            first_W=torch.nonzero(table.start_W == 0).flatten(),
            end_W=torch.nonzero(near_W).flatten(),
            count=len(table),
            start_fraction=start_fraction,
            end_fraction=end_fraction,
        )

    def rows(self, batch: int, seed: int, step: int) -> Tensor:
        """The rows of a training step, int64 [batch] on the CPU: a function of (seed, step)."""
        return self.draw(batch, step_generator(seed, step))

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """int64 [batch] window rows on the CPU."""
        anywhere = torch.randint(self.count, (batch,), generator=generator)
        first = self.first_W[torch.randint(len(self.first_W), (batch,), generator=generator)]
        rows = torch.where(torch.rand(batch, generator=generator) < self.start_fraction, first, anywhere)
        if not self.end_fraction:
            return rows
        end = self.end_W[torch.randint(len(self.end_W), (batch,), generator=generator)]
        return torch.where(torch.rand(batch, generator=generator) < self.end_fraction, end, rows)


def step_generator(seed: int, step: int, device: str | torch.device = "cpu") -> torch.Generator:
    """The generator of one training step: a function of (seed, step) only."""
    mixed = int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device=device).manual_seed(mixed)


class Targets(Protocol):
    """Physics targets of a window table."""

    @property
    def teacher_dim(self) -> int:
        """Width of the features that relations are made of; 0 where there are none."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """Who made them: name, version, licence and checksum of each teacher."""
        ...

    def available_rows(self) -> Tensor:
        """Rows of the windows that have targets, int64 on the CPU."""
        ...

    def batch(self, rows_B: Tensor) -> dict[str, Tensor]:
        """The ``targets`` dictionary of ``physics.forcing`` for rows of the table, on the training device."""
        ...


@dataclass(slots=True, kw_only=True)
class OnlineTargets:
    """Targets made by teachers that look at the pictures of each batch. ``episode_W``, ``start_W``: the window table, on the device of
    the pictures. ``grid``: (F, h, w) tokens."""

    store: FrameStore
    episode_W: Tensor
    start_W: Tensor
    teachers: OnlineTeachers
    grid: tuple[int, int, int]

    @property
    def teacher_dim(self) -> int:
        return self.teachers.channels

    @property
    def identity(self) -> dict[str, Any]:
        return self.teachers.identity

    def available_rows(self) -> Tensor:
        return torch.arange(len(self.start_W))

    def batch(self, rows_B: Tensor) -> dict[str, Tensor]:
        return self.teachers(self.store.windows(self.episode_W[rows_B], self.start_W[rows_B]), self.grid)


@dataclass(slots=True, kw_only=True)
class BankTargets:
    """Cached targets: ``row_W`` is a window's row in ``targets``, -1 where it has none.

    Targets are stored for every 8th step, so windows that start between have none and add nothing to the losses.
    """

    row_W: Tensor
    targets: WindowTargets
    identity: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        episodes: list[Episode],
        table: WindowTable,
        physics: PhysicsConfig,
        device: torch.device,
        *,
        teachers: TeachersConfig | None = None,
        cache: str | Path | None = None,
        workers: int,
    ) -> BankTargets:
        """Read the targets of the windows of ``episodes`` from ``cache`` (None: the folder ``targets`` of each dataset); what is
        missing is computed first and kept there."""
        roots = dict.fromkeys(episode.root for episode in episodes)
        folders = [Path(cache)] if cache else [Path(root) / "targets" for root in roots]
        recipe = resolve_recipe(teachers or TeachersConfig(), folders)
        chosen = torch.nonzero(table.start_W % recipe.start_stride == 0).flatten()
        windows = [
            (episodes[place].root, episodes[place].index, start)
            for place, start in zip(table.episode_W[chosen].tolist(), table.start_W[chosen].tolist(), strict=True)
        ]
        row = torch.full((len(table),), -1)
        row[chosen] = torch.arange(len(chosen))
        found = load_window_targets(
            windows, physics, recipe=recipe, teachers=teachers, cache=cache, device=device, workers=workers
        )
        identity = {kind: asdict(info) for kind, info in recipe.teachers.items()}
        return cls(row_W=row.to(device), targets=found, identity=identity)

    @property
    def teacher_dim(self) -> int:
        return self.targets.teacher_dim

    def available_rows(self) -> Tensor:
        return torch.nonzero(self.row_W >= 0).flatten().cpu()

    def batch(self, rows_B: Tensor) -> dict[str, Tensor]:
        row = self.row_W[rows_B]
        found, present = self.targets.batch(row.clamp(min=0)), row >= 0
        found["select_BN"] = found["select_BN"] & present[:, None]
        found["token_mask_BFhw"] = found["token_mask_BFhw"] & present[:, None, None, None]
        if "relation_valid_BK" in found:
            found["relation_valid_BK"] = found["relation_valid_BK"] & present[:, None]
        return found


@dataclass(slots=True, kw_only=True)
class WindowBank:
    """Everything a world-model batch needs, on the training device, one row a window.

    ``latents_WCFhw`` (``kept_dtype``), ``text_SLD`` with ``sentence_W``, ``proprioception_WKA``; ``targets``
    gives the physics targets of rows, or None where a run has no physics losses. ``actions_WPA``: drive targets of the window's
    control steps, which only an action model reads. ``names_E``: what an episode of the table is called in messages.
    """

    table: WindowTable
    latents_WCFhw: Tensor
    text_SLD: Tensor
    sentence_W: Tensor
    proprioception_WKA: Tensor
    targets: Targets | None = None
    actions_WPA: Tensor | None = None
    names_E: list[str] = field(default_factory=list)

    def name(self, row: int) -> str:
        """Dataset, episode and first control step of a window."""
        episode, start = int(self.table.episode_W[row]), int(self.table.start_W[row])
        known = self.names_E[episode] if self.names_E else f"episode {episode}"
        return f"{known} from step {start}"

    def physics_rows(self) -> Tensor:
        """Rows of the windows that have physics targets, on the CPU."""
        assert self.targets is not None
        return self.targets.available_rows()

    def __len__(self) -> int:
        return len(self.table)

    @property
    def device(self) -> torch.device:
        return self.latents_WCFhw.device

    @property
    def text_tokens(self) -> int:
        """Tokens that the blocks read beside the pictures': a sentence's and those of the joints."""
        return self.text_SLD.shape[1] + self.proprioception_WKA.shape[1]

    def latent_shape(self, rows_B: Tensor) -> tuple[int, ...]:
        """[B,C,F,h,w] of the latents of window rows."""
        return len(rows_B), *self.latents_WCFhw.shape[1:]

    def alike(self, *, physics: bool = True) -> Tensor:
        """Rows of windows with latents of one shape, with ``physics`` those that have targets, where any have: int64 on the CPU."""
        return self.physics_rows() if physics and self.targets is not None else torch.arange(len(self))

    def sampler(self, start_fraction: float, end_fraction: float) -> WindowSampler:
        """What draws the rows of the steps."""
        return WindowSampler.build(self.table, start_fraction, end_fraction)

    def expect(self, rows_B: Tensor) -> None:
        """Rows that ``batch`` will be asked for soon. They are here already."""

    def batch(self, rows_B: Tensor) -> dict[str, Any]:
        """``latents_BCFhw``, ``text_BLD``, ``proprioception_BKA``, ``actions_BPA`` (float32) and ``targets`` of window rows on the
        device. ``rows_B`` may be on the CPU."""
        if self.device.type == "cuda" and rows_B.device.type == "cpu":
            rows_B = rows_B.pin_memory()
        rows_B = rows_B.to(self.device, non_blocking=True)
        return {
            "latents_BCFhw": self.latents_WCFhw[rows_B].float(),
            "text_BLD": self.text_SLD[self.sentence_W[rows_B]],
            "proprioception_BKA": self.proprioception_WKA[rows_B],
            "actions_BPA": None if self.actions_WPA is None else self.actions_WPA[rows_B],
            "targets": None if self.targets is None else self.targets.batch(rows_B),
        }


def kept_dtype(device: torch.device) -> torch.dtype:
    """In which a bank's latents are computed and kept."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def bank_latents(codec: VideoCodec, frames_BTHWC: Tensor) -> Tensor:
    """Latents [B,C,F,h,w] as a bank keeps them, of pictures on the codec's device; also for whoever shows its model what it was trained on."""
    kept = kept_dtype(frames_BTHWC.device)
    with torch.autocast(frames_BTHWC.device.type, torch.bfloat16, enabled=kept == torch.bfloat16):
        return codec.encode(frames_BTHWC).to(kept)


def build_bank(
    store: FrameStore,
    table: WindowTable,
    codec: VideoCodec,
    lags: tuple[int, ...],
    *,
    text_cache: Path | None = None,
    chunk: int = 64,
) -> WindowBank:
    """Encode every window of ``table`` and gather its conditions (causal grouping makes latents depend on the start)."""
    device = store.frames_MHWC.device
    episode, start = table.episode_W.to(device), table.start_W.to(device)
    latents = []
    for first in range(0, len(table), chunk):
        part = slice(first, first + chunk)
        latents.append(bank_latents(codec, store.windows(episode[part], start[part])))
    sentences = sorted({item.instruction for item in store.episodes})
    number = {sentence: place for place, sentence in enumerate(sentences)}
    spoken = np.array([number[item.instruction] for item in store.episodes])
    places = list(zip(table.episode_W.tolist(), table.start_W.tolist(), strict=True))
    states = [store.episodes[place].states_TA for place, _ in places]
    proprioception = np.stack([lagged_states(s, step, lags) for s, (_, step) in zip(states, places, strict=True)])
    actions = np.stack([window_actions(s, step) for s, (_, step) in zip(states, places, strict=True)])
    return WindowBank(
        table=table,
        latents_WCFhw=torch.cat(latents),
        text_SLD=TextEmbedder(text_cache).batch(sentences)[0].to(device),
        sentence_W=torch.from_numpy(spoken)[table.episode_W].to(device),
        proprioception_WKA=torch.from_numpy(proprioception).to(device),
        names_E=[f"{item.root} episode {item.index}" for item in store.episodes],
        actions_WPA=torch.from_numpy(actions).to(device),
    )
