"""Every choice of the physics losses that the paper leaves open, named, with its default."""

from __future__ import annotations

from dataclasses import dataclass, field

from physisforcing.core.errors import UserError, unknown_name

#: Options with names: field -> what it may be. The first is the default.
CHOICES = {
    "motion": ("path", "net"),
    "camera_motion": ("none", "median"),
    "depth": ("teacher", "metric", "disparity", "off"),
    "select": ("mean", "topk", "both"),
    "mask": ("max", "nearest"),
    "time": ("mean", "last", "uniform"),
    "visibility": ("any", "share", "off"),
    "border": ("clamp", "drop"),
    "temperature": ("fixed", "learnable"),
    "trajectory_loss": ("mse", "huber", "ce_gauss"),
    "sigma_weight": ("none", "linear"),
    "relations": ("features", "rigid"),
    "relation_loss": ("l1", "margin", "mse"),
    "common": ("keep", "remove"),
    "weights": ("fixed", "gradient"),
}
_POSITIVE = ("depth_eps", "top_k", "feature_dim", "phi_hidden", "psi_hidden", "huber_delta", "gauss_sigma", "upsample")
_NOT_NEGATIVE = ("dead_zone", "min_motion", "relation_margin", "lambda_pix", "lambda_sem", "ratio_pix", "ratio_sem")


@dataclass(slots=True, kw_only=True)
class PhysicsConfig:
    """Equation numbers are those of PhysisForcing (arXiv 2606.28128); docs/physics.md explains each choice.

    Regions, eq. (1)-(4): which points and tokens are physics-informative.

    ``motion``: ``path`` is the sum of step lengths (the paper's), ``net`` the distance between first and last sight.
    ``visible_steps``: only steps between two frames in which the point is seen count.
    ``camera_motion``: ``median`` takes the median step of all points out first (a moving camera).
    ``dead_zone``: steps shorter than this fraction of the diagonal count as zero (tracker jitter; 0.00025 is 0.1 px at
    240x320, below anything the simulator's exact tracks need).
    ``depth``: what the depth values are: as the ``teacher`` says that made them, ``metric`` distances, ``disparity`` (larger is
    nearer, as Depth-Anything predicts; used as 1 - disparity, because the formula wants small for near), or ``off``.
    ``depth_eps``: epsilon of (2), not in the paper.
    ``select``: ``mean`` is the threshold of (3), ``topk`` the variant of the paper's appendix with ``top_k`` points, ``both``
    the best ``top_k`` of those above the mean.
    ``min_motion``: a point that moved less than this fraction of the diagonal is never selected, so that a static
    clip gives an empty mask (``>= mean`` alone would keep everything).
    ``mask``: ``max`` marks every token that a point passes through; ``nearest`` resizes the mask of single pixels by nearest
    neighbour, which keeps hardly any (a reading of the paper's "resize").

    Trajectories, eq. (5)-(8).

    ``time``: where a track is at a latent frame of a causal autoencoder: ``mean`` of the frames it covers, the ``last`` of
    them, or ``uniform`` resampling (off by up to three frames).
    ``visibility``: points count where seen in ``any`` frame of the latent frame, by the ``share`` of frames, or always (``off``).
    ``border``: an expectation cannot leave the hull of the cell centres: targets beyond it are moved onto it or dropped.
    ``query_frames``: latent frames whose positions are looked up (0 is the paper's; others where the point is seen there).
    ``upsample``: factor by which the logits of (6) are enlarged bilinearly (1 is the token grid).
    ``temperature``: ``fixed`` is the paper's 1/sqrt(C): phi ends in a norm without parameters, so the logits are cosines over
    1/sqrt(C) = 0.0625 for C = ``feature_dim`` = 256; ``learnable`` starts there and stays within [0.02, 0.2].
    ``phi_hidden``, ``psi_hidden``: hidden widths of the two MLPs (2048 at paper size, 256 here).
    ``trajectory_loss``: ``mse`` (the paper's), ``huber`` (``huber_delta`` in [0,1] units), ``ce_gauss``
    (cross-entropy to a Gaussian of ``gauss_sigma`` cells round the target: keeps a gradient where a confident wrong
    peak kills that of the MSE).
    ``sigma_weight``: ``linear`` weighs both losses of a sample by 1 - sigma (at high noise the future is not determined).

    Relations, eq. (9)-(12). ``relations``: cosines of an encoder's ``features``, or ``rigid``: tokens on the same rigid body
    of the simulator are alike. ``relation_loss``: ``l1`` (the paper's), ``margin`` (differences below ``relation_margin`` are
    free), ``mse``. ``common``: ``remove`` takes the mean token out on both sides first. ``max_tokens``: K, the paper's cap of 512.

    Total, eq. (13). ``lambda_pix``, ``lambda_sem``: not in the paper; for coordinates in [0,1] per axis. ``weights``: ``fixed``, or
    ``gradient``: set so that each loss has ``ratio_pix`` or ``ratio_sem`` times the norm of the flow-matching gradient at the
    tapped features, starting from the lambdas; a lambda of 0 stays 0.

    ``unknown``: choices that nobody has filled in; a config that has any is refused.
    """

    motion: str = "path"
    visible_steps: bool = True
    camera_motion: str = "none"
    dead_zone: float = 0.00025
    depth: str = "teacher"
    depth_eps: float = 0.1
    select: str = "mean"
    top_k: int = 128
    min_motion: float = 0.02
    mask: str = "max"

    time: str = "mean"
    visibility: str = "any"
    border: str = "clamp"
    query_frames: list[int] = field(default_factory=lambda: [0])
    upsample: int = 1
    temperature: str = "fixed"
    feature_dim: int = 256
    phi_hidden: int = 256
    psi_hidden: int = 256
    trajectory_loss: str = "mse"
    huber_delta: float = 0.05
    gauss_sigma: float = 0.7
    sigma_weight: str = "none"

    relations: str = "features"
    relation_loss: str = "l1"
    relation_margin: float = 0.1
    common: str = "keep"
    max_tokens: int = 512

    weights: str = "fixed"
    lambda_pix: float = 0.5
    lambda_sem: float = 0.5
    ratio_pix: float = 0.15
    ratio_sem: float = 0.15
    unknown: list[str] = field(default_factory=list)

    @property
    def wanted(self) -> bool:
        """Whether there are physics losses at all."""
        return self.lambda_pix > 0 or self.lambda_sem > 0

    def __post_init__(self) -> None:
        if self.unknown:
            fix = "fill them in configs/physics/authors.yaml from the authors' code, or use physics=paper"
            raise UserError(
                "physics", got=f"unknown: {', '.join(self.unknown)}", wanted="a value for every choice", fix=fix
            )
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise unknown_name(f"physics.{name}", getattr(self, name), known, see="docs/physics.md")
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise UserError(f"physics.{name}", got=getattr(self, name), wanted="a positive number", fix="raise it")
        for name in _NOT_NEGATIVE:
            if not getattr(self, name) >= 0:
                raise UserError(
                    f"physics.{name}", got=getattr(self, name), wanted="0 or more", fix="use 0 to switch it off"
                )
        if self.max_tokens < 2:
            raise UserError("physics.max_tokens", got=self.max_tokens, wanted="at least 2", fix="use 512")
        frames = self.query_frames
        if not frames or min(frames) < 0 or len(set(frames)) != len(frames):
            raise UserError(
                "physics.query_frames", got=frames, wanted="different latent frames from 0 on", fix="use [0]"
            )
