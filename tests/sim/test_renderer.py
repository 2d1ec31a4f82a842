"""The fast shadow and shaders against upstream's: the same picture."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from physisforcing.core.errors import UserError

pytestmark = pytest.mark.sim


def pictures(shadows):
    """Head and wrist pictures [3,240,320,3] of one scene with the arms lifted, as int."""
    import physisforcing.envs.robotwin  # noqa: F401

    cameras = ("head", "left_wrist", "right_wrist")
    env = gymnasium.make(
        "RoboTwin/stack_blocks_two-v0", cameras=cameras, shadows=shadows, disable_env_checker=True
    ).unwrapped
    try:
        env.reset(seed=3, options={"observe": False})
        target_A = env.observe(pictures=False)["state"]
        target_A[[1, 8]], target_A[[2, 9]], target_A[[3, 10]] = 1.2, 0.9, -0.8
        for k in range(1, 13):
            env.step_blind(target_A * np.where(target_A == 1.0, 1.0, k / 12))
        observation = env.observe()
        assert env._info()["renderer"].endswith(f"shadows={shadows}")
    finally:
        env.close()
    return np.stack([observation[f"{name}_rgb"] for name in cameras]).astype(int)


def test_the_small_shadow_map_draws_upstreams_directional_shadow(monkeypatch):
    from physisforcing.envs.robotwin import renderer

    fast, none = pictures("directional"), pictures("none")
    monkeypatch.setattr(renderer, "SHADOW_HALF_SIZE", 10.0)
    monkeypatch.setattr(renderer, "SHADOW_PIXELS", 2048)
    upstream = pictures("directional")
    assert (fast != upstream).mean() < 1e-4 and np.abs(fast - upstream).max() <= 2
    assert (none != upstream).mean() > 0.01, "there is a shadow to draw"


@pytest.mark.parametrize("shadows", ["directional", "all"])
def test_shaders_without_the_table_draw_the_same_picture(monkeypatch, shadows):
    from physisforcing.envs.robotwin import renderer

    folder = renderer.shader_folder()
    assert folder != "default", "SAPIEN's shaders read as expected"
    fast = pictures(shadows)
    monkeypatch.setattr(renderer, "shader_folder", lambda: "default")
    np.testing.assert_array_equal(fast, pictures(shadows))


def test_processes_that_start_together_write_whole_shaders(monkeypatch, tmp_path):
    from physisforcing.envs.robotwin import shaders

    monkeypatch.setenv("PHYSIS_HOME", str(tmp_path))
    with ThreadPoolExecutor(8) as threads:
        (folder,) = {found.result() for found in [threads.submit(shaders.shader_folder) for _ in range(32)]}
    whole = Path(folder).parent
    assert list((tmp_path / "shaders").iterdir()) == [whole], "nothing is left beside it"
    texts = {path.relative_to(whole).as_posix(): path.read_text() for path in whole.glob("*/*")}
    assert texts == shaders._without_table() and "default/deferred.frag" in texts
    assert not any(shaders.TABLE in text for text in texts.values())


def test_an_environment_map_is_refused():
    import sapien

    from physisforcing.envs.robotwin.renderer import rasterised

    plain = sapien.Scene.set_environment_map
    with rasterised("none"), pytest.raises(RuntimeError, match="environment map"):
        sapien.Scene.set_environment_map(None, "sky.ktx")
    assert sapien.Scene.set_environment_map is plain


def test_unknown_shadows_are_refused():
    import physisforcing.envs.robotwin  # noqa: F401

    with pytest.raises(UserError, match="did you mean 'directional'"):
        gymnasium.make("RoboTwin/click_bell-v0", shadows="directionl")
