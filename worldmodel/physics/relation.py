"""Semantic relation alignment, eq. (9)-(12): tokens that a frozen encoder finds alike look alike in the denoiser.

Shape suffixes: B batch, F latent frames, h w token grid, L = F*h*w tokens, K selected tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def token_order(batch: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Random numbers in [0,1) that decide which tokens are kept when a mask has too many: float32 [B,L].

    Drawn outside the loss, so that the loss itself is free of random state and may be compiled or captured.
    """
    return torch.rand(batch, tokens, generator=generator, device=generator.device)


def even_order(batch: int, tokens: int, *, device: torch.device | str | None = None) -> Tensor:
    """A fixed, evenly spread order (multiples of the golden ratio) for evaluation: float32 [B,L]."""
    order = torch.frac(torch.arange(1, tokens + 1, device=device, dtype=torch.float64) * 0.6180339887498949)
    return order.to(torch.float32).expand(batch, tokens)


def select_tokens(mask_BFhw: Tensor, order_BL: Tensor, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Eq. (10): at most K tokens of the mask, spread over the latent frames: index [B,K] into L, valid [B,K].

    Frames take turns: each gives the tokens that come first in ``order_BL``. K = min(max_tokens, L); a place without
    a token has ``valid`` False and an index that may be read.
    """
    batch, frames = mask_BFhw.shape[:2]
    mask_BFl = mask_BFhw.reshape(batch, frames, -1)
    key = torch.where(mask_BFl, order_BL.reshape(mask_BFl.shape), 2.0)
    place_in_frame = key.argsort(-1).argsort(-1).to(order_BL.dtype)
    turn = torch.where(mask_BFl, place_in_frame + order_BL.reshape(mask_BFl.shape), torch.inf).reshape(batch, -1)
    smallest, index = turn.topk(min(max_tokens, turn.shape[1]), largest=False)
    return index, torch.isfinite(smallest)


def gather_tokens(tokens_BLC: Tensor, index_BK: Tensor) -> Tensor:
    """The selected tokens, [B,K,C]."""
    return tokens_BLC.gather(1, index_BK[..., None].expand(-1, -1, tokens_BLC.shape[-1]))


def relation_matrix(tokens_BKC: Tensor, valid_BK: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """Eq. (11): cosines between all pairs of tokens over space and time, [B,K,K].

    With ``valid_BK`` the mean of each sample's valid tokens is taken out first: encoders whose features share a large
    common component (V-JEPA 2) find everything alike otherwise. EfficientNet-Lite0 does not need it: its tokens
    have a mean cosine of 0.16-0.26 on demonstrations.
    """
    if valid_BK is not None:
        weight = valid_BK[..., None].to(tokens_BKC.dtype)
        tokens_BKC = tokens_BKC - (tokens_BKC * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
    unit = tokens_BKC / torch.linalg.vector_norm(tokens_BKC, dim=-1, keepdim=True).clamp(min=eps)
    return unit @ unit.transpose(1, 2)


def rigid_relation(body_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Relations from the simulator: 1 for two tokens on the same rigid body, 0 for two bodies: [B,K,K] float32; and which
    pairs are known, bool [B,K,K] (both bodies known, -1 is not).
    """
    known = body_BK >= 0
    same = body_BK[:, :, None] == body_BK[:, None, :]
    return same.to(torch.float32), known[:, :, None] & known[:, None, :]


def reference_relations(
    targets: Mapping[str, Tensor], order_BL: Tensor, *, relations: str, max_tokens: int, common: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens whose relations are compared and what is compared with: index [B,K] into L, valid [B,K], matrix [B,K,K].

    ``targets``: of ``physics.forcing``: compact relations as they are stored, relations of ``body_BFhw`` (``relations="rigid"``), or of
    ``teacher_BFhwC``, with the mean of the selected tokens taken out for ``common="remove"``.
    """
    if "relation_BKK" in targets:
        stored = targets["relation_BKK"].float() / 127
        return targets["relation_index_BK"], targets["relation_valid_BK"], stored
    mask = targets["token_mask_BFhw"]
    if relations == "rigid":
        mask = mask & (targets["body_BFhw"] >= 0)
    index, valid = select_tokens(mask, order_BL, max_tokens)
    if relations == "rigid":
        return index, valid, rigid_relation(targets["body_BFhw"].flatten(1).gather(1, index))[0]
    teacher = targets["teacher_BFhwC"]
    if not teacher.numel():  # no encoder, so nothing to compare
        return index, valid & False, index.new_zeros(*index.shape, index.shape[1], dtype=torch.float32)
    features = gather_tokens(teacher.flatten(1, 3), index).float()
    return index, valid, relation_matrix(features, valid if common == "remove" else None)


def related_samples(targets: Mapping[str, Tensor], *, relations: str) -> Tensor:
    """Which samples have two tokens or more whose relations are compared, bool [B]: what ``reference_relations`` finds, without finding it."""
    if "relation_BKK" in targets:
        return targets["relation_valid_BK"].sum(1) >= 2
    mask = targets["token_mask_BFhw"]
    if relations == "rigid":
        mask = mask & (targets["body_BFhw"] >= 0)
    elif not targets["teacher_BFhwC"].numel():
        mask = torch.zeros_like(mask)
    return mask.flatten(1).sum(1) >= 2


def relation_errors(
    student_BKK: Tensor, teacher_BKK: Tensor, pair_BKK: Tensor, *, kind: str = "l1", margin: float = 0.1
) -> Tensor:
    """Eq. (12) sample by sample, [B]: mean over the pairs of the difference of the two relation matrices.

    ``l1`` the absolute difference, ``margin`` what exceeds ``margin`` of it, ``mse`` its square. Exactly 0, with zero
    gradients, where no pair counts.
    """
    difference = (student_BKK - teacher_BKK).abs()
    if kind == "margin":
        difference = (difference - margin).clamp(min=0)
    elif kind == "mse":
        difference = difference.square()
    else:
        assert kind == "l1", kind
    weight = pair_BKK.to(difference.dtype)
    return (difference * weight).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1)


def valid_pairs(valid_BK: Tensor) -> Tensor:
    """Pairs of valid tokens, in samples that have two or more: bool [B,K,K]."""
    return valid_BK[:, :, None] & valid_BK[:, None, :] & (valid_BK.sum(1) >= 2)[:, None, None]


def relation_loss(
    student_BKC: Tensor,
    teacher_BKC: Tensor,
    valid_BK: Tensor,
    *,
    kind: str = "l1",
    margin: float = 0.1,
    remove_common: bool = False,
) -> Tensor:
    """Eq. (12): mean difference of the two relation matrices, over the samples with two tokens or more.

    Each sample is divided by the square of its own number of valid tokens. Exactly 0, with zero gradients, when no
    sample has two.
    """
    valid = valid_BK if remove_common else None
    pairs = valid_pairs(valid_BK)
    with torch.no_grad():
        teacher = relation_matrix(teacher_BKC, valid)
    errors = relation_errors(relation_matrix(student_BKC, valid), teacher, pairs, kind=kind, margin=margin)
    return errors.sum() / (valid_BK.sum(1) >= 2).sum().clamp(min=1)
