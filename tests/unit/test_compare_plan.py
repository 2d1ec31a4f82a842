"""What ``physis compare`` refuses before a simulator starts: names used twice, and demonstrations of other scenes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from physisforcing.compare import CompareConfig
from physisforcing.compare_controls import check_demonstrations
from physisforcing.core.errors import DatasetError, UserError
from physisforcing.envs.collect import CollectConfig
from physisforcing.plan_scenes import Scenes, training_demonstrations
from physisforcing.planner.oracle import HeldOutDemonstrations


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory, write_black_episodes: Callable[..., Path]) -> Path:
    """Episodes of validation scenes 50000 and 50001, of which the second failed, and of test scene 100000."""
    folder = tmp_path_factory.mktemp("demos") / "data"
    return write_black_episodes(folder, (50_000, 50_001, 100_000), failed=(50_001,))


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
