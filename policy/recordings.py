"""States and actions of the episodes that a policy's windows were cut out of, whatever their latents are kept in.

An action is that of its row's column ``action``, ours also the next row's state (``docs/architecture.md``). The last row's belongs to no
recorded step: ours repeats its state there. So an episode of T rows has T - 1 actions, and what lies behind them repeats the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from physisforcing.core.errors import DatasetError, UserError
from physisforcing.core.types import RATE_TOLERANCE
from physisforcing.worldmodel.data.batches import WindowBank
from physisforcing.worldmodel.data.latent_bank import LatentBank
from physisforcing.worldmodel.data.windows import FRAME_STRIDE, WINDOW_STEPS, Episode

from .normalization import ActionStatistics


@dataclass(slots=True, kw_only=True)
class Recordings:
    """Of E episodes and the W windows cut out of them.

    ``names_E``: what messages call the episodes; ``states_E``, ``actions_E``: float32 [T,A] and [T-1,A] each; ``episode_W``, ``start_W``:
    int64, the row that a window's first picture shows. ``stride``: rows between two pictures; ``span``: rows that each window covers at
    least; ``time``: pictures of a latent frame behind the first. ``hz``: rows a second, None for the small models, which have one rate;
    ``rate_of``: the episode that it was read of.
    """

    names_E: list[str] = field(default_factory=list)
    states_E: list[NDArray[np.float32]] = field(default_factory=list)
    actions_E: list[NDArray[np.float32]] = field(default_factory=list)
    episode_W: Tensor
    start_W: Tensor
    stride: int
    span: int
    time: int = 4
    hz: float | None = None
    rate_of: str = ""

    @classmethod
    def of_windows(cls, bank: WindowBank, episodes: Sequence[Episode]) -> Recordings:
        """``episodes``: those of the bank's table. ``DatasetError`` as ``add``."""
        made = cls(
            episode_W=bank.table.episode_W, start_W=bank.table.start_W, stride=FRAME_STRIDE, span=WINDOW_STEPS
        )  # fmt: skip
        for episode in episodes:
            made.add(f"{episode.root} episode {episode.index}".strip(), episode.states_TA, episode.actions_TA)
        return made

    @classmethod
    def of_latents(cls, bank: LatentBank, like: Recordings | None = None) -> Recordings:
        """Each episode is read once. ``like``: of the training windows, whose rate held-out ones must have. ``DatasetError`` for an episode without
        actions, of other widths or of another rate than the first; ``UserError`` for latents that no policy reads."""
        info = bank.info
        if info.kind != "wan" or info.conditioned:
            got = "Cosmos3" if info.kind != "wan" else "a backbone with conditioning channels"
            wanted = "those of a Wan backbone that is shown its first latent frame, such as TI2V-5B"
            raise UserError("data.latents", got=f"latents of {got}", wanted=wanted, fix="make them with its model=")
        episode_W, firsts = _episodes(bank)
        frames = min(window.shape[1] for _, window in bank.windows)
        start_W = torch.tensor([window.start for _, window in bank.windows])
        made = cls(episode_W=episode_W, start_W=start_W, stride=1, span=0, time=info.stride[0])
        if like is not None:
            made.hz, made.stride, made.rate_of = like.hz, like.stride, like.rate_of
        for row in firsts:
            _, window = bank.windows[row]
            found = bank.recorded(row)
            made._check_rate(f"{window.source} episode {window.episode}", found.hz, info.fps)
            made.add(f"{window.source} episode {window.episode}", found.states_TA, found.actions_TA)
        made.span = (frames - 1) * made.time * made.stride
        return made

    def add(self, name: str, states_TA: NDArray[np.float32], actions_TA: NDArray[np.float32] | None) -> None:
        """One more episode. ``actions_TA``: None: the states of the next rows. ``DatasetError`` for widths that are not those of the first."""
        actions = states_TA[1:] if actions_TA is None else actions_TA[:-1]
        if not len(actions):  # one row: its action stands there, and counts nowhere
            actions = states_TA if actions_TA is None else actions_TA
        for column, values, known in (
            ("observation.state", states_TA, self.states_E),
            ("action", actions, self.actions_E),
        ):
            if known and values.shape[1] != known[0].shape[1]:
                wanted = f"{known[0].shape[1]}, as {self.names_E[0]} has"
                fix = "train on datasets of one robot"
                raise DatasetError(f"{column} of {name}", got=f"{values.shape[1]} numbers", wanted=wanted, fix=fix)
        self.names_E.append(name)
        self.states_E.append(states_TA)
        self.actions_E.append(actions)

    def _check_rate(self, name: str, hz: float, fps: float) -> None:
        """``hz``: rows a second of an episode; ``fps``: pictures a second of the windows."""
        if self.hz is None:
            self.hz, self.stride, self.rate_of = hz, max(1, round(hz / fps)), name
        if abs(hz - self.hz) > RATE_TOLERANCE * self.hz:
            fix = "train on datasets of one rate: a chunk has so many actions, not so many seconds"
            wanted = f"{self.hz:.4g}, as {self.rate_of} has"
            raise DatasetError(f"rate of {name}", got=f"{hz:.4g} rows a second", wanted=wanted, fix=fix)
        if abs(hz / self.stride - fps) > RATE_TOLERANCE * fps:
            wanted = f"a multiple of the {fps:.4g} pictures a second of its windows"
            fix = "physis data latents again"
            raise DatasetError(f"rate of {name}", got=f"{hz:.4g} rows a second", wanted=wanted, fix=fix)

    def statistics(self, kind: str) -> ActionStatistics:
        """Pooled over all rows of all episodes."""
        moved = [rows for rows, states in zip(self.actions_E, self.states_E, strict=True) if len(states) > 1]
        return ActionStatistics.of(moved, self.states_E, kind, episodes=len(self.states_E))

    def saturated(self, statistics: ActionStatistics) -> float:
        """The largest share of an episode's numbers, states or actions, that ``statistics`` clamp."""
        pairs = (statistics.state, self.states_E), (statistics.action, self.actions_E)
        return max(scale.saturated(torch.tensor(rows)) for scale, episodes in pairs for rows in episodes)


def _episodes(bank: LatentBank) -> tuple[Tensor, list[int]]:
    """-> (number of each window's episode, int64 [W]; row of the first window of each episode)."""
    numbers: dict[tuple[str, int, str], int] = {}
    firsts, places = [], []
    for row, (_, window) in enumerate(bank.windows):
        key = window.source, window.episode, window.content
        if key not in numbers:
            numbers[key] = len(firsts)
            firsts.append(row)
        places.append(numbers[key])
    return torch.tensor(places), firsts
