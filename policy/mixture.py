"""A block of the mixture of transformers: the video's block and the action expert's with one self-attention over both.

Each expert makes queries, keys and values of its own tokens with its own weights, modulated and at its own positions; attention runs over
the joint sequence by ``pattern.groups``; each goes on with its own output layer, gate, cross-attention and feed-forward. The class of the
video's stock blocks is replaced and the action expert's block put inside, so that one block of the transformer stays one unit for
sharding, compilation and recomputation.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from physisforcing.worldmodel.backbones.wan import gate_frames, modulate_frames

from .pattern import Group
from .positions import Rotary, rotate


class Stream(NamedTuple):
    """Tokens of one expert between two blocks. ``modulation_BF6D``: six rows for each of F equal runs of tokens; ``context_BLD``: text and
    proprioception in the expert's width."""

    x_BLD: Tensor
    modulation_BF6D: Tensor
    rotary: Rotary
    context_BLD: Tensor


class Keys(NamedTuple):
    """What later queries need of one block, [B,H,L,D] each: the video's keys and values, and the action expert's of text and
    proprioception. All of it is the same in every step of a plan."""

    key: Tensor
    value: Tensor
    text_key: Tensor
    text_value: Tensor


def table(block: Any, modulation_BF6D: Tensor) -> tuple[Tensor, ...]:
    """Shift, scale and gate of attention and feed-forward, [B,F,D] float32 each."""
    return (block.scale_shift_table.unsqueeze(0) + modulation_BF6D.float()).unbind(2)


def project(
    block: Any, x_BLD: Tensor, rows: tuple[Tensor, ...], rotary: Rotary, *, asks: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of the block's self-attention, [B,H,L,D], rotated; of tokens that do not ask no queries, [B,H,0,D]."""
    normed = modulate_frames(block.norm1(x_BLD.float()), rows[0], rows[1]).type_as(x_BLD)
    attn = block.attn1
    value = attn.to_v(normed).unflatten(2, (attn.heads, -1))

    def rotated(layer: nn.Module, norm: nn.Module) -> Tensor:
        made = norm(layer(normed).float()).unflatten(2, (attn.heads, -1))
        return rotate(made.to(value.dtype), rotary).transpose(1, 2)

    key = rotated(attn.to_k, attn.norm_k)
    query = rotated(attn.to_q, attn.norm_q) if asks else key[:, :, :0]
    return query, key, value.transpose(1, 2)


class _OneGradientLayout(torch.autograd.Function):
    """What attention gives, unchanged; its gradient gets one layout, [B,L,H,D] without gaps, however it was cut out of a larger one.

    cuDNN's backward pass (preferred on Hopper and datacentre Blackwell; seen with PyTorch 2.11) is planned once for shapes and layouts of queries,
    keys and values, and the plan also holds the layout of its first gradient: one of another layout, as compiled blocks make beside others in a
    process, is read at wrong places. PyTorch keeps no traced graphs on disk of functions like this one: each process traces its blocks anew.
    """

    @staticmethod
    def forward(_: Any, x_BHLD: Tensor) -> Tensor:
        return x_BHLD.view_as(x_BHLD)

    @staticmethod
    def backward(_: Any, gradient_BHLD: Tensor) -> Tensor:  # type: ignore[override]
        return gradient_BHLD.transpose(1, 2).contiguous().transpose(1, 2)


def attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None = None) -> Tensor:
    """[B,H,L,D] each. ``visible``: bool, keys that are seen, [B,1,1,L]."""
    found = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
    return _OneGradientLayout.apply(found) if found.requires_grad else found


def attend(
    query: Tensor, key: Tensor, value: Tensor, groups: tuple[Group, ...], visible_BL: Tensor | None = None
) -> Tensor:
    """Attention of a joint sequence by ``groups``: [B,H,L,D]. ``visible_BL``: keys that the last group's queries see of those in its runs."""
    made = []
    for place, ((begin, end), runs) in enumerate(groups):
        keys, values = (
            torch.cat([x[:, :, a:b] for a, b in runs], 2) if len(runs) > 1 else x[:, :, slice(*runs[0])]
            for x in (key, value)
        )
        shown = None
        if visible_BL is not None and place == len(groups) - 1:
            shown = torch.cat([visible_BL[:, a:b] for a, b in runs], 1)[:, None, None]
        made.append(attention(query[:, :, begin:end], keys, values, shown))
    return torch.cat(made, 2) if len(made) > 1 else made[0]


def text_keys(block: Any, context_BLD: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the block's cross-attention, [B,H,L,D]."""
    attn = block.attn2
    key, value = attn.norm_k(attn.to_k(context_BLD).float()), attn.to_v(context_BLD)
    return tuple(x.to(value.dtype).unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (key, value))  # type: ignore[return-value]


def finish(
    block: Any, x_BLD: Tensor, attended_BHLD: Tensor, rows: tuple[Tensor, ...], text: tuple[Tensor, Tensor]
) -> Tensor:
    """The block behind its self-attention: output layer, gate, cross-attention to ``text`` keys and values, feed-forward."""
    out = block.attn1.to_out[0](attended_BHLD.transpose(1, 2).flatten(2))
    x_BLD = (x_BLD.float() + gate_frames(out, rows[2])).type_as(x_BLD)
    attn = block.attn2
    query = attn.norm_q(attn.to_q(block.norm2(x_BLD.float()).type_as(x_BLD)).float())
    seen = attention(query.to(text[1].dtype).unflatten(2, (attn.heads, -1)).transpose(1, 2), *text)
    x_BLD = x_BLD + attn.to_out[0](seen.transpose(1, 2).flatten(2)).type_as(x_BLD)
    normed = modulate_frames(block.norm3(x_BLD.float()), rows[3], rows[4]).type_as(x_BLD)
    return (x_BLD.float() + gate_frames(block.ffn(normed), rows[5])).type_as(x_BLD)


@functools.cache
def mixture_block() -> type[nn.Module]:
    """The stock block with the action expert's block as ``action`` and a forward over both."""
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    class MixtureBlock(WanTransformerBlock):
        action: nn.Module

        def forward(
            self,
            video: Stream,
            action: Stream | None,
            groups: tuple[Group, ...],
            visible_BL: Tensor | None = None,
            unread: bool = False,
        ) -> tuple[Tensor, Tensor | None]:
            """-> (video tokens, action tokens or None) behind this block. ``unread``: nobody reads the former, which are returned as they came; those
            of their layers that the actions do not see are not computed, and get no gradients."""
            experts = [(self, video)] if action is None else [(self, video), (self.action, action)]
            rows = [table(block, stream.modulation_BF6D) for block, stream in experts]
            made = [
                project(block, stream.x_BLD, row, stream.rotary, asks=not unread or stream is action)
                for (block, stream), row in zip(experts, rows, strict=True)
            ]
            # of both experts one precision, whichever their residual streams have
            query, key, value = (
                torch.cat([part.to(made[0][2].dtype) for part in parts], 2) for parts in zip(*made, strict=True)
            )
            calls = (Group((0, query.shape[2]), groups[-1].keys),) if unread else groups
            attended = attend(query, key, value, calls, visible_BL).split([asked.shape[2] for asked, *_ in made], 2)
            found = [
                finish(block, s.x_BLD, part, row, text_keys(block, s.context_BLD)) if part.shape[2] else s.x_BLD
                for (block, s), part, row in zip(experts, attended, rows, strict=True)
            ]
            return found[0], found[1] if action is not None else None

        def prefill(
            self, video: Stream, groups: tuple[Group, ...], action_context_BLD: Tensor, unread: bool = False
        ) -> tuple[Tensor, Keys]:
            """-> (video tokens behind this block, what the actions need of it). ``unread``: as in ``forward``."""
            rows, x = table(self, video.modulation_BF6D), video.x_BLD
            query, key, value = project(self, x, rows, video.rotary, asks=not unread)
            if not unread:
                attended = attend(query, key, value, groups)
                x = finish(self, x, attended, rows, text_keys(self, video.context_BLD))
            return x, Keys(key, value, *text_keys(self.action, action_context_BLD))

        def act(self, x_BPD: Tensor, modulation_BF6D: Tensor, rotary: Rotary, keys: Keys) -> Tensor:
            """Action tokens behind this block, over the keys of a prefill and their own."""
            rows = table(self.action, modulation_BF6D)
            query, key, value = project(self.action, x_BPD, rows, rotary)
            joint = (torch.cat([old, new.to(old.dtype)], 2) for old, new in ((keys.key, key), (keys.value, value)))
            attended = F.scaled_dot_product_attention(query.to(keys.key.dtype), *joint)
            return finish(self.action, x_BPD, attended, rows, (keys.text_key, keys.text_value))

    MixtureBlock.__name__ = MixtureBlock.__qualname__ = WanTransformerBlock.__name__
    return MixtureBlock


def join(transformer: Any, actions: list[nn.Module]) -> None:
    """Put the action expert's blocks into the transformer's, whose class they change. Names of the video's parameters stay."""
    for block, action in zip(transformer.blocks, actions, strict=True):
        block.__class__ = mixture_block()
        block.action = action
