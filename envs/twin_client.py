"""The asking side of a twin (``twin.py``): starts its process when it is first needed, and notices when it is lost."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .machine import few_threads
from .processes import Died, EnvProcess
from .robotwin.fork import SimulatorState
from .tries import Order, Try
from .twin import Met, twin_process


class TwinLostError(RuntimeError):
    """The twin's process died or hung. The next question starts another one."""


class TwinClient:
    """A twin for episodes of ``RoboTwinEnv(task, **options)`` that draws the cameras ``views``. ``timeout_s``: how long an answer may take.

    Every question raises ``TwinLostError`` when the process dies, and besides what the question of the same name in ``twin.Twin`` raises.
    """

    def __init__(
        self, task: str, options: dict[str, Any], *, views: tuple[str, ...] = ("head",), timeout_s: float = 600.0
    ) -> None:
        self.task, self.options, self.views, self.timeout_s = task, dict(options), tuple(views), timeout_s
        self._process: EnvProcess | None = None

    def meet(self, state: SimulatorState) -> Met:
        """Be at this moment of a live episode."""
        return self._ask("meet", state)

    def imagine(self, order: Order) -> Try:
        """What follows from the moment met last."""
        return self._ask("imagine", order)

    def redraw(
        self,
        seed: int,
        scene_hash: str,
        ids_K: NDArray[np.uint16],
        poses_TK7: NDArray[np.float32],
        *,
        hide_objects: bool,
        shrink: int,
    ) -> NDArray[np.uint8]:
        """Pictures [V,T,H,W,3] of the scene of ``seed`` with the bodies ``ids_K`` at these poses."""
        return self._ask("redraw", seed, scene_hash, ids_K, poses_TK7, hide_objects, shrink)

    @property
    def pid(self) -> int | None:
        """The process, where one runs."""
        return None if self._process is None else self._process.pid

    def close(self) -> None:
        """End the process. Another question starts a new one."""
        process, self._process = self._process, None
        if process is not None:
            process.end()

    def _ask(self, question: str, *arguments: Any) -> Any:
        try:
            if self._process is None:
                with few_threads(1):
                    self._process = twin_process(self.task, self.options, self.views)
                self._process.answer(self.timeout_s)
            self._process.ask(question, *arguments)
            return self._process.answer(self.timeout_s)
        except Died as death:
            self.close()
            raise TwinLostError(f"the simulator's twin is lost: {death}") from death
