"""The task list, its registration, and the numbers of a planned motion. No simulator."""

import json
import subprocess
import sys
from importlib.resources import files

import gymnasium
import numpy as np
import pytest

import physisforcing.envs.robotwin  # noqa: F401  (registers the tasks)
from physisforcing.core.errors import UserError
from physisforcing.core.types import PHYSICS_HZ
from physisforcing.envs.robotwin.expert import PlannerConfig, ToppraPlanner, quintic_path
from physisforcing.envs.robotwin.runtime import runtime_installed
from physisforcing.envs.robotwin.tasks import MODEL_TASKS, PACK_TASKS, list_tasks, main, step_limit, task_info

needs_runtime = pytest.mark.skipif(not runtime_installed(), reason="needs the RoboTwin runtime (make setup)")


def test_all_tasks_are_registered():
    ids = {f"RoboTwin/{name}-v0" for name in list_tasks()}
    assert len(ids) == 50 and ids <= set(gymnasium.registry)
    assert set(MODEL_TASKS) <= set(PACK_TASKS) <= set(list_tasks())


@needs_runtime
def test_tasks_are_those_of_the_runtime():
    limits = {name for name in list_tasks() if step_limit(name) > 0}
    modules = {
        p.name.removesuffix(".py") for p in files("robotwin").joinpath("envs").iterdir() if p.name.endswith(".py")
    }
    infrastructure = {"__init__", "_GLOBAL_CONFIGS", "_base_task", "reward", "vector_env"}
    assert limits == set(list_tasks()) == modules - infrastructure
    assert step_limit("click_bell") == 400 and step_limit("stack_blocks_two") == 800


@pytest.mark.parametrize("typo, meant", [("clik_bell", "click_bell"), ("stack_block_two", "stack_blocks_two")])
def test_a_typo_names_the_nearest_task(typo, meant):
    with pytest.raises(UserError, match=f"did you mean '{meant}'"):
        task_info(typo)


@needs_runtime
def test_the_command_prints_json(capsys):
    assert main(["click_bell", "adjust_bottle", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["click_bell", "adjust_bottle"]
    assert rows[0]["step_limit"] == 400 and rows[0]["in_pack"] and rows[0]["in_shipped_model"]
    assert main([]) == 0
    table = capsys.readouterr().out.splitlines()
    assert sum(line.split()[0] in list_tasks() for line in table if line) == 50


def test_registration_imports_no_simulator():
    code = "import sys, physisforcing.envs.robotwin; print([m for m in ('sapien', 'robotwin', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("distance", [0.01, 0.3, 2.0, 6.0])
def test_a_planned_motion_keeps_its_limits_and_rests_at_both_ends(distance):
    config = PlannerConfig()
    start_J, goal_J = np.zeros(6), np.array([distance, -distance / 2, 0, 0, 0.1 * distance, 0])
    position_TJ, velocity_TJ = quintic_path(start_J, goal_J, config)
    np.testing.assert_allclose(position_TJ[-1], goal_J, atol=1e-12)
    np.testing.assert_allclose(velocity_TJ[-1], 0, atol=1e-12)
    assert np.abs(velocity_TJ).max() <= config.max_velocity + 1e-9
    acceleration_TJ = np.diff(velocity_TJ, axis=0, prepend=0) * PHYSICS_HZ
    assert np.abs(acceleration_TJ).max() <= config.max_acceleration * 1.01
    steps = np.diff(np.concatenate([start_J[None], position_TJ]), axis=0) * PHYSICS_HZ
    assert np.abs(steps - velocity_TJ).max() < 0.05 * config.max_velocity, "velocities are those of the positions"
    assert len(position_TJ) >= config.min_steps


def test_time_optimal_parametrisation_of_a_straight_line_is_a_trapezoid():
    path = np.array([[0.0, 0.0], [0.25, -0.1]])
    times, position_TJ, velocity_TJ, _, duration = ToppraPlanner().TOPP(path, 1 / PHYSICS_HZ)
    assert duration == pytest.approx(2 * np.sqrt(0.25), rel=1e-2), "1 rad/s^2 up, then down, never at 1 rad/s"
    np.testing.assert_allclose(position_TJ[-1], path[-1], atol=1e-4)
    assert np.abs(velocity_TJ).max() <= 1.0 and len(times) == int(duration * PHYSICS_HZ)
