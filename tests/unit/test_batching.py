"""Requests of several threads in one rollout: who is merged with whom, equal answers, errors where they belong, a clean end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.gathering import Gatherer
from physisforcing.core.protocols import WorldModel
from physisforcing.core.types import Rollout, RolloutRequest, ViewLayout, WorldModelSpec
from physisforcing.planner.batching import Batcher, BusyError, ClosedError
from physisforcing.planner.requests import (
    as_asked,
    kind_of,
    merge,
    rollout_in_equal_parts,
    rollout_in_parts,
    singly,
    split,
)

H, W, HORIZON = 4, 6, 3


class Counting:
    """Test double: pictures are a function of (context, instruction, proprioception, action, seed) of each sample alone.

    ``gate``: rollouts wait for it. A seed of -1 raises, one of -2 ends the interpreter thread.
    """

    def __init__(self, max_batch: int = 8, gate: threading.Event | None = None) -> None:
        self.sizes: list[tuple[int, int]] = []
        self.threads: set[int] = set()
        self.gate, self.entered = gate, threading.Event()
        self.spec = WorldModelSpec(
            name="counting",
            views=ViewLayout(height=H, width=W),
            context_frames=1,
            horizons=(HORIZON, 5),
            frame_dt=0.12,
            conditions=frozenset({"text", "actions"}),
            returns=frozenset({"frames", "latents"}),
            proprioception_lags=(0,),
            max_batch=max_batch,
        )

    def rollout(self, request: RolloutRequest) -> Rollout:
        self.sizes.append(request.seeds_BS.shape)
        self.threads.add(threading.get_ident())
        self.entered.set()
        if self.gate is not None:
            assert self.gate.wait(10)
        if (request.seeds_BS == -1).any():
            raise RuntimeError("a seed of -1")
        if (request.seeds_BS == -2).any():
            raise SystemExit(3)
        assert request.proprioception_BKA is not None and request.actions_BSPA is not None
        base_B = request.context_BVTHWC[:, 0, 0, 0, 0, 0] + np.array([len(text) for text in request.instructions])
        base_B = base_B + 10 * request.proprioception_BKA[:, 0, 0]
        value_BS = base_B[:, None] + 3 * request.seeds_BS + 5 * request.actions_BSPA[:, :, 0, 0]
        shape = (*value_BS.shape, 1, request.horizon, H, W, 3)
        frames = np.broadcast_to(value_BS[:, :, None, None, None, None, None], shape).astype(np.uint8)
        latents = np.broadcast_to(value_BS[:, :, None, None, None, None], (*value_BS.shape, 2, 1, 2, 2))
        return Rollout(
            times_T=np.arange(request.horizon) * 0.12,
            frames_BSVTHWC=frames,
            latents_BSCFhw=latents.astype(np.float32) if "latents" in request.returns else None,
            cost={"seconds": 1.0, "calls": float(value_BS.size)},
        )


def a_request(number: int, *, samples: int = 1, batch: int = 1, **changes: Any) -> RolloutRequest:
    seeds = np.arange(batch * samples).reshape(batch, samples) + number
    values: dict[str, Any] = {
        "context_BVTHWC": np.full((batch, 1, 1, H, W, 3), number % 50, np.uint8),
        "instructions": ["x" * (1 + number % 7)] * batch,
        "seeds_BS": seeds.astype(np.int64),
        "horizon": HORIZON,
        "proprioception_BKA": np.full((batch, 1, 2), number % 3, np.float32),
        "actions_BSPA": (seeds % 4)[:, :, None, None].repeat(2, -1).astype(np.float32),
    }
    return RolloutRequest(**(values | changes))


def in_threads(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Results of the calls, each in a thread of its own; what one raises is its result."""
    results: list[Any] = [None] * len(calls)

    def run(place: int) -> None:
        try:
            results[place] = calls[place]()
        except BaseException as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "nobody waits for ever"
    return results


def same(a: Rollout, b: Rollout) -> None:
    np.testing.assert_array_equal(a.frames_BSVTHWC, b.frames_BSVTHWC)
    np.testing.assert_array_equal(a.times_T, b.times_T)
    assert (a.latents_BSCFhw is None) == (b.latents_BSCFhw is None)
    if a.latents_BSCFhw is not None and b.latents_BSCFhw is not None:
        np.testing.assert_array_equal(a.latents_BSCFhw, b.latents_BSCFhw)


@pytest.mark.parametrize("pad", [False, True])
def test_many_threads_get_what_they_would_get_alone(pad: bool) -> None:
    model = Counting(max_batch=16)
    requests = [
        a_request(n, samples=1 + n % 3, returns=frozenset({"frames"} | ({"latents"} if n % 2 else set())))
        for n in range(40)
    ]
    with Batcher(model, wait_s=0.05, pad=pad) as batcher:
        assert isinstance(batcher, WorldModel) and batcher.spec is model.spec
        answers = in_threads([lambda r=request: batcher.rollout(r) for request in requests])  # type: ignore[misc]
    alone = Counting()
    for request, answer in zip(requests, answers, strict=True):
        same(answer, alone.rollout(request))
    assert len(model.sizes) < len(requests) / 2, "most were merged"
    assert len(model.threads) == 1, "only one thread calls the model"
    sizes = {b * s for b, s in model.sizes}
    assert sizes == {16} if pad else max(sizes) <= 16
    calls = sum(answer.cost["calls"] for answer in answers)
    assert calls == pytest.approx(sum(b * s for b, s in model.sizes)), "the cost is shared, and nothing of it is lost"
    assert any(answer.cost["batched"] > 1 for answer in answers)


def test_only_equal_kinds_are_merged_and_the_oldest_goes_first() -> None:
    gate = threading.Event()
    model = Counting(max_batch=8, gate=gate)
    with Batcher(model, wait_s=0.0) as batcher:
        first = threading.Thread(target=batcher.rollout, args=(a_request(0),))
        first.start()
        assert model.entered.wait(5)
        kinds = [
            a_request(1),
            a_request(2, horizon=5),
            a_request(3),
            a_request(4, samples=2),
            a_request(5, horizon=5),
            a_request(6, batch=3),
        ]
        threads = []
        for request in kinds:
            waiting = batcher.waiting
            threads.append(threading.Thread(target=batcher.rollout, args=(request,)))
            threads[-1].start()
            until = time.monotonic() + 5
            while batcher.waiting == waiting and time.monotonic() < until:
                time.sleep(0.001)
        gate.set()
        for thread in [first, *threads]:
            thread.join(10)
    assert model.sizes == [(1, 1), (5, 1), (2, 1), (1, 2)]


def test_a_batch_is_never_larger_than_allowed() -> None:
    model = Counting(max_batch=64)
    with Batcher(model, max_batch=4, wait_s=0.05) as batcher:
        requests = [
            a_request(n, batch=b, samples=s) for n, (b, s) in enumerate([(1, 9), (7, 1), (2, 3), (1, 1), (3, 1)])
        ]
        answers = in_threads([lambda r=request: batcher.rollout(r) for request in requests])  # type: ignore[misc]
    for request, answer in zip(requests, answers, strict=True):
        same(answer, Counting().rollout(request))
    assert max(b * s for b, s in model.sizes) <= 4


def test_a_lonely_request_does_not_wait_for_company_for_long() -> None:
    with Batcher(Counting(), wait_s=0.3) as batcher:
        began = time.monotonic()
        batcher.rollout(a_request(1))
        assert 0.25 < time.monotonic() - began < 5
        began = time.monotonic()
        in_threads([lambda n=n: batcher.rollout(a_request(n)) for n in range(8)])  # type: ignore[misc]
        assert time.monotonic() - began < 0.29, "a full batch starts at once"


def test_a_bad_request_is_its_callers_alone() -> None:
    """What the spec can tell is refused before anybody is merged with it; what only the model can tell is found one by one."""
    model = Counting(max_batch=16)
    bad: list[tuple[RolloutRequest, type[Exception], str]] = [
        (a_request(1, horizon=4), MissingCapabilityError, "horizon"),
        (a_request(1, returns=frozenset({"features"})), MissingCapabilityError, "returns"),
        (a_request(1, goal_BVHWC=np.zeros((1, 1, H, W, 3), np.uint8)), MissingCapabilityError, "goal"),
        (a_request(1, context_BVTHWC=np.zeros((1, 1, 1, H, W + 1, 3), np.uint8)), UserError, "context_BVTHWC"),
        (a_request(1, proprioception_BKA=np.full((1, 1, 2), np.nan, np.float32)), UserError, "proprioception"),
        (a_request(1, instructions=["a", "b"]), UserError, "instructions"),
    ]
    with Batcher(model, wait_s=0.05) as batcher:
        for request, kind, field in bad:
            with pytest.raises(kind, match=field):
                batcher.rollout(request)
        assert model.sizes == []
        poisoned = [a_request(-1), *[a_request(n) for n in range(5)], a_request(-2)]
        answers = in_threads([lambda r=request: batcher.rollout(r) for request in poisoned])  # type: ignore[misc]
        assert isinstance(answers[0], RuntimeError) and isinstance(answers[-1], SystemExit)
        for request, answer in zip(poisoned[1:-1], answers[1:-1], strict=True):
            same(answer, Counting().rollout(request))
        same(batcher.rollout(a_request(9)), Counting().rollout(a_request(9)))


def test_a_full_queue_says_so() -> None:
    gate = threading.Event()
    model = Counting(gate=gate)
    with Batcher(model, wait_s=0.0, max_waiting=2) as batcher:
        threads = [threading.Thread(target=batcher.rollout, args=(a_request(0),))]
        threads[0].start()
        assert model.entered.wait(5)
        for n in range(2):
            threads.append(threading.Thread(target=batcher.rollout, args=(a_request(n),)))
            threads[-1].start()
        until = time.monotonic() + 5
        while batcher.waiting < 2 and time.monotonic() < until:
            time.sleep(0.001)
        with pytest.raises(BusyError, match="2 requests"):
            batcher.rollout(a_request(3))
        gate.set()
        for thread in threads:
            thread.join(5)


def test_close_answers_what_is_under_way_and_refuses_the_rest() -> None:
    gate = threading.Event()
    model = Counting(max_batch=1, gate=gate)
    batcher = Batcher(model, wait_s=0.0)
    results: list[Any] = []

    def call(n: int) -> None:
        try:
            results.append(batcher.rollout(a_request(n)))
        except ClosedError as error:
            results.append(error)

    threads = [threading.Thread(target=call, args=(n,)) for n in range(3)]
    threads[0].start()
    assert model.entered.wait(5)
    for thread in threads[1:]:
        thread.start()
    until = time.monotonic() + 5
    while batcher.waiting < 2 and time.monotonic() < until:
        time.sleep(0.001)
    closing = threading.Thread(target=batcher.close)
    closing.start()
    time.sleep(0.05)
    gate.set()
    for thread in [*threads, closing]:
        thread.join(5)
        assert not thread.is_alive()
    assert [type(result).__name__ for result in results].count("Rollout") == 1
    assert [type(result).__name__ for result in results].count("ClosedError") == 2
    batcher.close()
    with pytest.raises(ClosedError):
        batcher.rollout(a_request(1))


def test_settings_out_of_range_are_refused() -> None:
    for settings, field in (
        ({"max_batch": 0}, "max_batch"),
        ({"wait_s": -1.0}, "wait_s"),
        ({"max_waiting": 0}, "max_wai"),
    ):
        with pytest.raises(UserError, match=field):
            Batcher(Counting(), **settings)  # type: ignore[arg-type]


def test_merging_and_splitting_are_inverse() -> None:
    requests = [
        a_request(n, batch=1 + n, samples=2, ids=[("t", n, k) for k in range(1 + n)], plan_steps=[32 * n] * (1 + n))
        for n in range(3)
    ]
    whole = merge(requests)
    assert whole.plan_steps == [0, 32, 32, 64, 64, 64] and singly(requests[1]).plan_steps == [32] * 4
    assert kind_of(requests[0]) != kind_of(a_request(0, samples=2, ids=[("t", 0, 0)]))
    assert whole.seeds_BS.shape == (6, 2) and whole.ids is not None and whole.ids[1:3] == [("t", 1, 0), ("t", 1, 1)]
    for part, request in zip(split(Counting().rollout(whole), requests), requests, strict=True):
        same(part, Counting().rollout(request))
    model, request = Counting(), a_request(3, batch=2, samples=5)
    for compute in (
        lambda: rollout_in_parts(model, request, 3),
        lambda: as_asked(rollout_in_equal_parts(model, singly(request), 4), request),
    ):
        same(compute(), Counting().rollout(request))
    assert model.sizes == [(1, 3), (1, 2), (1, 3), (1, 2), (4, 1), (4, 1), (4, 1)]


class Forgetful(Gatherer[int, int]):
    """Gives fewer answers than it was asked, except to a single request above 0."""

    def kind_of(self, request: int) -> None:
        pass

    def samples_of(self, request: int) -> int:
        return 1

    def compute(self, requests: Sequence[int]) -> list[int]:
        return list(requests) if len(requests) == 1 and requests[0] > 0 else list(requests)[1:]


def test_a_wrong_number_of_answers_is_an_error_and_not_the_end_of_the_thread() -> None:
    with Forgetful(max_batch=4, wait_s=0.0, max_waiting=4, what="the double") as gatherer:
        with pytest.raises(RuntimeError, match="the double gave 0 answers to 1 requests"):
            gatherer.ask(0)
        assert gatherer.ask(3) == 3, "it goes on"
