"""The policy type ``physis``: LeRobot's policy interface over ``loop.LockstepLoop``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from physisforcing.core.errors import UserError

from ..act import ExecutionConfig
from .configuration_physis import PhysisConfig
from .loop import LockstepLoop, folder_spec, inference_only, open_chunks


class PhysisPolicy(PreTrainedPolicy):
    """What ``lerobot-eval`` and ``lerobot-rollout`` drive. It has no parameters of torch: LeRobot neither loads, moves nor trains any. ``UserError``: see
    ``PhysisConfig.check``, ``loop.open_chunks``."""

    config_class = PhysisConfig
    name = "physis"

    def __init__(self, config: PhysisConfig, *inputs: Any, **kwargs: Any) -> None:
        super().__init__(config)
        config.check(folder_spec(config.folder))
        source = open_chunks(config.folder, config.server, config.planning())
        execution = ExecutionConfig(execute=config.execute)
        self.loop = LockstepLoop(source, execution, seed=config.seed, cameras=config.cameras)

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path | None = None, *, config: PhysisConfig | None = None, **kwargs: Any
    ) -> PhysisPolicy:
        """The policy of ``config.folder``. ``UserError`` for a path beside it: nothing of LeRobot's layout is read, and nothing is downloaded."""
        if pretrained_name_or_path is not None or config is None:
            fix = "--policy.type=physis --policy.folder=runs/policy/export"
            raise UserError("policy.path", got=str(pretrained_name_or_path), wanted="the policy's own folder", fix=fix)
        return cls(config).eval()

    def reset(self) -> None:
        self.loop.reset()

    def select_action(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """See ``LockstepLoop.select``."""
        return self.loop.select(batch)

    def predict_action_chunk(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """See ``LockstepLoop.chunk``."""
        return self.loop.chunk(batch)

    def forward(self, batch: dict[str, Any], *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Any] | None]:
        raise inference_only("a loss")

    def get_optim_params(self) -> dict[str, Any]:
        raise inference_only("parameters of an optimiser")

    def _save_pretrained(self, save_directory: Path, *args: Any, **kwargs: Any) -> None:
        raise inference_only("a checkpoint")
