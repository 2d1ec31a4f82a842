"""The windows of one episode as a shard of a latent store: autoencoder and text encoder of a pipeline folder."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from physisforcing.core.episodes import EpisodeSource

from ..backbones.folder import Described, describe_backbone
from ..pipeline_vae import PipelineVae, load_vae
from ..storage import latents_fingerprint
from ..text_encoders import CosmosText, UMT5Text, file_hashes
from .buckets import Bucket
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
        self.text: UMT5Text | CosmosText
        if self.described.cosmos:
            self.text = CosmosText(model)
        else:
            self.text = UMT5Text(model, dtype=dtype, cache=text_cache, run=self._on_device)
        self.latents = latents_fingerprint(model / "vae")
        self.seconds = {"pictures": 0.0, "latents": 0.0, "text": 0.0}

    def info(self, fps: float, teachers: dict[str, Any] | None) -> StoreInfo:
        """What the store says of its windows."""
        found = self.described
        return StoreInfo(
            kind="cosmos3" if found.cosmos else "wan", latents=self.latents, text=self._text_fingerprint(),
            channels=found.channels, stride=found.stride, conditioned=found.conditioned, fps=fps, teachers=teachers,
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
        vae = self._loaded_vae()
        latents, conditions = [], []
        for start in starts:
            frames = self._timed(
                "pictures",
                lambda start=start: source.frames(index, range(start, start + bucket.frames * stride, stride)),
            )
            video = torch.from_numpy(frames).to(self.device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0
            made = self._timed("latents", lambda video=video: vae.encode(video).to("cpu", self.dtype))
            latents.append(made[0])
            if self.described.conditioned:
                shown = self._timed("latents", lambda video=video: vae.encode_grey(video[:, :, 0], bucket.frames))
                conditions.append(shown[0].to("cpu", self.dtype))
        tensors = {"latents_WCFhw": torch.stack(latents)}
        if conditions:
            tensors["condition_WCFhw"] = torch.stack(conditions)
        sentence = source.episode(index).instruction
        return tensors | self._timed("text", lambda: self._sentence(sentence, bucket, fps))

    def _sentence(self, sentence: str, bucket: Bucket, fps: float) -> dict[str, Tensor]:
        if isinstance(self.text, CosmosText):
            size = {"frames": bucket.frames, "height": bucket.rows, "width": bucket.columns}
            return {"text_L": self.text.batch([sentence], fps=fps, **size)[0]}
        return {"text_LD": self.text.tokens(sentence).to(self.dtype)}

    def _text_fingerprint(self) -> str:
        if isinstance(self.text, CosmosText):
            return hashlib.sha256(json.dumps(file_hashes(self.model / "text_tokenizer")).encode()).hexdigest()[:12]
        return self.text.fingerprint

    def _patch(self) -> tuple[int, int, int]:
        values = json.loads((self.described.path / "config.json").read_text(encoding="utf-8"))
        side = int(values.get("latent_patch_size") or 2)
        time_, rows, columns = values.get("patch_size") or (1, side, side)
        return int(time_), int(rows), int(columns)

    def _loaded_vae(self) -> PipelineVae:
        if self._vae is None:
            self._vae = load_vae(self.model / "vae")  # in float32, as where videos are generated
            self._vae.vae.to(self.device)
        return self._vae

    def _on_device(self, encoder: torch.nn.Module, call: Callable[[], Tensor]) -> Tensor:
        """The text encoder goes to the device for its turn."""
        encoder.to(self.device)
        try:
            return call()
        finally:
            encoder.to("cpu")

    def _timed(self, what: str, call: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        made = call()
        self.seconds[what] += time.perf_counter() - begun
        return made
