"""What a policy is trained on: windows of demonstrations with normalised actions, and what of them lies past the end of the episode."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from physisforcing.core.errors import UserError
from physisforcing.worldmodel.data.batches import WindowBank, WindowSampler
from physisforcing.worldmodel.data.canvas import canvas_layout
from physisforcing.worldmodel.data.latent_bank import WAN_TOKENS, EpochSampler, LatentBank
from physisforcing.worldmodel.data.windows import Episode

from .checkpoint import PolicyInfo
from .normalization import ActionStatistics
from .recordings import Recordings

#: Pixel frames of a latent frame behind the first.
FRAMES_PER_LATENT = 4
#: What a policy's folder calls the text encoder of a Wan pipeline.
UMT5 = "umt5-xxl"


def episode_statistics(episodes: Sequence[Episode], kind: str) -> ActionStatistics:
    """Of the states and actions of training episodes."""
    none = torch.empty(0, dtype=torch.int64)
    made = Recordings(episode_W=none, start_W=none, stride=1, span=0)
    for episode in episodes:
        made.add(f"{episode.root} episode {episode.index}".strip(), episode.states_TA, episode.actions_TA)
    return made.statistics(kind)


def latent_banks(
    training: LatentBank,
    heldout: LatentBank | None,
    kind: str,
    chunk: int,
    stored: ActionStatistics | None = None,
    look: Callable[[Recordings, ActionStatistics], object] = lambda _recordings, _statistics: None,
) -> tuple[PolicyBank, PolicyBank | None]:
    """Windows of a large backbone with their actions. Statistics are those of the training windows' episodes, or ``stored``, those of a
    policy that is trained further; ``look`` is shown them and what they are of. ``UserError`` for latents of another picture than the policy will see; ``DatasetError`` and ``UserError`` as
    ``Recordings.of_latents`` and ``PolicyBank.of_recordings``."""
    _check_canvas(training)
    recordings = Recordings.of_latents(training)
    statistics = stored if stored is not None else recordings.statistics(kind)
    look(recordings, statistics)
    made = PolicyBank.of_recordings(training, recordings, statistics, chunk)
    if heldout is None:
        return made, None
    return made, PolicyBank.of_recordings(heldout, Recordings.of_latents(heldout, recordings), statistics, chunk)


@dataclass(slots=True, kw_only=True)
class PolicyBank:
    """Windows of a world model's ``bank`` with their actions, states and masks. These lie where the bank's latents do: of a small model on its
    device, of a large one on the CPU.

    ``actions_MA``, ``states_MA``: of all episodes, one behind the other, float32, normalised by ``statistics``. Of each window: ``action_W``, ``state_W``: the
    rows of its first action and state; ``last_W``: that of its episode's last action; ``remaining_W``: recorded steps from its first to its
    episode's last; int64. ``stride``, ``time``: as in ``Recordings``.
    """

    bank: WindowBank | LatentBank
    statistics: ActionStatistics
    chunk: int
    actions_MA: Tensor
    states_MA: Tensor
    action_W: Tensor
    state_W: Tensor
    last_W: Tensor
    remaining_W: Tensor
    stride: int
    time: int
    hz: float | None = None

    @classmethod
    def of(cls, bank: WindowBank, episodes: Sequence[Episode], statistics: ActionStatistics, chunk: int) -> PolicyBank:
        """Of a small model. ``UserError`` and ``DatasetError`` as ``of_recordings``."""
        return cls.of_recordings(bank, Recordings.of_windows(bank, episodes), statistics, chunk)

    @classmethod
    def of_recordings(
        cls, bank: WindowBank | LatentBank, recordings: Recordings, statistics: ActionStatistics, chunk: int
    ) -> PolicyBank:
        """``UserError`` for a chunk that is longer than a window, and for episodes of another robot than the statistics."""
        if not 1 <= chunk <= recordings.span:
            wanted, fix = f"1 to {recordings.span}: what a window shows", f"policy.chunk={recordings.span}"
            raise UserError("policy.chunk", got=chunk, wanted=wanted, fix=fix)
        for name, rows, scale in (
            ("observation.state", recordings.states_E, statistics.state),
            ("action", recordings.actions_E, statistics.action),
        ):
            if rows[0].shape[1] != scale.width:
                got, fix = f"{rows[0].shape[1]} numbers", "data of the robot that the statistics are of"
                raise UserError(name, got=got, wanted=f"{scale.width}", fix=fix)
        episode, start = recordings.episode_W, recordings.start_W
        device = torch.device("cpu") if isinstance(bank, LatentBank) else bank.device
        first_states, lengths = _places(recordings.states_E)
        first_actions, counts = _places(recordings.actions_E)
        return cls(
            bank=bank, statistics=statistics, chunk=chunk, stride=recordings.stride, time=recordings.time, hz=recordings.hz,
            actions_MA=statistics.action.normalise(torch.from_numpy(np.concatenate(recordings.actions_E))).to(device),
            states_MA=statistics.state.normalise(torch.from_numpy(np.concatenate(recordings.states_E))).to(device),
            action_W=(first_actions[episode] + start).to(device),
            state_W=(first_states[episode] + start).to(device),
            last_W=(first_actions + counts - 1)[episode].to(device),
            remaining_W=(lengths[episode] - 1 - start).to(device),
        )  # fmt: skip

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
        """Tokens that the blocks read beside the pictures': a sentence's and those of the state."""
        return self.bank.text_tokens + isinstance(self.bank, LatentBank)

    @property
    def fingerprint(self) -> str | None:
        """Of the windows of a large backbone; None of a small model's, which their settings tell."""
        return self.bank.fingerprint if isinstance(self.bank, LatentBank) else None

    def name(self, row: int) -> str:
        """See ``WindowBank``; as the methods below."""
        return self.bank.name(row)

    def sampler(self, start_fraction: float, end_fraction: float) -> WindowSampler | EpochSampler:
        return self.bank.sampler(start_fraction, end_fraction)

    def latent_shape(self, rows_B: Tensor) -> tuple[int, ...]:
        return self.bank.latent_shape(rows_B)

    def alike(self, *, physics: bool = True) -> Tensor:
        return self.bank.alike(physics=physics)

    def physics_rows(self) -> Tensor:
        return self.bank.physics_rows()

    def expect(self, rows_B: Tensor) -> None:
        self.bank.expect(rows_B)

    def close(self) -> None:
        """End the threads that read latents."""
        if isinstance(self.bank, LatentBank):
            self.bank.close()

    def batch(self, rows_B: Tensor) -> dict[str, Any]:
        """``latents_BCFhw``, ``text`` [B,L,D], ``state_BA`` and ``actions_BPA`` (normalised), of a small model ``proprioception_BKA`` (raw, at its
        lags), ``action_valid_BP`` and ``frame_valid_BF`` (bool), and ``targets`` of window rows, on the device.

        An action is valid where its episode has it; a latent frame unless all its pixel frames lie past the end.
        """
        here = self.state_W.device
        if not isinstance(self.bank, LatentBank):  # which asks its readers on the CPU
            rows_B = _sent(rows_B, here)
        found = self.bank.batch(rows_B)
        steps, shown = _steps(self.chunk, found["latents_BCFhw"].shape[2], self.time, self.stride, here)
        place_BP = torch.minimum(self.action_W[rows_B, None] + steps, self.last_W[rows_B, None])
        remaining_B1 = self.remaining_W[rows_B, None]
        mine = {
            "state_BA": self.states_MA[self.state_W[rows_B]],
            "actions_BPA": self.actions_MA[place_BP],
            "action_valid_BP": steps < remaining_B1,
            "frame_valid_BF": shown <= remaining_B1,
        }
        made: dict[str, Any] = {name: _sent(value, self.device) for name, value in mine.items()}
        if "proprioception_BKA" in found:
            made["proprioception_BKA"] = found["proprioception_BKA"]
        # as a policy that acts is given them, whatever they are stored in
        text = found["text"].float() if "text" in found else found["text_BLD"]
        return made | {"latents_BCFhw": found["latents_BCFhw"], "text": text, "targets": found["targets"]}


def large_info(config: Any, bank: PolicyBank, source: dict[str, Any]) -> PolicyInfo:
    """What belongs to a policy on a large backbone beside its weights: what its windows show, and which autoencoder and text encoder read them.
    ``config``: of its training."""
    assert isinstance(bank.bank, LatentBank) and bank.hz is not None
    info, (_, window) = bank.bank.info, bank.bank.windows[0]
    layout = canvas_layout(info.canvas)
    text = {"encoder": UMT5, "tokens": bank.bank.sentence_tokens, "padded": WAN_TOKENS, "fingerprint": info.text}
    return PolicyInfo(
        canvas=info.canvas,
        size=(layout.height, layout.width),
        frames=1 + (window.shape[1] - 1) * bank.time,
        frame_stride=bank.stride,
        text=text,
        latents=info.latents,
        autoencoder=Path(config.model).name,
        control_hz=bank.hz,
        source=source,
        tasks=tuple(config.data.tasks),
    )


def _check_canvas(bank: LatentBank) -> None:
    """``UserError`` unless the windows show a whole canvas, as the policy does when it acts."""
    info = bank.info
    fix = "physis data latents canvas=robotwin buckets=[9x384x320], or canvas=libero buckets=[9x224x448]"
    if not info.canvas:
        raise UserError("data.latents", got="pictures of one camera", wanted="a canvas", fix=fix)
    layout = canvas_layout(info.canvas)
    for high, wide in sorted({window.shape[2:] for _, window in bank.windows}):
        size = high * info.stride[1], wide * info.stride[2]
        if size != (layout.height, layout.width):
            wanted = f"{layout.height}x{layout.width}, as canvas={info.canvas} has"
            raise UserError("data.latents", got=f"pictures of {size[0]}x{size[1]}", wanted=wanted, fix=fix)


@functools.lru_cache(maxsize=32)
def _steps(chunk: int, frames: int, time: int, stride: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """-> (numbers of a chunk's actions [P], control steps from a window's first to the first picture of each latent frame [F])."""
    shown = ((torch.arange(frames, device=device) - 1) * time + 1).clamp(min=0) * stride
    return torch.arange(chunk, device=device), shown


def _sent(value: Tensor, device: torch.device) -> Tensor:
    """On the device; the copy does not hold up the host."""
    if device.type == "cuda" and value.device.type == "cpu":
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


def _places(episodes: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """-> (row of each episode's first in all of them one behind the other, rows of each), int64 [E]."""
    counts = torch.tensor([len(rows) for rows in episodes])
    return counts.cumsum(0) - counts, counts
