"""What happens to an update whose loss or gradient is not finite: ``run.nonfinite`` is ``stop`` or ``skip``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from physisforcing.core.errors import UserError

POLICIES = ("stop", "skip")


def check_policy(policy: str) -> None:
    """``UserError`` for a ``run.nonfinite`` that is not in ``POLICIES``."""
    if policy not in POLICIES:
        raise UserError("run.nonfinite", got=policy, wanted="stop or skip", fix="run.nonfinite=stop")


class FiniteGuard:
    """``admits`` is asked between the backward pass and the optimiser, ``check`` before anything is logged or saved.

    ``stop``: every update is admitted, and ``check`` raises for the first one that was not finite. So nothing waits for a GPU, and
    what is on disk is from before. ``skip``: waits for the device at every step; an update that is not admitted must leave weights,
    optimiser and average as they are. ``clips(step)``: what the batch of a step was made of, for messages.
    """

    def __init__(self, policy: str, clips: Callable[[int], list[str]]) -> None:
        check_policy(policy)
        self.policy, self.clips = policy, clips
        #: Updates that were left out since the run began; and the one left out last, until ``take_skipped``.
        self.skipped = 0
        self._new: int | None = None
        self._pending: list[tuple[int, Tensor, Tensor]] = []

    def admits(self, step: int, loss: Tensor, norm: Tensor) -> bool:
        """Whether the update is to be made. ``loss`` and ``norm``: scalars, the same in every process."""
        if self.policy == "stop":
            self._pending.append((step, loss.detach(), norm.detach()))
            return True
        if bool(torch.isfinite(loss.detach()) & torch.isfinite(norm)):
            return True
        self.skipped += 1
        self._new = step
        return False

    def check(self) -> None:
        """Raise ``FloatingPointError`` that names the first update since the last call whose loss or gradient was not finite."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        values = torch.stack([value.float() for _, *both in pending for value in both])
        finite = values.isfinite().view(-1, 2).all(1).tolist()
        for (step, *_), good in zip(pending, finite, strict=True):
            if not good:
                clips = ", ".join(self.clips(step))
                raise FloatingPointError(
                    f"step {step}: a loss is not finite, or its gradient. The batch: {clips}. Nothing was saved after it; "
                    "run.nonfinite=skip leaves such updates out"
                )

    def take_skipped(self) -> dict[str, object] | None:
        """What the log says of an update that was just left out, once; None where none was."""
        step, self._new = self._new, None
        return None if step is None else {"step": step + 1, "skipped": self.skipped, "clips": self.clips(step)}
