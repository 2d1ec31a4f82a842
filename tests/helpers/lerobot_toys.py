"""An environment and a robot as plug-ins of LeRobot: both reach their targets at once and keep what they were given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import gymnasium
import numpy as np
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.robots import Robot, RobotConfig

JOINTS = 14
SENTENCE = "press the bell"


def picture(seed: int, step: int) -> np.ndarray:
    """uint8 [240,320,3] that every scene and step has another of."""
    return np.random.default_rng([seed, step]).integers(0, 256, (240, 320, 3), np.uint8)


class ToyScene(gymnasium.Env):
    """Four steps long; ``LOG`` holds (seed, action) of every step."""

    LOG: ClassVar[list[tuple[int, np.ndarray]]] = []
    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 17}
    task = SENTENCE
    task_description = SENTENCE
    _max_episode_steps = 4

    def __init__(self, **kwargs: Any) -> None:
        self.render_mode = "rgb_array"
        images = gymnasium.spaces.Dict({"top": gymnasium.spaces.Box(0, 255, (240, 320, 3), np.uint8)})
        states = gymnasium.spaces.Box(-10, 10, (JOINTS,), np.float32)
        self.observation_space = gymnasium.spaces.Dict({"pixels": images, "agent_pos": states})
        self.action_space = gymnasium.spaces.Box(-10, 10, (JOINTS,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        self._seed, self._step, self._state = seed or 0, 0, np.zeros(JOINTS, np.float32)
        return self._seen(), {}

    def _seen(self) -> dict[str, Any]:
        return {"pixels": {"top": picture(self._seed, self._step)}, "agent_pos": self._state}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self.LOG.append((self._seed, np.array(action, np.float32)))
        self._step, self._state = self._step + 1, np.array(action, np.float32)
        done = self._step == self._max_episode_steps
        return self._seen(), 0.0, done, False, {"is_success": done}

    def render(self) -> np.ndarray:
        return picture(self._seed, self._step)


gymnasium.register("toys/ToyScene-v0", entry_point=ToyScene)


@EnvConfig.register_subclass("toys")
@dataclass
class ToyEnvConfig(EnvConfig):
    task: str | None = "ToyScene-v0"
    fps: int = 17
    width: int = JOINTS
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(
        default_factory=lambda: {
            "action": "action", "agent_pos": "observation.state", "pixels/top": "observation.images.top",
        }
    )  # fmt: skip

    def __post_init__(self) -> None:
        self.features = {
            "action": PolicyFeature(FeatureType.ACTION, (self.width,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (self.width,)),
            "pixels/top": PolicyFeature(FeatureType.VISUAL, (240, 320, 3)),
        }

    @property
    def package_name(self) -> str:
        return "lerobot_toys"

    @property
    def gym_id(self) -> str:
        return "toys/ToyScene-v0"

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {}


@RobotConfig.register_subclass("toy_arm")
@dataclass
class ToyArmConfig(RobotConfig):
    pass


class ToyArm(Robot):
    """``SENT``: the targets it was sent."""

    config_class = ToyArmConfig
    name = "toy_arm"
    SENT: ClassVar[list[np.ndarray]] = []

    def __init__(self, config: ToyArmConfig) -> None:
        super().__init__(config)
        self.cameras: dict[str, Any] = {}
        self._state, self._connected = np.zeros(JOINTS, np.float32), False

    @property
    def action_features(self) -> dict[str, Any]:
        return {f"joint_{number}.pos": float for number in range(JOINTS)}

    @property
    def observation_features(self) -> dict[str, Any]:
        return self.action_features | {"top": (240, 320, 3)}

    is_connected = property(lambda self: self._connected)
    is_calibrated = property(lambda self: True)

    def connect(self, calibrate: bool = True) -> None:
        self._connected = True

    def disconnect(self) -> None:
        self._connected = False

    def calibrate(self) -> None: ...

    def configure(self) -> None: ...

    def get_observation(self) -> dict[str, Any]:
        return dict(zip(self.action_features, self._state.tolist())) | {"top": picture(0, len(self.SENT))}

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        self._state = np.array([action[name] for name in self.action_features], np.float32)
        self.SENT.append(self._state)
        return action
