"""The planner against exact stand-ins: a world model that returns recorded frames, a decoder that reads numbers out of pixels."""

import json

import numpy as np
import pytest

from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.protocols import InverseDynamics, Policy, WorldModel
from physisforcing.core.types import (
    DT,
    ActionChunk,
    ActionSpec,
    DecoderNeeds,
    Observation,
    Rollout,
    ViewLayout,
    WorldModelSpec,
)
from physisforcing.planner.action_planner import ActionPlanner, ActionPlannerConfig, StateHistory, noise_seed
from physisforcing.planner.measurements import FIELDS, measurement, seed_range, write_measurements
from physisforcing.planner.summary import markdown, summarise
from physisforcing.planner.tool import rotate, tool_errors, tool_points
from physisforcing.planner.video_decoding import OpenLoopPolicy, decode_video

H, W = 8, 16


def picture(value: float) -> np.ndarray:
    """A picture that says one number (0..2.5 in steps of 0.01)."""
    return np.full((H, W, 3), round(100 * value), np.uint8)


class RecordedWorldModel:
    """Test double: imagines the pictures of a straight motion; the first ``still`` candidates of every plan do not move."""

    def __init__(self, still: int = 0, **changes) -> None:
        self.requests, self.still = [], still
        values = {
            "name": "recorded",
            "views": ViewLayout(height=H, width=W),
            "context_frames": 1,
            "horizons": (17,),
            "frame_dt": 2 * DT,
            "conditions": frozenset({"text"}),
            "returns": frozenset({"frames"}),
            "proprioception_lags": (0, 8, 16),
            "fingerprint": "r1",
        }
        self.spec = WorldModelSpec(**(values | changes))

    def rollout(self, request):
        self.requests.append(request)
        now = request.context_BVTHWC[0, 0, 0, 0, 0, 0] / 100
        first_of_plan = len({r.seeds_BS.tobytes() for r in self.requests}) <= self.still
        speed = 0.0 if first_of_plan else 0.01
        frames = np.stack([picture(now + speed * t) for t in range(17)])
        return Rollout(times_T=np.arange(17) * 2 * DT, frames_BSVTHWC=frames[None, None, None])


class PixelReader:
    """Test double: joint 0 is the number in the picture; the targets between two pictures are those of the later one."""

    fingerprint = "reader"
    needs = DecoderNeeds()

    def __init__(self) -> None:
        self.starts = []

    def decode(self, rollout, state_BA, instructions):
        frames_BTHWC = rollout.frames_BSVTHWC[:, 0, 0]
        self.starts.append(state_BA.copy())
        chunks = []
        for frames, state in zip(frames_BTHWC, state_BA, strict=True):
            rows = np.repeat(state[None], 2 * (len(frames) - 1), 0)
            rows[:, 0] = np.repeat(frames[1:, 0, 0, 0] / 100, 2)
            spread = np.full(len(rows), 0.01, np.float32)
            chunks.append([ActionChunk(actions_PA=rows.astype(np.float32), spread_P=spread)])
        return chunks


def observation(step: int, value: float) -> Observation:
    state = np.zeros(14, np.float32)
    state[0] = value
    return Observation(
        images={"head": picture(value)}, state_A=state, measured_A=state, instruction="press it", step=step
    )


class Recorder:
    def __init__(self) -> None:
        self.videos = []

    def imagined(self, step, frames_THWC):
        self.videos.append((step, frames_THWC))


def test_stand_ins_and_planner_satisfy_the_protocols():
    assert isinstance(RecordedWorldModel(), WorldModel) and isinstance(PixelReader(), InverseDynamics)
    assert isinstance(ActionPlanner(RecordedWorldModel(), PixelReader()), Policy)
    assert isinstance(OpenLoopPolicy("x", np.zeros((1, 14))), Policy)


def test_a_chunk_follows_the_imagination_and_is_replanned():
    model, recorder = RecordedWorldModel(), Recorder()
    planner = ActionPlanner(model, PixelReader(), ActionPlannerConfig(execute_horizon=24), recorder)
    planner.reset(task="click_bell", seed=100_001, instruction="press the bell")
    chunk = planner.act(observation(0, 0.5))
    assert chunk.shape == (24, 14) and chunk.dtype == np.float32
    np.testing.assert_allclose(chunk[:, 0], 0.5 + 0.01 * np.repeat(np.arange(1, 13), 2), atol=1e-6)
    planner.act(observation(24, 0.62))
    first, second = model.requests
    assert first.instructions == ["press the bell"] and first.horizon == 17
    assert first.seeds_BS.item() == noise_seed(100_001, 0, 0) and second.seeds_BS.item() == noise_seed(100_001, 1, 0)
    # proprioception at lags 0, 8, 16: the start at the first plan, the planner's own targets at the second
    assert first.proprioception_BKA[0, :, 0].tolist() == pytest.approx([0.5, 0.5, 0.5])
    assert second.proprioception_BKA[0, :, 0].tolist() == pytest.approx([0.62, 0.58, 0.54])
    assert [step for step, _ in recorder.videos] == [0, 24] and recorder.videos[0][1].shape == (17, H, W, 3)
    telemetry = planner.telemetry()
    assert telemetry["plans"] == 2 and telemetry["resampled"] == 0 and telemetry["spread"] == pytest.approx(0.01)


def test_still_chunks_are_resampled_at_most_three_times_and_counted():
    model = RecordedWorldModel(still=2)
    planner = ActionPlanner(model, PixelReader())
    planner.reset(task="t", seed=7, instruction="i")
    assert planner.act(observation(0, 0.2))[-1, 0] == pytest.approx(0.36)
    assert [r.seeds_BS.item() for r in model.requests] == [noise_seed(7, 0, k) for k in range(3)]
    assert planner.telemetry()["resampled"] == 2 and planner.telemetry()["still"] == 0
    frozen = RecordedWorldModel(still=99)
    planner = ActionPlanner(frozen, PixelReader())
    planner.reset(task="t", seed=7, instruction="i")
    assert planner.act(observation(0, 0.2)).shape == (32, 14)
    assert len(frozen.requests) == 4
    assert planner.telemetry()["resampled"] == 3 and planner.telemetry()["still"] == 1
    planner.reset(task="t", seed=8, instruction="i")
    assert planner.telemetry()["resampled"] == 0


def test_chunks_stay_within_the_joint_limits_and_so_does_the_history():
    model = RecordedWorldModel()
    limits = ActionSpec(names=("joint",) * 14, low=(-1.0,) * 14, high=(0.56,) + (1.0,) * 13)
    planner = ActionPlanner(model, PixelReader(), ActionPlannerConfig(execute_horizon=16), action_spec=limits)
    planner.reset(task="t", seed=7, instruction="i")
    chunk = planner.act(observation(0, 0.5))
    wanted = np.minimum(0.5 + 0.01 * np.repeat(np.arange(1, 9), 2), 0.56)
    np.testing.assert_allclose(chunk[:, 0], wanted, atol=1e-6)
    assert chunk.dtype == np.float32 and planner.telemetry()["clipped"] == 4
    planner.act(observation(16, 0.56))
    # lags 0, 8, 16: what stood there after clipping, not what was decoded
    assert planner._history.lagged((0, 1, 2))[:, 0].tolist() == pytest.approx([0.56, 0.56, 0.56])
    assert model.requests[1].proprioception_BKA[0, :, 0].tolist() == pytest.approx([0.56, 0.54, 0.5])
    free = ActionPlanner(RecordedWorldModel(), PixelReader(), ActionPlannerConfig(execute_horizon=16))
    free.reset(task="t", seed=7, instruction="i")
    assert free.act(observation(0, 0.5))[-1, 0] == pytest.approx(0.58) and free.telemetry()["clipped"] == 0


def test_noise_seeds_differ_in_every_part_and_are_stable():
    seeds = {noise_seed(e, r, c) for e in range(20) for r in range(10) for c in range(4)}
    assert len(seeds) == 800 and all(0 <= s < 2**63 for s in seeds)
    assert noise_seed(100_000, 0, 0) == 308468752165666235


def test_fingerprint_names_weights_and_settings():
    base = ActionPlanner(RecordedWorldModel(), PixelReader()).fingerprint
    assert base.startswith("recorded-")
    assert base == ActionPlanner(RecordedWorldModel(), PixelReader()).fingerprint
    assert base != ActionPlanner(RecordedWorldModel(fingerprint="r2"), PixelReader()).fingerprint
    assert (
        base != ActionPlanner(RecordedWorldModel(), PixelReader(), ActionPlannerConfig(execute_horizon=16)).fingerprint
    )


def test_planner_refuses_models_and_settings_that_cannot_work():
    with pytest.raises(MissingCapabilityError, match="horizon"):
        ActionPlanner(RecordedWorldModel(horizons=(9,)), PixelReader())
    with pytest.raises(MissingCapabilityError, match="context"):
        ActionPlanner(RecordedWorldModel(context_frames=3), PixelReader())
    with pytest.raises(UserError, match="execute_horizon"):
        ActionPlanner(RecordedWorldModel(), PixelReader(), ActionPlannerConfig(execute_horizon=40))


def test_state_history_keeps_what_was_observed():
    history = StateHistory()
    history.observe(0, np.zeros(2), None)
    history.observe(3, np.array([3.5, 3.5]), np.arange(1, 9)[:, None].repeat(2, 1).astype(np.float32))
    assert history.lagged((0, 1, 2, 3, 9))[:, 0].tolist() == [3.5, 2, 1, 0, 0]


def test_whole_video_is_decoded_in_chained_windows():
    reader = PixelReader()
    frames = np.stack([picture(0.02 * t) for t in range(41)])
    targets = decode_video(reader, frames, np.zeros(14, np.float32), height=H, width=W)
    assert targets.shape == (40, 14)
    wanted = 0.04 * (np.arange(40) // 2 + 1)
    np.testing.assert_allclose(targets[:, 0], wanted, atol=1e-6)
    assert len(reader.starts) == 2
    # the second window starts from the first one's own last prediction
    np.testing.assert_allclose(reader.starts[1][0, 0], targets[31, 0])
    assert decode_video(reader, frames[:1], np.zeros(14), height=H, width=W).shape == (1, 14)


def test_open_loop_policy_executes_row_by_row_and_holds_the_last():
    steps = []
    policy = OpenLoopPolicy("oracle", np.arange(3)[:, None].repeat(14, 1), steps.append)
    policy.reset(task="t", seed=1, instruction="")
    rows = [policy.act(observation(step, 0.0))[0, 0] for step in range(5)]
    assert rows == [0, 1, 2, 2, 2] and steps == [0, 1, 2, 3, 4]


def test_tool_points_and_errors():
    half = np.sqrt(0.5)
    turn = [half, 0, 0, half]  # 90 degrees about z: x becomes y
    assert rotate(np.array(turn), np.array([1.0, 0, 0])) == pytest.approx([0, 1, 0])
    poses = np.zeros((4, 3, 7))
    poses[..., 3] = 1
    poses[:, 1, 3:] = turn
    poses[:, 2, 0] = np.linspace(0, 0.3, 4)
    names = {5: "table", 9: "fl_link6", 12: "fr_link6"}
    points = tool_points(poses, np.array([5, 9, 12]), names)
    assert points[0, 0] == pytest.approx([0, 0.12, 0]) and points[3, 1] == pytest.approx([0.42, 0, 0])
    shifted = points.copy()
    shifted[2:, 1, 2] += 0.01
    shifted[:, 0, 2] += 0.5  # the arm that rests in the recording is left out
    errors = tool_errors(shifted, points)
    assert errors["tool_mm"] == pytest.approx(5.0) and errors["tool_mm_max"] == pytest.approx(10.0)
    assert errors["tool_mm_end"] == pytest.approx(10.0)
    with pytest.raises(UserError, match="fr_link6"):
        tool_points(poses, np.array([5, 9, 12]), {5: "table", 9: "fl_link6"})


def rows_of(task, policy, successes, failures, errors=0):
    kinds = ["success"] * successes + ["failure"] * failures + ["error"] * errors
    return [{"task": task, "policy": policy, "status": s, "seed": 100_000 + i} for i, s in enumerate(kinds)]


def test_summary_counts_intervals_and_tests():
    rows = (
        rows_of("click_bell", "pico", 30, 20, 1)
        + rows_of("click_bell", "noop", 0, 50)
        + rows_of("click_bell", "random", 1, 49)
    )
    rows[0]["joint_deg"], rows[1]["joint_deg"] = 1.0, 3.0
    rows[0]["telemetry"] = {"plans": 3.0}
    summary = summarise(rows)
    entry = summary["tasks"]["click_bell"]["pico"]
    assert (entry["successes"], entry["n"], entry["errors"]) == (30, 50, 1)
    assert entry["rate"] == pytest.approx(0.6) and entry["low"] == pytest.approx(0.4618, abs=1e-3)
    assert entry["against"]["noop"] < 1e-9 and entry["against"]["random"] < 1e-9
    assert entry["joint_deg"] == pytest.approx(2.0) and entry["telemetry"]["plans"] == 3
    assert "noop" not in summary["tasks"]["click_bell"]["noop"]["against"]
    text = markdown(summary, title="Planning", notes=["two threads"])
    assert "| pico | 30/50 | 60 % | 46-72 % | 1 |" in text and "- two threads" in text
    unfinished = summarise(rows_of("t", "pico", 0, 0, 2))["tasks"]["t"]["pico"]
    assert unfinished["rate"] is None and (unfinished["low"], unfinished["high"]) == (0.0, 1.0)


def test_measurement_lines(tmp_path):
    assert seed_range([100_002, 100_000, 100_001]) == "100000-100002" and seed_range([3, 1]) == "1,3"
    line = measurement(
        "planner/oracle/click_bell/success", 0.95, unit="share", n=20, low=0.76, high=0.99, seeds=range(100_000, 100_020),
        against={"black": 0.0}, command="physis eval plan planner.oracle=video",
    )  # fmt: skip
    assert tuple(line) == FIELDS and line["versions"]["torch"] and line["commit"] and "cores" in line["hardware"]
    path = write_measurements(tmp_path / "results.json", [line])
    write_measurements(path, [line | {"value": 0.9}, line | {"claim": "a/b"}])
    stored = json.loads(path.read_text())
    assert [s["claim"] for s in stored] == ["a/b", line["claim"]] and stored[1]["value"] == 0.9
