"""The world-action model: a Wan video transformer and an action expert, one attention over both (reference sections 1.4 to 1.9).

Conventions are those of ``worldmodel.flow_matching``: ``x_s = (1 - s) x0 + s eps``, velocity ``eps - x0``, timestep ``1000 s``. Video and
actions have noise levels of their own. Latent frame 0 is the clean picture at timestep 0. The video never sees the actions.

Precision is the caller's ``torch.autocast``: in training that of ``run.precision``, in use ``precision`` below, which is the same where that is
``auto`` and both run on the same kind of device. Times, action latents and their first and last layers are float32 in all; modulations are
made by a layer under autocast and applied in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from physisforcing.worldmodel.backbones.protocol import call_block
from physisforcing.worldmodel.backbones.wan import OverWan, unembed
from physisforcing.worldmodel.flow_matching import TIMESTEP_SCALE, frame_timesteps

from .action_expert import build_expert
from .config import PolicyModelConfig
from .initial import interpolate
from .mixture import Keys, Stream, join
from .pattern import Group, groups
from .positions import Rotary, action_rotary


class Copy(NamedTuple):
    """The future once more, as the actions see it in ``idm``: latents [B,C,F,h,w] with the clean first frame, their noise level [B], and
    bool [B] which samples' actions see it (None: all)."""

    latents_BCFhw: Tensor
    sigma_B: Tensor
    seen_B: Tensor | None = None


class WorldActionModel(OverWan, nn.Module):
    """``transformer``: a stock ``WanTransformer3DModel`` (patches one latent frame deep), whose blocks get the action expert's inside.

    ``conditioner``: the small backbones' proprioception tokens, for ``proprioception="backbone"``. ``run_block`` calls a block; a trainer puts
    something else there to recompute activations. ``tap``: the block, counted from 1, whose video tokens the physics losses read.
    """

    def __init__(
        self,
        transformer: Any,
        config: PolicyModelConfig,
        *,
        tap: int | None = None,
        conditioner: nn.Module | None = None,
    ) -> None:
        super().__init__()
        assert transformer.config.patch_size[0] == 1, "patches one latent frame deep"
        assert (conditioner is not None) == (config.proprioception == "backbone"), "a conditioner for its tokens alone"
        self.config, self.transformer = config, transformer
        expert, blocks = build_expert(config, transformer)
        if config.initial == "interpolated":
            video = dict(transformer.named_parameters())
            interpolate(expert, video, published=config.published_initial)
            for index, block in enumerate(blocks):
                prefix = f"blocks.{index}."
                own = {name.removeprefix(prefix): value for name, value in video.items() if name.startswith(prefix)}
                interpolate(block, own, published=config.published_initial)
        self.expert = expert
        join(transformer, blocks)
        text_dim = transformer.config.text_dim
        self.proprioception = conditioner if conditioner is not None else nn.Linear(config.state_dim, text_dim)
        self.tap = tap if tap is not None else max(1, len(transformer.blocks) // 2)
        self.run_block: Callable[..., Any] = call_block
        cos, sin = action_rotary(transformer.rope, config.positions, config.chunk, config.steps_per_latent)
        self.register_buffer("action_cos", cos, persistent=False)
        self.register_buffer("action_sin", sin, persistent=False)

    def action_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of the action expert and the proprioception: what the video backbone does not have."""
        for name, parameter in self.named_parameters():
            if name.startswith(("expert.", "proprioception.")) or ".action." in name:
                yield name, parameter

    def context(self, text_BLD: Tensor, state: Tensor) -> Tensor:
        """Text tokens, zero behind the sentence, and the proprioception's: [B,L+K,text width]. ``state``: normalised joint targets [B,A], or for
        the backbone's conditioner raw ones at its lags [B,K,A]."""
        made = self.proprioception(state.to(text_BLD.dtype))
        tokens = made.unsqueeze(1) if made.ndim == 2 else made
        return torch.cat([text_BLD, tokens.to(text_BLD.dtype)], dim=1)

    def forward(
        self,
        latents_BCFhw: Tensor,
        sigma_B: Tensor,
        actions_BPA: Tensor | None,
        action_sigma_B: Tensor | None,
        context_BLD: Tensor,
        *,
        copy: Copy | None = None,
        need_tap: bool = False,
        need_velocity: bool = True,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """-> (video velocity like the latents, of frame 0 meaningless, or None where nobody needs it; action velocity [B,P,A] or None; tapped tokens [B,F*h*w,D] or None).

        ``latents_BCFhw``: noisy, frame 0 clean; a single frame computes no noisy future at all.
        """
        sees_copy = actions_BPA is not None and self.config.mode in ("idm", "optional_idm")
        assert (copy is not None) == sees_copy, "a copy for idm alone"
        video, temb, tokens = self._video(
            latents_BCFhw, frame_timesteps(sigma_B, latents_BCFhw.shape[2]), context_BLD, copy
        )
        action = action_temb = None
        if actions_BPA is not None:
            assert action_sigma_B is not None
            action, action_temb = self._action(actions_BPA, action_sigma_B, context_BLD)
        frames = latents_BCFhw.shape[2]
        copied = 0 if copy is None else copy.latents_BCFhw.shape[2] - 1
        lengths = {"first": tokens, "future": (frames - 1) * tokens, "copy": copied * tokens}
        lengths["action"] = 0 if action is None else action.x_BLD.shape[1]
        calls, tapped = groups(self.config.mode, lengths), None
        visible = _visible(lengths, copy)
        unread = action is not None and not need_velocity and not (need_tap and self.tap == len(self.blocks))
        for index, block in enumerate(self.blocks, start=1):
            x, y = self.run_block(block, video, action, calls, visible, unread and index == len(self.blocks))
            if need_tap and index == self.tap:
                x, tapped = _tapped(x, frames * tokens)
            video = video._replace(x_BLD=x)
            action = None if action is None else action._replace(x_BLD=y)
        velocity = None
        if need_velocity:
            noisy = video.x_BLD[:, : frames * tokens]
            velocity = unembed(self.transformer, noisy, temb[:, :frames], latents_BCFhw.shape)
        acted = None if action is None else self.expert.velocity(action.x_BLD, action_temb)  # type: ignore[arg-type]
        return velocity, acted, tapped

    def prefill(self, latents_BCFhw: Tensor, sigma_B: Tensor, context_BLD: Tensor) -> tuple[Keys, ...]:
        """Keys for a plan, block by block: those of the first frame alone (one latent frame), or of an imagined future too, at its noise level."""
        video, calls, text = self.before_prefill(latents_BCFhw, sigma_B, context_BLD)
        found = []
        for index, block in enumerate(self.blocks, start=1):
            x, keys = block.prefill(video, calls, text, index == len(self.blocks))  # type: ignore[operator]
            video = video._replace(x_BLD=x)
            found.append(keys)
        return tuple(found)

    def before_prefill(
        self, latents_BCFhw: Tensor, sigma_B: Tensor, context_BLD: Tensor
    ) -> tuple[Stream, tuple[Group, ...], Tensor]:
        """What the blocks of a prefill read: the video's tokens, their attention, and text and proprioception in the action expert's width."""
        frames = latents_BCFhw.shape[2]
        video, _, tokens = self._video(latents_BCFhw, frame_timesteps(sigma_B, frames), context_BLD, None)
        calls = groups(self.config.mode, {"first": tokens, "future": (frames - 1) * tokens})
        return video, calls, self.expert.condition_embedder.text_embedder(context_BLD)

    def act(self, actions_BPA: Tensor, times: tuple[Tensor, Tensor], prefilled: tuple[Keys, ...]) -> Tensor:
        """Action velocity [B,P,A] float32 over prefilled keys. ``times``: of ``action_times`` for the noise level."""
        temb_BD, modulation_BF6D = times
        x = self.embed_actions(actions_BPA)
        rotary = self.action_cos, self.action_sin
        for block, keys in zip(self.blocks, prefilled, strict=True):
            x = block.act(x, modulation_BF6D, rotary, keys)  # type: ignore[operator]
        return self.expert.velocity(x, temb_BD)

    def embed_actions(self, actions_BPA: Tensor) -> Tensor:
        """Action tokens [B,P,D] float32, rounded as ``coarse_times`` has it."""
        return self.expert.embed(self._rounded(actions_BPA))

    def action_times(self, sigma_B: Tensor) -> tuple[Tensor, Tensor]:
        """-> (time embedding [B,D], modulations [B,1,6,D]) of the actions' noise levels."""
        temb, modulation = self._times(self.expert.condition_embedder, TIMESTEP_SCALE * sigma_B.float()[:, None])
        return temb[:, 0], modulation

    def _times(self, embedder: Any, timesteps_BF: Tensor) -> tuple[Tensor, Tensor]:
        """-> (time embedding [B,F,D], modulations [B,F,6,D]) in float32."""
        with torch.autocast(timesteps_BF.device.type, enabled=False):
            waves = embedder.timesteps_proj(self._rounded(timesteps_BF.float()).flatten())
            temb = embedder.time_embedder(waves).unflatten(0, timesteps_BF.shape)
        # a sampler makes those of all its steps outside autocast, where a layer does not cast what it reads
        modulation = embedder.time_proj(embedder.act_fn(temb).to(embedder.time_proj.weight.dtype)).float()
        return temb, modulation.unflatten(2, (6, -1))

    def _rounded(self, value: Tensor) -> Tensor:
        """As the published model sees times and action latents, where the config says so."""
        return value.bfloat16().float() if self.config.coarse_times else value

    def _video(
        self, latents_BCFhw: Tensor, times_BF: Tensor, context_BLD: Tensor, copy: Copy | None
    ) -> tuple[Stream, Tensor, int]:
        """-> (tokens of the noisy frames and of the copy's future, time embedding [B,F,D], tokens a frame)."""
        model = self.transformer
        parts = [model.patch_embedding(latents_BCFhw)]
        cos, sin = model.rope(latents_BCFhw if copy is None else copy.latents_BCFhw)
        frames, tokens = latents_BCFhw.shape[2], parts[0].shape[3] * parts[0].shape[4]
        if copy is not None:
            parts.append(model.patch_embedding(copy.latents_BCFhw[:, :, 1:]))
            later = copy.sigma_B.float()[:, None] * TIMESTEP_SCALE
            times_BF = torch.cat([times_BF, later.expand(-1, copy.latents_BCFhw.shape[2] - 1)], dim=1)
            cos, sin = (torch.cat([x[:, : frames * tokens], x[:, tokens:]], dim=1) for x in (cos, sin))
        x = torch.cat([part.flatten(2).transpose(1, 2) for part in parts], dim=1)
        temb, modulation = self._times(model.condition_embedder, times_BF)
        text = model.condition_embedder.text_embedder(context_BLD)
        return Stream(x, modulation, (cos, sin), text), temb, tokens

    def _action(self, actions_BPA: Tensor, sigma_B: Tensor, context_BLD: Tensor) -> tuple[Stream, Tensor]:
        temb, modulation = self.action_times(sigma_B)
        x = self.embed_actions(actions_BPA)
        text = self.expert.condition_embedder.text_embedder(context_BLD)
        rotary: Rotary = (self.action_cos, self.action_sin)
        return Stream(x, modulation, rotary, text), temb


def _tapped(x_BLD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """-> (the same tokens, the first ``count`` of them). The gradient of all that reads the former arrives at the latter, where the physics
    losses measure their shares of it."""
    if x_BLD.shape[1] == count:
        return x_BLD, x_BLD
    first, rest = x_BLD.split([count, x_BLD.shape[1] - count], 1)
    return torch.cat([first, rest], 1), first


def _visible(lengths: Mapping[str, int], copy: Copy | None) -> Tensor | None:
    """bool [B,L]: what of the sequence each sample's actions may see, where that differs between samples."""
    if copy is None or copy.seen_B is None:
        return None
    seen = copy.seen_B[:, None]
    parts = [torch.ones_like(seen).expand(-1, lengths["first"] + lengths["future"]), seen.expand(-1, lengths["copy"])]
    return torch.cat([*parts, torch.ones_like(seen).expand(-1, lengths["action"])], dim=1)


@contextlib.contextmanager
def precision(device: torch.device) -> Iterator[None]:
    """The arithmetic of use, and of training with ``run.precision=auto``: bfloat16 matrix products on a GPU, float32 on a CPU."""
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        yield


def to_inference(model: nn.Module, device: torch.device, *, half: bool | None = None) -> nn.Module:
    """``model`` on ``device``, frozen, with the weights of matrix products in bfloat16 where autocast would round them at every call (``half``;
    None: on a GPU) and all others in float32: the same numbers, less memory. They are rounded before they move, so that the device never has
    those of float32 as well. In place."""
    model.eval().requires_grad_(False)
    exact = {id(p) for name in EXACT for p in model.get_submodule(name).parameters()}
    if device.type == "cuda" if half is None else half:
        for layer in model.modules():
            if isinstance(layer, nn.Linear | nn.Conv3d):
                for parameter in layer.parameters():
                    if id(parameter) not in exact:
                        parameter.data = parameter.data.bfloat16()
    return model.to(device)


#: Layers that compute in float32 everywhere.
EXACT = (
    "expert.action_in", "expert.proj_out", "expert.condition_embedder.time_embedder", "transformer.condition_embedder.time_embedder",
)  # fmt: skip
