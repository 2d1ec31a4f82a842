"""``physis eval evaluator real=simulate``: the policies that acted in the model act in RoboTwin, in the same scenes."""

import sys

import numpy as np
import pytest

from physisforcing.core.types import DT, ActionSpec, Rollout, ViewLayout, WorldModelSpec
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


def test_success_in_the_simulator_is_that_of_the_same_scenes(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluator_parts", sys.modules[__name__])
    demos = tmp_path / "demos"
    collect(CollectConfig(output=str(demos), tasks=[TASK], episodes=1, start_seed=100_000, workers=0), progress=False)
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
