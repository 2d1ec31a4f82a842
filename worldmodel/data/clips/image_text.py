"""Caption and pictures compared by a CLIP or SigLIP model from a folder on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from physisforcing.core.errors import UserError

from ...teachers.preprocess import load_pretrained, read_config, resized

#: ``model_type`` -> transformers' class, whether pictures are cut square (otherwise squeezed), how texts are padded.
FAMILIES: dict[str, tuple[str, bool, str]] = {
    "clip": ("CLIPModel", True, "longest"),
    "siglip": ("SiglipModel", False, "max_length"),
}
#: Pictures of a clip that are looked at, evenly spread, and captions at once.
PICTURES, BATCH = 8, 64


class ImageTextAlignment:
    """Cosine between a caption and the mean of a clip's pictures, in the model's common space. Satisfies ``LooksItself``.

    The folder has ``config.json``, safetensors and a tokenizer, as transformers saves them. Its own ``preprocessor_config.json``, where
    there is one, gives mean and deviation. Nothing is downloaded, and no code of the folder runs: a config that names any is refused.
    """

    def __init__(self, path: str | Path, *, checksum: str | None = None, device: str = "cpu") -> None:
        """``UserError`` for a folder of another model, other weights than ``checksum``, or without a tokenizer."""
        import transformers

        config = read_config(path, tuple(FAMILIES))
        name, self.square, self.padding = FAMILIES[config["model_type"]]
        self.model, digest = load_pretrained(
            getattr(transformers, name), path, checksum=checksum, device=device, dtype=torch.float32
        )
        self.tokenizer = _tokenizer(Path(path))
        self.side = int(self.model.config.vision_config.image_size)
        self.most_tokens = int(self.model.config.text_config.max_position_embeddings)
        mean, std = _normalisation(Path(path), config["model_type"])
        self.mean, self.std = (torch.tensor(v, device=device).view(3, 1, 1) * 255 for v in (mean, std))
        self.key = f"{config['model_type']}/{digest[:12]}/{PICTURES}"

    @torch.no_grad()
    def look(self, pictures_THWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Mean of the pictures' vectors, each of length 1 before."""
        chosen = np.linspace(0, len(pictures_THWC) - 1, min(PICTURES, len(pictures_THWC))).round().astype(int)
        pictures = torch.from_numpy(pictures_THWC[chosen]).to(self.mean.device).permute(0, 3, 1, 2).float()
        found = self.model.get_image_features(pixel_values=(self._fitted(pictures) - self.mean) / self.std)
        return _unit(_pooled(found)).mean(0).cpu().numpy()

    @torch.no_grad()
    def scores(
        self, seen_ND: NDArray[np.float32], captions: Sequence[str], same: Sequence[tuple[int, int]]
    ) -> NDArray[np.float64]:
        """Cosines [N]. Captions longer than the model reads are cut."""
        texts = sorted(set(captions))
        vectors: dict[str, NDArray[np.float32]] = {}
        for start in range(0, len(texts), BATCH):
            part = texts[start : start + BATCH]
            words = self.tokenizer(
                part, padding=self.padding, truncation=True, max_length=self.most_tokens, return_tensors="pt"
            ).to(self.mean.device)
            known = {k: v for k, v in words.items() if k == "input_ids" or (k == "attention_mask" and self.square)}
            found = _unit(_pooled(self.model.get_text_features(**known))).cpu().numpy()
            vectors |= dict(zip(part, found, strict=True))
        text_ND = np.stack([vectors[caption] for caption in captions]).astype(np.float64)
        seen = seen_ND.astype(np.float64)
        return (seen * text_ND).sum(1) / np.maximum(np.linalg.norm(seen, axis=1), 1e-9)

    def _fitted(self, pictures_BCHW: Tensor) -> Tensor:
        """To the model's square: CLIP cuts the middle, SigLIP squeezes the whole picture."""
        if not self.square:
            return resized(pictures_BCHW, (self.side, self.side), "bicubic")
        height, width = pictures_BCHW.shape[-2:]
        scale = self.side / min(height, width)
        size = max(self.side, round(height * scale)), max(self.side, round(width * scale))
        bigger = resized(pictures_BCHW, size, "bicubic")
        top, left = (size[0] - self.side) // 2, (size[1] - self.side) // 2
        return bigger[..., top : top + self.side, left : left + self.side]


def _pooled(found: Any) -> Tensor:
    """transformers 5 returns an output object, earlier ones the tensor."""
    return found if isinstance(found, Tensor) else found.pooler_output


def _unit(vectors_ND: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors_ND.float(), dim=-1)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    file = folder / "tokenizer_config.json"
    if not file.is_file():
        fix = "copy tokenizer.json and tokenizer_config.json of the model into it"
        raise UserError("alignment.path", got=f"no {file.name}", wanted="a tokenizer in the folder", fix=fix)
    if "auto_map" in json.loads(file.read_text(encoding="utf-8")):
        fix = f"remove auto_map from {file.name}"
        raise UserError(str(file), got="auto_map", wanted="a tokenizer that needs no code of the folder", fix=fix)
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def _normalisation(folder: Path, kind: str) -> tuple[list[float], list[float]]:
    """Mean and deviation of pictures in [0,1]."""
    file = folder / "preprocessor_config.json"
    told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    usual = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    mean, std = usual if kind == "clip" else ([0.5] * 3, [0.5] * 3)
    return told.get("image_mean", mean), told.get("image_std", std)
