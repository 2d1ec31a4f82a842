"""A run that is told to end saves first: SIGTERM, and SIGINT once, end it after the update under way."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from physisforcing.core.errors import IncompleteCoverageError


class TrainingStopped(IncompleteCoverageError):
    """A run ended before its last update because it was told to. Everything up to ``checkpoint`` is kept (exit code 3)."""

    def __init__(self, told: str, done: int, steps: int, checkpoint: Path) -> None:
        self.told, self.done, self.steps, self.checkpoint = told, done, steps, checkpoint
        kept = f"{done} of {steps} updates are saved in {checkpoint}"
        super().__init__(f"the run was ended by {told}; {kept}; the same command with run.resume=true continues it")

    def __reduce__(self) -> tuple:
        return type(self), (self.told, self.done, self.steps, self.checkpoint)


class StopSignals:
    """While active SIGTERM and SIGINT are noted in ``told`` instead of ending the process; a second SIGINT interrupts at once.

    Does nothing outside the main thread, where Python takes no signals.
    """

    def __init__(self) -> None:
        self.told: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.told == "SIGINT":
            raise KeyboardInterrupt
        self.told = signal.Signals(number).name
