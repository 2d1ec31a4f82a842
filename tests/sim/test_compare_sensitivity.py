"""How much a model depends on its condition, measured in the real simulator with models that follow it, ignore it, or do the other thing."""

from __future__ import annotations

import json
import math

import gymnasium
import numpy as np
import pytest

import physisforcing.envs.robotwin  # noqa: F401  (registers the tasks)
from physisforcing.compare import CompareConfig, compare
from physisforcing.compare_sensitivity import _execute, action_pairs, find_moment, instruction_pairs, other_sentence
from physisforcing.core.results import ResultsFile
from physisforcing.core.types import DT

pytestmark = pytest.mark.sim
SEED, STEPS = 100_000, 32
TIMES = np.arange(17) * 2 * DT


@pytest.fixture(scope="module")
def world():
    """The moment, and the pictures of both continuations as a perfect model would imagine them."""
    env = gymnasium.make("RoboTwin/click_bell-v0", disable_env_checker=True).unwrapped
    moment = find_moment(env, SEED, STEPS, diverted=True)
    before = moment.states_RA[1:]
    other = _execute(env, SEED, before, moment.actions[1], expect=None, draw=True)
    env.close()
    assert np.array_equal(other[2][0], moment.real_THWC[0]), "both begin in the same state"
    return moment, (small(moment.real_THWC), small(other[2]))


def small(video_THWC):
    return video_THWC.reshape(len(video_THWC), 120, 2, 160, 2, 3).mean((2, 4)).round().astype(np.uint8)


def test_the_moment_is_one_of_the_experts_path(world):
    moment, _ = world
    assert len(moment.real_THWC) == 17 and moment.observation.step == len(moment.states_RA) - 1 > 10
    np.testing.assert_array_equal(moment.observation.state_A, moment.states_RA[-1])
    assert [chunk.steps for chunk in moment.executed] == [STEPS, STEPS]
    assert np.abs(moment.actions[0] - moment.actions[1]).max() > 0.1


def test_a_model_that_follows_actions_is_nearer_to_its_own_execution(world):
    moment, videos = world

    def follows(_, actions_PA):
        return videos[0 if np.array_equal(actions_PA, moment.actions[0]) else 1], TIMES

    def contrary(_, actions_PA):
        return videos[1 if np.array_equal(actions_PA, moment.actions[0]) else 0], TIMES

    arms = [pair for pair in action_pairs(follows, moment, "") if pair["kind"] == "action (arm)"]
    assert len(arms) == 2 and all(pair["own"] < 0.5 * pair["other"] for pair in arms), arms
    wrong = [pair for pair in action_pairs(contrary, moment, "") if pair["kind"] == "action (arm)"]
    assert all(pair["own"] > pair["other"] for pair in wrong), wrong


def test_a_model_that_ignores_the_sentence_is_nearer_to_nothing(world):
    moment, (real, _) = world
    sentence = other_sentence("click_bell", ["click_bell"])
    assert sentence != moment.observation.instruction
    still = np.repeat(real[:1], 17, axis=0)

    def follows(text):
        return (real if text == moment.observation.instruction else still), TIMES

    arm = instruction_pairs(follows, moment, sentence)[0]
    assert arm["kind"] == "instruction (arm)" and arm["own"] < 0.3 * arm["other"], arm
    ignored = instruction_pairs(lambda _: (real, TIMES), moment, sentence)[0]
    assert ignored["own"] == ignored["other"]


def test_a_comparison_reports_it(tmp_path):
    """A text model, an action model that cannot be planned with, and one that has no condition."""
    config = CompareConfig(
        models={
            "shipped": "shipped",
            "acting": "tests_models_of_sensitivity:Acting",
            "still": "physisforcing.envs.control_models:FrozenFrame",
        },
        episodes=1,
        sensitivity=1,
        controls=["noop"],
        max_steps=4,
        threads=1,
        videos=0,
        output=str(tmp_path / "run"),
    )
    config.planner.denoising_steps = 1
    code = (
        "import dataclasses, numpy as np\n"
        "from physisforcing.core.types import ActionSpec\n"
        "from physisforcing.envs.control_models import FrozenFrame\n"
        "class Acting(FrozenFrame):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        spec = ActionSpec(names=tuple('abcdefghijklmn'), low=(-9.,) * 14, high=(9.,) * 14)\n"
        "        self.spec = dataclasses.replace(self.spec, conditions=frozenset({'actions'}), action_spec=spec, name='acting')\n"
    )
    (tmp_path / "tests_models_of_sensitivity.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        summary = compare(config, progress=False)
    assert {cell["model"] for cell in summary["success"]} == {"shipped", "still", "noop"}
    assert summary["skipped"]["acting in closed loop"].startswith("a planner that gives it actions")
    assert "instruction or actions" in summary["skipped"]["sensitivity of still"]
    rows = {(row["model"], row["kind"]): row for row in summary["sensitivity"]}
    assert rows["shipped", "instruction (arm)"]["n"] + rows["shipped", "instruction (arm)"]["missing"] == 1
    acting = rows["acting", "action (arm)"]
    assert acting["n"] == 2 and math.isfinite(acting["margin"]) and summary["errors"] == 0
    for name in ("report.md", "report.html"):
        page = (tmp_path / "run" / name).read_text(encoding="utf-8")
        assert "Sensitivity to actions and instructions" in page and "action (arm)" in page
    claims = {line["claim"] for line in json.loads((tmp_path / "run" / "measurements.json").read_text())}
    assert "compare/interpolated/acting/click_bell/sensitivity/action/arm" in claims
    kept = ResultsFile(tmp_path / "run" / "sensitivity" / "results.jsonl").rows
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        again = compare(config, progress=False)
    assert ResultsFile(tmp_path / "run" / "sensitivity" / "results.jsonl").rows == kept
    assert again["sensitivity"] == summary["sensitivity"]
    config.sensitivity, config.models = 0, {"still": config.models["still"]}
    assert compare(config, progress=False)["sensitivity"] == []
