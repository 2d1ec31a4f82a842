"""Policies inside a world model: who drives whom, when, and what success there says about success elsewhere."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from physisforcing.core.errors import IncompleteCoverageError, MissingCapabilityError, UserError
from physisforcing.core.lerobot import HEAD, LeRobotDataset, LeRobotWriter, robot_features
from physisforcing.core.stats import pearson_interval, wilson
from physisforcing.core.types import DT, ActionSpec, Observation, Rollout, RolloutRequest, ViewLayout, WorldModelSpec
from physisforcing.core.video import probe_mp4
from physisforcing.envs.baselines import NoOp, Random, Replay
from physisforcing.eval_evaluator import EvaluatorConfig, evaluate, main
from physisforcing.evaluator_episodes import noisy_targets
from physisforcing.evaluator_simulator import real_results
from physisforcing.planner.action_planner import noise_seed
from physisforcing.planner.evaluator_config import JudgeSettings, PolicyInModelConfig
from physisforcing.planner.evaluator_frames import read_strip, write_strip
from physisforcing.planner.evaluator_summary import markdown, measurements, published_markdown, summarise
from physisforcing.planner.judges import JudgeRequest
from physisforcing.planner.policy_evaluator import PolicyInModel, Start, target_frames
from physisforcing.planner.video_decoding import OpenLoopPolicy

NAMES = tuple(f"joint{k}" for k in range(14))


class Meter:
    """An action-conditioned world model whose pictures show joint 0: every pixel has grey level 100 * u_0, at every second step."""

    def __init__(
        self, horizons: tuple[int, ...] = (5,), stride: int = 1, text: bool = False, lags: tuple[int, ...] = ()
    ) -> None:
        self.requests: list[RolloutRequest] = []
        spec = ActionSpec(names=NAMES, low=(-3.0,) * 14, high=(3.0,) * 14, dt=stride * DT)
        self.spec = WorldModelSpec(
            name="meter",
            views=ViewLayout(height=12, width=16),
            context_frames=1,
            horizons=horizons,
            frame_dt=2 * DT,
            conditions=frozenset({"text", "proprioception"} if text else {"actions"}),
            returns=frozenset({"frames"}),
            proprioception_lags=lags,
            action_spec=None if text else spec,
            fingerprint="meter-1",
        )
        self.stride = stride

    def rollout(self, request: RolloutRequest) -> Rollout:
        self.requests.append(request)
        context = request.context_BVTHWC[0, 0, 0]
        if request.actions_BSPA is None:
            assert request.proprioception_BKA is not None
            levels = np.full(request.horizon - 1, request.proprioception_BKA[0, 0, 0])
        else:
            levels = request.actions_BSPA[0, 0, :, 0].repeat(self.stride)[1::2]
            assert len(levels) == request.horizon - 1
        later = [np.full_like(context, round(100 * float(level))) for level in levels]
        frames = np.stack([context, *later])
        return Rollout(
            times_T=np.arange(len(frames)) * self.spec.frame_dt,
            frames_BSVTHWC=frames[None, None, None],
            cost={"seconds": 2.0},
        )


class Counting:
    """A policy that counts its rows in joint 0, ``chunk`` at a time, and remembers what it saw."""

    fingerprint = "counting"

    def __init__(self, chunk: int) -> None:
        self.chunk, self.seen, self.given = chunk, [], 0

    def reset(self, *, task: str, seed: int, instruction: str) -> None:
        self.seen, self.given = [], 0

    def act(self, observation: Observation) -> np.ndarray:
        self.seen.append((observation.step, int(observation.images["head"][0, 0, 0]), float(observation.state_A[0])))
        rows = np.zeros((self.chunk, 14), np.float32)
        rows[:, 0] = (self.given + 1 + np.arange(self.chunk)) / 100
        self.given += self.chunk
        return rows

    def telemetry(self) -> dict[str, float]:
        return {}


def start(steps: int = 20, **changes: Any) -> Start:
    values = {
        "task": "click_bell",
        "seed": 100_003,
        "instruction": "click",
        "picture_HW3": np.zeros((24, 32, 3), np.uint8),
        "state_A": np.zeros(14, np.float32),
        "steps": steps,
    }
    return Start(**(values | changes))


# ------------------------------------------------------------------------------------------------------------- in the model


def test_the_policy_drives_the_model_and_sees_what_follows() -> None:
    model, policy = Meter(), Counting(8)
    made = PolicyInModel(model).run(policy, start(20))
    # 1.2 * 20 control steps at two a picture: 12 pictures, three rollouts of 4 new ones, cut.
    assert len(made.frames_THWC) == 12 and made.frames_THWC.shape[1:] == (12, 16, 3)
    assert made.frames_THWC[:, 0, 0, 0].tolist() == list(range(0, 24, 2)), "each picture shows the command of its step"
    np.testing.assert_allclose(made.commands_PA[:, 0], np.arange(1, 25) / 100, atol=1e-6)
    assert [row[0] for row in policy.seen] == [0, 8, 16]
    assert [row[1] for row in policy.seen] == [0, 8, 16], "the policy sees the last imagined picture"
    assert [round(100 * row[2]) for row in policy.seen] == [0, 8, 16], "and the joints that it commanded"
    assert made.telemetry == {
        "policy_calls": 3,
        "stale_calls": 0,
        "dropped_rows": 0,
        "rollouts": 3,
        "imagination_s": 6.0,
    }
    second = model.requests[1]
    assert (second.context_BVTHWC == 8).all() and second.context_BVTHWC.shape == (1, 1, 1, 12, 16, 3)
    assert second.ids == [("click_bell", 100_003, 1)] and second.instructions == ["click"]


def test_what_is_too_short_for_a_rollout_is_dropped_or_kept() -> None:
    """A policy of 20 rows and a model of 8: two rollouts, then 4 rows are left."""
    dropping, keeping = Counting(20), Counting(20)
    dropped = PolicyInModel(Meter()).run(dropping, start(30))
    kept = PolicyInModel(Meter(), PolicyInModelConfig(remainder="keep")).run(keeping, start(30))
    assert dropped.telemetry["dropped_rows"] == 8 and dropped.telemetry["policy_calls"] == 3
    np.testing.assert_allclose(
        100 * dropped.commands_PA[:, 0], [*range(1, 17), *range(21, 37), *range(41, 49)], atol=1e-4
    )
    assert [row[0] for row in dropping.seen] == [0, 16, 32] and [row[1] for row in dropping.seen] == [0, 16, 36]
    np.testing.assert_allclose(100 * kept.commands_PA[:, 0], range(1, 41), atol=1e-4)
    assert kept.telemetry["dropped_rows"] == 0
    assert keeping.seen[1][:2] == (20, 16), (
        "it is told the step where its new rows begin, and the last picture there is"
    )


def test_a_policy_with_short_chunks_is_asked_again_and_that_is_counted() -> None:
    policy = Counting(3)
    made = PolicyInModel(Meter()).run(policy, start(7))
    np.testing.assert_allclose(100 * made.commands_PA[:8, 0], range(1, 9), atol=1e-4)
    assert made.telemetry["policy_calls"] == 3 and made.telemetry["stale_calls"] == 2 and len(made.frames_THWC) == 5
    assert [row[0] for row in policy.seen] == [0, 3, 6] and {row[1] for row in policy.seen} == {0}


def test_a_recording_is_played_exactly() -> None:
    actions = np.zeros((21, 14), np.float32)
    actions[:, 0] = np.sin(np.arange(21) / 5) ** 2
    made = PolicyInModel(Meter()).run(OpenLoopPolicy("recorded", actions), start(21))
    np.testing.assert_array_equal(made.commands_PA[:21], actions)
    np.testing.assert_array_equal(made.commands_PA[21:], actions[[-1, -1, -1]])
    # The same recording as one long chunk: WorldArena's rule loses its end, keeping the queue does not.
    lost = PolicyInModel(Meter()).run(Replay(actions), start(21)).commands_PA
    kept = PolicyInModel(Meter(), PolicyInModelConfig(remainder="keep")).run(Replay(actions), start(21)).commands_PA
    assert (lost[16:] == actions[-1]).all() and (lost[16:21] != actions[16:21]).any()
    np.testing.assert_array_equal(kept[:21], actions)


def test_the_longest_rollout_is_taken_and_coarser_actions_are_ends() -> None:
    model = Meter(horizons=(5, 9), stride=2)
    PolicyInModel(model).run(Counting(16), start(10))
    actions = model.requests[0].actions_BSPA
    assert actions is not None and actions.shape == (1, 1, 8, 14)
    np.testing.assert_allclose(100 * actions[0, 0, :, 0], range(2, 17, 2), atol=1e-4)


def test_noise_is_the_same_for_every_policy() -> None:
    seeds = []
    for policy, seed in ((Counting(8), 0), (NoOp(), 0), (Counting(8), 1)):
        model = Meter()
        PolicyInModel(model, PolicyInModelConfig(seed=seed)).run(policy, start(12))
        seeds.append([int(request.seeds_BS[0, 0]) for request in model.requests])
    assert seeds[0] == seeds[1] and len({*seeds[0], *seeds[2]}) == 4
    assert seeds[0][1] == noise_seed(noise_seed(0, 100_003, 0), 1, 0)


def test_by_text_the_policy_only_moves_where_rollouts_start() -> None:
    with pytest.raises(MissingCapabilityError, match="condition actions"):
        PolicyInModel(Meter(text=True, lags=(0, 4)))
    with pytest.raises(MissingCapabilityError, match="any influence"):
        PolicyInModel(Meter(text=True), PolicyInModelConfig(conditioning="text"))
    model = Meter(text=True, lags=(0, 4))
    made = PolicyInModel(model, PolicyInModelConfig(conditioning="text")).run(Counting(8), start(20))
    assert made.frames_THWC[:, 0, 0, 0].tolist() == [0] * 5 + [8] * 4 + [16] * 3
    third = model.requests[2]
    assert third.actions_BSPA is None and third.proprioception_BKA is not None
    np.testing.assert_allclose(100 * third.proprioception_BKA[0, :, 0], [16, 12], atol=1e-4)


def test_what_a_model_knows_to_be_true_is_kept() -> None:
    class Knows(Meter):
        def rollout(self, request: RolloutRequest) -> Rollout:
            made = super().rollout(request)
            made.cost |= {"success": float(len(self.requests) == 2), "success_s": 0.06}
            return made

    assert PolicyInModel(Knows()).run(Counting(8), start(20)).truth == {"success": True}, "success latches"
    assert PolicyInModel(Knows()).run(Counting(8), start(5)).truth == {"success": False}
    assert PolicyInModel(Meter()).run(Counting(8), start(20)).truth == {}


@pytest.mark.parametrize(("step", "told"), [(2, True), (4, True), (5, False), (8, False), (None, "unknown")])
def test_truth_is_that_of_the_video_which_is_judged(step: int | None, told: bool | str) -> None:
    """11 pictures: 5, 4, and of the last rollout of 8 steps 2 pictures, so that its last four steps are not shown."""

    class Late(Meter):
        def rollout(self, request: RolloutRequest) -> Rollout:
            made = super().rollout(request)
            made.cost["success"] = float(len(self.requests) == 3)
            if step is not None and made.cost["success"]:
                made.cost["success_s"] = step * DT
            return made

    made = PolicyInModel(Late()).run(Counting(8), start(18))
    shown = len(made.frames_THWC) - 9
    assert shown == 2, "pictures of the third rollout, two control steps each"
    assert made.truth == ({} if told == "unknown" else {"success": told})


def test_lengths() -> None:
    assert target_frames(143, 3 * DT, 1.2) == 58, "the example of WorldArena's page"
    assert target_frames(20, 2 * DT, 1.2) == 12 and target_frames(1, 2 * DT, 1.0) == 2
    for steps in range(1, 300):
        assert target_frames(steps, DT, 1.2) == max(2, math.ceil(round(1.2 * steps, 9)))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"conditioning": "action"}, "did you mean 'actions'"),
        ({"remainder": "hold"}, "remainder"),
        ({"length_scale": 0.0}, "length_scale"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        PolicyInModel(Meter(), PolicyInModelConfig(**changes))


def test_models_and_policies_that_do_not_fit() -> None:
    slow = Meter()
    slow.spec.frame_dt = 0.1
    with pytest.raises(MissingCapabilityError, match="frame_dt"):
        PolicyInModel(slow)
    with pytest.raises(MissingCapabilityError, match="dt"):
        PolicyInModel(Meter(stride=3))
    two = Meter()
    two.spec.views = ViewLayout(names=("head", "wrist"), height=12, width=16)
    with pytest.raises(MissingCapabilityError, match="one view"):
        PolicyInModel(two).run(NoOp(), start())

    class Wrong(NoOp):
        def act(self, observation: Observation) -> np.ndarray:
            return np.zeros((2, 7), np.float32)

    with pytest.raises(UserError, match=r"policy\.act"):
        PolicyInModel(Meter()).run(Wrong(), start())


# ------------------------------------------------------------------------------------------------------------------ summary


def rows(policy: str, success: int, failure: int, error: int = 0) -> list[dict[str, Any]]:
    kinds = ["success"] * success + ["failure"] * failure + ["error"] * error
    return [{"policy": policy, "status": kind} for kind in kinds]


FIVE = [*rows("a", 1, 9), *rows("b", 3, 7), *rows("c", 4, 6), *rows("d", 8, 2), *rows("e", 9, 1)]
REAL = {"a": (2, 20), "b": (5, 20), "c": (11, 20), "d": (12, 20), "e": (19, 20)}


def test_the_correlation_is_scipys() -> None:
    found = summarise(FIVE, REAL)
    part = found["correlation"]["valid_only"]
    x, y = [0.1, 0.3, 0.4, 0.8, 0.9], [0.1, 0.25, 0.55, 0.6, 0.95]
    assert part["pearson_r"] == pytest.approx(scipy.stats.pearsonr(x, y).statistic)
    assert part["fisher"] == pytest.approx(tuple(scipy.stats.pearsonr(x, y).confidence_interval(0.95)))
    assert part["kendall_tau"] == pytest.approx(scipy.stats.kendalltau(x, y).statistic) == 1.0
    assert part["kendall_p"] == pytest.approx(scipy.stats.kendalltau(x, y, method="exact").pvalue)
    every = [abs(scipy.stats.pearsonr(x, order).statistic) for order in itertools.permutations(y)]
    as_far = sum(value >= part["pearson_r"] - 1e-9 for value in every)
    assert part["permutation_p"] == as_far / 120 and part["mean_bias"] == pytest.approx(0.01)
    assert part["bootstrap_policies"][0] <= part["pearson_r"] <= part["bootstrap_policies"][1]
    assert part["bootstrap_episodes"][0] < part["pearson_r"] < part["bootstrap_episodes"][1]
    assert summarise(FIVE, REAL) == found and summarise(FIVE, REAL, seed=1) != found, "the seed decides"
    assert part["n"] == 5 and "n=5 policies" in found["warnings"][0]
    b = found["policies"]["b"]
    assert (b["valid_only"]["low"], b["valid_only"]["high"]) == wilson(3, 10) and b["bias"] == pytest.approx(0.05)


def test_errors_are_counted_in_two_ways_and_never_dropped() -> None:
    found = summarise([*FIVE[10:], *rows("a", 1, 4, 5), *rows("f", 0, 0, 3)], REAL | {"f": (1, 2)})
    a = found["policies"]["a"]
    assert a["valid_only"]["rate"] == 0.2 and a["errors_as_failures"]["rate"] == 0.1 and a["errors"] == 5
    assert found["correlation"]["valid_only"]["n"] == 5, "f has no verdict at all"
    assert found["correlation"]["errors_as_failures"]["n"] == 6
    assert any("8 of 53 verdicts are errors" in text for text in found["warnings"])
    assert found["policies"]["f"]["valid_only"]["rate"] is None
    assert "| f | - | - | 3 | 1/2 = 50 %" in markdown(found, title="t")


def test_what_cannot_be_said_is_skipped() -> None:
    two = summarise(FIVE[:20], REAL)["correlation"]["valid_only"]
    assert two == {"skipped": "needs 3 policies with verdicts and simulator results, has 2"}
    none = summarise(FIVE, {})
    assert "has 0" in none["correlation"]["valid_only"]["skipped"] and none["policies"]["a"]["real"] is None
    assert any("no simulator results of a, b" in text for text in none["warnings"])
    same = summarise([*rows("a", 0, 9), *rows("b", 0, 9), *rows("c", 0, 9)], REAL)["correlation"]["valid_only"]
    assert same["skipped"] == "needs policies that differ: all have rate 0.00 in the world model"
    assert "skipped: needs policies that differ" in markdown(
        summarise(FIVE[:1] * 3, {}) | {"correlation": {"valid_only": same}}, title="t"
    )


def test_the_judge_against_the_truth() -> None:
    told = [("success", True)] * 3 + [("failure", True), ("failure", False), ("success", False), ("error", False)]
    found = summarise([{"policy": "a", "status": s, "truth": {"success": t}} for s, t in told], {})
    assert found["judge"]["successes_seen"]["rate"] == 0.75 and found["judge"]["failures_seen"]["rate"] == 0.5
    assert found["judge"]["balanced_accuracy"] == 0.625 and (found["judge"]["n"], found["judge"]["errors"]) == (6, 1)
    assert "failures called failure: 1/2 = 50 % (95 % 9-91 %)" in markdown(found, title="t")
    assert summarise(FIVE, REAL)["judge"] is None
    assert (
        summarise([{"policy": "a", "status": "success", "truth": {"success": True}}], {})["judge"]["balanced_accuracy"]
        is None
    )


def test_lines_and_tables() -> None:
    found = summarise(FIVE, REAL)
    provenance = {"commit": "c", "hardware": "h", "versions": {}, "date": "d"}
    lines = {x["claim"]: x for x in measurements(found, model="meter", command="x", provenance=provenance)}
    r = lines["planner/evaluator/meter/valid_only/pearson_r"]
    assert (
        (r["low"], r["high"]) == pearson_interval(r["value"], 5) and r["n"] == 5 and r["against"]["kendall_tau"] == 1.0
    )
    assert lines["planner/evaluator/meter/b/success"]["against"] == {"errors": 0, "simulator": 0.25}
    text = markdown(found, title="Policies", notes=["a note"])
    assert "| b | 3/10 = 30 % | 11-60 % | 0 | 5/20 = 25 % | 11-47 % | +5 |" in text and "- a note" in text
    published = published_markdown()
    assert "| Ctrl-World | 0.986 | 0.80 to 1.00 |" in published and "(not measured here)" in published


# -------------------------------------------------------------------------------------------------------------- the command


def bright_at_the_end(request: JudgeRequest) -> bool:
    """Rule of a scripted judge: success is a bright last picture."""
    assert len(request.rollout_THWC) == 5 == len(request.reference_THWC)  # type: ignore[arg-type]
    return bool(request.rollout_THWC[-1].mean() > 50)


def hand_raised() -> OpenLoopPolicy:
    """A policy factory."""
    return OpenLoopPolicy("raised", np.full((4, 14), 0.9, np.float32))


MADE: list[Meter] = []


def make_meter() -> Meter:
    """A world-model factory; views of the size of the demonstrations below."""
    model = Meter()
    model.spec.views = ViewLayout(height=16, width=24)
    MADE.append(model)
    return model


def write_demonstrations(root: Path, first_seed: int, count: int = 3) -> Path:
    writer = LeRobotWriter(root, robot_features(NAMES, height=16, width=24))
    length = 11
    joints = np.repeat(np.linspace(0, 1, length, dtype=np.float32)[:, None], 14, axis=1)
    action = np.concatenate([joints[1:], joints[-1:]])
    for seed in range(first_seed, first_seed + count):
        writer.add_episode(
            columns={
                "observation.state": joints,
                "observation.state_measured": joints,
                "action": action,
                "next.success": np.arange(length) == length - 1,
            },
            frames={HEAD: np.zeros((length, 16, 24, 3), np.uint8)},
            instruction="click the bell",
            task_name="click_bell",
            seed=seed,
            success=True,
        )
    return writer.finalize()


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EvaluatorConfig:
    import sys

    monkeypatch.setitem(sys.modules, "my_parts", sys.modules[__name__])
    MADE.clear()
    return EvaluatorConfig(
        world_model="my_parts:make_meter",
        demos=str(write_demonstrations(tmp_path / "demos", 100_000)),
        episodes=3,
        policies=["noop", "recorded", "recorded+0.05", "my_parts:hand_raised"],
        judge=JudgeSettings(kind="scripted", rule="my_parts:bright_at_the_end"),
        output=str(tmp_path / "out"),
        threads=1,
        videos=1,
    )


def test_an_evaluation_from_videos_to_correlation(config: EvaluatorConfig, tmp_path: Path) -> None:
    table = {"noop": [0, 10], "recorded": [9, 10], "recorded+0.05": [7, 10], "my_parts:hand_raised": [10, 10]}
    (tmp_path / "real.json").write_text(json.dumps(table))
    config.real = str(tmp_path / "real.json")
    summary = evaluate(config, progress=False)
    rates = {name: entry["valid_only"]["rate"] for name, entry in summary["policies"].items()}
    assert rates == {"noop": 0.0, "recorded": 1.0, "recorded+0.05": 1.0, "my_parts:hand_raised": 1.0}
    expected = scipy.stats.pearsonr([0, 1, 1, 1], [0, 0.9, 0.7, 1.0]).statistic
    assert summary["correlation"]["valid_only"]["pearson_r"] == pytest.approx(expected)
    text = (tmp_path / "out/summary.md").read_text()
    assert "world model meter meter-1, driven by actions; judge my_parts:bright_at_the_end" in text
    assert (
        "Ctrl-World" in text.partition("(not measured here)")[2]
        and "Ctrl-World" not in text.partition("(not measured here)")[0]
    )
    videos = sorted((tmp_path / "out/videos").glob("*.mp4"))
    assert len(videos) == 4, "one a policy"
    comment = probe_mp4(videos[0]).metadata["comment"]
    assert comment.startswith("generated by meter meter-1, driven by") and "episode seed 100000" in comment
    # The same command again: nothing is imagined or judged.
    before = (tmp_path / "out/results.jsonl").read_bytes()
    again = evaluate(config, progress=False)
    assert again["policies"] == summary["policies"] and not MADE[-1].requests
    assert (tmp_path / "out/results.jsonl").read_bytes() == before


def test_imagined_first_and_judged_later(config: EvaluatorConfig, tmp_path: Path) -> None:
    config.judge.kind = "none"
    first = evaluate(config, progress=False)
    assert first["policies"] == {} and "nothing was judged" in first["warnings"][-1]
    assert len(list((tmp_path / "out/frames").glob("*.png"))) == 12 and len(MADE[0].requests) == 24
    config.judge.kind = "scripted"
    second = evaluate(config, progress=False)
    assert not MADE[1].requests, "the pictures are there"
    assert second["policies"]["recorded"]["valid_only"]["successes"] == 3
    row = json.loads((tmp_path / "out/results.jsonl").read_text().splitlines()[0])
    reference, rollout, about = read_strip(tmp_path / "out" / row["frames"])
    assert reference.shape == rollout.shape == (5, 16, 24, 3) and about["telemetry"]["rollouts"] == 2
    assert row["label"] == about["label"] and row["imagined_frames"] == 7


def test_replay_without_a_log_counts_errors(config: EvaluatorConfig, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("")
    config.judge = JudgeSettings(kind="replay", model="vlm-1", log=str(log))
    config.policies = ["noop", "recorded"]
    summary = evaluate(config, progress=False)
    assert all(entry["errors"] == 3 and entry["valid_only"]["n"] == 0 for entry in summary["policies"].values())
    assert any("6 of 6 verdicts are errors" in text for text in summary["warnings"])
    words = [
        f"demos={config.demos}",
        f"output={config.output}",
        f"judge.log={log}",
        "judge.kind=replay",
        "judge.model=vlm-1",
    ]
    words += ["world_model=my_parts:make_meter", "policies=[noop,recorded]", "episodes=3"]
    with pytest.raises(IncompleteCoverageError, match="6 verdicts are errors"):
        main(words)


def test_a_killed_evaluation_goes_on(config: EvaluatorConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(config, progress=False)
    config.output = str(tmp_path / "killed")
    run, done = PolicyInModel.run, []

    def killed(self: PolicyInModel, *arguments: Any) -> Any:
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(1)
        return run(self, *arguments)

    monkeypatch.setattr(PolicyInModel, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, progress=False)
    monkeypatch.setattr(PolicyInModel, "run", run)
    assert evaluate(config, progress=False)["policies"] == whole["policies"]
    assert len(MADE[-1].requests) == 2 * 7, "five of twelve were there"


def test_a_policy_that_breaks_is_an_error(config: EvaluatorConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, observation: Observation) -> np.ndarray:
        raise RuntimeError("no hand")

    monkeypatch.setattr(NoOp, "act", broken)
    config.policies = ["noop", "recorded"]
    summary = evaluate(config, progress=False)
    assert summary["policies"]["noop"]["errors"] == 3 and summary["policies"]["recorded"]["errors"] == 0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"demos": ""}, "held-out demonstrations"),
        ({"policies": ["noop", "noop"]}, "different policies"),
        ({"policies": ["noup"]}, "did you mean 'noop'"),
        ({"policies": ["recorded+x"]}, "RADIANS"),
        ({"policies": ["retrieval"]}, "train_demos"),
        ({"episodes": 4}, "3 of click_bell"),
        ({"tasks": ["press_stapler"]}, "0 of press_stapler"),
        ({"judge": JudgeSettings(kind="opnai")}, "did you mean 'openai'"),
        ({"judge": JudgeSettings(kind="openai")}, r"judge\.model"),
        ({"judge": JudgeSettings(kind="scripted", rule="my_parts")}, "module:function"),
        ({"real": "nowhere"}, "real"),
    ],
)
def test_mistakes_are_named(config: EvaluatorConfig, changes: dict[str, Any], match: str) -> None:
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(UserError, match=match):
        evaluate(config, progress=False)


def test_scenes_that_were_trained_on_are_refused(config: EvaluatorConfig, tmp_path: Path) -> None:
    config.demos = str(write_demonstrations(tmp_path / "trained", 7))
    with pytest.raises(UserError, match="nobody trained on"):
        evaluate(config, progress=False)


def test_real_results_are_of_the_same_scenes(config: EvaluatorConfig, tmp_path: Path) -> None:
    from physisforcing.core.results import ResultKey, ResultsFile

    results = ResultsFile(tmp_path / "plan/results.jsonl")
    for policy in ("noop", "recorded", "other"):
        for seed, status in ((100_000, "success"), (100_001, "failure"), (100_002, "error"), (100_009, "success")):
            key = ResultKey(manifest="m", episode=f"click_bell/{seed}", fingerprint=policy, config="c")
            results.append(key, status, task="click_bell", policy=policy, seed=seed)
    config.real = str(tmp_path / "plan")
    starts = {("click_bell", seed): None for seed in range(100_000, 100_003)}
    setting: Any = type("Setting", (), {"config": config, "starts": starts})
    assert real_results(setting, progress=False) == {"noop": (1, 2), "recorded": (1, 2)}
    config.policies = ["random"]
    with pytest.raises(UserError, match="same policies and seeds"):
        real_results(setting, progress=False)
    for bad in ("[1]", '{"noop": [3, 2]}', '{"noop": 1}', "{"):
        (tmp_path / "bad.json").write_text(bad)
        config.real = str(tmp_path / "bad.json")
        with pytest.raises(UserError, match="real"):
            real_results(setting, progress=False)


def test_noise_of_recorded_actions() -> None:
    targets = np.zeros((41, 14), np.float32)
    noisy = noisy_targets(targets, 0.05, 100_000)
    np.testing.assert_array_equal(noisy, noisy_targets(targets, 0.05, 100_000))
    assert (noisy[:, [6, 13]] == 0).all() and (noisy[0] == noisy[3]).all() and (noisy[3] != noisy[4]).any()
    assert noisy[:, :6].std() == pytest.approx(0.05, rel=0.35) and noisy_targets(targets, 0.0, 1) is targets
    assert (noisy != noisy_targets(targets, 0.05, 100_001)).any()


def test_strips_come_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    reference, rollout = (rng.integers(0, 256, (n, 6, 8, 3), dtype=np.uint8) for n in (2, 5))
    write_strip(tmp_path / "a.png", reference, rollout, {"label": "x", "telemetry": {"rollouts": 3.0}})
    back = read_strip(tmp_path / "a.png")
    np.testing.assert_array_equal(back[0], reference)
    np.testing.assert_array_equal(back[1], rollout)
    assert back[2] == {"label": "x", "telemetry": {"rollouts": 3.0}}
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    with pytest.raises(UserError, match=r"a\.png"):
        read_strip(tmp_path / "a.png")


def test_random_uses_the_robots_limits(config: EvaluatorConfig) -> None:
    config.policies = ["random", "noop"]
    evaluate(config, progress=False)
    commands = MADE[0].requests[0].actions_BSPA
    spec = MADE[0].spec.action_spec
    assert commands is not None and spec is not None
    first = Random(spec)
    first.reset(task="click_bell", seed=100_000, instruction="")
    state = LeRobotDataset(config.demos).columns(0)["observation.state"][0]
    seen = Observation(images={}, state_A=state, measured_A=state, instruction="", step=0)
    np.testing.assert_allclose(commands[0, 0], first.act(seen)[:8], atol=1e-6)
