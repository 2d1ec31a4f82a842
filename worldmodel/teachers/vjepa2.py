"""V-JEPA 2 as relation teacher, eq. (9), through the encoder of transformers' ``VJEPA2Model``.

``aligned``, the default: pictures of 16 pixels a token, and a pair of frames for each latent frame: (0, 0) for latent 0 and
(4k-2, 4k) for latent k. The encoder's tubelets are then the latent frames and its patches the tokens: no interpolation, no change
of aspect, no lag in time.

``resize``, the paper's: 64 frames of 256x256, uniform over the video (repeated where it has fewer) and without keeping the aspect,
then trilinear interpolation of the features onto the grid. Token centres are mapped linearly, as everywhere where tensors are
resized; because latent 0 is a single frame, a latent frame then sees features of 1.4 frames later or earlier on average.

Positions. The encoder has rotary positions: tubelet, row and column of each token. transformers computes them from the config's
square crop (16x16 for 256 pixels) whatever was given, and the encoder has no argument for them: on a grid of 21x15x20, 99.7% of the
tokens get the position of another one, and the last tubelet is number 24 instead of 20. (Meta's code passes the rows and columns of
the input.) Here the positions are those of the grid, set for each call.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from physisforcing.core.errors import UserError, unknown_name

from .preprocess import check_video, load_pretrained, normalised, random_weights, read_config, version_of
from .protocols import TeacherInfo

if TYPE_CHECKING:
    from transformers import VJEPA2Config, VJEPA2Model

MODES = ("aligned", "resize")
LICENCE = "MIT"


def grid_positions(grid: tuple[int, int, int], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Tubelet, row and column of every token of a grid (F, h, w), tubelets outermost, columns innermost: three int64 [F*h*w]."""
    tubelets, rows, columns = grid
    ids = torch.arange(tubelets * rows * columns, device=device)
    return ids // (rows * columns), ids // columns % rows, ids % columns


def aligned_frames(latents: int) -> list[int]:
    """Numbers of the 2F frames of ``aligned``: 0, 0, then 4k-2, 4k for each latent frame k."""
    return [0, 0, *(frame for k in range(1, latents) for frame in (4 * k - 2, 4 * k))]


def uniform_frames(total: int, wanted: int) -> list[int]:
    """Numbers of ``wanted`` frames spread evenly over ``total``: the frame that the middle of each share falls into."""
    return [(2 * i + 1) * total // (2 * wanted) for i in range(wanted)]


class VJepa2:
    """A frozen V-JEPA 2 encoder. Satisfies ``VideoEncoder``; not for several threads at once."""

    def __init__(self, model: VJEPA2Model, info: TeacherInfo, *, mode: str = "aligned", batch: int = 1) -> None:
        """``model`` in evaluation mode; its attention is changed to take the positions of the grid, its predictor is dropped.

        ``batch``: videos a forward. Users call ``from_folder``. Raises ``UserError`` for an unknown ``mode``, and for ``aligned``
        with a model whose tubelets are not of two frames.
        """
        if mode not in MODES:
            raise unknown_name("mode", mode, MODES, see="physisforcing.worldmodel.teachers.vjepa2")
        if mode == "aligned" and model.config.tubelet_size != 2:
            raise UserError(
                "mode", got=mode, wanted="a model with tubelets of 2 frames", fix="write mode=resize for this model"
            )
        self.model, self.mode, self.batch = model, mode, batch
        self._info = info
        model.predictor = None  # never called
        self._attentions = [layer.attention for layer in model.encoder.layer]
        for attention in self._attentions:
            _take_positions_of_the_grid(attention)

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        *,
        mode: str = "aligned",
        checksum: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch: int = 1,
    ) -> VJepa2:
        """From a folder with config.json and safetensors. ``checksum``: SHA-256 that the weights must have (``weights_sha256``).

        Raises ``UserError`` for a folder of another model, another checksum or weights that do not fit.
        """
        from transformers import VJEPA2Model

        read_config(path, ("vjepa2",))
        model, digest = load_pretrained(
            VJEPA2Model,
            path,
            checksum=checksum,
            device=device,
            dtype=dtype,
            unused=("predictor.",),
            attn_implementation="sdpa",
        )
        return cls(model, _info(model.config, mode, dtype, checksum=digest), mode=mode, batch=batch)

    @classmethod
    def from_config(
        cls,
        config: VJEPA2Config | None = None,
        *,
        mode: str = "aligned",
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch: int = 1,
    ) -> VJepa2:
        """Random weights, for tests and timing. ``config``: that of ViT-L, 64 frames of 256 pixels."""
        from transformers import VJEPA2Config, VJEPA2Model

        config = config or VJEPA2Config()
        model = random_weights(VJEPA2Model, config, seed=seed, device=device, dtype=dtype)
        return cls(model, _info(config, mode, dtype, suffix=f"/random{seed}"), mode=mode, batch=batch)

    @property
    def info(self) -> TeacherInfo:
        return self._info

    @property
    def channels(self) -> int:
        return self.model.config.hidden_size

    @property
    def per_frame(self) -> bool:
        return False

    @torch.no_grad()
    def encode(self, video_BTHWC: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """uint8 [B,T,H,W,3] with T = 1 + 4 (F - 1) -> float32 [B,F,h,w,C] for ``grid`` (F, h, w), on the network's device.

        Features are those after the final norm. Raises ``UserError`` for any other video.
        """
        check_video(video_BTHWC, grid)
        one = self._aligned if self.mode == "aligned" else self._resized
        return torch.cat([one(video, grid) for video in video_BTHWC.split(self.batch)])

    def _aligned(self, video_BTHWC: Tensor, grid: tuple[int, int, int]) -> Tensor:
        patch = self.model.config.patch_size
        return self.features(self._pictures(video_BTHWC, aligned_frames(grid[0]), (grid[1] * patch, grid[2] * patch)))

    def _resized(self, video_BTHWC: Tensor, grid: tuple[int, int, int]) -> Tensor:
        config = self.model.config
        frames = uniform_frames(video_BTHWC.shape[1], config.frames_per_clip)
        features_BFhwC = self.features(self._pictures(video_BTHWC, frames, (config.crop_size, config.crop_size)))
        moved = nnf.interpolate(features_BFhwC.permute(0, 4, 1, 2, 3), size=grid, mode="trilinear", align_corners=False)
        return moved.permute(0, 2, 3, 4, 1).contiguous()

    def _pictures(self, video_BTHWC: Tensor, frames: list[int], size: tuple[int, int]) -> Tensor:
        """float32 [B,T,3,*size] of these frames."""
        chosen = video_BTHWC[:, frames]
        return normalised(chosen.flatten(0, 1), size, "bilinear", self.model.device).unflatten(0, chosen.shape[:2])

    @torch.no_grad()
    def features(self, pictures_BTCHW: Tensor) -> Tensor:
        """Normalised pictures, T, H and W multiples of tubelet and patch -> float32 [B,T/tubelet,H/patch,W/patch,C]."""
        config = self.model.config
        frames, _, height, width = pictures_BTCHW.shape[1:]
        grid = (frames // config.tubelet_size, height // config.patch_size, width // config.patch_size)
        for attention in self._attentions:
            attention.grid = grid
        with torch.autocast(pictures_BTCHW.device.type, enabled=False):
            found_BLC = self.model(
                pixel_values_videos=pictures_BTCHW.to(self.model.dtype), skip_predictor=True
            ).last_hidden_state
        if any(attention.grid is not None for attention in self._attentions):  # another transformers may ask elsewhere
            raise RuntimeError("this version of transformers does not take V-JEPA 2's positions from get_position_ids")
        return found_BLC.float().unflatten(1, grid)


def _take_positions_of_the_grid(attention: Any) -> None:
    """Make one attention layer of transformers' encoder use the positions of its ``grid``, which each forward uses up."""
    attention.__class__ = _grid_attention(type(attention))
    attention.grid = None


@functools.lru_cache
def _grid_attention(stock: type) -> type:
    """One class for all layers: compiled code is shared by class."""

    class GridAttention(stock):  # type: ignore[valid-type, misc]
        def get_position_ids(self, x: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
            assert masks is None and self.grid is not None, "the encoder is called through VJepa2.features"
            grid, self.grid = self.grid, None
            return grid_positions(grid, x.device)

    return GridAttention


def _info(config: VJEPA2Config, mode: str, dtype: torch.dtype, *, checksum: str = "", suffix: str = "") -> TeacherInfo:
    return TeacherInfo(
        name=f"vjepa2-width{config.hidden_size}-{config.frames_per_clip}x{config.crop_size}",
        version=version_of(mode, dtype) + suffix,
        licence=LICENCE,
        checksum=checksum,
    )
