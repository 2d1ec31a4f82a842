"""Checkpoints in the layouts in which others release them, with random weights: names by the original modules' structure, not by our rules.

``WanModel``, ``WanVae``, ``T5`` and ``Cosmos3`` have the original attribute names and shapes and no forward. ``original_*`` rename the
tensors of a stock model by plain replacement or by position.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import Tensor, nn

State = dict[str, Tensor]
#: Sizes of a tiny transformer, in Wan's names; heads of 12.
TINY_WAN = {
    "dim": 24,
    "ffn_dim": 40,
    "freq_dim": 16,
    "in_dim": 8,
    "num_heads": 2,
    "num_layers": 2,
    "out_dim": 8,
    "eps": 1e-06,
}
TINY_VAE = {"base_dim": 4, "z_dim": 8, "dim_mult": [1, 2, 2, 2], "temperal_downsample": [False, True, True]}
LATENTS = {"latents_mean": [0.25] * 8, "latents_std": [2.0] * 8}


class Gamma(nn.Module):
    def __init__(self, width: int, images: bool = False) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, *([1] * (2 if images else 3))))


class Rms(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Attention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = Rms(dim), Rms(dim)


class WanBlock(nn.Module):
    def __init__(self, dim: int, ffn: int) -> None:
        super().__init__()
        self.self_attn, self.cross_attn, self.norm3 = Attention(dim), Attention(dim), nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn), nn.GELU(), nn.Linear(ffn, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim))


class WanHead(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.head, self.modulation = nn.Linear(dim, out), nn.Parameter(torch.randn(1, 2, dim))


class WanModel(nn.Module):
    """Wan2.2's transformer."""

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        freq_dim: int,
        in_dim: int,
        num_layers: int,
        out_dim: int,
        text_dim: int = 4096,
        **_: object,
    ) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv3d(in_dim, dim, (1, 2, 2), (1, 2, 2))
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(WanBlock(dim, ffn_dim) for _ in range(num_layers))
        self.head = WanHead(dim, 4 * out_dim)


class Residual(nn.Module):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            Gamma(a), nn.SiLU(), nn.Conv3d(a, b, 3), Gamma(b), nn.SiLU(), nn.Dropout(), nn.Conv3d(b, b, 3)
        )
        self.shortcut = nn.Conv3d(a, b, 1) if a != b else nn.Identity()


class Resample(nn.Module):
    """``narrow``: channels that come out of an upsampling, as a divisor."""

    def __init__(self, width: int, timed: bool, up: bool, narrow: int) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(width, width // narrow, 3))
        if timed:
            self.time_conv = nn.Conv3d(width, width * (2 if up else 1), (3, 1, 1))


class Middle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.to_qkv, self.proj = (
            Gamma(width, True),
            nn.Conv2d(width, 3 * width, 1),
            nn.Conv2d(width, width, 1),
        )


class Stage(nn.Module):
    """Wan2.2: the blocks of one resolution in a list of their own."""

    def __init__(self, blocks: list[nn.Module], up: bool) -> None:
        super().__init__()
        setattr(self, "upsamples" if up else "downsamples", nn.Sequential(*blocks))


class Half(nn.Module):
    """Encoder or decoder of either autoencoder."""

    def __init__(
        self, first: int, widths: list[int], last: int, timed: list[bool], blocks: int, up: bool, nested: bool
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(first, widths[0], 3)
        end = widths[0] if up else widths[-1]
        middle = nn.Sequential(Residual(end, end), Middle(end), Residual(end, end))
        if up:
            self.middle = middle
        stages: list[nn.Module] = []
        for index, (a, b) in enumerate(zip(widths[:-1], widths[1:])):
            a = a // 2 if up and not nested and index else a
            made: list[nn.Module] = [Residual(a if k == 0 else b, b) for k in range(blocks)]
            if index < len(widths) - 2:
                made.append(Resample(b, timed[index], up, 2 if up and not nested else 1))
            stages += [Stage(made, up)] if nested else made
        setattr(self, "upsamples" if up else "downsamples", nn.Sequential(*stages))
        if not up:
            self.middle = middle
        self.head = nn.Sequential(Gamma(widths[-1]), nn.SiLU(), nn.Conv3d(widths[-1], last, 3))


class WanVae(nn.Module):
    """Wan2.1's autoencoder, or Wan2.2's where ``nested``."""

    def __init__(
        self,
        base: int,
        z: int,
        mult: list[int],
        timed: list[bool],
        nested: bool,
        decoder: int | None = None,
        blocks: int = 2,
    ) -> None:
        super().__init__()
        colours, out = (12, 12) if nested else (3, 3)
        down, up = [base, *(base * m for m in mult)], [(decoder or base) * m for m in (mult[-1], *mult[::-1])]
        self.encoder = Half(colours, down, 2 * z, timed, blocks, False, nested)
        self.conv1, self.conv2 = nn.Conv3d(2 * z, 2 * z, 1), nn.Conv3d(z, z, 1)
        self.decoder = Half(z, up, out, timed[::-1], blocks + 1, True, nested)


class T5Block(nn.Module):
    def __init__(self, dim: int, inner: int, ffn: int, heads: int, buckets: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = Rms(dim), Rms(dim)
        self.attn, self.ffn, self.pos_embedding = nn.Module(), nn.Module(), nn.Module()
        self.attn.q, self.attn.k, self.attn.v = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.attn.o = nn.Linear(inner, dim, bias=False)
        self.ffn.gate = nn.Sequential(nn.Linear(dim, ffn, bias=False), nn.GELU())
        self.ffn.fc1, self.ffn.fc2 = nn.Linear(dim, ffn, bias=False), nn.Linear(ffn, dim, bias=False)
        self.pos_embedding.embedding = nn.Embedding(buckets, heads)


class T5(nn.Module):
    """Wan's UMT5 encoder."""

    def __init__(self, vocab: int, dim: int, inner: int, ffn: int, heads: int, layers: int, buckets: int = 32) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(T5Block(dim, inner, ffn, heads, buckets) for _ in range(layers))
        self.norm = Rms(dim)


def random_state(model: nn.Module, seed: int = 0) -> State:
    """The tensors of a skeleton with random numbers of a size that keeps a network's outputs finite and different from one another."""
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=draw) * 0.2 for name, value in model.state_dict().items()}


def original_transformer(state: State) -> State:
    """Tensors of a ``WanTransformer3DModel`` under Wan's names."""
    words = {
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
        "attn1": "self_attn",
        "attn2": "cross_attn",
        "to_out.0": "o",
        ".to_": ".",
        "norm2": "norm3",
        "ffn.net.0.proj": "ffn.0",
        "ffn.net.2": "ffn.2",
        "proj_out": "head.head",
    }
    out = {}
    for name, value in state.items():
        name = "head.modulation" if name == "scale_shift_table" else name.replace("scale_shift_table", "modulation")
        for new, old in words.items():
            name = name.replace(new, old)
        out[name] = value
    return out


def original_autoencoder(state: State, skeleton: WanVae) -> State:
    """Tensors of an ``AutoencoderKLWan`` under Wan's names: both models hold them in one order, but for the attention of the middle."""
    order = list(state)
    for side in ("encoder", "decoder"):
        attention = [name for name in order if name.startswith(f"{side}.mid_block.attentions.")]
        order = [name for name in order if name not in attention]
        place = next(k for k, name in enumerate(order) if name.startswith(f"{side}.mid_block.resnets.1."))
        order[place:place] = attention
    names = list(skeleton.state_dict())
    assert len(names) == len(order)
    out = dict(zip(names, (state[name] for name in order), strict=True))
    for name, value in skeleton.state_dict().items():
        assert out[name].shape == value.shape, name
    return out


def original_cosmos(state: State, prefix: str = "model.net.") -> State:
    """Tensors of a ``Cosmos3OmniTransformer`` under the framework's names."""
    parts = {
        "to_q": "q_proj",
        "to_k": "k_proj",
        "to_v": "v_proj",
        "to_out": "o_proj",
        "norm_q": "q_norm",
        "norm_k": "k_norm",
    }
    parts |= {"add_q_proj": "q_proj_moe_gen", "add_k_proj": "k_proj_moe_gen", "add_v_proj": "v_proj_moe_gen"}
    parts |= {"to_add_out": "o_proj_moe_gen", "norm_added_q": "q_norm_moe_gen", "norm_added_k": "k_norm_moe_gen"}
    tops = {
        "proj_in": "vae2llm",
        "proj_out": "llm2vae",
        "action_proj_in": "action2llm",
        "action_proj_out": "llm2action",
    }
    tops |= {
        "audio_proj_in": "sound2llm",
        "audio_proj_out": "llm2sound",
        "audio_modality_embed": "sound_modality_embed",
    }
    tops |= {"lm_head": "language_model.lm_head"}
    out = {}
    for name, value in state.items():
        words = name.split(".")
        if words[0] in ("layers", "norm", "norm_moe_gen", "embed_tokens"):
            words = ["language_model", "model", *(parts.get(word, word) for word in words)]
        elif words[0] == "time_embedder":
            words[1:2] = ["mlp", {"linear_1": "0", "linear_2": "2"}[words[1]]]
        else:
            words[0] = tops.get(words[0], words[0])
        out[prefix + ".".join(words)] = value
    return out


def save_shards(folder: Path, state: State, name: str, shards: int = 1) -> list[Path]:
    """One safetensors file, or several with their index."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(state, folder / f"{name}.safetensors")
        return [folder / f"{name}.safetensors"]
    keys, files, weight_map = list(state), [], {}
    for k in range(shards):
        file = f"{name}-{k + 1:05d}-of-{shards:05d}.safetensors"
        part = keys[k * len(keys) // shards : (k + 1) * len(keys) // shards]
        save_file({key: state[key] for key in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
        files.append(folder / file)
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files


def shapes(state: State | nn.Module) -> dict[str, tuple[int, ...]]:
    held = state.state_dict() if isinstance(state, nn.Module) else state
    return {name: tuple(value.shape) for name, value in held.items()}


def numbers(text: str) -> list[int]:
    return [int(word) for word in re.findall(r"\d+", text)]
