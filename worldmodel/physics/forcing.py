"""PhysisForcing's two losses on one tapped feature map, eq. (13): the one module a trainer calls.

Use in a trainer::

    forcing = PhysisForcing(PhysicsConfig(), width=256, teacher_dim=112)
    order = token_order(batch, F * h * w, generator)          # random numbers of this step, drawn outside
    out = forcing(hidden_BLD, (F, h, w), targets, order)      # hidden_BLD: output of block l, tokens in (F, h, w) order
    loss = flow_matching_loss + out.loss                      # already weighted with lambda_pix and lambda_sem
    log(pix=out.pix, sem=out.sem, **out.metrics)              # unweighted terms and metrics, scalars on the device

``targets`` is a dictionary of tensors on the device of ``hidden_BLD`` (``data.batches.BankTargets.batch`` makes it):

``points_BFN2``    float, tracks at latent times, (x + 0.5) / W and (y + 0.5) / H in [0,1]; latent 0 holds the queries
``visible_BFN``    bool or weight in [0,1]: how far the point is seen in the latent frame
``select_BN``      bool, physics-informative points, eq. (3)
``token_mask_BFhw``  bool, physics-informative tokens, eq. (4)

and what tokens are alike, one of

``teacher_BFhwC``  float, features of the frozen encoder at the same tokens, eq. (9)
``body_BFhw``      int, rigid body of each token, -1 unknown (``relations="rigid"``)
``relation_BKK``   int8, cached cosines times 127, with ``relation_index_BK`` (int, tokens) and ``relation_valid_BK`` (bool)

A sample without targets has ``select_BN`` and ``token_mask_BFhw`` all False: it adds exactly zero. The heads are
trained with the model (``training.worldmodel`` puts them into the same optimiser, at the same learning rate) and saved
beside it, never inside it: nothing of this is needed to generate. Both losses are computed in float32 outside autocast.

With several processes (``torch.distributed``) the means run over the points and samples of all of them, so that averaged
gradients are those of one large batch also where some processes have no targets: every process must call this module
at every step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from physisforcing.core.errors import UserError

from .config import PhysicsConfig
from .gradients import GradientMeter
from .relation import (
    even_order,
    gather_tokens,
    reference_relations,
    related_samples,
    relation_errors,
    relation_matrix,
    valid_pairs,
)
from .trajectory import clamp_to_hull, divisor, end_point_error, in_hull, match_logits, trajectory_errors
from .views import Rect, cut

#: Pixels in which the end-point error is reported, (H, W), whatever the resolution of the video.
REPORT_SIZE = (240, 320)
#: What a learnable temperature stays within.
TEMPERATURES = (0.02, 0.2)

Targets = dict[str, Tensor]


@dataclass(slots=True, kw_only=True)
class PhysicsOutput:
    """``loss``: the weighted sum, for backward. ``pix``, ``sem``: the terms without weights, detached. ``metrics``:
    detached scalars.

    ``epe_cells``, ``epe_px``: end-point error of the soft-argmax in tokens and in pixels of 240x320;
    ``epe_uniform_px`` and ``epe_still_px``: the same for a uniform map and for points that stay where they were;
    ``valid``: fraction of (point, latent frame) pairs in the loss; ``tokens``: mean number of selected tokens a
    sample; ``pairs`` and ``related``: how many (point, latent frame) pairs, by weight, and samples with relations the two
    terms are means of in this process; ``lambda_pix``, ``lambda_sem``: weights, where they are set from gradients.
    """

    loss: Tensor
    pix: Tensor
    sem: Tensor
    metrics: dict[str, Tensor]


@dataclass(slots=True, kw_only=True)
class Match:
    """Logits of every point in the latent frames 1.. over the cells of ``grid``, where the point is looked up, where it really goes
    (moved onto the hull of the cell centres), and how far it counts."""

    logits_BFNL: Tensor
    query_BN2: Tensor
    target_BFN2: Tensor
    weight_BFN: Tensor
    grid: tuple[int, int]


class PhysisForcing(nn.Module):
    """The heads phi (to C = ``feature_dim``) and psi (to the teacher's width) and both losses. ``width``: D.

    phi: LayerNorm, three linear layers with SiLU, and a norm without parameters, which makes eq. (6) a cosine with
    temperature 1/sqrt(C). psi: LayerNorm and three linear layers.

    ``measure`` (attribute): measure gradient shares in the next backward passes too where weights are fixed. ``group``
    (attribute): the processes over which means run (None: all).
    """

    def __init__(self, config: PhysicsConfig, *, width: int, teacher_dim: int) -> None:
        super().__init__()
        self.config, self.width, self.teacher_dim = config, width, teacher_dim
        self.measure, self.group = False, None
        self.phi = _mlp(width, config.phi_hidden, config.feature_dim)
        self.psi = _mlp(width, config.psi_hidden, teacher_dim)
        self.meter = GradientMeter(persistent=config.weights == "gradient")
        self.temperature_place: nn.Parameter | None = None
        if config.temperature == "learnable":
            # one element, not a scalar: fully_shard refuses scalars
            self.temperature_place = nn.Parameter(torch.full((1,), _place_of(config.feature_dim**-0.5)))

    def forward(
        self,
        hidden_BLD: Tensor,
        grid: tuple[int, int, int],
        targets: Targets | Sequence[Targets],
        order_BL: Tensor | None = None,
        *,
        sigma_B: Tensor | None = None,
        views: Sequence[Rect] | None = None,
        counts_2: Tensor | None = None,
    ) -> PhysicsOutput:
        """``order_BL``: from ``token_order``; None takes a fixed, evenly spread choice (evaluation). ``sigma_B``: noise levels
        in [0,1], needed by ``sigma_weight``. ``views``: for a collage the tokens of each camera (``views.token_rects``), with
        one dictionary of targets each. ``counts_2``: what the two sums are divided by, where this is a part of a larger batch whose
        gradients are summed up: ``counts`` of all of it, over all processes, for each part that a process makes of it.
        """
        config = self.config
        assert hidden_BLD.shape[1] == math.prod(grid), (hidden_BLD.shape, grid)
        if (dtype := self.phi[0].weight.dtype) != torch.float32:
            fix = "leave the heads out of .to(bfloat16) and of mixed-precision policies (autocast is fine)"
            raise UserError("PhysisForcing", got=f"heads in {dtype}", wanted="torch.float32: both losses are", fix=fix)
        assert sigma_B is not None or config.sigma_weight == "none", "sigma_weight needs the noise levels"
        weights_2 = self._weights(hidden_BLD)
        measured = self.measures and torch.is_grad_enabled()
        for_pix = for_sem = hidden_BLD
        if measured and hidden_BLD.requires_grad:
            for_pix, for_sem = self.meter.split(hidden_BLD, weights_2, self.group)
        with torch.autocast(hidden_BLD.device.type, enabled=False):
            trust_B = None if config.sigma_weight == "none" or sigma_B is None else 1 - sigma_B.float()
            if order_BL is None:
                order_BL = even_order(*hidden_BLD.shape[:2], device=hidden_BLD.device)
            maps = [part.float().unflatten(1, grid) for part in (for_pix, for_sem)] + [order_BL.unflatten(1, grid)]
            parts = [(maps, targets)] if isinstance(targets, dict) else []
            if not isinstance(targets, dict):
                assert views is not None, "targets of several views need the tokens of each"
                parts = [([cut(one, rect) for one in maps], t) for rect, t in zip(views, targets, strict=True)]
            given = (None, None) if counts_2 is None else counts_2.unbind()
            pix, metrics = self._trajectory([(m[0], t) for m, t in parts], trust_B, given[0])
            sem, metrics["tokens"], metrics["related"] = self._relation(
                [(m[1], m[2], t) for m, t in parts], trust_B, given[1]
            )
            # The last term keeps every parameter and the feature map in the graph whatever the masks are.
            loss = weights_2[0] * pix + weights_2[1] * sem + 0.0 * hidden_BLD.float().sum()
        if config.weights == "gradient":
            metrics |= {"lambda_pix": weights_2[0], "lambda_sem": weights_2[1]}
        return PhysicsOutput(loss=loss, pix=pix.detach(), sem=sem.detach(), metrics=metrics)

    @torch.no_grad()
    def counts(self, targets: Targets, grid: tuple[int, int, int]) -> Tensor:
        """How many (point, latent frame) pairs, by weight, and how many samples with relations the two terms are means of: [2]."""
        fine = self._fine(grid[1:])
        pairs = torch.stack([self._point_weights(targets, fine, query).sum() for query in self.config.query_frames])
        return torch.stack([pairs.sum(), related_samples(targets, relations=self.config.relations).sum().float()])

    def shares(self) -> dict[str, Tensor]:
        """``share_pix`` and ``share_sem`` of the last backward pass that was measured: norm of the weighted loss's gradient at the
        features over that of flow matching."""
        return {name: value.clone() for name, value in self.meter.shares().items()}

    @property
    def measures(self) -> bool:
        """Whether the next backward pass measures gradients."""
        return self.measure or self.config.weights == "gradient"

    def watch(self, hidden_BLD: Tensor) -> None:
        """Name the tensor that the blocks above read, before this module is called with it.

        Only needed where something wraps this module (``fully_shard``, ``DistributedDataParallel``) and gradients are
        measured: the wrapper hands in a tensor of its own, at which flow matching's gradient does not pass.
        """
        if self.measures and hidden_BLD.requires_grad:
            self.meter.watch(hidden_BLD, self.group)

    def _weights(self, like: Tensor) -> Tensor:
        """Weights [2] of the two losses, on the device."""
        config = self.config

        def two(a: float, b: float) -> Tensor:  # filled there: copying from the host would wait for the device
            return torch.stack([torch.full((), v, device=like.device, dtype=torch.float32) for v in (a, b)])

        start_2 = two(config.lambda_pix, config.lambda_sem)
        if config.weights == "fixed":
            return start_2
        return self.meter.weights(start_2, two(config.ratio_pix, config.ratio_sem))

    def features(self, hidden: Tensor) -> Tensor:
        """phi(H^l) of eq. (5): [...,D] -> [...,C] with root mean square 1."""
        mapped = self.phi(hidden)
        return mapped * torch.rsqrt(mapped.square().mean(-1, keepdim=True) + 1e-6)

    def match(self, features_BFhwC: Tensor, targets: Targets, query_frame: int = 0) -> Match:
        """What eq. (6)-(8) compare, for the points of one query frame."""
        fine = self._fine(features_BFhwC.shape[2:4])
        points = _known_points(targets)[0]
        query, upsample, temperature = points[:, query_frame], self.config.upsample, self.temperature()
        return Match(
            logits_BFNL=match_logits(
                features_BFhwC, query, query_frame=query_frame, upsample=upsample, temperature=temperature
            ),
            query_BN2=query,
            target_BFN2=clamp_to_hull(points[:, 1:], fine),
            weight_BFN=self._point_weights(targets, fine, query_frame),
            grid=fine,
        )

    def _fine(self, grid: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the cells that points are matched with."""
        return grid[0] * self.config.upsample, grid[1] * self.config.upsample

    def _point_weights(self, targets: Targets, fine: tuple[int, int], query_frame: int) -> Tensor:
        """How far every point counts in the latent frames 1.., [B,F-1,N]."""
        points, visible = _known_points(targets)
        weight = targets["select_BN"][:, None].float() * visible[:, 1:]
        if self.config.border == "drop":
            weight = weight * in_hull(points[:, 1:], fine)
        if query_frame:  # a point can be looked up only where it is seen, and its own frame teaches nothing
            other = torch.arange(1, points.shape[1], device=weight.device) != query_frame
            weight = weight * (visible[:, query_frame] > 0)[:, None] * other[None, :, None]
        return weight

    def temperature(self) -> Tensor | None:
        """The learnable temperature, or None for 1/sqrt(C)."""
        if self.temperature_place is None:
            return None
        low, high = map(math.log, TEMPERATURES)
        # a clamp would have no gradient to come back with from beyond its ends
        return (low + (high - low) * self.temperature_place[0].sigmoid()).exp()

    def _mean(self, total: Tensor, count: Tensor, given: Tensor | None) -> Tensor:
        """``total / count`` over all processes, such that the mean of what they get is the mean of the whole batch; ``total / given`` where
        the count of a larger batch is given."""
        if given is not None:
            world = dist.get_world_size(self.group) if dist.is_available() and dist.is_initialized() else 1
            return total * world / divisor(given)
        if dist.is_available() and dist.is_initialized() and (world := dist.get_world_size(self.group)) > 1:
            count = count.detach().clone()
            dist.all_reduce(count, group=self.group)
            total = total * world
        return total / divisor(count)

    def _trajectory(
        self, parts: list[tuple[Tensor, Targets]], trust_B: Tensor | None, given: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        totals: dict[str, Tensor] = {}

        def add(name: str, value: Tensor) -> None:
            totals[name] = totals[name] + value if name in totals else value

        for hidden_BFhwD, targets in parts:
            grid = (hidden_BFhwD.shape[2], hidden_BFhwD.shape[3])
            features = self.features(hidden_BFhwD)
            for query in config.query_frames:
                found = self.match(features, targets, query)
                target, weight, fine = found.target_BFN2, found.weight_BFN, found.grid
                errors, prediction = trajectory_errors(
                    found.logits_BFNL,
                    target,
                    fine,
                    kind=config.trajectory_loss,
                    huber_delta=config.huber_delta,
                    gauss_sigma=config.gauss_sigma,
                )
                add("total", (errors * (weight if trust_B is None else weight * trust_B[:, None, None])).sum())
                add("count", weight.sum())
                add("places", weight.new_full((), weight.numel()))
                with torch.no_grad():
                    still = clamp_to_hull(found.query_BN2, fine)[:, None].expand_as(target)
                    for name, guess in (
                        ("epe", prediction),
                        ("uniform", torch.full_like(target, 0.5)),
                        ("still", still),
                    ):
                        cells, pixels = end_point_error(guess, target, weight, grid, REPORT_SIZE)
                        add(f"{name}_cells", cells * weight.sum())
                        add(f"{name}_px", pixels * weight.sum())
        count = divisor(totals["count"])
        metrics = {
            "epe_cells": totals["epe_cells"] / count,
            "epe_px": totals["epe_px"] / count,
            "epe_uniform_px": totals["uniform_px"] / count,
            "epe_still_px": totals["still_px"] / count,
            "valid": totals["count"] / totals["places"],
            "pairs": totals["count"],
        }
        if (temperature := self.temperature()) is not None:
            metrics["temperature"] = temperature.detach()
        return self._mean(totals["total"], totals["count"], given), metrics

    def _relation(
        self, parts: list[tuple[Tensor, Tensor, Targets]], trust_B: Tensor | None, given: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        total = count = tokens = parts[0][0].new_zeros(())
        for hidden_BFhwD, order_BFhw, targets in parts:
            hidden_BLD = hidden_BFhwD.flatten(1, 3)
            with torch.no_grad():
                index, valid, reference = reference_relations(
                    targets,
                    order_BFhw.flatten(1),
                    relations=config.relations,
                    max_tokens=config.max_tokens,
                    common=config.common,
                )
            common = valid if config.common == "remove" and config.relations == "features" else None
            # psi of the selected tokens only: it acts token by token, and the student's grid is the teacher's.
            student = relation_matrix(self.psi(gather_tokens(hidden_BLD, index)), common)
            errors_B = relation_errors(
                student, reference, valid_pairs(valid), kind=config.relation_loss, margin=config.relation_margin
            )
            total = total + (errors_B if trust_B is None else errors_B * trust_B).sum()
            count = count + (valid.sum(1) >= 2).sum()
            tokens = tokens + valid.sum(1).float().mean()
        return self._mean(total, count.float(), given), tokens, count.float()


def _known_points(targets: Targets) -> tuple[Tensor, Tensor]:
    """Points [B,F,N,2] and how far they are seen [B,F,N]; what is no number is nowhere to be seen."""
    points, visible = targets["points_BFN2"].float(), targets["visible_BFN"].float()
    known = points.isfinite().all(-1)
    return torch.where(known[..., None], points, 0.5), torch.where(known, visible, 0)


def _place_of(temperature: float) -> float:
    """The parameter at which the learnable temperature starts: at this value, or near the end of its range that is next to it."""
    low, high = map(math.log, TEMPERATURES)
    share = min(max((math.log(temperature) - low) / (high - low), 0.02), 0.98)
    return math.log(share / (1 - share))


def _mlp(width: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, hidden),
        nn.SiLU(),
        nn.Linear(hidden, hidden),
        nn.SiLU(),
        nn.Linear(hidden, out),
    )
