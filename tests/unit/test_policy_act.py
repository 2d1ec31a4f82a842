"""A policy in the loop: exact bookkeeping of chunks, histories, seeds and delays; a folder that acts; threads, batches and refusals."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from physisforcing.core.errors import UserError
from physisforcing.core.protocols import Policy
from physisforcing.core.types import ActionSpec, Observation
from physisforcing.policy.act import ExecutionConfig, WorldActionPolicy, check_rate
from physisforcing.policy.checkpoint import PolicyInfo
from physisforcing.policy.normalization import ActionStatistics
from physisforcing.policy.planning import ChunkModel, PlanningConfig
from physisforcing.policy.remote import PlanBatcher
from physisforcing.policy.requests import PlanAnswer, PlanRequest, PolicySpec
from physisforcing.policy.sampling import plan_seed
from physisforcing.policy_episodes import PolicyRunner
from tests.helpers.tiny_policy import tiny_policy

CHUNK, WIDTH = 32, 3


class Counting:
    """A plan's row i is (step of the picture + i, number of the call, 0); pictures carry their step. ``slow``: seconds a plan takes."""

    def __init__(self, slow: float = 0.0, lags: tuple[int, ...] = (0,)) -> None:
        self.spec = PolicySpec(
            name="counting", canvas="head", size=(120, 160), lags=lags, state_dim=WIDTH, action_dim=WIDTH, chunk=CHUNK,
            control_hz=50 / 3, fingerprint="counts",
        )  # fmt: skip
        self.slow, self.requests, self.gate = slow, list[PlanRequest](), threading.Event()
        self.gate.set()

    def plan(self, request: PlanRequest) -> PlanAnswer:
        call = len(self.requests)
        self.requests.append(request)
        assert self.gate.wait(10)
        time.sleep(self.slow)
        first = float(request.canvas_BHWC[0, 0, 0, 0])
        rows = np.stack([first + np.arange(CHUNK), np.full(CHUNK, call), np.zeros(CHUNK)], 1).astype(np.float32)
        return PlanAnswer(actions_BPA=rows[None], seconds={"encode": 0.25, "prefill": 0.5, "steps": 1.0})


def observe(step: int, state: Any = None) -> Observation:
    state = np.full(WIDTH, step, np.float32) if state is None else np.asarray(state, np.float32)
    picture = np.full((240, 320, 3), step, np.uint8)
    return Observation(images={"head": picture}, state_A=state, measured_A=state, instruction="press", step=step)


def run(policy: WorldActionPolicy, steps: int) -> list[tuple[int, int]]:
    """(place in its plan's time, number of the plan) of every executed row: a loop whose robot reaches its targets at once."""
    policy.reset(task="click_bell", seed=7, instruction="press the bell")
    executed: list[np.ndarray] = []
    state = np.zeros(WIDTH, np.float32)
    while len(executed) < steps:
        for row in policy.act(observe(len(executed), state)):
            executed.append(row)
            state = row
    return [(int(row[0]), int(row[1])) for row in executed[:steps]]


def test_receding_horizon_executes_the_beginning_of_each_plan() -> None:
    source = Counting()
    policy = WorldActionPolicy(source, ExecutionConfig(execute=12))
    assert isinstance(policy, Policy)
    assert run(policy, 30) == [(step, step // 12) for step in range(30)]
    assert policy.telemetry() | {"canvas_s": 0.0} == {
        "plans": 3.0, "clipped": 0.0, "dropped": 0.0, "waited_s": 0.0, "late": 0.0, "canvas_s": 0.0, "encode_s": 0.75,
        "prefill_s": 1.5, "steps_s": 3.0,
    }  # fmt: skip
    assert [request.seeds_B.tolist() for request in source.requests] == [[plan_seed(7, k)] for k in range(3)]
    assert source.requests[0].canvas_BHWC.shape == (1, 120, 160, 3)


def test_asynchronous_plans_drop_the_rows_whose_moments_are_past() -> None:
    """Looks at 0, 12, 24, ..; a plan is used from 4 steps after its look on, and every row is executed at its own moment."""
    source = Counting()
    policy = WorldActionPolicy(source, ExecutionConfig(execute=12, execution="async", delay=4))
    assert run(policy, 60) == [(step, max(0, step - 4) // 12) for step in range(60)]
    assert policy.telemetry()["dropped"] == 4 * 4 and policy.telemetry()["plans"] == 5
    looks = [int(request.canvas_BHWC[0, 0, 0, 0]) for request in source.requests]
    assert looks == [0, 12, 24, 36, 48]


def test_a_slow_plan_is_waited_for_and_the_episode_is_the_same() -> None:
    """Repeatable: an episode does not depend on the speed of the machine where the delay is given."""
    config = ExecutionConfig(execute=6, execution="async", delay=6)
    quick, slow = WorldActionPolicy(Counting(), config), WorldActionPolicy(Counting(slow=0.03), config)
    assert run(quick, 40) == run(slow, 40) == [(step, max(0, step - 6) // 6) for step in range(40)]
    told = slow.telemetry()
    assert told["late"] == 5 and 0.05 < told["waited_s"] < 2.0


def test_by_the_clock_a_plan_is_used_as_soon_as_it_is_there() -> None:
    """The second plan arrives after 3 more steps and loses 3 rows; the third does not arrive before the rows of the second are used up."""
    source = Counting()
    policy = WorldActionPolicy(source, ExecutionConfig(execute=12, execution="async", delay=0))
    policy.reset(task="", seed=0, instruction="")
    rows: list[np.ndarray] = []

    def go(until: int) -> None:
        while len(rows) < until:
            rows.extend(policy.act(observe(len(rows), rows[-1] if rows else np.zeros(WIDTH))))

    go(12)
    source.gate.clear()
    go(15)
    source.gate.set()
    policy._coming.thread.join()
    go(24)
    assert [int(row[1]) for row in rows] == [0] * 15 + [1] * 9
    source.gate.clear()
    go(44)
    threading.Timer(0.05, source.gate.set).start()
    go(45)
    assert [int(row[1]) for row in rows[24:]] == [1] * 20 + [2]
    assert [int(row[0]) for row in rows] == list(range(45)), "every row at its own moment"
    assert policy.telemetry()["dropped"] == 3 + 20 and policy.telemetry()["late"] == 1
    policy.close()


def test_an_error_of_a_plan_is_raised_where_its_rows_are_needed() -> None:
    class Broken(Counting):
        def plan(self, request: PlanRequest) -> PlanAnswer:
            if self.requests:
                raise RuntimeError("out of memory")
            return super().plan(request)

    policy = WorldActionPolicy(Broken(), ExecutionConfig(execute=12, execution="async", delay=4))
    with pytest.raises(RuntimeError, match="out of memory"):
        run(policy, 30)
    policy.reset(task="", seed=0, instruction="")


def test_states_at_their_lags_are_those_that_were_commanded() -> None:
    source = Counting(lags=(0, 8, 16))
    limits = ActionSpec(names=("a", "b", "c"), low=(-1.0,) * 3, high=(20.0,) * 3)
    policy = WorldActionPolicy(source, ExecutionConfig(execute=12), action_spec=limits)
    executed = run(policy, 36)
    # row i is commanded during step i and is the state at step i + 1; the limit of 20 is applied before
    commanded = [[0.0, 0.0, 0.0]] + [[min(20.0, float(a)), float(b), 0.0] for a, b in executed]
    for number, request in enumerate(source.requests):
        wanted = [commanded[max(0, 12 * number - lag)] for lag in (0, 8, 16)]
        assert request.state_BKA[0].tolist() == wanted
    assert policy.telemetry()["clipped"] == 15 and max(a for a, _ in executed) == 20


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"execute": 0}, "execute"), ({"execute": 33}, "execute"), ({"execution": "open"}, "execution"),
     ({"execution": "async", "execute": 30, "delay": 3}, "delay"), ({"execution": "async", "execute": 32, "delay": 0}, "delay")],
)  # fmt: skip
def test_settings_that_a_chunk_cannot_serve_are_refused(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError, match=f"policy.{field}"):
        WorldActionPolicy(Counting(), ExecutionConfig(**settings))


def test_what_changes_the_result_changes_the_fingerprint() -> None:
    source = Counting()
    made = {
        WorldActionPolicy(source, ExecutionConfig(**settings)).fingerprint
        for settings in ({}, {"execute": 8}, {"execution": "async"}, {"execution": "async", "delay": 2})
    }
    assert len(made) == 4
    assert WorldActionPolicy(source, ExecutionConfig(delay=2)).fingerprint in made, "no delay in receding"


def test_rows_of_another_rate_are_refused() -> None:
    spec = Counting().spec
    check_rate(spec, 0.06)
    check_rate(dataclasses.replace(spec, control_hz=16.67), 0.06)  # as a dataset rounds it
    with pytest.raises(UserError, match=r"policy counting: got '50 actions a second', wanted 16\.67, .*control=topp"):
        check_rate(dataclasses.replace(spec, control_hz=50.0), 0.06)
    source = Counting()
    source.spec = dataclasses.replace(spec, control_hz=50.0)
    robot = SimpleNamespace(action_spec=ActionSpec(names=("a",), low=(0.0,), high=(1.0,)), control="interpolated")
    with pytest.raises(UserError, match="50 actions a second"):
        PolicyRunner._check_rate(WorldActionPolicy(source), SimpleNamespace(unwrapped=robot))
    robot.control = "topp"  # which has no rate
    PolicyRunner._check_rate(WorldActionPolicy(source), SimpleNamespace(unwrapped=robot))


# ---------------------------------------------------------------------- a model that plans


class Toy:
    """Sentences as random tokens; a first frame of 4 channels by area."""

    def __init__(self) -> None:
        self.embedded: list[str] = []

    def prepare(self, instructions: list[str]) -> None:
        """Nothing takes long here."""

    def batch(self, instructions: list[str]) -> torch.Tensor:
        self.embedded += instructions
        seeds = [sum(sentence.encode()) for sentence in instructions]
        return torch.stack([torch.randn(5, 12, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    @staticmethod
    def first_frame(canvas_BHWC: torch.Tensor) -> torch.Tensor:
        small = F.interpolate(canvas_BHWC.movedim(-1, 1).float() / 64 - 2, (4, 6), mode="area")
        return torch.cat([small, small[:, :1]], 1).unsqueeze(2)


STATISTICS = ActionStatistics.of(
    [np.random.default_rng(0).normal(2.0, 3.0, (50, WIDTH))], [np.random.default_rng(1).normal(-1.0, 0.5, (50, WIDTH))]
)


def chunk_model(trained: str = "first_frame", *, model: dict[str, Any] | None = None, **settings: Any) -> ChunkModel:
    info = PolicyInfo(frames=9, frame_stride=1)
    backend = settings.pop("backend", "eager")
    policy = tiny_policy(trained, **(model or {}))
    config = PlanningConfig(steps=3, video_steps=2, **settings)
    return ChunkModel(policy, info, STATISTICS, Toy.first_frame, Toy(), config, fingerprint="tiny", backend=backend)


def a_request(count: int, first: int = 0) -> PlanRequest:
    draw = np.random.default_rng(first)
    return PlanRequest(
        canvas_BHWC=draw.integers(0, 256, (count, 120, 160, 3), dtype=np.uint8),
        instructions=[f"press {k % 2}" for k in range(count)],
        state_BKA=draw.normal(size=(count, 1, WIDTH)).astype(np.float32),
        seeds_B=np.arange(count, dtype=np.int64) + first,
    )


def test_a_plan_is_the_sampled_chunk_in_the_robots_units() -> None:
    made, request = chunk_model(), a_request(1)
    answer = made.plan(request)
    assert answer.actions_BPA.shape == (1, 8, WIDTH) and set(answer.seconds) == {"encode", "prefill", "steps"}
    state = (request.state_BKA[:, 0].astype(np.float64) - STATISTICS.state.offset_D) / STATISTICS.state.scale_D
    noise = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(0))[None]
    with torch.no_grad():
        context = made.model.context(Toy().batch(request.instructions), torch.from_numpy(state.clip(-5, 5)).float())
        kept = made.model.prefill(Toy.first_frame(torch.from_numpy(request.canvas_BHWC)), torch.zeros(1), context)
        for now, after in ((1.0, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0.0)):
            velocity = made.model.act(noise, made.model.action_times(torch.tensor([now])), kept)
            noise = noise + (after - now) * velocity
    wanted = noise.numpy() * STATISTICS.action.scale_D + STATISTICS.action.offset_D
    np.testing.assert_allclose(answer.actions_BPA, wanted, rtol=1e-4, atol=1e-4)


def test_a_batch_of_plans_is_bit_equal_to_single_ones_and_larger_calls_agree() -> None:
    request = a_request(5)
    one, four = chunk_model(), chunk_model(batch=4)
    together = one.plan(request).actions_BPA
    single = PlanRequest(
        canvas_BHWC=request.canvas_BHWC[3:4], instructions=request.instructions[3:4],
        state_BKA=request.state_BKA[3:4], seeds_B=request.seeds_B[3:4],
    )  # fmt: skip
    assert np.array_equal(one.plan(single).actions_BPA[0], together[3])
    np.testing.assert_allclose(four.plan(request).actions_BPA, together, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["joint", "optional_idm"])
def test_other_modes_plan_and_say_so_in_the_fingerprint(mode: str) -> None:
    made = chunk_model(mode)
    assert made.plan(a_request(1)).actions_BPA.shape == (1, 8, WIDTH)
    assert made.spec.fingerprint != chunk_model().spec.fingerprint
    if mode == "optional_idm":
        near = chunk_model(mode, mode="first_frame")
        assert near.spec.fingerprint not in (made.spec.fingerprint, "")
        assert not np.allclose(near.plan(a_request(1)).actions_BPA, made.plan(a_request(1)).actions_BPA)


def test_compiled_blocks_are_one_graph_for_all_blocks_and_give_the_same_plan() -> None:
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(len(inputs))
        return graph.forward

    plain, made = chunk_model(), chunk_model(compute="compile", backend=backend)
    for first in (0, 1):
        np.testing.assert_allclose(
            made.plan(a_request(1, first)).actions_BPA,
            plain.plan(a_request(1, first)).actions_BPA,
            rtol=1e-5,
            atol=1e-5,
        )
    assert len(graphs) == 3, (
        "prefill, that of the last block, and action step, once for three blocks, three steps and two plans"
    )
    assert set(made.model.state_dict()) == set(plain.model.state_dict())


@pytest.mark.parametrize(("trained", "graphs_made"), [("first_frame", 4), ("joint", 1), ("optional_idm", 5)])
def test_fused_plans_are_the_plain_ones_in_every_mode(trained: str, graphs_made: int) -> None:
    """``joint`` and the future of ``idm`` go through the compiled blocks of the whole model."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(len(inputs))
        return graph.forward

    plain, made = chunk_model(trained), chunk_model(trained, compute="fused", backend=backend)
    for first in (0, 1):
        one, other = (chunks.plan(a_request(1, first)).actions_BPA for chunks in (plain, made))
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5)
    assert len(graphs) == graphs_made
    assert set(made.model.state_dict()) == set(plain.model.state_dict())
    assert made.spec.fingerprint == plain.spec.fingerprint, "the same plans"


def test_another_precision_of_the_autoencoder_is_another_policy() -> None:
    half = chunk_model(autoencoder_half=True)
    assert half.spec.fingerprint != chunk_model().spec.fingerprint


def test_a_new_sentence_keeps_nobody_else_waiting() -> None:
    made, asked, gate = chunk_model(), threading.Event(), threading.Event()

    def prepare(instructions: list[str]) -> None:
        if "new" in instructions:
            asked.set()
            assert gate.wait(10)

    made._sentences.prepare = prepare
    batcher, slow = PlanBatcher(made, wait_s=0.0), a_request(1)
    slow.instructions = ["new"]
    answers: list[PlanAnswer] = []
    thread = threading.Thread(target=lambda: answers.append(batcher.plan(slow)))
    thread.start()
    assert asked.wait(10)
    for source in (made, batcher):  # while the sentence is embedded
        assert source.plan(a_request(1)).actions_BPA.shape == (1, 8, WIDTH)
    assert not answers
    gate.set()
    thread.join(10)
    assert len(answers) == 1 and batcher.close(10)


def test_requests_that_do_not_fit_are_refused() -> None:
    made, request = chunk_model(), a_request(2)
    request.state_BKA[0, 0, 0] = np.nan
    with pytest.raises(UserError, match="state_BKA"):
        made.plan(request)
    for name, value in (("seeds_B", np.zeros(3, np.int64)), ("canvas_BHWC", np.zeros((2, 60, 80, 3), np.uint8))):
        request = a_request(2)
        setattr(request, name, value)
        with pytest.raises(UserError, match=name):
            made.plan(request)
    with pytest.raises(UserError, match=r"policy\.compute"):
        PlanningConfig(compute="graph")


def test_a_folder_needs_its_own_autoencoder(tmp_path: Path) -> None:
    from physisforcing.core.paths import weights_root
    from physisforcing.policy.encoding import autoencoder_folder
    from physisforcing.worldmodel.storage import latents_fingerprint

    own = latents_fingerprint(weights_root() / "vae")
    assert autoencoder_folder(PolicyInfo(latents=own), "", tmp_path) == weights_root() / "vae"
    with pytest.raises(UserError, match=r"policy\.autoencoder"):
        autoencoder_folder(PolicyInfo(latents="another"), "", tmp_path)
