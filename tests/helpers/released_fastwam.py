"""Fast-WAM checkpoints in the layout of their release with random weights: names by the original modules' structure, not by our rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from released_checkpoints import Rms, WanModel

#: Sizes of a tiny release: two heads of 24; of ``given`` the shapes say nothing.
VIDEO = {"dim": 48, "ffn_dim": 64, "freq_dim": 16, "in_dim": 4, "num_layers": 3, "out_dim": 4, "text_dim": 12}
ACTION = {"width": 16, "ffn_dim": 24, "attention": 48, "freq_dim": 16, "num_layers": 3, "text_dim": 12}
GIVEN = {"num_heads": 2}


class NarrowAttention(nn.Module):
    """Attention whose heads are wider together than the residual stream."""

    def __init__(self, width: int, attention: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, attention) for _ in range(3))
        self.o = nn.Linear(attention, width)
        self.norm_q, self.norm_k = Rms(attention), Rms(attention)


class NarrowBlock(nn.Module):
    def __init__(self, width: int, ffn_dim: int, attention: int) -> None:
        super().__init__()
        self.self_attn, self.cross_attn = NarrowAttention(width, attention), NarrowAttention(width, attention)
        self.norm3 = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, ffn_dim), nn.GELU(), nn.Linear(ffn_dim, width))
        self.modulation = nn.Parameter(torch.randn(1, 6, width))


class ActionModel(nn.Module):
    def __init__(
        self, action_dim: int, width: int, ffn_dim: int, attention: int, freq_dim: int, num_layers: int, text_dim: int
    ) -> None:
        super().__init__()
        self.action_encoder = nn.Linear(action_dim, width)
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, width), nn.GELU(), nn.Linear(width, width))
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, width), nn.SiLU(), nn.Linear(width, width))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(NarrowBlock(width, ffn_dim, attention) for _ in range(num_layers))
        self.head = nn.Linear(width, action_dim)


def skeleton(action_dim: int, state_dim: int, video: dict[str, int], action: dict[str, int]) -> nn.ModuleDict:
    """The modules of a release: ``mot`` with both experts, and ``proprio_encoder``."""
    experts = nn.ModuleDict({"video": WanModel(**video), "action": ActionModel(action_dim, **action)})
    return nn.ModuleDict(
        {"mot": nn.ModuleDict({"mixtures": experts}), "proprio_encoder": nn.Linear(state_dim, video["text_dim"])}
    )


def release(
    action_dim: int = 14,
    state_dim: int = 14,
    dtype: torch.dtype = torch.bfloat16,
    video: dict[str, int] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """What a released ``.pt`` holds, in tiny size. ``video``: sizes other than ``VIDEO``. ``more``: sections beside the usual ones."""
    sizes = VIDEO | (video or {})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = skeleton(action_dim, state_dim, sizes, ACTION | {"text_dim": sizes["text_dim"]})
        for value in model.parameters():
            nn.init.normal_(value, std=0.2)
    sections = {name: {k: v.to(dtype) for k, v in part.state_dict().items()} for name, part in model.items()}
    return {**sections, "step": 7, "torch_dtype": str(dtype), **more}


def write_release(folder: Path, payload: dict[str, Any], name: str = "robotwin_uncond_3cam_384") -> Path:
    """The ``.pt``, its statistics beside it and the config that says what no shape does."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(payload, folder / f"{name}.pt")
    widths = [payload["proprio_encoder"]["weight"].shape[1], payload["mot"]["mixtures.action.head.bias"].shape[0]]
    (folder / f"{name}_dataset_stats.json").write_text(json.dumps(statistics(*widths)))
    (folder / "sizes.json").write_text(json.dumps(GIVEN))
    return folder / f"{name}.pt"


def statistics(state_dim: int, action_dim: int) -> dict[str, Any]:
    """``dataset_stats.json``: vectors whose numbers are all different; the last dimension hardly moves."""
    made: dict[str, Any] = {"num_episodes": 3, "num_transition": 90}
    for name, width in (("state", state_dim), ("action", action_dim)):
        low = [-(k + 1) / 4 for k in range(width)]
        high = [(k + 2) / 3 for k in range(width - 1)] + [low[-1] + 5e-5]
        mean, std = [k / 7 for k in range(width)], [0.1 + k / 9 for k in range(width)]
        row = {"min": low, "max": high, "q01": low, "q99": high, "mean": mean, "std": std}
        made[name] = {"default": {f"global_{key}": value for key, value in row.items()}}
        made[name]["default"] |= {f"stepwise_{key}": [value] * 2 for key, value in row.items()}
    return made


def flat(payload: dict[str, Any]) -> dict[str, Tensor]:
    """Section and name in one, as LeRobot's port has them behind ``model.``."""
    return {f"{part}.{name}": value for part in ("mot", "proprio_encoder") for name, value in payload[part].items()}
