"""Environments as Ray actors (the extra ``ray``)."""

import sys

import numpy as np
import pytest

from physisforcing.core.errors import UserError
from physisforcing.core.message_client import ServerLostError


def test_ray_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    from physisforcing.envs.ray_actors import RayEnv

    with pytest.raises(UserError, match=r"physisforcing\[ray\]"):
        RayEnv("click_bell")


@pytest.mark.sim
def test_ray_actor():
    ray = pytest.importorskip("ray", reason="needs the extra 'ray'")
    from physisforcing.envs.ray_actors import RayEnv

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    try:
        env = RayEnv("click_bell", cameras=[])
        observation, info = env.reset(seed=100_000)
        assert info["task"] == "click_bell" and env.observation_space.contains(observation)
        observation["state"][0] += 0.01  # the caller's to change
        assert env.step(observation["state"])[4]["step"] == 1
        with pytest.raises(UserError, match="action"):
            env.step(np.zeros(3))
        ray.kill(env._actor)
        with pytest.raises(ServerLostError, match="Ray actor for click_bell"):
            env.observe()
        with pytest.raises(UserError, match="clik_bell"):
            RayEnv("clik_bell")
    finally:
        ray.shutdown()
