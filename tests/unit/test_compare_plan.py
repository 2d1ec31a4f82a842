"""What ``physis compare`` refuses before a simulator starts: names used twice, and demonstrations of other scenes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from physisforcing.compare import CompareConfig
from physisforcing.compare_controls import check_demonstrations
from physisforcing.core.errors import DatasetError, UserError
from physisforcing.core.lerobot import HEAD, LeRobotWriter, robot_features
from physisforcing.envs.collect import CollectConfig
from physisforcing.plan_scenes import Scenes, training_demonstrations
from physisforcing.planner.oracle import HeldOutDemonstrations


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Episodes of validation scenes 50000 and 50001, of which the second failed, and of test scene 100000."""
    features = robot_features([f"joint{k}" for k in range(14)], height=16, width=24)
    writer = LeRobotWriter(tmp_path_factory.mktemp("demos") / "data", features)
    joints = np.zeros((5, 14), np.float32)
    columns = dict.fromkeys(("observation.state", "observation.state_measured", "action"), joints)
    for seed in (50_000, 50_001, 100_000):
        writer.add_episode(
            columns={**columns, "next.success": np.arange(5) == 4},
            frames={HEAD: np.zeros((5, 16, 24, 3), np.uint8)},
            instruction="click the bell",
            task_name="click_bell",
            seed=seed,
            success=seed != 50_001,
            scene_hash=f"scene-{seed}",
            policy="expert",
            embodiment="robot",
            assets_version="1",
        )
    return writer.finalize()


def scenes(**hashes: str) -> Scenes:
    """Scenes of click_bell: seed -> hash of a manifest, '' for a plain seed."""
    entries: dict[tuple[str, int], Any] = {}
    for name, known in hashes.items():
        if known:
            entries["click_bell", int(name[1:])] = SimpleNamespace(scene_hash=known)
    return Scenes(seeds={"click_bell": [int(name[1:]) for name in hashes]}, entries=entries)


def test_demonstrations_of_other_scenes_are_refused(demos: Path) -> None:
    check_demonstrations(str(demos), scenes(s50000="scene-50000", s100000=""))
    with pytest.raises(UserError, match=r"demos.*click_bell 50000 recorded in scene scene-50000.*wanted.*scene other"):
        check_demonstrations(str(demos), scenes(s50000="other"))
    with pytest.raises(UserError, match=r"no successful demonstration of click_bell 50001"):
        check_demonstrations(str(demos), scenes(s50001="scene-50001"))
    with pytest.raises(UserError, match=r"no successful demonstration of click_bell 100001"):
        check_demonstrations(str(demos), scenes(s100001=""))


def test_validation_scenes_are_held_out_and_a_missing_one_is_named(demos: Path) -> None:
    held_out = HeldOutDemonstrations(demos)
    assert held_out.seeds("click_bell") == [50_000, 100_000]
    with pytest.raises(DatasetError, match=r"no successful demonstration of click_bell 50001.*start_seed=50001"):
        held_out.load("click_bell", 50_001)


def test_retrieval_must_not_remember_validation_scenes(demos: Path) -> None:
    with pytest.raises(UserError, match=r"train_demos: got 'seed 50000 in"):
        training_demonstrations(str(demos))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": ["click_bell", "click_bell"]}, r"tasks.*click_bell twice"),
        ({"controls": ["noop", "frozen", "noop"]}, r"controls.*noop twice"),
        ({"models": {"recorded": "shipped"}}, r"models.*recorded"),
        ({"models": {"retrieval_video": "shipped"}}, r"models.*retrieval_video"),
        ({"models": {"perfect": "shipped"}}, r"models.*perfect"),
    ],
)
def test_names_that_would_collide_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        CompareConfig(**({"models": {"mine": "shipped"}} | changes)).check()


def test_an_unknown_randomization_is_refused_before_the_simulator_starts() -> None:
    with pytest.raises(UserError, match=r"randomization.*demo_clean"):
        CollectConfig(output="x", randomization="demo_clear").check()
