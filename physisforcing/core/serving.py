"""What a server's process needs whatever it serves: an output of its own, an end by signal, an end with its parent."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import IO


@contextlib.contextmanager
def stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and SIGINT call ``stop`` while active. Only in the main thread."""
    before = {number: signal.signal(number, lambda *_: stop()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def own_output() -> IO[str]:
    """Standard output for our lines alone: what libraries print goes to standard error from now on."""
    ours = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stdout.flush()
    os.dup2(2, 1)
    return ours


def stopped_with_parent(handle: int, stop: Callable[[], None]) -> None:
    """Call ``stop`` once nothing can come through ``handle`` any more, which the parent process holds open as a lifeline."""
    threading.Thread(target=_until_closed, args=(handle, stop), daemon=True, name="lifeline").start()


def _until_closed(handle: int, then: Callable[[], None]) -> None:
    """Unbuffered, because a thread that waits inside a buffered reader keeps the interpreter from ending."""
    while os.read(handle, 4096):
        pass
    then()
