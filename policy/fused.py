"""Plans with few kernels: the fast twin of ``mixture``'s ``prefill`` and ``act``, whose numbers it gives.

An action step at full size moves 32 rows through 30 blocks: its time is the number of its kernels, not their work. So what reads the same input is
one matrix product; queries, keys and values are normed, rotated and written in one pass, to where attention reads them (a ``Room`` a block, whose
front rows a prefill fills and whose last rows every step writes again); modulations of all steps lie ready; a block ends with the first norm
of the next; and what comes before and behind the blocks are two functions that compile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from physisforcing.worldmodel.backbones.wan import modulate_frames

from .mixture import Stream, attend, finish, table
from .model import WorldActionModel
from .pattern import Group
from .positions import Rotary, rotate
from .sampling import Joint, Sampler, SamplingConfig


class Room(NamedTuple):
    """Of one block: queries, keys and values [B,L+P,3,H,D] of what the actions see and, behind it, of the P actions (the first L queries are not
    read), and the action expert's keys and values of text and proprioception [B,H,T,D]. A plan of the same shapes may overwrite it."""

    joint: Tensor
    text_key: Tensor
    text_value: Tensor


def join_products(model: WorldActionModel) -> None:
    """Lay the weights of layers that read the same input one behind the other. The layers' own parameters become views of that, so that names,
    values and memory stay; what is joined is in buffers that no checkpoint has. For models that are not trained: in place."""
    for block in model.blocks:
        for part in (block, block.action):
            _join(part.attn1, ("to_q", "to_k", "to_v"))
            _join(part.attn2, ("to_k", "to_v"))
            attn: Any = part.attn1
            norms = torch.stack([attn.norm_q.weight, attn.norm_k.weight, torch.ones_like(attn.norm_k.weight)])
            attn.register_buffer("joined_norm", norms.detach(), persistent=False)


def _join(attn: Any, names: tuple[str, ...]) -> None:
    layers = [getattr(attn, name) for name in names]
    for kind in ("weight", "bias"):
        parts = [getattr(layer, kind) for layer in layers]
        assert not any(part.requires_grad for part in parts), "of a model that is not trained"
        joined = torch.cat([part.detach() for part in parts])
        for part, view in zip(parts, joined.split([len(part) for part in parts]), strict=True):
            part.data = view
        attn.register_buffer(f"joined_{kind}", joined, persistent=False)


def with_values(rotary: Rotary) -> Rotary:
    """(cos, sin) [1,L,3,1,D] for queries, keys and values: the positions of the former, and none for values."""
    cos, sin = rotary
    return torch.stack([cos, cos, torch.ones_like(cos)], 2), torch.stack([sin, sin, torch.zeros_like(sin)], 2)


def joined_heads(attn: Any, normed_BLD: Tensor, rotary: Rotary) -> Tensor:
    """Queries, keys and values [B,L,3,H,D], rotated: those of ``mixture.project``. ``rotary``: of ``with_values``."""
    made = F.linear(normed_BLD, attn.joined_weight, attn.joined_bias).unflatten(2, (3, -1))
    exact = made.float()
    normed = F.rms_norm(exact, exact.shape[-1:], eps=attn.norm_q.eps) * attn.joined_norm
    value = (torch.arange(3, device=made.device) == 2)[:, None]
    return rotate(torch.where(value, exact, normed).to(made.dtype).unflatten(3, (attn.heads, -1)), rotary)


def joined_text(attn: Any, context_BLD: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the cross-attention, [B,H,L,D]: those of ``mixture.text_keys``."""
    key, value = F.linear(context_BLD, attn.joined_weight, attn.joined_bias).chunk(2, 2)
    key = attn.norm_k(key.float()).to(value.dtype)
    return tuple(x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (key, value))  # type: ignore[return-value]


def prefill_block(
    block: Any, video: Stream, groups: tuple[Group, ...], action_context_BLD: Tensor, joint: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``MixtureBlock.prefill``, of the last block too in whole: -> (video tokens behind the block, the actions' keys and values of text); fills the front
    of ``joint``."""
    rows, x = table(block, video.modulation_BF6D), video.x_BLD
    normed = modulate_frames(block.norm1(x.float()), rows[0], rows[1]).type_as(x)
    made = joined_heads(block.attn1, normed, video.rotary)
    joint[:, : x.shape[1]] = made
    query, key, value = (part.transpose(1, 2) for part in made.unbind(2))
    attended = attend(query, key, value, groups)
    x = finish(block, x, attended, rows, joined_text(block.attn2, video.context_BLD))
    return x, *joined_text(block.action.attn2, action_context_BLD)


def act_block(
    block: Any,
    x_BPD: Tensor,
    normed_BPD: Tensor,
    rows_116D: Tensor,
    after_116D: Tensor,
    rotary: Rotary,
    room: Room,
) -> tuple[Tensor, Tensor]:
    """``MixtureBlock.act``: -> (action tokens behind the block, what the next one's attention reads). ``normed_BPD``: what the block before gave
    of the latter. ``rows_116D``, ``after_116D``: modulations of this block and of the next."""
    action, rows = block.action, rows_116D.unbind(2)
    made = joined_heads(action.attn1, normed_BPD, rotary)
    joint, first = room.joint, room.joint.shape[1] - made.shape[1]
    joint[:, first:] = made
    query, key, value = (part.transpose(1, 2) for part in joint.unbind(2))
    attended = F.scaled_dot_product_attention(query[:, :, first:], key, value)
    x_BPD = finish(action, x_BPD, attended, rows, (room.text_key, room.text_value))
    return x_BPD, ready(action, x_BPD, after_116D)


def ready(block: Any, x_BPD: Tensor, rows_116D: Tensor) -> Tensor:
    """Normed and modulated, as the block's joined product reads it: in the precision of its weights, to which it would be rounded there."""
    shift, scale = rows_116D[:, :, 0], rows_116D[:, :, 1]
    made = modulate_frames(block.norm1(x_BPD.float()), shift, scale)
    return made.to(block.attn1.joined_weight.dtype)


def begin_step(model: WorldActionModel, actions_BPA: Tensor, rows_116D: Tensor) -> tuple[Tensor, Tensor]:
    """-> (action tokens, what the first block's attention reads of them, with its modulations)."""
    x = model.embed_actions(actions_BPA)
    return x, ready(model.blocks[0].action, x, rows_116D)


def end_step(model: WorldActionModel, x_BPD: Tensor, temb_1D: Tensor, actions_BPA: Tensor, change: Tensor) -> Tensor:
    """The actions after the step, whose noise level differs by ``change``."""
    return actions_BPA + change * model.expert.velocity(x_BPD, temb_1D)


class FusedSampler(Sampler):
    """``Sampler`` of ``first_frame`` and ``idm`` that plans as this module says; what ``idm`` imagines is computed as ever. The model must be one
    of ``to_inference``, whose products it joins.

    ``compiled``: whether its functions are; ``backend``: what compiles them.
    """

    def __init__(
        self,
        model: WorldActionModel,
        config: SamplingConfig,
        *,
        frames: int,
        compiled: bool = True,
        backend: str | Callable[..., Any] = "inductor",
    ) -> None:
        super().__init__(model, config, frames=frames)
        assert self.way != "joint", "nothing of a plan of joint is computed once"
        join_products(model)
        self._rotary = with_values((model.action_cos, model.action_sin))
        with torch.no_grad():
            tables = torch.stack([block.action.scale_shift_table for block in model.blocks])  # [N,1,6,D]
            #: Of each step, of each block: modulations [1,1,6,D].
            self._rows = [(tables.unsqueeze(2) + times[1].float()).unbind(0) for times in self.times]
        changes = [after - now for now, after in zip(self.sigmas[:-1], self.sigmas[1:], strict=True)]
        self._changes = torch.tensor(changes, dtype=torch.float32, device=tables.device).unbind(0)
        # uncompiled it is for tests
        wrap = functools.partial(torch.compile, dynamic=False, fullgraph=True, backend=backend, disable=not compiled)
        self._prefill_block, self._act_block = wrap(prefill_block), wrap(act_block)
        self._begin_step, self._end_step = wrap(begin_step), wrap(end_step)

    def prefill(self, latents_BCFhw: Tensor, sigma_B: Tensor, context_BLD: Tensor) -> tuple[Room, ...]:
        video, calls, text = self.model.before_prefill(latents_BCFhw, sigma_B, context_BLD)
        video, found = video._replace(rotary=with_values(video.rotary)), []
        tokens = video.x_BLD.shape[1] + self.model.config.chunk
        for block in self.model.blocks:
            attn: Any = block.attn1
            joint = attn.joined_weight.new_empty(
                len(latents_BCFhw), tokens, 3, attn.heads, attn.inner_dim // attn.heads, dtype=_made_in(attn)
            )
            x, *of_text = self._prefill_block(block, video, calls, text, joint)
            video = video._replace(x_BLD=x)
            found.append(Room(joint, *of_text))
        return tuple(found)

    def steps(self, begun: Any, noise_BPA: Tensor) -> Tensor:
        assert not isinstance(begun, Joint)
        model, actions = self.model, noise_BPA.float()
        for times, rows, change in zip(self.times, self._rows, self._changes, strict=True):
            x, normed = self._begin_step(model, actions, rows[0])
            for index, (block, room) in enumerate(zip(model.blocks, begun, strict=True)):
                # the last block's next norm is nobody's: one computation for all blocks
                after = rows[(index + 1) % len(rows)]
                x, normed = self._act_block(block, x, normed, rows[index], after, self._rotary, room)
            actions = self._end_step(model, x, times[0], actions, change)
        return actions


def _made_in(attn: Any) -> torch.dtype:
    """What a product gives here."""
    kind = attn.joined_weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else attn.joined_weight.dtype
