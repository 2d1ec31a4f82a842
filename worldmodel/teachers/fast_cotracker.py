"""CoTracker3 (offline) in half precision: the weights of the user's network, arranged for a GPU.

The plain adapter (``cotracker3.CoTracker3``) runs the published network as it is and stays the measure: the twin of this class, to
which it agrees within the limits of ``benchmarks/teacher_parity.py``. What is different here, with nothing left out of the computation:

* Convolutions run in half precision, channels last; their biases are dropped where an instance norm follows, which removes them anyway.
* Around a point only its 8x8 whole pixels are read, correlated with the 7x7 features of the query, and the correlations are
  blended bilinearly: all 49 places share their fraction of a pixel, and a correlation is linear in what is read. A Triton kernel
  does it without storing any features (``correlate``; on other devices the same in torch).
* Rows of odd length (49x49 correlations, 1110 inputs) are padded with zeros or split, because tensor cores want multiples of 8; the
  embedding of time is added after the first linear layer instead of before.
* Attention through ``scaled_dot_product_attention``; encoder and update compiled.

Positions, visibility and confidence, their motion features and the last linear layers stay in float32; so do norms and softmax inside.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from physisforcing.core.errors import UserError

from .cotracker3 import ITERATIONS, CoTracker3, support_grid, track_clips
from .protocols import TeacherInfo, Tracks

#: Part of every cache key: raise it when tracks of the same weights change.
VERSION = "1"
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
#: What the network looks at around a point: RADIUS pixels to each side, in every level of its pyramid.
RADIUS = 3
SIDE = 2 * RADIUS + 1
#: Places of the neighbourhood, and the same padded: rows of PADDED correlations are a multiple of 16 bytes, TILE is a power of two.
PLACES, PADDED, TILE = SIDE**2, 56, 64
#: Octaves of the embedding of motion.
OCTAVES = 10
#: At most this many frames go through the encoder at once; 81 frames of 384x512 hold 3 GB in half precision.
FRAMES = 128


class FastCoTracker3:
    """``PointTracker`` with the weights of ``exact``, whose network stays as it is.

    ``dtype``: fp16 (default: the same speed as bf16 with an eighth of its rounding error), bf16, or fp32 for tests. ``compiled``:
    None compiles on a GPU; every number of points and of frames is compiled once. ``backend``: that of ``torch.compile``.

    Raises ``UserError`` for an unknown precision and for a network of another neighbourhood than 7x7.
    """

    def __init__(
        self, exact: CoTracker3, *, dtype: str = "fp16", compiled: bool | None = None, backend: str = "inductor"
    ) -> None:
        if dtype not in PRECISIONS:
            raise UserError("dtype", got=dtype, wanted=" or ".join(PRECISIONS), fix="dtype=fp16")
        network = exact.network
        if network.corr_radius != RADIUS:
            got = f"radius {network.corr_radius}"
            raise UserError("network", got=got, wanted=f"radius {RADIUS}", fix="use CoTracker3 itself")
        self.exact, self.network = exact, network
        self._precision, self._dtype = dtype, PRECISIONS[dtype]
        self._device = next(network.parameters()).device
        self._encoder = _encoder(network.fnet, self._dtype)
        self._update = _Update(network, self._dtype)
        if self._device.type == "cuda" if compiled is None else compiled:
            self._features: Callable[..., list[Tensor]] = torch.compile(self._pyramid, dynamic=False, backend=backend)
            self._step: Callable[..., tuple[Tensor, ...]] = torch.compile(self._update, dynamic=False, backend=backend)
        else:
            self._features, self._step = self._pyramid, self._update

    @property
    def info(self) -> TeacherInfo:
        exact = self.exact.info
        return replace(exact, version=f"{exact.version}-fast{VERSION}-{self._precision}")

    def track(self, video_BTHWC: Tensor, queries_BN2: Tensor) -> Tracks:
        """As ``CoTracker3.track``, which says what is visible and raises the same errors."""
        return track_clips(self._track, video_BTHWC, queries_BN2)

    def _track(self, frames_THWC: Tensor, queries_N2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> points [T,N,2] in the pixels of the frames, visibility and confidence [T,N] in [0,1]; float32."""
        working = tuple(int(side) for side in self.network.model_resolution)
        height, width = frames_THWC.shape[1:3]
        ratio = torch.tensor([(working[1] - 1) / (width - 1), (working[0] - 1) / (height - 1)], device=self._device)
        queries = torch.cat([queries_N2.to(self._device).float() * ratio, support_grid(working, self._device)])
        queries = queries / self.network.stride
        parts = [self._encode(some) for some in frames_THWC.split(FRAMES)]
        levels = parts[0] if len(parts) == 1 else [torch.cat(level) for level in zip(*parts, strict=True)]
        supports = [query_features(level[0], queries / 2**i, self._dtype) for i, level in enumerate(levels)]
        frames = len(frames_THWC)
        times_TD = self._update.times(self.network.interpolate_time_embed(queries, frames)[0])
        places = queries[:, None].expand(-1, frames, -1).contiguous()
        visible, confidence = places.new_zeros(places.shape[:2]), places.new_zeros(places.shape[:2])
        found = places.new_empty((*places.shape[:2], len(levels), PLACES * PADDED), dtype=self._dtype)
        for _ in range(ITERATIONS):
            correlate(levels, supports, places, found)
            places, visible, confidence = self._step(found, places, visible, confidence, times_TD)
        count = len(queries_N2)
        points = places[:count].transpose(0, 1) * self.network.stride / ratio
        return points, visible[:count].sigmoid().T, confidence[:count].sigmoid().T

    def _encode(self, frames_THWC: Tensor) -> list[Tensor]:
        """Levels of features [T,h,w,C], each of half the size of the one before, in the working precision."""
        pictures = frames_THWC.to(self._device).permute(0, 3, 1, 2).float()
        working = tuple(int(side) for side in self.network.model_resolution)
        pictures = nnf.interpolate(pictures, working, mode="bilinear", align_corners=True)
        with _fastest_convolutions():
            return list(self._features(pictures))

    def _pyramid(self, pictures_TCHW: Tensor) -> list[Tensor]:
        scaled = (pictures_TCHW * (2 / 255) - 1).to(self._dtype, memory_format=torch.channels_last)
        maps = self._encoder(scaled).float()
        maps = maps * maps.square().sum(1, keepdim=True).clamp(min=1e-12).rsqrt()
        levels = [maps]
        for _ in range(self.network.corr_levels - 1):
            levels.append(nnf.avg_pool2d(levels[-1], 2))
        return [level.permute(0, 2, 3, 1).to(self._dtype).contiguous() for level in levels]


class _Update(nn.Module):
    """One iteration after the correlations: new positions, visibility and confidence."""

    def __init__(self, network: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale = [side / network.stride for side in (network.model_resolution[1], network.model_resolution[0])]
        mlp, former = network.corr_mlp, copy.deepcopy(network.updateformer)
        first = nnf.pad(mlp.fc1.weight.unflatten(1, (PLACES, PLACES)), (0, PADDED - PLACES)).flatten(1)
        self.first, self.first_bias = _parameter(first, dtype), _parameter(mlp.fc1.bias, dtype)
        self.second, self.second_bias = _parameter(mlp.fc2.weight, dtype), _parameter(mlp.fc2.bias, dtype)
        self.activation = mlp.act
        # Columns of the first linear layer: visibility, confidence, the embedded correlations of all levels, motion.
        entry, embedded = former.input_transform, network.corr_levels * mlp.fc2.out_features
        self.entry, self.entry_bias = _parameter(entry.weight), _parameter(entry.bias)
        own = torch.cat([entry.weight[:, :2], entry.weight[:, 2 + embedded :]], 1)
        self.padding = -own.shape[1] % 8
        self.from_state = _parameter(nnf.pad(own, (0, self.padding)), dtype)
        self.from_correlations = _parameter(entry.weight[:, 2 : 2 + embedded], dtype)
        former.input_transform = nn.Identity()
        self.former = _replaced(former.to(dtype), lambda module: hasattr(module, "to_kv"), _Attention)
        for name in ("flow_head", "vis_conf_head"):
            if hasattr(former, name):
                setattr(former, name, _Exact(getattr(network.updateformer, name)))

    def times(self, embedding_TI: Tensor) -> Tensor:
        """What the embedding of time, which the network adds to its inputs, adds to the outputs of the first layer: [T,D] float32."""
        return nnf.linear(embedding_TI.float(), self.entry, self.entry_bias)

    def forward(
        self, correlations_NTLK: Tensor, places_NT2: Tensor, visible_NT: Tensor, confidence_NT: Tensor, times_TD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = correlations_NTLK.dtype
        hidden = self.activation(nnf.linear(correlations_NTLK, self.first, self.first_bias))
        embedded = nnf.linear(hidden, self.second, self.second_bias).flatten(2)
        state = torch.cat([visible_NT[..., None], confidence_NT[..., None], self._motion(places_NT2)], -1)
        tokens = nnf.linear(embedded, self.from_correlations)
        tokens = tokens + nnf.linear(nnf.pad(state, (0, self.padding)).to(dtype), self.from_state) + times_TD.to(dtype)
        change = self.former(tokens[None])[0]
        return places_NT2 + change[..., :2], visible_NT + change[..., 2], confidence_NT + change[..., 3]

    def _motion(self, places_NT2: Tensor) -> Tensor:
        """Steps back from the next frame and on from the last one, as shares of the picture, and their sines and cosines."""
        step = places_NT2[:, 1:] - places_NT2[:, :-1]
        both = torch.cat([nnf.pad(-step, (0, 0, 0, 1)), nnf.pad(step, (0, 0, 1, 0))], -1)
        both = torch.stack([part / self.scale[i % 2] for i, part in enumerate(both.unbind(-1))], -1)
        phases = torch.cat([both * 2**octave for octave in range(OCTAVES)], -1)
        return torch.cat([both, phases.sin(), (phases + math.pi / 2).sin()], -1)


class _Attention(nn.Module):
    """The weights of one attention layer of the network, without storing its matrix."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.to_q, self.to_kv, self.to_out, self.heads = stock.to_q, stock.to_kv, stock.to_out, stock.heads

    def forward(self, x: Tensor, context: Tensor | None = None, attn_bias: None = None) -> Tensor:
        assert attn_bias is None
        keys, values = self.to_kv(x if context is None else context).chunk(2, -1)
        heads = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.to_q(x), keys, values))
        return self.to_out(nnf.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class _InstanceNorm(nn.Module):
    def __init__(self, stock: nn.InstanceNorm2d) -> None:
        super().__init__()
        assert not stock.affine and not stock.track_running_stats
        self.eps = stock.eps

    def forward(self, x: Tensor) -> Tensor:
        exact = x.float()
        variance, mean = torch.var_mean(exact, (2, 3), correction=0, keepdim=True)
        return ((exact - mean) * (variance + self.eps).rsqrt()).to(x.dtype)


class _Exact(nn.Module):
    """A linear layer in float32 whatever comes in."""

    def __init__(self, stock: nn.Linear) -> None:
        super().__init__()
        self.stock = stock

    def forward(self, x: Tensor) -> Tensor:
        return self.stock(x.float())


def _encoder(stock: Any, dtype: torch.dtype) -> nn.Module:
    encoder = copy.deepcopy(stock)
    _replaced(encoder, lambda module: isinstance(module, nn.InstanceNorm2d), _InstanceNorm)
    for module in encoder.modules():
        # The last convolution is the only one that no instance norm follows.
        if isinstance(module, nn.Conv2d) and module is not encoder.conv3:
            module.bias = None
    return encoder.to(dtype=dtype, memory_format=torch.channels_last)


def _replaced(root: nn.Module, which: Callable[[nn.Module], bool], by: Callable[[Any], nn.Module]) -> nn.Module:
    """``root`` with every submodule that ``which`` picks replaced, one that stands in two places by the same one."""
    made: dict[nn.Module, nn.Module] = {}
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if which(child):
                made[child] = made.get(child) or by(child)
                setattr(parent, name, made[child])
    return root


def _parameter(weight: Tensor, dtype: torch.dtype | None = None) -> nn.Parameter:
    return nn.Parameter(weight.detach().to(dtype or weight.dtype).clone(), requires_grad=False)


@contextmanager
def _fastest_convolutions() -> Iterator[None]:
    """cuDNN tries its algorithms once a shape; what the caller has set stands again afterwards."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _neighbourhood(device: torch.device) -> Tensor:
    """Offsets (x, y) of the places in the order of the network, x outermost: [PLACES,2]."""
    line = torch.arange(-RADIUS, RADIUS + 1, device=device, dtype=torch.float32)
    return torch.stack([line.repeat_interleave(SIDE), line.repeat(SIDE)], -1)


def query_features(map_hwC: Tensor, places_N2: Tensor, dtype: torch.dtype) -> Tensor:
    """Features of a map at the neighbourhood of each place, bilinear, border values repeated: [N,TILE,C], zero beyond PLACES."""
    height, width, _ = map_hwC.shape
    points = places_N2[:, None] + _neighbourhood(places_N2.device)
    extent = torch.tensor([max(width - 1, 1), max(height - 1, 1)], device=points.device)
    found = nnf.grid_sample(
        map_hwC.float().permute(2, 0, 1)[None],
        (points * 2 / extent - 1)[None],
        padding_mode="border",
        align_corners=True,
    )
    return nnf.pad(found[0].permute(1, 2, 0), (0, 0, 0, TILE - PLACES)).to(dtype).contiguous()


def correlate(levels: list[Tensor], supports: list[Tensor], places_NT2: Tensor, out_NTLK: Tensor) -> None:
    """Correlations of the neighbourhood of every place with that of its query, in every level.

    ``levels``: maps [T,h,w,C]; ``supports``: [N,TILE,C] of ``query_features``; ``places_NT2``: float32 in cells of level 0.
    ``out_NTLK``: K = PLACES x PADDED, the place outermost, zero beyond PLACES; it is overwritten.
    """
    places_NT2 = places_NT2.contiguous()
    one = correlate_in_triton if places_NT2.is_cuda and has_triton() else correlate_in_torch
    for number, (level, support) in enumerate(zip(levels, supports, strict=True)):
        one(level, support, places_NT2, out_NTLK[:, :, number], 0.5**number)


def correlate_in_torch(
    level_ThwC: Tensor, support_NTC: Tensor, places_NT2: Tensor, out_NTK: Tensor, scale: float
) -> None:
    """One level of ``correlate``. ``scale``: cells of this level a cell of level 0."""
    frames, height, width, channels = level_ThwC.shape
    # Further out the border is all there is.
    limit = torch.tensor([width + RADIUS, height + RADIUS], device=places_NT2.device)
    places = (places_NT2 * scale).clamp(min=-RADIUS - 1).minimum(limit)
    whole = places.floor()
    share = (places - whole).to(level_ThwC.dtype)
    around = whole.long()[..., None] + torch.arange(-RADIUS, RADIUS + 2, device=places.device)
    column, row = around[:, :, 0].clamp(0, width - 1), around[:, :, 1].clamp(0, height - 1)
    frame = torch.arange(frames, device=places.device)[:, None, None]
    index = (frame * height + row[:, :, None]) * width + column[..., None]
    patch = level_ThwC.reshape(-1, channels)[index.flatten(1)]
    found = torch.bmm(patch, support_NTC[:, :PADDED].transpose(1, 2))
    found = found.unflatten(1, (frames, SIDE + 1, SIDE + 1))
    x, y = (part[..., None, None, None] for part in share.unbind(-1))
    found = found[:, :, :-1] * (1 - x) + found[:, :, 1:] * x
    found = found[..., :-1, :] * (1 - y) + found[..., 1:, :] * y
    out_NTK.copy_(found.flatten(2))


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def correlate_in_triton(
    level_ThwC: Tensor, support_NTC: Tensor, places_NT2: Tensor, out_NTK: Tensor, scale: float
) -> None:
    """``correlate_in_torch`` in one kernel, which keeps what it reads in registers."""
    from .correlation_kernel import launch

    launch(level_ThwC, support_NTC, places_NT2, out_NTK, scale)
