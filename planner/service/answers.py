"""What the service remembers of requests, so that a retry gets the same answer and another payload under the same id is refused."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from .faults import ServiceFault


@dataclass(slots=True, eq=False)
class Entry:
    """``future`` becomes the answer's bytes. ``done``: when, None while it is computed. ``size``: bytes, 0 once they were dropped."""

    request_id: str
    digest: bytes
    future: Future[bytes] = field(default_factory=Future)
    done: float | None = None
    size: int = 0


class AnswerStore:
    """Answers by request id; bounded in number, bytes and time, in memory only. Safe in threads.

    The same id with the same payload: the stored answer, or that of the request under way. With another payload: ``ServiceFault``
    ``REQUEST_ID_CONFLICT``. Requests that failed are forgotten, so that a retry computes again. Where space is short the oldest
    answer's bytes go first; its id stays bound to its payload, and a retry is computed again, which gives the same pixels.
    """

    def __init__(self, *, bytes_: int, ttl_s: float, ids: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._bytes, self._ttl_s, self._ids, self._clock = bytes_, ttl_s, ids, clock
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._lock = threading.Lock()
        self.stored_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def claim(self, request_id: str, digest: bytes) -> tuple[Entry, Future[bytes], bool]:
        """-> (entry, its future, whether the caller has to compute it and to call ``finish`` or ``fail``)."""
        with self._lock:
            self._expire()
            entry = self._entries.get(request_id)
            if entry is not None and entry.digest != digest:
                raise ServiceFault(
                    "REQUEST_ID_CONFLICT",
                    "request_id: another payload came under this id; send a new UUID with a new payload",
                    request_id=request_id,
                )
            if entry is not None and (entry.done is None or entry.size):
                return entry, entry.future, False
            entry = Entry(request_id, digest)
            self._entries[request_id] = entry
            self._entries.move_to_end(request_id)
            self._shrink()
            return entry, entry.future, True

    def finish(self, entry: Entry, answer: bytes) -> None:
        """The answer of a claimed entry; those who wait get it."""
        with self._lock:
            entry.done, entry.size = self._clock(), len(answer)
            self.stored_bytes += entry.size
            entry.future.set_result(answer)
            self._shrink()

    def fail(self, entry: Entry, error: BaseException) -> None:
        """Forget a claimed entry; those who wait get the error."""
        with self._lock:
            if self._entries.get(entry.request_id) is entry:
                del self._entries[entry.request_id]
            entry.future.set_exception(error)

    def _expire(self) -> None:
        now = self._clock()
        for entry in [e for e in self._entries.values() if e.done is not None and now - e.done > self._ttl_s]:
            self._forget(entry)

    def _shrink(self) -> None:
        finished = [entry for entry in self._entries.values() if entry.done is not None]
        for entry in finished[: max(0, len(self._entries) - self._ids)]:
            self._forget(entry)
        for entry in finished:
            if self.stored_bytes <= self._bytes:
                return
            self._drop(entry)

    def _forget(self, entry: Entry) -> None:
        self._drop(entry)
        self._entries.pop(entry.request_id, None)

    def _drop(self, entry: Entry) -> None:
        self.stored_bytes -= entry.size
        entry.size, entry.future = 0, Future()
