"""The action expert's first weights, resized from the video backbone's: axis by axis, linearly, corner on corner (reference section 1.8)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

#: Layers that have no counterpart in the video: what reads and writes actions.
FRESH = ("action_in.", "proj_out.")
TABLE = "scale_shift_table"


def resize(value: Tensor, shape: torch.Size | tuple[int, ...], *, keep_variance: bool = True) -> Tensor:
    """``value`` at another ``shape``, each axis that differs resized by linear interpolation with corners aligned, in float32.

    ``keep_variance``: matrices whose last axis (what is summed over) shrank from m to n are multiplied by ``sqrt(m / n)``.
    """
    assert value.ndim == len(shape), f"{tuple(value.shape)} and {tuple(shape)}"
    made = value.detach().float()
    for place, size in enumerate(shape):
        if made.shape[place] != size:
            made = _along(made, place, size)
    if keep_variance and value.ndim >= 2 and value.shape[-1] != shape[-1]:
        made = made * math.sqrt(value.shape[-1] / shape[-1])
    return made.to(value.dtype)


def _along(value: Tensor, place: int, size: int) -> Tensor:
    """Linear interpolation of one axis; its first and last entries stay."""
    count = value.shape[place]
    at = torch.linspace(0, count - 1, size, dtype=torch.float64, device=value.device)
    below = at.floor().long().clamp(max=max(0, count - 2))
    share = (at - below).float().view(-1, *[1] * (value.ndim - place - 1))
    first, second = value.index_select(place, below), value.index_select(place, (below + 1).clamp(max=count - 1))
    return first + (second - first) * share


@torch.no_grad()
def interpolate(module: nn.Module, video: Mapping[str, Tensor], *, published: bool = False) -> list[str]:
    """Fill ``module`` from the video's tensors of the same names; returns the names of what stays as it was (``FRESH``).

    ``published``: as in the released weights, where modulation tables are multiplied like fan-in weights although they are added to what
    they modulate, and the six stacked time projections are one axis, so that they blend at their borders. By default neither.
    """
    left = []
    for name, parameter in module.named_parameters():
        if name not in video or name.startswith(FRESH):
            left.append(name)
            continue
        value = video[name]
        if ".time_proj." in name and not published:
            parts = value.unflatten(0, (6, -1)), (6, parameter.shape[0] // 6, *parameter.shape[1:])
            parameter.copy_(resize(*parts, keep_variance=value.ndim > 1).flatten(0, 1))
        else:
            parameter.copy_(resize(value, parameter.shape, keep_variance=published or not name.endswith(TABLE)))
    unknown = [name for name in left if not name.startswith(FRESH)]
    assert not unknown, f"no counterpart in the video: {unknown}"
    return left
