"""From a video to joint targets: the pixel inverse dynamics model.

A per-frame convolutional encoder whose pooling keeps positions (soft-argmax keypoints at a quarter of the resolution and a
flattened coarse map), a small temporal transformer over the window's frames with the start joints as one more token, and a
head that gives every frame after the first the targets of the control steps that lead up to it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn

from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.types import DT, ActionChunk, DecoderNeeds, Rollout
from physisforcing.worldmodel.storage import save_tensors

#: Columns of the 14-D action: six joints (radians) and one gripper (0 closed .. 1 open) an arm.
GRIPPERS = (6, 13)
JOINTS = tuple(i for i in range(14) if i not in GRIPPERS)
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
#: Factor on the keypoint maps before their softmax.
HEAT_SCALE = 10.0
STATISTICS = ("state_mean_A", "state_std_A", "delta_std_A")


@dataclass(slots=True, kw_only=True)
class InverseDynamicsConfig:
    """Geometry and size. ``frames`` window frames, ``steps_per_frame`` control steps apart (HOUSE window: 17 at stride 2)."""

    frames: int = 17
    steps_per_frame: int = 2
    height: int = 120
    width: int = 160
    action_dim: int = 14
    channels: tuple[int, int] = (64, 128)
    blocks: tuple[int, int] = (2, 3)
    keypoints: int = 32
    flat_channels: int = 8
    dim: int = 192
    layers: int = 2
    heads: int = 6

    @property
    def chunk(self) -> int:
        """Rows of the predicted chunk (P)."""
        return (self.frames - 1) * self.steps_per_frame


class _ChannelNorm(nn.Module):
    """Layer norm over the channels of each pixel. In channels-last memory this is one kernel and no transpose; inside it
    accumulates in float32 whatever the dtype, so autocast (which would return float32 pictures) is switched off."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias).permute(0, 3, 1, 2)


class Residual(nn.Module):
    """Pre-activation residual block: norm, SiLU, 3x3 convolution, twice."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _ChannelNorm(channels), _ChannelNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class FrameEncoder(nn.Module):
    """Frames with their difference to the frame before -> one vector a frame, positions kept.

    Input [N, 6, H, W] in [-1, 1]; output [N, dim].
    """

    grid: Tensor

    def __init__(self, config: InverseDynamicsConfig) -> None:
        super().__init__()
        c1, c2 = config.channels
        h, w = config.height // 4, config.width // 4
        if config.height % 8 or config.width % 8:
            raise UserError(
                "height, width", got=(config.height, config.width), wanted="multiples of 8", fix="use 120 x 160"
            )
        self.stem = nn.Conv2d(6 * 16, c1, 3, padding=1)
        self.fine = nn.Sequential(*[Residual(c1) for _ in range(config.blocks[0])])
        self.down = nn.Conv2d(c1, c2, 3, stride=2, padding=1)
        self.coarse = nn.Sequential(*[Residual(c2) for _ in range(config.blocks[1])])
        self.norm_fine, self.norm_coarse = _ChannelNorm(c1), _ChannelNorm(c2)
        self.lateral = nn.Conv2d(c2, c1, 1)
        self.heat = nn.Conv2d(c1, config.keypoints, 1)
        self.flat = nn.Conv2d(c2, config.flat_channels, 1)
        self.project = nn.Linear(3 * config.keypoints + config.flat_channels * (h // 2) * (w // 2), config.dim)
        self.norm_out = nn.LayerNorm(config.dim)
        ys, xs = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
        self.register_buffer("grid", torch.stack([xs.flatten(), ys.flatten()], -1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(self.stem(F.pixel_unshuffle(x, 4)))
        coarse = F.silu(self.norm_coarse(self.coarse(self.down(fine))))
        both = F.silu(self.norm_fine(fine + F.interpolate(self.lateral(coarse), scale_factor=2.0, mode="nearest")))
        heat, flat = self.heat(both).flatten(2), self.flat(coarse).flatten(1)
        # From here on float32: bfloat16 would round positions to a quarter of a pixel.
        with torch.autocast(x.device.type, enabled=False):
            heat = heat.float()
            # Sharpened, because a nearly uniform map has its centre of mass in the middle whatever the picture shows.
            weights = (HEAT_SCALE * heat).softmax(-1)
            xy = weights @ self.grid
            level = (weights * heat).sum(-1)
            return self.norm_out(self.project(torch.cat([xy.flatten(1), level, flat.float()], dim=-1)))


class PictureDecoder(nn.Module):
    """What decoders of pictures share: statistics, checks and ``core.protocols.InverseDynamics``.

    ``forward(frames_BTHWC uint8, state_BA)`` of a subclass gives ``(targets_BPA, log_variance_BPA)``: row i is the target approached
    during step i; the log variance is of the target divided by ``delta_std_A``.
    """

    state_mean_A: Tensor
    state_std_A: Tensor
    delta_std_A: Tensor

    def __init__(self, config: InverseDynamicsConfig) -> None:
        super().__init__()
        self.config = config
        for name in STATISTICS:
            self.register_buffer(name, torch.full((config.action_dim,), float("nan")))
        self.fingerprint = "untrained"

    def set_statistics(self, mean_A: Tensor, std_A: Tensor, delta_std_A: Tensor) -> None:
        """Normalisation of the training data; part of the weights."""
        for name, value in zip(STATISTICS, (mean_A, std_A, delta_std_A), strict=True):
            getattr(self, name).copy_(value)

    @property
    def needs(self) -> DecoderNeeds:
        c = self.config
        return DecoderNeeds(horizons=(c.frames,), frame_dt=c.steps_per_frame * DT)

    def decode(
        self, rollout: Rollout, state_BA: NDArray[np.float32], instructions: Sequence[str] = ()
    ) -> list[list[ActionChunk]]:
        """The first view of every candidate through ``decode_frames``; instructions are not read."""
        if rollout.frames_BSVTHWC is None:
            fix = "ask the world model for what needs names"
            raise MissingCapabilityError("rollout", got="no frames", wanted="frames", fix=fix)
        batch, samples = rollout.frames_BSVTHWC.shape[:2]
        flat = rollout.frames_BSVTHWC[:, :, 0].reshape(batch * samples, *rollout.frames_BSVTHWC.shape[3:])
        chunks = self.decode_frames(flat, rollout.times_T, np.repeat(state_BA, samples, axis=0))
        return [chunks[b * samples : (b + 1) * samples] for b in range(batch)]

    @torch.inference_mode()
    def decode_frames(
        self, frames_BTHWC: NDArray[np.uint8], times_T: NDArray[np.float64], state_BA: NDArray[np.float32]
    ) -> list[ActionChunk]:
        """Frames [B,17,120,160,3] uint8 at multiples of 0.12 s and drive targets now -> 32 targets an entry.

        On a CPU entries are computed one by one, so that a chunk is bit-equal wherever its video stands in a batch. Grippers are clipped
        to [0, 1]. Raises ``MissingCapabilityError`` for another rate, size or number of frames.
        """
        self._check(frames_BTHWC, times_T, state_BA)
        device = self.delta_std_A.device
        frames = torch.from_numpy(np.ascontiguousarray(frames_BTHWC)).to(device)
        state = torch.from_numpy(np.array(state_BA, np.float32)).to(device)
        chunks: list[ActionChunk] = []
        for rows in torch.arange(len(frames), device=device).split(1 if device.type == "cpu" else max(1, len(frames))):
            targets, log_variance = self(frames[rows], state[rows])
            actions = targets.cpu().numpy()
            actions[..., GRIPPERS] = actions[..., GRIPPERS].clip(0.0, 1.0)
            variance = log_variance.exp() * self.delta_std_A**2
            spread = variance[..., JOINTS].mean(-1).sqrt().cpu().numpy()
            chunks += [ActionChunk(actions_PA=a, spread_P=s) for a, s in zip(actions, spread, strict=True)]
        return chunks

    def _check(self, frames: NDArray, times_T: NDArray, state_BA: NDArray) -> None:
        c = self.config
        if not bool(torch.isfinite(self.delta_std_A).all()):
            raise UserError(
                "decoder",
                got="no normalisation statistics",
                wanted="a trained decoder",
                fix="train it: physis train idm",
            )
        wanted = (c.frames, c.height, c.width, 3)
        if frames.dtype != np.uint8 or frames.ndim != 5 or frames.shape[1:] != wanted:
            raise MissingCapabilityError(
                "frames_BTHWC",
                got=f"{frames.dtype} {frames.shape}",
                wanted=f"uint8 [B, {', '.join(map(str, wanted))}]",
                fix="resize by area and cut a window of this many frames",
            )
        expected = np.arange(c.frames) * c.steps_per_frame * DT
        if len(times_T) != c.frames or np.abs(np.asarray(times_T) - expected).max() > 1e-3:
            raise MissingCapabilityError(
                "times_T",
                got=np.round(times_T, 3).tolist()[:4],
                wanted=f"multiples of {c.steps_per_frame * DT:.2f} s",
                fix="use a world model whose frame_dt the decoder was trained for",
            )
        if state_BA.shape != (len(frames), c.action_dim) or not np.isfinite(state_BA).all():
            raise UserError(
                "state_BA",
                got=f"{state_BA.shape}, finite: {bool(np.isfinite(state_BA).all())}",
                wanted=f"finite [{len(frames)}, {c.action_dim}]",
                fix="pass the drive targets of the observation",
            )


class PixelInverseDynamics(PictureDecoder):
    """Window of pictures + drive targets now -> drive targets of the following control steps.

    ``forward(frames_BTHWC uint8, state_BA)`` gives ``(targets_BPA, log_variance_BPA)``: row i is the target approached during
    step i, i.e. u[t+1+i]. Targets are absolute (radians; gripper 0..1), computed as start + scale * network; the log variance
    is of the target divided by ``delta_std_A``.
    """

    def __init__(self, config: InverseDynamicsConfig | None = None) -> None:
        super().__init__(config or InverseDynamicsConfig())
        c = self.config
        self.encoder = FrameEncoder(c)
        self.state_token = nn.Linear(c.action_dim, c.dim)
        self.position = nn.Parameter(torch.zeros(c.frames + 1, c.dim))
        layer = nn.TransformerEncoderLayer(
            c.dim, c.heads, 4 * c.dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.temporal = nn.TransformerEncoder(layer, c.layers, norm=nn.LayerNorm(c.dim), enable_nested_tensor=False)
        last = nn.Linear(c.dim, 2 * c.steps_per_frame * c.action_dim)
        nn.init.trunc_normal_(last.weight, std=0.02)
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(nn.Linear(c.dim + c.action_dim, c.dim), nn.GELU(), last)
        nn.init.trunc_normal_(self.position, std=0.02)

    def forward(self, frames_BTHWC: Tensor, state_BA: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        assert frames_BTHWC.dtype == torch.uint8 and frames_BTHWC.shape[1:] == (c.frames, c.height, c.width, 3)
        video = rearrange(frames_BTHWC, "B T H W C -> B T C H W").to(self.position.dtype) / 127.5 - 1.0
        difference = torch.cat([torch.zeros_like(video[:, :1]), video[:, 1:] - video[:, :-1]], dim=1)
        x = rearrange(torch.cat([video, difference], dim=2), "B T C H W -> (B T) C H W")
        frames = rearrange(
            self.encoder(x.contiguous(memory_format=torch.channels_last)), "(B T) D -> B T D", T=c.frames
        )
        with torch.autocast(frames.device.type, enabled=False):
            state = (state_BA - self.state_mean_A) / self.state_std_A
            tokens = torch.cat([self.state_token(state)[:, None], frames], dim=1)
            hidden = self.temporal(tokens + self.position)[:, 2:]
            out = self.head(torch.cat([hidden, state[:, None].expand(-1, hidden.shape[1], -1)], dim=-1))
        mean, log_variance = rearrange(out, "B T (Q P A) -> Q B (T P) A", Q=2, P=c.steps_per_frame, A=c.action_dim)
        return state_BA[:, None] + mean * self.delta_std_A, log_variance.clamp(-12.0, 4.0)


def save_inverse_dynamics(model: PixelInverseDynamics, folder: str | Path, *, card: str | None = None) -> Path:
    """Write ``model.safetensors`` (network float16, statistics float32), ``config.json`` and, if given, the model card."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        k: v.detach().cpu().to(torch.float32 if k in STATISTICS else torch.float16).contiguous()
        for k, v in model.state_dict().items()
    }
    # The weights come last: a folder with weights has the configuration they belong to.
    (folder / CONFIG_NAME).write_text(json.dumps(dataclasses.asdict(model.config), indent=2) + "\n")
    save_tensors(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


def load_inverse_dynamics(folder: str | Path, device: str = "cpu") -> PixelInverseDynamics:
    """Read a folder that ``save_inverse_dynamics`` wrote. Any missing or surplus key is a ``UserError``."""
    from safetensors.torch import load_file

    folder = Path(folder)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise UserError(
                "decoder", got=str(folder), wanted=f"a folder with {name}", fix="train one: physis train idm"
            )
    raw = json.loads((folder / CONFIG_NAME).read_text())
    known = {f.name for f in dataclasses.fields(InverseDynamicsConfig)}
    if surplus := set(raw) - known:
        raise UserError(
            "decoder config", got=sorted(surplus), wanted=f"fields {sorted(known)}", fix="use matching versions"
        )
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
    config = InverseDynamicsConfig(**settings)
    model = PixelInverseDynamics(config)
    tensors = load_file(folder / WEIGHTS_NAME)
    wanted = set(model.state_dict())
    if set(tensors) != wanted:
        raise UserError(
            "decoder weights",
            got=f"missing {sorted(wanted - set(tensors))[:4]}, surplus {sorted(set(tensors) - wanted)[:4]}",
            wanted="exactly the keys of the configuration",
            fix="export the decoder again with physis train idm",
        )
    model.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=True)
    model.fingerprint = hashlib.sha256((folder / WEIGHTS_NAME).read_bytes()).hexdigest()[:16]
    return model.eval().to(device)


def chunk_errors(predicted_BPA: NDArray, target_BPA: NDArray) -> dict[str, float]:
    """RMSE of joint targets in degrees, of grippers in percent of the opening; all rows, and by quarter of the horizon."""
    error = np.asarray(predicted_BPA, np.float64) - np.asarray(target_BPA, np.float64)
    rows = error.shape[-2]
    out = {
        "joint_deg": float(np.degrees(np.sqrt((error[..., JOINTS] ** 2).mean()))),
        "gripper_percent": float(100 * np.sqrt((error[..., GRIPPERS] ** 2).mean())),
    }
    for quarter in range(4):
        part = error[..., quarter * rows // 4 : (quarter + 1) * rows // 4, :]
        if part.shape[-2]:
            name = f"joint_deg_rows_{quarter * rows // 4 + 1}_{(quarter + 1) * rows // 4}"
            out[name] = float(np.degrees(np.sqrt((part[..., JOINTS] ** 2).mean())))
    return out
