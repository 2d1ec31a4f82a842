"""Floating-point operations of a policy's training step, counted as those of the world model are (``worldmodel/training/flops.py``)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from .model import WorldActionModel
from .pattern import groups

#: Parts of the names of linear layers that act on the tokens of text and proprioception.
_TEXT = ("attn2.to_k", "attn2.to_v", "text_embedder")


def step_flops(
    model: WorldActionModel, shape: Sequence[int], text: int, *, video: bool = True, tap: bool = False
) -> float:
    """Of one sample's forward and backward pass: every linear layer of both experts, and all attention.

    ``shape``: [B,C,F,h,w] of its latents, of which B is not read; ``text``: tokens of sentence and proprioception. ``video``, ``tap``: whether
    something reads the velocity of the future frames, or what is tapped of them; without either only ``joint`` computes them. What the last
    block computes of the video is counted where it is read. Gradients of weights are counted where they are trained, gradients of activations
    everywhere but at the first layers; the proprioception's own layers are left out.
    """
    grid = [side // part for side, part in zip(shape[2:], model.patch, strict=True)]
    tokens, chunk = math.prod(grid[1:]), model.config.chunk
    copied = model.config.mode in ("idm", "optional_idm")
    frames = grid[0] if video or tap or model.config.mode == "joint" else 1
    later, copies = (frames - 1) * tokens, (grid[0] - 1) * copied
    lengths = {"first": tokens, "future": later, "copy": copies * tokens, "action": chunk}
    seen = tokens + later + copies * tokens
    times, total = frames + copies, 0.0
    last = f"transformer.blocks.{len(model.blocks) - 1}."
    unread = not video and not (tap and model.tap == len(model.blocks))
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv3d) or name.startswith("proprioception."):
            continue
        acts = ".action." in name or name.startswith("expert.")
        if unread and name.startswith(last) and not acts and not name.endswith(("attn1.to_k", "attn1.to_v")):
            continue
        rows = chunk if acts else seen
        if "condition_embedder.time" in name:
            rows = 1 if acts else times
        elif any(part in name for part in _TEXT):
            rows = text
        elif name == "transformer.proj_out":
            rows = frames * tokens if video else 0
        first = name in ("transformer.patch_embedding", "expert.action_in") or "time_embedder.linear_1" in name
        backward = 2.0 * (not first) + 2.0 * layer.weight.requires_grad
        total += (2.0 + backward) * rows * layer.weight.numel()
    calls = groups(model.config.mode, lengths)
    pairs = [(end - begin) * sum(b - a for a, b in runs) + (end - begin) * text for (begin, end), runs in calls]
    attended = sum(pairs) * len(model.blocks) - (sum(pairs[:-1]) if unread else 0)
    return total + 3.0 * 4.0 * model.width * attended
