"""The settings of the policy type ``physis``, as LeRobot's commands parse them: ``--policy.type=physis --policy.folder=...``."""

from __future__ import annotations

from dataclasses import dataclass, field

from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, PolicyFeature

from physisforcing.core.errors import UserError

from ..act import ExecutionConfig
from ..requests import PolicySpec
from .loop import STATE, camera_features, check_features, check_loop_rate, folder_spec, inference_only


@PreTrainedConfig.register_subclass("physis")
@dataclass
class PhysisConfig(PreTrainedConfig):
    """``folder``: of the policy. ``fps``: rows that the loop takes a second (0: none, each target is driven to in its own time); LeRobot does not tell
    a policy. ``execute``: rows of a plan between two looks. ``seed``: of the first episode's noise, the next ones count on; LeRobot's own ``--seed``
    does not reach a policy. ``cameras``: camera of the policy's canvas -> name of the robot's, where they differ. ``server``: HOST:PORT of
    ``physis serve policy`` with the same policy, which then makes the plans. The rest: ``policy.planning.PlanningConfig``."""

    folder: str = ""
    fps: float | None = None
    execute: int = 12
    seed: int = 1000
    cameras: dict[str, str] = field(default_factory=dict)
    server: str = ""
    compute: str = "auto"
    steps: int = 10
    video_steps: int = 10
    mode: str = ""
    autoencoder: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            spec = folder_spec(self.folder)
            pictures = camera_features(spec.canvas, self.cameras)
        except UserError:
            return  # raised again when the policy is made: LeRobot's parser would put its own sentence in place of this one
        self.input_features = {name: PolicyFeature(FeatureType.VISUAL, shape) for name, shape in pictures.items()}
        self.input_features[STATE] = PolicyFeature(FeatureType.STATE, (spec.state_dim,))
        self.output_features = {"action": PolicyFeature(FeatureType.ACTION, (spec.action_dim,))}

    def check(self, spec: PolicySpec) -> None:
        """``UserError`` for what this policy cannot do: another rate, other actions or states, a chunk too short, mixed precision,
        another device."""
        check_loop_rate(spec, self.fps)
        ExecutionConfig(execute=self.execute).check(spec.chunk)
        self.validate_features()
        if self.use_amp:
            wanted = "false: the policy has the numerics of its training"
            raise UserError("policy.use_amp", got=True, wanted=wanted, fix="leave --policy.use_amp out")
        if (self.device or "").partition(":")[0] not in ("cpu", "cuda"):
            raise UserError("policy.device", got=self.device, wanted="cpu or cuda", fix="--policy.device=cpu")

    def validate_features(self) -> None:
        """``UserError`` where actions or states have other widths than the policy's."""
        spec = folder_spec(self.folder)
        shapes = [None if one is None else one.shape for one in (self.action_feature, self.robot_state_feature)]
        check_features(spec, *shapes)

    def planning(self) -> dict[str, object]:
        """Fields of ``PlanningConfig``."""
        own = {name: getattr(self, name) for name in ("compute", "steps", "video_steps", "mode", "autoencoder")}
        return own | {"device": self.device}

    def get_optimizer_preset(self) -> None:
        raise inference_only("an optimiser")

    def get_scheduler_preset(self) -> None:
        raise inference_only("a schedule of learning rates")

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> None:
        raise inference_only("windows of a dataset")

    @property
    def reward_delta_indices(self) -> None:
        return None
