"""Physics-informative regions, eq. (1)-(4): which tracked points move and are near, and the tokens they pass through.

Shape suffixes: B batch, T pixel frames, F latent frames, N points, h w token grid. Everything is batched and has static
shapes, so it runs under ``torch.compile``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import PhysicsConfig


def pair(like: Tensor, x: float, y: float) -> Tensor:
    """[2] of the type and on the device of ``like``, filled there: copying it from the host would wait for the device."""
    return torch.stack([like.new_full((), x), like.new_full((), y)])


def normalise_points(points_px: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels (x, y) of a picture of ``size`` (H, W), integers at pixel centres -> [0,1] per axis: ``(x + 0.5) / W``.

    The value does not depend on the resolution, and token (i, j) of an h x w grid has its centre at ((j+.5)/w,
    (i+.5)/h).
    """
    return (points_px + 0.5) / pair(points_px, size[1], size[0])


def to_pixels(points: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of ``normalise_points``."""
    return points * pair(points, size[1], size[0]) - 0.5


def to_cells(points: Tensor, grid: tuple[int, int]) -> Tensor:
    """[0,1] per axis -> token coordinates (x, y) of an (h, w) grid, integers at cell centres."""
    return points * pair(points, grid[1], grid[0]) - 0.5


def in_frame(points: Tensor) -> Tensor:
    """Whether normalised points [...,2] lie inside the picture: bool [...]."""
    return ((points >= 0) & (points < 1)).all(-1)


def motion_magnitude(
    points_BTN2: Tensor,
    visible_BTN: Tensor,
    size: tuple[int, int],
    *,
    kind: str = "path",
    dead_zone: float = 0.0,
    visible_steps: bool = True,
) -> Tensor:
    """Eq. (1): how far each point moves, in pixels of ``size`` (H, W): [B,N].

    Points normalised to [0,1]. With ``visible_steps`` only steps between two frames in which the point is visible count;
    steps below ``dead_zone`` (a fraction of the diagonal) are jitter. ``net``: distance between the first and the last frame
    (in which it is visible).
    """
    position = to_pixels(points_BTN2, size)
    counted = visible_BTN if visible_steps else torch.ones_like(visible_BTN)
    floor = dead_zone * (size[0] ** 2 + size[1] ** 2) ** 0.5
    if kind == "path":
        step = torch.linalg.vector_norm(position[:, 1:] - position[:, :-1], dim=-1)
        seen = counted[:, 1:] & counted[:, :-1]
        return torch.where(seen & (step >= floor), step, 0).sum(1)
    assert kind == "net", kind
    frames = torch.arange(counted.shape[1], device=position.device)[None, :, None]
    first = torch.where(counted, frames, counted.shape[1] - 1).amin(1)
    last = torch.where(counted, frames, 0).amax(1)
    index = torch.stack([first, last], 1)[..., None].expand(-1, -1, -1, 2)
    ends = position.gather(1, index)
    distance = torch.linalg.vector_norm(ends[:, 1] - ends[:, 0], dim=-1)
    return torch.where(counted.any(1) & (distance >= floor), distance, 0)


def without_camera_motion(points_BTN2: Tensor, visible_BTN: Tensor) -> Tensor:
    """Tracks as a camera that follows the background would see them: [B,T,N,2].

    The median over the visible points of each step is taken out (per axis), on the ground that most points are background.
    Only translation in the picture is compensated.
    """
    step = points_BTN2[:, 1:] - points_BTN2[:, :-1]
    seen = (visible_BTN[:, 1:] & visible_BTN[:, :-1])[..., None]
    median = torch.where(seen, step, torch.nan).nanmedian(2, keepdim=True).values.nan_to_num(0.0)
    drift = torch.cat([torch.zeros_like(median[:, :1]), median.cumsum(1)], 1)
    return points_BTN2 - drift


def foreground_weight(depth_BN: Tensor, *, kind: str = "metric", eps: float = 0.1) -> Tensor:
    """Eq. (2): ``r = 1 / (D + eps)`` with D scaled to [0,1] per sample, 0 nearest: [B,N] in [1/(1+eps), 1/eps].

    ``metric``: larger is farther, 0 means unknown and counts as farthest. ``disparity``: larger is nearer. D is
    scaled by the 1st and 99th percentile over the points, so that one odd pixel does not set the scale; where all are
    equal D = 0.
    """
    if kind == "off":
        return torch.ones_like(depth_BN)
    known = depth_BN > 0 if kind == "metric" else torch.ones_like(depth_BN, dtype=torch.bool)
    ordered = torch.where(known, depth_BN, torch.inf).sort(1).values
    count = known.sum(1, keepdim=True)
    low = ordered.gather(1, ((count - 1).clamp(min=0) * 0.01).round().long())
    high = ordered.gather(1, ((count - 1).clamp(min=0) * 0.99).round().long())
    span = high - low
    usable = torch.isfinite(span) & (span > 0)
    scaled = ((depth_BN - torch.where(usable, low, 0)) / torch.where(usable, span, 1)).clamp(0, 1) * usable
    if kind == "disparity":
        scaled = torch.where(usable, 1 - scaled, scaled)
    else:
        assert kind == "metric", kind
        scaled = torch.where(known, scaled, 1)
    return 1 / (scaled + eps)


def select_points(
    score_BN: Tensor, motion_BN: Tensor, valid_BN: Tensor, *, kind: str, min_motion: float, top_k: int
) -> Tensor:
    """Eq. (3): ``q_i >= mean_j q_j`` (``mean``), the ``top_k`` highest (``topk``), or both: bool [B,N].

    Points that moved less than ``min_motion`` pixels, or are not ``valid`` (hidden in the first frame), are never
    selected: a static clip has an empty mask. The mean runs over valid points.
    """
    chosen = valid_BN & (motion_BN >= min_motion)
    if kind in ("mean", "both"):
        mean = torch.where(valid_BN, score_BN, 0).sum(1, keepdim=True) / valid_BN.sum(1, keepdim=True).clamp(min=1)
        chosen = chosen & (score_BN >= mean)
    if kind in ("topk", "both"):
        order = torch.where(chosen, score_BN, -torch.inf).argsort(dim=1, descending=True, stable=True)
        chosen = chosen & torch.zeros_like(chosen).scatter_(1, order[:, :top_k], True)
    else:
        assert kind == "mean", kind
    return chosen


def point_scores(
    points_BTN2: Tensor,
    visible_BTN: Tensor,
    depth_BN: Tensor,
    size: tuple[int, int],
    config: PhysicsConfig,
    *,
    depth_kind: str = "metric",
) -> tuple[Tensor, Tensor]:
    """The two factors of the score ``q = m r``: motion in pixels of ``size`` (H, W), eq. (1), and the weight of nearness, eq. (2): [B,N].

    ``depth_kind``: what the teacher says of its depth (``metric``, ``disparity``, or ``off`` where there is none).
    """
    if config.camera_motion == "median":
        points_BTN2 = without_camera_motion(points_BTN2, visible_BTN)
    motion = motion_magnitude(
        points_BTN2,
        visible_BTN,
        size,
        kind=config.motion,
        dead_zone=config.dead_zone,
        visible_steps=config.visible_steps,
    )
    kind = depth_kind if config.depth == "teacher" else config.depth
    return motion, foreground_weight(depth_BN, kind=kind, eps=config.depth_eps)


def informative_points(
    points_BTN2: Tensor,
    visible_BTN: Tensor,
    depth_BN: Tensor,
    size: tuple[int, int],
    config: PhysicsConfig,
    *,
    depth_kind: str = "metric",
) -> Tensor:
    """Eq. (1)-(3): the points that the losses look at, bool [B,N]. ``size``: (H, W) in pixels; ``depth_kind`` as in ``point_scores``."""
    motion, weight = point_scores(points_BTN2, visible_BTN, depth_BN, size, config, depth_kind=depth_kind)
    diagonal = (size[0] ** 2 + size[1] ** 2) ** 0.5
    return select_points(
        motion * weight,
        motion,
        visible_BTN[:, 0],
        kind=config.select,
        min_motion=config.min_motion * diagonal,
        top_k=config.top_k,
    )


def latent_frame(frames: int, *, temporal_stride: int = 4, device: torch.device | str | None = None) -> Tensor:
    """The latent frame of each pixel frame of a causal autoencoder: 0 -> 0, frames 4k-3..4k -> k; int64 [T]."""
    assert (frames - 1) % temporal_stride == 0, f"{frames} frames are not 1 + {temporal_stride}k"
    return (torch.arange(frames, device=device) + temporal_stride - 1) // temporal_stride


def token_mask(
    points_BTN2: Tensor,
    visible_BTN: Tensor,
    select_BN: Tensor,
    grid: tuple[int, int],
    *,
    temporal_stride: int = 4,
    kind: str = "max",
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Eq. (4) in token coordinates: the tokens that a selected, visible point passes through, bool [B,F,h,w].

    ``max`` equals marking ``round(p)`` in a mask of full resolution and max-pooling it onto the tokens, in time too,
    without the mask. ``nearest`` equals resizing that mask of ``size`` (H, W) by nearest neighbour: a token is marked only
    where a point stands on the one pixel, in the one frame, that the resize reads.
    """
    batch, frames, points = visible_BTN.shape
    height, width = grid
    latents = (frames - 1) // temporal_stride + 1
    cell = torch.floor(points_BTN2 * pair(points_BTN2, width, height)).long()
    marked = visible_BTN & select_BN[:, None] & in_frame(points_BTN2)
    latent = latent_frame(frames, temporal_stride=temporal_stride, device=cell.device)[None, :, None]
    if kind == "nearest":
        assert size is not None, "nearest needs the size of the picture"
        pixel = torch.floor(to_pixels(points_BTN2, size) + 0.5).long()
        read = torch.floor(cell * pair(points_BTN2, size[1] / width, size[0] / height)).long()
        frame = torch.arange(frames, device=cell.device)[None, :, None]
        latent = ((frame * latents + frames - 1) // frames).clamp(max=latents - 1)
        marked = marked & (pixel == read).all(-1) & (frame == (latent * frames) // latents)
    else:
        assert kind == "max", kind
    row, column = cell[..., 1].clamp(0, height - 1), cell[..., 0].clamp(0, width - 1)
    total = latents * height * width
    index = torch.where(marked, (latent * height + row) * width + column, total).reshape(batch, frames * points)
    mask = torch.zeros(batch, total + 1, dtype=torch.bool, device=cell.device).scatter_(1, index, True)
    return mask[:, :total].reshape(batch, latents, height, width)


def token_bodies(
    points_BTN2: Tensor, visible_BTN: Tensor, body_BN: Tensor, grid: tuple[int, int], *, temporal_stride: int = 4
) -> Tensor:
    """The rigid body that each token shows, from exact tracks: int64 [B,F,h,w], -1 where no visible point passes.

    ``body_BN``: body id of each point (below 2^20), -1 unknown. Of several points in a token the one nearest to its centre
    decides.
    """
    batch, frames, points = visible_BTN.shape
    height, width = grid
    latents = (frames - 1) // temporal_stride + 1
    position = points_BTN2 * pair(points_BTN2, width, height)
    cell = torch.floor(position).long()
    known = visible_BTN & in_frame(points_BTN2) & (body_BN >= 0)[:, None]
    row, column = cell[..., 1].clamp(0, height - 1), cell[..., 0].clamp(0, width - 1)
    latent = latent_frame(frames, temporal_stride=temporal_stride, device=cell.device)[None, :, None]
    total = latents * height * width
    index = torch.where(known, (latent * height + row) * width + column, total).reshape(batch, frames * points)
    distance = ((position - cell - 0.5).square().sum(-1) * (1 << 20)).long()
    # Distance and id in one integer, so that the minimum carries the id of the nearest point along.
    key = ((distance << 20) | body_BN[:, None].clamp(min=0)).reshape(batch, frames * points)
    empty = torch.iinfo(torch.int64).max
    best = torch.full((batch, total + 1), empty, dtype=torch.int64, device=cell.device)
    best = best.scatter_reduce_(1, index, key, "amin")[:, :total].reshape(batch, latents, height, width)
    return torch.where(best == empty, -1, best & ((1 << 20) - 1))
