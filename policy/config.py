"""What a world-action model is: sizes, conditioning mode, and the numerics that its weights were trained with."""

from __future__ import annotations

from dataclasses import dataclass

from physisforcing.core.errors import UserError, unknown_name

#: How the actions see the video; ``pattern.PATTERNS`` says which part of the sequence sees which.
MODES = ("first_frame", "joint", "idm", "optional_idm")
INITIAL = ("interpolated", "random")
HEADS = ("modulated", "bare")
POSITIONS = ("shared", "separate")
PROPRIOCEPTION = ("linear", "backbone")
WEIGHTINGS = ("uniform", "bell")


@dataclass(slots=True, kw_only=True)
class PolicyModelConfig:
    """Settings that belong to a checkpoint: its weights mean nothing under others.

    ``mode``: one of ``MODES``. ``chunk``: actions P; ``steps_per_latent``: control steps between two latent frames (16 for 9 pictures of 33
    steps, 8 for 17). ``width``, ``ffn_dim``: of the action expert; heads, head width and layers are the video backbone's. ``initial``: the
    action expert's weights are resized from the video's (section 1.8 of the reference: axis by axis, linearly) or drawn.
    ``head``: ``modulated`` is norm, time modulation and a linear layer that begins at zero; ``bare`` the published linear layer on the
    residual stream. ``positions``: ``shared`` puts action i at the latent time of the picture that follows it, on the video's time
    axis; ``separate`` is a one-dimensional RoPE over the whole head. ``proprioception``: a ``linear`` token of the normalised state, or the
    tokens of the small backbones' own conditioner.

    ``video_shift``, ``action_shift``: of the noise levels, in training and use. ``weighting``: of the losses by noise level; ``bell`` is the
    published one, which is zero at pure noise. ``coarse_times``: timesteps and action latents rounded to bfloat16, as published; else float32.
    ``published_initial``: interpolate as published, modulation tables scaled like fan-in weights and the six stacked time projections as one axis.
    ``condition_noise``: share of the ``idm`` copies that are noised in training. ``idm_share``: of ``optional_idm``, the share of
    samples whose actions see the copy.
    """

    mode: str = "first_frame"
    action_dim: int = 14
    state_dim: int = 14
    chunk: int = 32
    steps_per_latent: float = 16.0
    width: int = 1024
    ffn_dim: int = 4096
    initial: str = "interpolated"
    head: str = "modulated"
    positions: str = "shared"
    proprioception: str = "linear"
    video_shift: float = 5.0
    action_shift: float = 1.0
    weighting: str = "uniform"
    coarse_times: bool = False
    published_initial: bool = False
    condition_noise: float = 0.5
    idm_share: float = 0.5

    def __post_init__(self) -> None:
        for name, known in (
            ("mode", MODES), ("initial", INITIAL), ("head", HEADS), ("positions", POSITIONS),
            ("proprioception", PROPRIOCEPTION), ("weighting", WEIGHTINGS),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise unknown_name(f"policy.{name}", getattr(self, name), known, see="docs/policy.md")
        for name in (
            "action_dim",
            "state_dim",
            "chunk",
            "width",
            "ffn_dim",
            "steps_per_latent",
            "video_shift",
            "action_shift",
        ):
            if not getattr(self, name) > 0:
                raise UserError(
                    f"policy.{name}", got=getattr(self, name), wanted="more than 0", fix="see docs/policy.md"
                )
        for name in ("condition_noise", "idm_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"policy.{name}", got=getattr(self, name), wanted="a share from 0 to 1", fix="0.5")


def fastwam_compat(**sizes: int) -> PolicyModelConfig:
    """The published design, for released checkpoints. ``sizes``: what differs between them, such as ``action_dim``."""
    return PolicyModelConfig(
        head="bare", positions="separate", action_shift=5.0, weighting="bell", coarse_times=True, published_initial=True, **sizes
    )  # fmt: skip
