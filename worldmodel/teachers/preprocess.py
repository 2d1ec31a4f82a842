"""What the teachers over transformers' models share: pictures become network inputs, folders on disk become frozen networks.

Weights come from a folder that the user names: ``config.json`` and safetensors, checked by SHA-256. Nothing is downloaded, and a
config that would make transformers fetch or run something else is refused.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from physisforcing.core.digests import file_sha256
from physisforcing.core.errors import UserError

#: Mean and standard deviation of ImageNet (R, G, B) of pictures in [0,1]: what all of these teachers were trained with.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: Entries of a config that make transformers import code, ask the hub for a kernel or a backbone, or quantise.
_REACHING_OUT = (
    *("auto_map", "attn_implementation", "_attn_implementation", "quantization_config"),
    *("backbone", "use_timm_backbone", "use_pretrained_backbone"),
)
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def resized(pictures_BCHW: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Float pictures in [0,255] -> ``size`` (H, W), antialiased ``bilinear`` or ``bicubic``, as Pillow does it; half-pixel centres.

    A bicubic kernel overshoots at edges: its result is clipped to [0,255], as it is in 8-bit pictures.
    """
    if tuple(pictures_BCHW.shape[-2:]) == tuple(size):
        return pictures_BCHW
    out = nnf.interpolate(pictures_BCHW, size=tuple(size), mode=mode, align_corners=False, antialias=True)
    return out.clamp_(0, 255) if mode == "bicubic" else out


def normalised(frames_BHWC: Tensor, size: tuple[int, int], mode: str, device: torch.device | str) -> Tensor:
    """uint8 [B,H,W,3] -> float32 [B,3,*size] on ``device``: resized, scaled to [0,1], less ``MEAN``, by ``STD``."""
    pictures = resized(frames_BHWC.to(device).permute(0, 3, 1, 2).float(), size, mode)
    mean, std = (torch.tensor(value, device=device).view(3, 1, 1) * 255 for value in (MEAN, STD))
    return (pictures - mean) / std


def check_frames(frames_BHWC: Tensor) -> None:
    """``UserError`` unless these are uint8 pictures [B,H,W,3], at least one."""
    if frames_BHWC.dtype != torch.uint8 or frames_BHWC.ndim != 4 or frames_BHWC.shape[-1] != 3 or not len(frames_BHWC):
        raise UserError(
            "frames",
            got=f"{frames_BHWC.dtype}{list(frames_BHWC.shape)}",
            wanted="uint8 [B,H,W,3]",
            fix="give RGB pictures of 0 to 255, channels last",
        )


def check_video(video_BTHWC: Tensor, grid: tuple[int, int, int]) -> None:
    """``UserError`` unless this is a uint8 video [B,T,H,W,3] with T = 1 + 4 (F - 1) for ``grid`` (F, h, w), all at least 1."""
    if len(grid) != 3 or min(grid) < 1:
        raise UserError("grid", got=grid, wanted="(F, h, w), each 1 or more", fix="give the denoiser's token grid")
    shape, frames = list(video_BTHWC.shape), 1 + 4 * (grid[0] - 1)
    if video_BTHWC.dtype != torch.uint8 or len(shape) != 5 or shape[-1] != 3 or shape[1] != frames or not shape[0]:
        raise UserError(
            "video",
            got=f"{video_BTHWC.dtype}{shape}",
            wanted=f"uint8 [B,{frames},H,W,3] for {grid[0]} latent frames",
            fix="give RGB frames of 0 to 255, channels last, 1 + 4 (F - 1) of them",
        )


def last_frames(video_BTHWC: Tensor) -> Tensor:
    """The frames 4k, the last of each latent frame's group: [B,T,H,W,3] -> [B*F,H,W,3]."""
    return video_BTHWC[:, ::4].flatten(0, 1)


def read_config(folder: str | Path | None, kinds: tuple[str, ...]) -> dict[str, Any]:
    """``config.json`` of a model's folder.

    Raises ``UserError`` when there is none, when its ``model_type`` is not one of ``kinds``, or when it asks for anything that is
    not in the folder.
    """
    file = Path(folder or "") / "config.json"
    if folder is None or not file.is_file():
        raise UserError(
            "path",
            got=None if folder is None else str(folder),
            wanted=f"a folder with config.json and {_WEIGHTS}",
            fix="download the model yourself and give its folder; nothing is downloaded here",
        )
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("model_type") not in kinds:
        raise UserError(
            f"{file}: model_type",
            got=config.get("model_type"),
            wanted=" or ".join(kinds),
            fix="give the folder of such a model",
        )
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    if asked := [name for name in _REACHING_OUT if any(part.get(name) for part in parts)]:
        raise UserError(
            f"{file}: {asked[0]}",
            got=next(part[asked[0]] for part in parts if part.get(asked[0])),
            wanted="a config that needs nothing but this folder",
            fix=f"remove {', '.join(asked)} from it",
        )
    return config


def weights_sha256(folder: str | Path) -> str:
    """SHA-256 of the weights that transformers would read from ``folder``.

    Of one file, that of its bytes; of shards, that of the lines ``<sha256>  <name>`` in the order of their names, which is what
    ``sha256sum model-*.safetensors | sha256sum`` prints. Raises ``UserError`` where there are no safetensors.
    """
    folder = Path(folder)
    if (folder / _WEIGHTS).is_file():
        return file_sha256(folder / _WEIGHTS)
    if (folder / _INDEX).is_file():
        names = sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        if all(Path(name).name == name and (folder / name).is_file() for name in names):
            lines = "".join(f"{file_sha256(folder / name)}  {name}\n" for name in names)
            return hashlib.sha256(lines.encode()).hexdigest()
    raise UserError(
        "path",
        got=str(folder),
        wanted=f"a folder with {_WEIGHTS}, or {_INDEX} and all of its shards",
        fix="give weights as safetensors; pickled ones (.bin, .pt, .pth) are not read",
    )


def load_pretrained(
    kind: Any,
    folder: str | Path,
    *,
    checksum: str | None,
    device: torch.device | str,
    dtype: torch.dtype,
    unused: tuple[str, ...] = (),
    **options: Any,
) -> tuple[Any, str]:
    """A frozen transformers model of class ``kind`` from ``folder`` (see ``read_config``), and the SHA-256 of its weights.

    ``checksum``: the SHA-256 they must have, None for any. ``unused``: parts of names of tensors that may be missing because the
    teacher never uses them. ``options`` go to ``from_pretrained``. Raises ``UserError`` for other weights than those expected, and
    for weights that do not fit the config: transformers only logs that and leaves random numbers in their place.
    """
    digest = weights_sha256(folder)
    if checksum is not None and digest != checksum.lower():
        raise UserError(
            "checksum",
            got=digest,
            wanted=checksum,
            fix=f"fetch the weights in {folder} again, or give this checksum if you trust them",
        )
    model, report = kind.from_pretrained(
        str(folder),
        local_files_only=True,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # so that they are reported below instead of as a RuntimeError
        output_loading_info=True,
        dtype=dtype,
        **options,
    )
    missing = [name for name in report["missing_keys"] if not any(part in name for part in unused)]
    wrong = sorted(missing + [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]])
    if wrong:
        raise UserError(
            str(folder),
            got=f"{len(wrong)} tensors missing or of another shape, such as {wrong[0]}",
            wanted=f"the weights of a {kind.__name__} with this config",
            fix="take weights and config from the same model",
        )
    return frozen(model, device, dtype), digest


def random_weights(kind: Any, config: Any, *, seed: int, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A frozen transformers model of class ``kind`` with weights drawn from ``seed``; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
    return frozen(model, device, dtype)


def frozen(model: Any, device: torch.device | str, dtype: torch.dtype) -> Any:
    """``model`` without gradients, in evaluation mode, on ``device`` in ``dtype``."""
    return model.requires_grad_(False).eval().to(device=device, dtype=dtype)


def version_of(preprocessing: str, dtype: torch.dtype) -> str:
    """Version of a teacher: its preprocessing, and its precision where that is not float32, because features differ with it."""
    return preprocessing if dtype == torch.float32 else f"{preprocessing}-{str(dtype).removeprefix('torch.')}"


def remember_positions(embeddings: Any) -> None:
    """Have a frozen ViT of transformers interpolate its position embeddings once for each size of picture, not for each picture:
    on a GPU that takes as long as the rest of the network."""
    stock, kept = embeddings.interpolate_pos_encoding, {}

    def positions(tokens: Tensor, height: int, width: int) -> Tensor:
        key = (height, width, tokens.device, embeddings.position_embeddings.dtype)
        if key not in kept:
            kept[key] = stock(tokens, height, width)
        return kept[key]

    embeddings.interpolate_pos_encoding = positions
