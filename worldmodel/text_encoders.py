"""Sentences for the large backbones, with a pipeline folder's own tokenizer and encoder: UMT5 embeddings (Wan) or token ids (Cosmos3).

Nothing is downloaded. Embeddings are cached on disk by sentence and encoder, so that the encoder (11 GB for Wan) is loaded on a miss
alone; its files are hashed once a process.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from physisforcing.core.digests import file_sha256
from physisforcing.core.errors import UserError
from physisforcing.core.paths import cache_home
from physisforcing.core.results import config_hash

#: Tokens that a sentence is padded to, as in Wan's training.
WAN_TOKENS = 512
#: Sentences kept in memory.
MOST_REMEMBERED = 128
#: Files of an encoder or tokenizer that decide what it makes.
_DECISIVE = frozenset({".safetensors", ".json", ".txt", ".model"})


class UMT5Text:
    """Sentences -> token embeddings of the UMT5 encoder in a Wan pipeline folder, zeros behind them.

    ``folder``: with ``tokenizer/`` and ``text_encoder/``. ``dtype``: the encoder's. ``max_tokens``: what lies beyond is cut, with a
    warning that counts it. ``store=False``: no file is written, for sentences that strangers send. ``run(module, call)``: how the encoder is
    called; the default is on the CPU.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        dtype: torch.dtype = torch.float32,
        cache: Path | None = None,
        max_tokens: int = WAN_TOKENS,
        store: bool = True,
        run: Callable[[Any, Callable[[], Tensor]], Tensor] = lambda _module, call: call(),
    ) -> None:
        self.folder, self.dtype, self.max_tokens = Path(folder), dtype, max_tokens
        self.cache = cache if cache is not None else cache_home() / "text_wan"
        self._keep, self._run = store, run
        self._parts: dict[str, Any] = {}
        self._memory: dict[str, Tensor] = {}
        for part in ("tokenizer", "text_encoder"):
            if not (self.folder / part).is_dir():
                fix = "use the whole pipeline folder"
                raise UserError("model", got=f"{self.folder} without {part}/", wanted="a Wan pipeline folder", fix=fix)
        self._fingerprint = ""

    @property
    def fingerprint(self) -> str:
        """Of tokenizer, encoder, precision and length: what embeddings depend on beside the sentence."""
        if not self._fingerprint:
            files = {part: file_hashes(self.folder / part) for part in ("tokenizer", "text_encoder")}
            self._fingerprint = config_hash(files | {"dtype": str(self.dtype), "max_tokens": self.max_tokens})
        return self._fingerprint

    def tokens(self, sentence: str) -> Tensor:
        """Embeddings [L<=max_tokens,D] of one sentence on the CPU, without the zeros."""
        text = clean(sentence)
        if text not in self._memory:
            made = self.cached(sentence)
            if len(self._memory) >= MOST_REMEMBERED:
                del self._memory[next(iter(self._memory))]
            self._memory[text] = made
        return self._memory[text]

    def cached(self, sentence: str) -> Tensor:
        """The same, read from the cache on disk (and put there first) every time: for more sentences than memory holds. Without ``store`` one
        that is not there is computed every time."""
        path = self._path(sentence)
        tokens, cut = self._load(self.make(sentence)) if self._keep or path.is_file() else self._encode(clean(sentence))
        if cut:
            text = clean(sentence)
            said = f"a prompt is {cut} tokens longer than the {self.max_tokens} that are read: {text[:60]!r}..."
            warnings.warn(said, stacklevel=3)
        return tokens

    def length(self, sentence: str) -> int:
        """Tokens of one sentence, as many as ``tokens`` gives; its embeddings are made first where they are not cached, and not read."""
        from safetensors import safe_open

        with safe_open(self.make(sentence), "pt") as file:
            return int(file.get_slice("tokens_LD").get_shape()[0])

    def make(self, sentence: str) -> Path:
        """The file of a sentence in the cache, made where it is not there."""
        path = self._path(sentence)
        if not path.is_file():
            self._store(path, clean(sentence))
        return path

    def _path(self, sentence: str) -> Path:
        key = hashlib.sha256(f"{self.fingerprint}\n{clean(sentence)}".encode()).hexdigest()[:32]
        return self.cache / f"{key}.safetensors"

    def release(self) -> None:
        """Let go of tokenizer and encoder; the next sentence that is not cached loads them again."""
        self._parts.clear()

    def batch(self, sentences: Sequence[str]) -> Tensor:
        """[B,max_tokens,D] in the encoder's precision, on the CPU."""
        rows = [self.tokens(sentence) for sentence in sentences]
        out = torch.zeros(len(rows), self.max_tokens, rows[0].shape[1], dtype=rows[0].dtype)
        for row, tokens in zip(out, rows, strict=True):
            row[: len(tokens)] = tokens
        return out

    @torch.no_grad()
    def _encode(self, text: str) -> tuple[Tensor, int]:
        """-> (embeddings [L,D], tokens that were cut)."""
        tokenizer = self._part("tokenizer")
        whole = len(tokenizer(text, add_special_tokens=True).input_ids)
        given = tokenizer(
            [text], padding="max_length", max_length=self.max_tokens, truncation=True, add_special_tokens=True,
            return_attention_mask=True, return_tensors="pt",
        )  # fmt: skip
        encoder = self._part("text_encoder")

        def call() -> Tensor:
            device = next(encoder.parameters()).device
            # padded as in training: a shorter sequence may round differently
            return encoder(given.input_ids.to(device), given.attention_mask.to(device)).last_hidden_state

        made = self._run(encoder, call)[0].to("cpu", self.dtype)
        return made[: int(given.attention_mask.gt(0).sum())].clone(), max(0, whole - self.max_tokens)

    def _store(self, path: Path, text: str) -> None:
        from safetensors.torch import save_file

        tokens, cut = self._encode(text)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        noted = {"text": text, "encoder": self.fingerprint, "tokens": str(len(tokens)), "cut": str(cut)}
        save_file({"tokens_LD": tokens.contiguous()}, aside, metadata=noted)
        os.replace(aside, path)

    def _load(self, path: Path) -> tuple[Tensor, int]:
        """-> (embeddings [L,D], tokens that were cut)."""
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return file.get_tensor("tokens_LD"), int((file.metadata() or {}).get("cut", 0))

    def _part(self, name: str) -> Any:
        if name not in self._parts:
            from transformers import AutoTokenizer, UMT5EncoderModel

            from .teachers.preprocess import load_pretrained

            folder = self.folder / name
            if name == "tokenizer":
                self._parts[name] = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            else:
                found = load_pretrained(UMT5EncoderModel, folder, checksum=None, device="cpu", dtype=self.dtype)
                self._parts[name] = found[0]
        return self._parts[name]


class CosmosText:
    """Sentences -> token ids of a Cosmos3 pipeline folder: its chat template, and the sentences about size and length that the model
    was trained with, all by diffusers' own pipeline. Nothing of the model's weights is read."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        for part in ("text_tokenizer", "vae"):
            if not (self.folder / part).is_dir():
                fix = "use the whole pipeline folder"
                raise UserError("model", got=f"{self.folder} without {part}/", wanted="a Cosmos3 folder", fix=fix)
        self._pipeline: Any = None

    def pair(
        self, prompt: str, negative: str, *, frames: int, height: int, width: int, fps: float
    ) -> tuple[Tensor, Tensor]:
        """Ids int64 [1,L] of the prompt and of the negative prompt, for a video of this size."""
        ids, others = self._stock().tokenize_prompt(
            prompt, negative, num_frames=frames, height=height, width=width, fps=fps
        )
        return torch.tensor([ids], dtype=torch.int64), torch.tensor([others], dtype=torch.int64)

    def batch(self, prompts: Sequence[str], *, frames: int, height: int, width: int, fps: float) -> Tensor:
        """Ids int64 [B,L], -1 behind the last one of a row."""
        rows = [self.pair(p, "", frames=frames, height=height, width=width, fps=fps)[0][0] for p in prompts]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)

    def _stock(self) -> Any:
        """The pipeline without its weights: only its tokenizer and what it says about sizes are used."""
        if self._pipeline is None:
            from diffusers import AutoencoderKLWan, Cosmos3OmniPipeline
            from transformers import AutoTokenizer

            settings = json.loads((self.folder / "model_index.json").read_text(encoding="utf-8"))
            with torch.device("meta"):
                vae = AutoencoderKLWan.from_config(
                    AutoencoderKLWan.load_config(self.folder / "vae", local_files_only=True)
                )
            tokenizer = AutoTokenizer.from_pretrained(self.folder / "text_tokenizer", local_files_only=True)
            self._pipeline = Cosmos3OmniPipeline(
                transformer=None, text_tokenizer=tokenizer, vae=vae, scheduler=None, enable_safety_checker=False,
                default_use_system_prompt=settings.get("default_use_system_prompt", True),
            )  # fmt: skip
        return self._pipeline


def clean(sentence: str) -> str:
    """A sentence as Wan's pipelines clean it: broken Unicode repaired, HTML entities resolved, white space collapsed."""
    from diffusers.pipelines.wan.pipeline_wan_i2v import prompt_clean

    return prompt_clean(sentence)


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of an encoder or tokenizer that decide what it makes, by name."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in _DECISIVE and path.is_file())
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
