"""The stock diffusers ``WanTransformer3DModel`` as velocity predictor: feature tap, proprioception tokens, actions where wanted.

Conditioning follows TI2V-5B: latent frame 0 is the clean encoded picture and its tokens have timestep 0, all others ``1000
sigma``. Proprioception enters as K extra tokens behind the text tokens. The stock forward has no text mask, so text is always
padded with zero vectors to the same length (32), in training and in use. An action model is a text model with an
``ActionConditioner``: it cannot be used without actions, and a text model not with them.

``WanDenoiser.forward`` runs the stock sub-modules itself: modulations are computed once a latent frame instead of once a token,
and the tap needs no hook. A test holds it against the stock forward.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..flow_matching import add_noise, frame_timesteps
from ..storage import as_dtype, load_diffusers, save_diffusers, save_tensors
from ..text import TEXT_WIDTH
from .actions import ActionConditioner, ActionConfig

#: Layers of every block that LoRA is put on: self-attention, cross-attention and feed-forward.
WAN_LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
#: One token a latent cell: the geometry of docs/architecture.md.
PATCH = (1, 1, 1)


@dataclass(slots=True, kw_only=True)
class WanConfig:
    """Size of the transformer. ``tap``: block (counted from 1) whose output the physics losses read."""

    latent_channels: int = 16
    num_heads: int = 4
    head_dim: int = 64
    num_layers: int = 7
    ffn_dim: int = 896
    text_dim: int = TEXT_WIDTH
    tap: int = 4

    @property
    def dim(self) -> int:
        return self.num_heads * self.head_dim


@dataclass(slots=True, kw_only=True)
class ConditionerConfig:
    """Proprioception: joint targets at ``lags`` (control steps before now, first is 0), ``state_dim`` numbers each."""

    state_dim: int = 14
    lags: tuple[int, ...] = (0, 8, 16)
    hidden: int = 192
    width: int = TEXT_WIDTH

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ConditionerConfig:
        """As a JSON file has it."""
        return cls(**{**values, "lags": tuple(values["lags"])})


class ProprioceptionConditioner(nn.Module):
    """Joint targets at K lags -> K conditioning tokens.

    It sees the present targets and the differences between successive lags (velocities), both standardised with stored
    statistics of the training set.
    """

    state_mean: Tensor
    state_std: Tensor
    difference_std: Tensor

    def __init__(self, config: ConditionerConfig) -> None:
        super().__init__()
        self.config = config
        lags = len(config.lags)
        self.register_buffer("state_mean", torch.zeros(config.state_dim))
        self.register_buffer("state_std", torch.ones(config.state_dim))
        self.register_buffer("difference_std", torch.ones(config.state_dim))
        self.net = nn.Sequential(
            nn.Linear(lags * config.state_dim, config.hidden),
            nn.SiLU(),
            nn.Linear(config.hidden, config.hidden),
            nn.SiLU(),
            nn.Linear(config.hidden, lags * config.width),
        )

    def set_statistics(self, proprioception_NKA: Tensor) -> None:
        """Standardise with the statistics of training windows [N,K,A]; joints that never move keep scale 1."""
        now, difference = proprioception_NKA[:, 0], proprioception_NKA[:, :-1] - proprioception_NKA[:, 1:]
        self.state_mean.copy_(now.mean(0))
        for buffer, values in ((self.state_std, now), (self.difference_std, difference.flatten(0, 1))):
            spread = values.std(0)
            buffer.copy_(torch.where(spread > 1e-4, spread, torch.ones_like(spread)))

    def forward(self, proprioception_BKA: Tensor) -> Tensor:
        now = (proprioception_BKA[:, :1] - self.state_mean) / self.state_std
        difference = (proprioception_BKA[:, :-1] - proprioception_BKA[:, 1:]) / self.difference_std
        tokens = self.net(torch.cat([now, difference], dim=1).flatten(1))
        return tokens.unflatten(1, (len(self.config.lags), self.config.width))


class OverWan:
    """What a module over a stock diffusers ``WanTransformer3DModel`` says of it."""

    transformer: Any

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.blocks

    @property
    def width(self) -> int:
        """Numbers of a tapped token."""
        return int(self.transformer.config.num_attention_heads * self.transformer.config.attention_head_dim)

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of a token."""
        return tuple(self.transformer.config.patch_size)


class WanDenoiser(OverWan, nn.Module):
    """Velocity of noisy latents under instruction, proprioception and, in an action model, actions; see the module's docstring."""

    lora_targets = WAN_LORA_TARGETS
    #: Latent frame 0 is given.
    first_predicted = 1

    def __init__(
        self,
        transformer: Any,
        conditioner: ProprioceptionConditioner,
        tap: int,
        actions: ActionConditioner | None = None,
    ) -> None:
        super().__init__()
        assert 1 <= tap <= len(transformer.blocks), f"tap {tap} of {len(transformer.blocks)} blocks"
        self.transformer = transformer
        self.conditioner = conditioner
        self.actions = actions
        self.tap = tap
        #: How a block is called, ``block_forward`` or what a trainer puts in its place to compile, shard or recompute it.
        self.run_block: Callable[..., Tensor] = block_forward

    def whole_parts(self) -> list[nn.Module]:
        """What is too small to be spread over processes."""
        return [part for part in (self.conditioner, self.actions) if part is not None]

    def compile_blocks(self) -> None:
        """Compile the block computation for training (one graph shared by all blocks). Parameters and exports stay as they are.

        Without gradients the plain computation runs: evaluation has other shapes and would make the graph dynamic.
        """
        compiled = torch.compile(block_forward, dynamic=False)

        def run(*inputs: Any) -> Tensor:
            return compiled(*inputs) if torch.is_grad_enabled() else block_forward(*inputs)

        self.run_block = run

    def context(self, text_BLD: Tensor, proprioception_BKA: Tensor) -> Tensor:
        """Text tokens [B,32,384] (zero padded) and the proprioception tokens behind them: [B,32+K,384]."""
        return torch.cat([text_BLD, self.conditioner(proprioception_BKA).to(text_BLD.dtype)], dim=1)

    def add_actions(self, config: ActionConfig) -> ActionConditioner:
        """Make a text model an action model that still gives the same velocities; draws from torch's global generator."""
        assert self.actions is None
        self.actions = ActionConditioner(config, self.transformer.condition_embedder.time_proj.in_features)
        return self.actions

    def action_embedding(self, actions_BPA: Tensor | None, proprioception_BKA: Tensor) -> Tensor | None:
        """What ``forward`` takes as ``action_BFD``: None for a text model, which reads no actions."""
        if self.actions is None:
            return None
        assert actions_BPA is not None, "an action model needs actions"
        return self.actions(actions_BPA, proprioception_BKA[:, 0])

    def predict(
        self, batch: Mapping[str, Any], noise_BCFhw: Tensor, sigma_B: Tensor, *, need_tap: bool
    ) -> tuple[Tensor, Tensor | None]:
        """See ``training.denoiser.Denoiser``."""
        x0, now = batch["latents_BCFhw"], batch["proprioception_BKA"]
        context = self.context(batch["text_BLD"], now)
        action = self.action_embedding(batch.get("actions_BPA"), now)
        noisy, times = add_noise(x0, noise_BCFhw, sigma_B), frame_timesteps(sigma_B, x0.shape[2])
        return self(noisy, times, context, action_BFD=action, need_tap=need_tap)

    def forward(
        self,
        x_BCFhw: Tensor,
        timesteps_BF: Tensor,
        context_BLD: Tensor,
        *,
        action_BFD: Tensor | None = None,
        need_tap: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """-> (velocity [B,C,F,h,w], output of block ``tap`` [B,T,D], a token a patch, row-major (F,h,w), or None).

        Any spatial patch: (1,1,1) in our small models, (1,2,2) in Wan2.2-TI2V-5B.
        """
        model = self.transformer
        assert (action_BFD is None) == (self.actions is None), "actions for an action model, none for a text model"
        at = embed(model, x_BCFhw, timesteps_BF, context_BLD, action_BFD)
        x = at.x_BLD
        tapped = None
        for index, block in enumerate(model.blocks, start=1):
            x = self.run_block(block, x, at.context_BLD, at.modulation_BF6D, at.rotary)
            if need_tap and index == self.tap:
                tapped = x
        return unembed(model, x, at.temb_BFD, x_BCFhw.shape), tapped


@dataclass(slots=True, kw_only=True)
class Embedded:
    """What the blocks of a ``WanTransformer3DModel`` read: tokens [B,F*h*w,D] row-major (F,h,w), the time embedding and its six
    modulations once a latent frame (or any F equal runs of tokens, down to single ones), projected text [B,L,D], rotary positions."""

    x_BLD: Tensor
    temb_BFD: Tensor
    modulation_BF6D: Tensor
    context_BLD: Tensor
    rotary: tuple


def embed(
    transformer: Any,
    x_BCFhw: Tensor,
    timesteps_BF: Tensor,
    context_BLD: Tensor,
    action_BFD: Tensor | None = None,
) -> Embedded:
    """The stock forward before its first block, for any spatial patch (a token is one latent frame deep).

    ``action_BFD`` is added to the time embedding, before the modulations are made of it.
    """
    assert transformer.config.patch_size[0] == 1, "modulations are given once a latent frame"
    rotary = transformer.rope(x_BCFhw)
    x = transformer.patch_embedding(x_BCFhw).flatten(2).transpose(1, 2).contiguous()
    temb, modulation, context, _ = transformer.condition_embedder(
        timesteps_BF.flatten(), context_BLD, None, timestep_seq_len=timesteps_BF.shape[1]
    )
    if action_BFD is not None:
        embedder = transformer.condition_embedder
        temb = temb + action_BFD.type_as(temb)
        modulation = embedder.time_proj(embedder.act_fn(temb))
    modulation = modulation.unflatten(2, (6, -1))
    return Embedded(x_BLD=x, temb_BFD=temb, modulation_BF6D=modulation, context_BLD=context, rotary=rotary)


def unembed(transformer: Any, x_BLD: Tensor, temb_BFD: Tensor, shape: Sequence[int]) -> Tensor:
    """The stock forward after its last block: velocity [B,C,F,h,w] for latents of this ``shape`` (its channels are not read)."""
    frames, height, width = shape[2:]
    _, rows, columns = transformer.config.patch_size
    shift, scale = (transformer.scale_shift_table.unsqueeze(0) + temb_BFD.unsqueeze(2)).float().unbind(2)
    x_BLD = modulate_frames(transformer.norm_out(x_BLD.float()), shift, scale).type_as(x_BLD)
    patches = transformer.proj_out(x_BLD).unflatten(1, (frames, height // rows, width // columns))
    velocity_BCFhywx = patches.unflatten(-1, (rows, columns, -1)).permute(0, 6, 1, 2, 4, 3, 5)
    return velocity_BCFhywx.flatten(5, 6).flatten(3, 4)


def modulate_frames(x_BLD: Tensor, shift_BFD: Tensor, scale_BFD: Tensor) -> Tensor:
    """``x (1 + scale) + shift`` with one row of each a frame: the L tokens are F equal runs."""
    frames = x_BLD.unflatten(1, (shift_BFD.shape[1], -1))
    return (frames * (1 + scale_BFD.unsqueeze(2)) + shift_BFD.unsqueeze(2)).flatten(1, 2)


def gate_frames(x_BLD: Tensor, gate_BFD: Tensor) -> Tensor:
    """``gate x`` in float32 with one row a frame."""
    return (x_BLD.float().unflatten(1, (gate_BFD.shape[1], -1)) * gate_BFD.unsqueeze(2)).flatten(1, 2)


def block_forward(block: Any, x_BLD: Tensor, context: Tensor, modulation_BF6D: Tensor, rotary: tuple) -> Tensor:
    """One stock ``WanTransformerBlock`` with modulations given per latent frame (the stock forward wants them per token)."""
    table = block.scale_shift_table.unsqueeze(0) + modulation_BF6D.float()
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = table.unbind(2)
    normed = modulate_frames(block.norm1(x_BLD.float()), shift, scale).type_as(x_BLD)
    x_BLD = (x_BLD.float() + gate_frames(block.attn1(normed, None, None, rotary), gate)).type_as(x_BLD)
    normed = block.norm2(x_BLD.float()).type_as(x_BLD)
    x_BLD = x_BLD + block.attn2(normed, context, None, None)
    normed = modulate_frames(block.norm3(x_BLD.float()), ffn_shift, ffn_scale).type_as(x_BLD)
    return (x_BLD.float() + gate_frames(block.ffn(normed), ffn_gate)).type_as(x_BLD)


def build_denoiser(
    config: WanConfig, conditioner: ConditionerConfig, actions: ActionConfig | None = None
) -> WanDenoiser:
    """A freshly initialised denoiser, a text model without ``actions``; draws from torch's global generator (seed it first)."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    transformer = WanTransformer3DModel(
        patch_size=PATCH,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        text_dim=config.text_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
    )
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    denoiser = WanDenoiser(transformer, ProprioceptionConditioner(conditioner), config.tap)
    if actions is not None:
        denoiser.add_actions(actions)
    return denoiser


def save_denoiser(denoiser: WanDenoiser, folder: Path, dtype: torch.dtype | None = None) -> None:
    """``transformer/`` (a plain diffusers folder), ``conditioner.safetensors``, ``denoiser.json`` and, of an action model,
    ``actions.safetensors`` in ``folder``.

    ``dtype`` (e.g. float16) is the stored precision; None keeps the weights bit-exact. The model itself is not changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_diffusers(denoiser.transformer, folder / "transformer", dtype)
    save_tensors(as_dtype(denoiser.conditioner.state_dict(), dtype), folder / "conditioner.safetensors")
    settings = {"tap": denoiser.tap, "conditioner": asdict(denoiser.conditioner.config)}
    if denoiser.actions is not None:
        exact = dict(denoiser.actions.named_buffers())  # the specification is made of them
        state = as_dtype(denoiser.actions.state_dict(), dtype) | as_dtype(exact, None)
        save_tensors(state, folder / "actions.safetensors")
        settings["actions"] = asdict(denoiser.actions.config)
    (folder / "denoiser.json").write_text(json.dumps(settings, indent=2) + "\n")


def load_denoiser(folder: Path, device: str | torch.device = "cpu") -> WanDenoiser:
    """What ``save_denoiser`` wrote, in float32."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
    from safetensors.torch import load_file

    transformer = load_diffusers(WanTransformer3DModel, folder / "transformer")
    settings = json.loads((folder / "denoiser.json").read_text())
    settings["conditioner"]["lags"] = tuple(settings["conditioner"]["lags"])
    conditioner = ProprioceptionConditioner(ConditionerConfig.of(settings["conditioner"]))
    state = load_file(folder / "conditioner.safetensors")
    conditioner.load_state_dict({name: value.float() for name, value in state.items()})
    denoiser = WanDenoiser(transformer, conditioner, settings["tap"])
    if "actions" in settings:
        settings["actions"]["names"] = tuple(settings["actions"]["names"])
        added = denoiser.add_actions(ActionConfig(**settings["actions"]))
        state = load_file(folder / "actions.safetensors")
        added.load_state_dict({name: value.float() for name, value in state.items()})
    return denoiser.to(device)
