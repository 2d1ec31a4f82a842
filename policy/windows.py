"""What a policy is trained on: windows of demonstrations with normalised actions, and what of them lies past the end of the episode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from physisforcing.core.errors import UserError
from physisforcing.worldmodel.data.batches import WindowBank, WindowSampler
from physisforcing.worldmodel.data.windows import FRAME_STRIDE, WINDOW_STEPS, Episode

from .normalization import ActionStatistics

#: Pixel frames of a latent frame behind the first.
FRAMES_PER_LATENT = 4


def episode_statistics(episodes: Sequence[Episode], kind: str) -> ActionStatistics:
    """Of the states and actions of training episodes: the action of step t is the state of step t + 1."""
    states = [episode.states_TA for episode in episodes]
    moved = [rows[1:] for rows in states if len(rows) > 1]
    return ActionStatistics.of(moved, states, kind, episodes=len(states))


@dataclass(slots=True, kw_only=True)
class PolicyBank:
    """A ``WindowBank`` as the policy's trainer reads it. ``length_E``: control steps of each episode, on the bank's device."""

    bank: WindowBank
    length_E: Tensor
    statistics: ActionStatistics
    chunk: int

    @classmethod
    def of(cls, bank: WindowBank, episodes: Sequence[Episode], statistics: ActionStatistics, chunk: int) -> PolicyBank:
        """``UserError`` for a chunk that is longer than a window, and for episodes of another robot."""
        if not 1 <= chunk <= WINDOW_STEPS:
            raise UserError(
                "policy.chunk",
                got=chunk,
                wanted=f"1 to {WINDOW_STEPS}: what a window shows",
                fix=f"policy.chunk={WINDOW_STEPS}",
            )
        width = episodes[0].states_TA.shape[1]
        if width != statistics.state.width:
            fix = "data.roots of one robot"
            raise UserError("observation.state", got=f"{width} numbers", wanted=f"{statistics.state.width}", fix=fix)
        lengths = torch.tensor([episode.length for episode in episodes], device=bank.device)
        return cls(bank=bank, length_E=lengths, statistics=statistics, chunk=chunk)

    def __len__(self) -> int:
        return len(self.bank)

    @property
    def device(self) -> torch.device:
        return self.bank.device

    @property
    def targets(self) -> Any:
        """Physics targets of the windows, or None."""
        return self.bank.targets

    @property
    def text_tokens(self) -> int:
        return self.bank.text_tokens

    def name(self, row: int) -> str:
        """See ``WindowBank``; as the methods below."""
        return self.bank.name(row)

    def sampler(self, start_fraction: float, end_fraction: float) -> WindowSampler:
        return self.bank.sampler(start_fraction, end_fraction)

    def latent_shape(self, rows_B: Tensor) -> tuple[int, ...]:
        return self.bank.latent_shape(rows_B)

    def alike(self, *, physics: bool = True) -> Tensor:
        return self.bank.alike(physics=physics)

    def expect(self, rows_B: Tensor) -> None:
        self.bank.expect(rows_B)

    def batch(self, rows_B: Tensor) -> dict[str, Any]:
        """``latents_BCFhw``, ``text`` [B,L,D], ``proprioception_BKA`` (raw), ``state_BA`` and ``actions_BPA`` (normalised), ``action_valid_BP``
        and ``frame_valid_BF`` (bool), and ``targets`` of window rows, on the device.

        An action is valid where the episode has the state that it brings about; a latent frame unless all its pixel frames lie past the end.
        """
        found = self.bank.batch(rows_B)
        actions = found["actions_BPA"]
        assert actions is not None, "windows without actions"
        remaining_B = self._remaining(rows_B)
        steps = torch.arange(self.chunk, device=self.device) + 1
        frames = torch.arange(found["latents_BCFhw"].shape[2], device=self.device)
        shown = ((frames - 1) * FRAMES_PER_LATENT + 1).clamp(min=0) * FRAME_STRIDE
        return {
            "latents_BCFhw": found["latents_BCFhw"],
            "text": found["text_BLD"],
            "proprioception_BKA": found["proprioception_BKA"],
            "state_BA": self.statistics.state.normalise(found["proprioception_BKA"][:, 0]),
            "actions_BPA": self.statistics.action.normalise(actions[:, : self.chunk]),
            "action_valid_BP": steps <= remaining_B[:, None],
            "frame_valid_BF": shown <= remaining_B[:, None],
            "targets": found["targets"],
        }

    def _remaining(self, rows_B: Tensor) -> Tensor:
        """Control steps between a window's first step and the last of its episode, int64 [B]."""
        table, rows = self.bank.table, rows_B.cpu()
        return self.length_E[table.episode_W[rows].to(self.device)] - 1 - table.start_W[rows].to(self.device)
