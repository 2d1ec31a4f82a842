"""A stage that cannot be set up gives its place back and says why, without a simulator."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest

from physisforcing.core.errors import UnstableSceneError, UserError
from physisforcing.envs.robotwin.live import claim, release
from physisforcing.envs.robotwin.stage import Stage
from physisforcing.envs.twin import Twin


class Scene:
    """Test double of ``RoboTwinEnv``: a reset claims the one live place, and fails where ``fails`` says, before or after it built."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self._task, self._hash, self.seed_used = fails, None, "", -1

    def reset(self, *, seed: int, options: dict[str, Any]) -> None:
        claim(self)
        self._task, self.seed_used = None, seed
        if self.fails == "early":
            raise UnstableSceneError("the bottle falls over")
        self._task, self._hash = SimpleNamespace(), "a scene"
        if self.fails == "late":
            raise UnstableSceneError("the bottle falls over")

    def body_poses(self) -> tuple[list[int], None]:
        return [], None

    def close(self) -> None:
        self._task = None
        release(self)


@pytest.fixture(autouse=True)
def nobody_is_live():
    gc.collect()
    yield
    gc.collect()


@pytest.mark.parametrize("fails", ["early", "late"])
def test_a_stage_that_fails_gives_its_place_back(fails: str) -> None:
    stage, other = Stage(Scene(fails)), Scene()
    with pytest.raises(UnstableSceneError, match="falls over"):
        stage.set_up(3)
    assert (stage.scene_hash, stage.seed) == ("", -1), "no half-built scene is taken for one"
    claim(other)
    release(other)


@pytest.mark.parametrize("fails", ["early", "late"])
def test_a_live_episode_stays_live_and_hears_the_cause(fails: str) -> None:
    twin = Twin(None, None)  # type: ignore[arg-type]
    twin._env, twin._stage = Scene(), Stage(Scene(fails))
    twin._env.reset(seed=1, options={})
    with pytest.raises(UnstableSceneError, match="falls over"):
        twin._set_stage(2, "a scene")
    with pytest.raises(UserError, match="second live"):
        claim(Scene())  # the episode's environment is live again
    release(twin._env)
