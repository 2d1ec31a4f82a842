"""Settings of ``physis train policy``."""

from __future__ import annotations

from dataclasses import dataclass, field

from physisforcing.core.errors import UserError, check_at_least, unknown_name
from physisforcing.worldmodel.data.windows import FRAME_STRIDE
from physisforcing.worldmodel.physics.config import PhysicsConfig
from physisforcing.worldmodel.training.config import DataConfig, RunConfig, TrainWorldModelConfig

from .config import PolicyModelConfig
from .normalization import KINDS
from .windows import FRAMES_PER_LATENT


@dataclass(slots=True, kw_only=True)
class TrainPolicyConfig(TrainWorldModelConfig):
    """Those of ``physis train worldmodel``, for what both do, and the policy's.

    ``model``: the pipeline folder of a large backbone; the video's weights are its transformer's where ``run.init`` names no others.
    ``text_tokens``: what its sentences are padded to, in training and in use.

    ``run.init``: the export of a world model, whose transformer becomes the video backbone, or a policy's folder, which is trained
    further; without it the backbone is drawn. ``policy``: the model. ``video_weight``: of the video's loss beside the actions'; 0 trains
    without it. ``physics``: its losses stay on where its lambdas are not 0 and there are targets. ``freeze_video``: train the action
    expert alone. ``action_rate``: its learning rate, as a multiple of ``optim.lr``. ``normalization``: of states and actions, ``zscore`` or ``minmax``.
    """

    policy: PolicyModelConfig = field(
        default_factory=lambda: PolicyModelConfig(
            width=128, ffn_dim=512, steps_per_latent=float(FRAMES_PER_LATENT * FRAME_STRIDE), proprioception="backbone", video_shift=3.0
        )
    )  # fmt: skip
    video_weight: float = 1.0
    freeze_video: bool = False
    action_rate: float = 1.0
    normalization: str = "zscore"
    text_tokens: int = 128
    run: RunConfig = field(default_factory=lambda: RunConfig(out="runs/policy", steps=5000, batch=128))
    data: DataConfig = field(default_factory=lambda: DataConfig(start_fraction=0.1))
    physics: PhysicsConfig = field(default_factory=lambda: PhysicsConfig(lambda_pix=0.0, lambda_sem=0.0))

    def __post_init__(self) -> None:
        TrainWorldModelConfig.__post_init__(self)
        if self.video_weight < 0:
            raise UserError("video_weight", got=self.video_weight, wanted="0 or more", fix="video_weight=1")
        check_at_least(self, text_tokens=1)
        self.run.refuse_large()
        if self.action_rate <= 0:
            raise UserError("action_rate", got=self.action_rate, wanted="more than 0", fix="action_rate=1")
        if self.normalization not in KINDS:
            raise unknown_name("normalization", self.normalization, KINDS, see="docs/policy.md")
        if self.freeze_video and (self.video_weight or self.physics.wanted):
            wanted = "video_weight=0 and physics=none: a frozen backbone learns nothing from them"
            raise UserError("freeze_video", got=True, wanted=wanted, fix="add video_weight=0 physics=none")
        expected = float(FRAMES_PER_LATENT * FRAME_STRIDE)
        if not self.model and self.policy.steps_per_latent != expected:
            got = self.policy.steps_per_latent
            raise UserError(
                "policy.steps_per_latent",
                got=got,
                wanted=f"{expected} with the small models",
                fix="leave it out, or model=<the pipeline folder of a large backbone>",
            )
        if self.text_dropout or self.actions or self.lora.rank:
            name = "text_dropout" if self.text_dropout else "actions" if self.actions else "lora.rank"
            raise UserError(name, got="set", wanted="no such setting of a policy", fix=f"leave {name} out")
