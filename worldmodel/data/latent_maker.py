"""The windows of one episode as a shard of a latent store: autoencoder and text encoder of a pipeline folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from physisforcing.core.episodes import EpisodeSource

from ..backbones.folder import Described, describe_backbone
from ..pipeline_vae import PipelineVae, load_vae
from ..storage import latents_fingerprint
from ..text_encoders import CosmosText, UMT5Text, file_hashes
from .buckets import Bucket
from .canvas import canvas_digest
from .latent_shards import StoreInfo

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class LatentMaker:
    """``model``: a pipeline folder. ``dtype``: one of ``DTYPES``, in which latents and sentences are stored. The autoencoder is loaded with
    the first shard, the text encoder with the first sentence that is not cached. ``seconds``: spent on pictures, autoencoder and
    sentences so far."""

    def __init__(
        self, model: Path, *, device: torch.device, dtype: torch.dtype, text_cache: Path | None = None
    ) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        self.described: Described = describe_backbone(model)
        self.patch = self._patch()
        self._vae: PipelineVae | None = None
        self._stays, self._tokenizing = False, threading.Lock()
        self.text: UMT5Text | CosmosText
        if self.described.cosmos:
            self.text = CosmosText(model)
        else:
            self.text = UMT5Text(model, dtype=dtype, cache=text_cache, run=self._on_device)
        self.latents = latents_fingerprint(model / "vae")
        self.seconds = {"pictures": 0.0, "latents": 0.0, "text": 0.0}

    def info(self, fps: float, teachers: dict[str, Any] | None, canvas: str = "") -> StoreInfo:
        """What the store says of its windows."""
        found = self.described
        return StoreInfo(
            kind="cosmos3" if found.cosmos else "wan", latents=self.latents, text=self._text_fingerprint(),
            channels=found.channels, stride=found.stride, conditioned=found.conditioned, fps=fps, teachers=teachers,
            canvas=canvas, canvas_digest=canvas_digest(canvas) if canvas else "",
        )  # fmt: skip

    def shard_name(
        self, content: str, sentence: str, bucket: Bucket, starts: Sequence[int], stride: int, fps: float
    ) -> str:
        """Where an episode's windows lie in a store: a digest of all they depend on. ``content`` is that of the pictures."""
        parts = [content, sentence, bucket.name, list(starts), stride, round(fps, 4), str(self.dtype), self.latents]
        parts += [self._text_fingerprint(), self.described.conditioned]
        return f"{bucket.name}/{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}.safetensors"

    def make(
        self, source: EpisodeSource, index: int, bucket: Bucket, starts: Sequence[int], stride: int, fps: float
    ) -> dict[str, Tensor]:
        """The tensors of ``latent_shards.write_shard``. ``source`` shows pictures of the bucket's size."""
        self.load()
        parts: dict[str, list[Tensor]] = {}
        for start in starts:
            frames = self._timed("pictures", lambda start=start: window_frames(source, index, bucket, start, stride))
            made = self._timed("latents", lambda frames=frames: _on_cpu(self.encode(torch.from_numpy(frames))))
            for name, value in made.items():
                parts.setdefault(name.replace("_CFhw", "_WCFhw"), []).append(value)
        sentence = source.episode(index).instruction
        tensors = {name: torch.stack(values) for name, values in parts.items()}
        return tensors | self._timed("text", lambda: self.sentence(sentence, bucket, fps))

    def encode(self, frames_THWC: Tensor) -> dict[str, Tensor]:
        """``latents_CFhw`` of the pictures (uint8) of a window and, of a backbone with conditioning channels, ``condition_CFhw`` of the first one
        and grey; on the device, in the precision in which they are kept. The autoencoder is that of ``load``."""
        assert self._vae is not None
        video = frames_THWC.to(self.device, non_blocking=True).permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0
        found = {"latents_CFhw": self._vae.encode(video)[0].to(self.dtype)}
        if self.described.conditioned:
            found["condition_CFhw"] = self._vae.encode_grey(video[:, :, 0], len(frames_THWC))[0].to(self.dtype)
        return found

    def sentence(self, sentence: str, bucket: Bucket, fps: float, *, keep: bool = True) -> dict[str, Tensor]:
        """``text_LD`` or ``text_L`` of a sentence, on the CPU. ``keep``: in memory as well, for the next window that has it."""
        if isinstance(self.text, CosmosText):
            size = {"frames": bucket.frames, "height": bucket.rows, "width": bucket.columns}
            with self._tokenizing:  # by one thread at a time, as tokenizers want it
                return {"text_L": self.text.batch([sentence], fps=fps, **size)[0]}
        return {"text_LD": (self.text.tokens if keep else self.text.cached)(sentence).to(self.dtype)}

    def sentence_length(self, sentence: str, bucket: Bucket, fps: float) -> int:
        """Tokens of what ``sentence`` gives."""
        if isinstance(self.text, UMT5Text):
            return self.text.length(sentence)
        return len(self.sentence(sentence, bucket, fps)["text_L"])

    def embed(self, sentences: Iterable[str]) -> None:
        """Put embeddings of all ``sentences`` into the cache on disk. The encoder stays on the device meanwhile, and nowhere after it."""
        if isinstance(self.text, CosmosText):
            return  # ids are made in no time
        self._stays = True
        try:
            for sentence in sentences:
                self.text.make(sentence)
        finally:
            self._stays = False
            self.text.release()

    def _text_fingerprint(self) -> str:
        if isinstance(self.text, CosmosText):
            return hashlib.sha256(json.dumps(file_hashes(self.model / "text_tokenizer")).encode()).hexdigest()[:12]
        return self.text.fingerprint

    def _patch(self) -> tuple[int, int, int]:
        values = json.loads((self.described.path / "config.json").read_text(encoding="utf-8"))
        side = int(values.get("latent_patch_size") or 2)
        time_, rows, columns = values.get("patch_size") or (1, side, side)
        return int(time_), int(rows), int(columns)

    def load(self) -> None:
        """The autoencoder to the device, in float32, as where videos are generated."""
        if self._vae is None:
            self._vae = load_vae(self.model / "vae").to(self.device)

    def _on_device(self, encoder: torch.nn.Module, call: Callable[[], Tensor]) -> Tensor:
        """The text encoder goes to the device for its turn."""
        encoder.to(self.device)
        try:
            return call()
        finally:
            if not self._stays:
                encoder.to("cpu")

    def _timed(self, what: str, call: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        made = call()
        self.seconds[what] += time.perf_counter() - begun
        return made


def window_frames(source: EpisodeSource, index: int, bucket: Bucket, start: int, stride: int) -> NDArray[np.uint8]:
    """The pictures [T,H,W,3] of the window of an episode that starts at the recorded frame ``start``; past the end the last one repeats."""
    steps = np.minimum(start + stride * np.arange(bucket.frames), source.episode(index).length - 1)
    shown, places = np.unique(steps, return_inverse=True)
    return source.frames(index, shown.tolist())[places]


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in tensors.items()}


@contextlib.contextmanager
def as_in_commands(device: torch.device) -> Iterator[None]:
    """Inside, encoders and teachers compute as ``physis data latents`` does, whatever a training run has chosen for its own network: without
    autocast, with exact products of matrices, and with the convolutions that are chosen without trying them."""
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.benchmark = False
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.benchmark = cudnn
