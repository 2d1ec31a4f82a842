"""The service behind the routes: loads a world model, admits requests up to its capacity, answers each once, and ends cleanly.

Nothing here writes a file. A request has one thread of its own while it is checked, computed and encoded; a thread cannot be
stopped, so its place stays taken until it has really ended, also when its client has left or its deadline has passed. What it
computed is kept for a retry.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

from physisforcing.core.connection import is_loopback
from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.protocols import WorldModel
from physisforcing.core.types import WorldModelSpec

from ..batching import Batcher, BusyError, ClosedError
from .answers import AnswerStore
from .faults import ServiceFault
from .limits import ByteBudget, ServiceLimits
from .offers import Offer, capabilities_of, model_version, offers_of
from .schema import API_VERSION
from .translate import Prepared, answer, prepare

T = TypeVar("T")
LOG = logging.getLogger("physisforcing.service")


class WorldModelService:
    """``load``: makes the model, in a thread of its own after ``start``. ``token``: what clients must send; without one only this
    machine's names are answered. ``batch``, ``pad``: samples computed together (None: what the spec says), and
    whether always exactly so many (see ``Batcher``). ``joints``: numbers in a row of proprioception where no action spec says
    it. ``on_failure``: called when the model cannot be loaded.
    """

    def __init__(
        self,
        load: Callable[[], WorldModel],
        limits: ServiceLimits | None = None,
        *,
        token: str = "",
        batch: int | None = None,
        pad: bool = False,
        joints: int = 14,
        on_failure: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.limits = replace(limits or ServiceLimits())
        self.limits.check()
        self._load, self._token, self._batch, self._joints = load, token, batch, joints
        self._pad, self._on_failure = pad, on_failure
        self.budget = ByteBudget(self.limits.buffered_bytes)
        self.answers = AnswerStore(
            bytes_=self.limits.answer_bytes, ttl_s=self.limits.answer_ttl_s, ids=self.limits.request_ids
        )
        self.loaded = threading.Event()
        self.failure: BaseException | None = None
        self._batcher: Batcher | None = None
        self._offers: dict[str, Offer] = {}
        self._manifest = b""
        self._closing = False
        self._lock = threading.Lock()
        self._admitted = self._late = 0
        self._usual_s = 1.0

    # ------------------------------------------------------------------ beginning and end

    def start(self) -> None:
        """Load the model in the background; ``loaded`` is set when that is over, one way or the other."""
        threading.Thread(target=self._load_model, daemon=True, name="load").start()

    def _load_model(self) -> None:
        try:
            model = self._load()
            spec, limits = model.spec, self.limits
            limits.max_batch_size = min(limits.max_batch_size, spec.max_batch)
            self._offers = offers_of(spec, self._joints)
            manifest = capabilities_of(spec, self._offers, limits)
            self._manifest = manifest.model_dump_json().encode()
            self._batcher = Batcher(model, max_batch=self._batch, pad=self._pad, max_waiting=limits.max_concurrency)
        except BaseException as error:  # whatever it is: whoever waits for the model must hear of it
            self.failure = error
            if self._on_failure is not None:
                self._on_failure(error)
        finally:
            self.loaded.set()

    def close(self) -> None:
        """Refuse what comes; the rollout under way may take ``limits.grace_s`` to end, then nobody waits for it any more."""
        self._closing = True
        if self._batcher is not None:
            self._batcher.close(self.limits.grace_s)

    @property
    def spec(self) -> WorldModelSpec:
        """Of the loaded model; ``NOT_READY`` before."""
        return self._ready().spec

    def _ready(self) -> Batcher:
        if self._closing:
            raise ServiceFault("NOT_READY", "the service is going down", retry_after_s=5)
        if self.failure is not None:
            raise ServiceFault("INTERNAL", "the model could not be loaded")
        if self._batcher is None:
            raise ServiceFault("NOT_READY", "the model is being loaded", retry_after_s=5)
        return self._batcher

    # ------------------------------------------------------------------ answers

    def authorize(self, authorization: str | None, host: str | None) -> None:
        """``UNAUTHENTICATED`` without the token; ``PERMISSION_DENIED`` for a name that is not this machine's where there is none."""
        if self._token:
            given = (authorization or "").encode("utf-8", "replace")
            if not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
                raise ServiceFault("UNAUTHENTICATED", "send the header Authorization: Bearer <token>")
            return
        name = (
            (host or "localhost").strip().lower()
        )  # another one is a web page that found its way here (DNS rebinding)
        name = name[1:].split("]")[0] if name.startswith("[") else name.split(":")[0]
        if not is_loopback(name):
            raise ServiceFault("PERMISSION_DENIED", "a service without a token answers to localhost only")

    def health(self) -> dict[str, Any]:
        """``starting``, ``ready``, or ``degraded`` while a request that missed its deadline still occupies the model."""
        if self.failure is not None:
            raise ServiceFault("INTERNAL", "the model could not be loaded")
        ready = self._batcher is not None and not self._closing
        status = ("degraded" if self._late else "ready") if ready else "starting"
        version = model_version(self._batcher.spec) if self._batcher is not None else None
        return {"status": status, "api_version": API_VERSION, "model_version": version}

    def manifest(self) -> bytes:
        """The capability manifest as JSON."""
        self._ready()
        return self._manifest

    async def predict(self, body: bytes) -> bytes:
        """The answer to a request's body, or a ``ServiceFault``. Never waits longer than ``limits.deadline_s``."""
        self._ready()
        deadline = time.monotonic() + self.limits.deadline_s
        entry = _Progress()
        self._admit()
        job = _in_thread(lambda: self._answer(body, entry), self._release)
        try:
            done = await _until(job, deadline)
            return done if isinstance(done, bytes) else await _until(done, deadline)
        except TimeoutError:
            if not job.done():
                self._is_late(job)
            message = (
                f"no answer within {self.limits.deadline_s:g} s; a retry with this request_id gets it when it is there"
            )
            raise ServiceFault("DEADLINE_EXCEEDED", message, request_id=entry.request_id, retry_after_s=5) from None

    def _answer(self, body: bytes, progress: _Progress) -> bytes | Future[bytes]:
        """In a request's own thread: the answer, or the future of the same request that is under way or was answered."""
        batcher = self._ready()
        prepared = prepare(body, batcher.spec, self._offers, self.limits)
        progress.request_id = prepared.request_id
        entry, future, mine = self.answers.claim(prepared.request_id, prepared.digest)
        if not mine:
            return future
        try:
            made = self._imagine(batcher, prepared)
        except BaseException as error:
            self.answers.fail(entry, error)
            raise
        self.answers.finish(entry, made)
        return made

    def _imagine(self, batcher: Batcher, prepared: Prepared) -> bytes:
        begun, request_id = time.monotonic(), prepared.request_id
        try:
            made = answer(prepared, batcher.rollout(prepared.rollout), batcher.spec)
        except BusyError:
            raise self._overloaded(request_id) from None
        except ClosedError:
            raise ServiceFault(
                "NOT_READY", "the service is going down", request_id=request_id, retry_after_s=5
            ) from None
        except MissingCapabilityError as error:
            message = f"the model does not offer {error.field}"
            raise ServiceFault("MISSING_CAPABILITY", message, request_id=request_id, needs=error.field) from None
        except UserError as error:  # its text may name files of this machine
            LOG.warning("request %s refused by the model: %s", request_id, error)
            message = f"the model refused the request: {error.field}"
            raise ServiceFault("INVALID_ARGUMENT", message, request_id=request_id) from None
        except BaseException:  # also SystemExit: a model that gives up is no reason for an answer without a typed body
            LOG.exception("request %s failed", request_id)
            raise ServiceFault("INTERNAL", "the model failed", request_id=request_id) from None
        self._usual_s = 0.8 * self._usual_s + 0.2 * (time.monotonic() - begun)
        return made

    # ------------------------------------------------------------------ capacity

    def _admit(self) -> None:
        with self._lock:
            if self._admitted >= self.limits.max_concurrency:
                raise self._overloaded(None)
            self._admitted += 1

    def _release(self) -> None:
        with self._lock:
            self._admitted -= 1

    def _overloaded(self, request_id: str | None) -> ServiceFault:
        message = f"{self.limits.max_concurrency} requests are being answered, which is the most at a time"
        wait = max(1, min(60, math.ceil(self._usual_s)))
        return ServiceFault("OVERLOADED", message, request_id=request_id, retry_after_s=wait)

    def _is_late(self, job: Future[Any]) -> None:
        with self._lock:
            self._late += 1

        def ended(_: Future[Any]) -> None:
            with self._lock:
                self._late -= 1

        job.add_done_callback(ended)


class _Progress:
    """What is known of a request so far, for the error of one that ran out of time."""

    request_id: str | None = None


def _in_thread(work: Callable[[], T], then: Callable[[], None]) -> Future[T]:
    """``work`` in a thread that does not keep the process alive; ``then`` is called when it has ended, before the result is there."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            then()
            future.set_exception(error)
        else:
            then()
            future.set_result(result)

    try:
        threading.Thread(target=run, daemon=True, name="request").start()
    except RuntimeError:  # the machine gives no more threads
        then()
        raise ServiceFault("OVERLOADED", "no thread is free", retry_after_s=1) from None
    return future


async def _until(future: Future[T], deadline: float) -> T:
    """The result, or ``TimeoutError``; the work goes on. Whoever stops waiting leaves no trace."""
    waiter = asyncio.wrap_future(future)
    waiter.add_done_callback(lambda done: done.cancelled() or done.exception())
    done, _ = await asyncio.wait({waiter}, timeout=max(0.0, deadline - time.monotonic()))
    if not done:
        raise TimeoutError
    return waiter.result()
