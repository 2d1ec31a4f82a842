"""Every choice of the physics losses that the paper leaves open, named, with its default."""

from __future__ import annotations

from dataclasses import dataclass

from physisforcing.core.errors import UserError, unknown_name

MOTIONS = ("path", "net")
DEPTHS = ("metric", "disparity", "off")
SELECTIONS = ("mean", "topk")
TRAJECTORY_LOSSES = ("mse", "huber", "ce_gauss")


@dataclass(slots=True, kw_only=True)
class PhysicsConfig:
    """Equation numbers are those of PhysisForcing (arXiv 2606.28128).

    Regions, eq. (1)-(4): which points and tokens are physics-informative.

    ``motion``: ``path`` is the sum of step lengths (the paper's), ``net`` the distance between first and last sight.
    ``dead_zone``: steps shorter than this fraction of the diagonal count as zero (tracker jitter; 0.00025 is 0.1 px at
    240x320, below anything the simulator's exact tracks need).
    ``depth``: ``metric`` distances, ``disparity`` (larger is nearer, as Depth-Anything predicts; used as 1 -
    disparity, because the formula wants small for near), ``off``. ``depth_eps``: epsilon of (2), not in the paper.
    ``select``: ``mean`` is the threshold of (3), ``topk`` the variant of the paper's appendix with ``top_k`` points.
    ``min_motion``: a point that moved less than this fraction of the diagonal is never selected, so that a static
    clip gives an empty mask (``>= mean`` alone would keep everything).

    Trajectories, eq. (5)-(8).

    ``feature_dim``: C of (6). phi ends in a norm without parameters, so the logits are cosines over 1/sqrt(C) = 0.0625.
    ``phi_hidden``, ``psi_hidden``: hidden widths of the two MLPs (2048 at paper size, 256 here).
    ``trajectory_loss``: ``mse`` (the paper's), ``huber`` (``huber_delta`` in [0,1] units), ``ce_gauss``
    (cross-entropy to a Gaussian of ``gauss_sigma`` cells round the target: keeps a gradient where a confident wrong
    peak kills that of the MSE).

    Relations, eq. (9)-(12). ``max_tokens``: K, the paper's cap of 512.

    Total, eq. (13). ``lambda_pix``, ``lambda_sem``: not in the paper; for coordinates in [0,1] per axis.
    """

    motion: str = "path"
    dead_zone: float = 0.00025
    depth: str = "metric"
    depth_eps: float = 0.1
    select: str = "mean"
    top_k: int = 128
    min_motion: float = 0.02

    feature_dim: int = 256
    phi_hidden: int = 256
    psi_hidden: int = 256
    trajectory_loss: str = "mse"
    huber_delta: float = 0.05
    gauss_sigma: float = 0.7

    max_tokens: int = 512

    lambda_pix: float = 0.5
    lambda_sem: float = 0.5

    def __post_init__(self) -> None:
        for name, known in (
            ("motion", MOTIONS),
            ("depth", DEPTHS),
            ("select", SELECTIONS),
            ("trajectory_loss", TRAJECTORY_LOSSES),
        ):
            if getattr(self, name) not in known:
                raise unknown_name(f"physics.{name}", getattr(self, name), known, see="worldmodel/physics/config.py")
        for name in ("depth_eps", "top_k", "feature_dim", "phi_hidden", "psi_hidden", "huber_delta", "gauss_sigma"):
            if not getattr(self, name) > 0:
                raise UserError(f"physics.{name}", got=getattr(self, name), wanted="a positive number", fix="raise it")
        for name in ("dead_zone", "min_motion", "lambda_pix", "lambda_sem"):
            if not getattr(self, name) >= 0:
                raise UserError(
                    f"physics.{name}", got=getattr(self, name), wanted="0 or more", fix="use 0 to switch it off"
                )
        if self.max_tokens < 2:
            raise UserError("physics.max_tokens", got=self.max_tokens, wanted="at least 2", fix="use 512")
