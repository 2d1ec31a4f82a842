"""``physis eval evaluator real=simulate``: the policies that acted in the model act in RoboTwin, in the same scenes."""

import sys

import numpy as np
import pytest

from physisforcing.core.lerobot import LeRobotDataset
from physisforcing.core.pictures import shrink_area
from physisforcing.core.types import DT, ActionSpec, Rollout, ViewLayout, WorldModelSpec
from physisforcing.core.video import read_mp4
from physisforcing.envs.collect import CollectConfig, collect
from physisforcing.eval_evaluator import EvaluatorConfig, evaluate
from physisforcing.planner.evaluator_config import JudgeSettings

pytestmark = pytest.mark.sim
TASK = "click_bell"


class Still:
    """An action model that imagines nothing new."""

    spec = WorldModelSpec(
        name="still",
        views=ViewLayout(),
        context_frames=1,
        horizons=(9,),
        frame_dt=2 * DT,
        conditions=frozenset({"actions"}),
        returns=frozenset({"frames"}),
        action_spec=ActionSpec(names=("a",) * 14, low=(-3.0,) * 14, high=(3.0,) * 14),
        fingerprint="still-1",
    )

    def rollout(self, request):
        frames = np.repeat(request.context_BVTHWC[:, None], request.horizon, axis=3)
        return Rollout(times_T=np.arange(request.horizon) * self.spec.frame_dt, frames_BSVTHWC=frames)


def ever_true(request):
    return True


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluator") / "demos"
    collect(CollectConfig(output=str(root), tasks=[TASK], episodes=1, start_seed=100_000, workers=0), progress=False)
    return root


def test_the_simulator_in_the_place_of_the_model(demos, tmp_path):
    """Recorded actions do in the loop what they did when they were recorded, picture by picture."""
    config = EvaluatorConfig(
        world_model="simulator",
        demos=str(demos),
        episodes=1,
        policies=["noop", "recorded"],
        judge=JudgeSettings(kind="scripted", rule="truth"),
        output=str(tmp_path / "out"),
        threads=1,
        videos=1,
    )
    summary = evaluate(config, progress=False)
    assert [summary["policies"][name]["valid_only"]["rate"] for name in ("noop", "recorded")] == [0.0, 1.0]
    assert summary["judge"]["balanced_accuracy"] == 1.0 and summary["judge"]["n"] == 2
    recorded = LeRobotDataset(demos).frames(0)
    video = read_mp4(next((tmp_path / "out/videos").glob("*recorded*.mp4")))
    assert len(video) == -(-12 * len(recorded) // 20)
    for place in (1, 10, len(recorded) // 2 - 1):
        far = np.abs(video[place].astype(int) - shrink_area(recorded[[2 * place]], 2)[0])
        assert far.mean() < 2.0, place
    moved = np.abs(video[0].astype(int) - video[20]).mean()
    assert moved > 4.0, "and the pictures do change"


def test_success_in_the_simulator_is_that_of_the_same_scenes(demos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluator_parts", sys.modules[__name__])
    config = EvaluatorConfig(
        world_model="evaluator_parts:Still",
        demos=str(demos),
        episodes=1,
        policies=["noop", "recorded"],
        real="simulate",
        judge=JudgeSettings(kind="scripted", rule="evaluator_parts:ever_true"),
        output=str(tmp_path / "out"),
        threads=1,
    )
    summary = evaluate(config, progress=False)
    assert summary["real"] == {"noop": (0, 1), "recorded": (1, 1)}
    assert summary["policies"]["noop"]["bias"] == 1.0 and summary["policies"]["recorded"]["bias"] == 0.0
    assert "needs 3 policies" in summary["correlation"]["valid_only"]["skipped"]
    before = (tmp_path / "out/simulator/results.jsonl").read_bytes()
    assert evaluate(config, progress=False)["real"] == summary["real"]
    assert (tmp_path / "out/simulator/results.jsonl").read_bytes() == before, "no episode runs again"
