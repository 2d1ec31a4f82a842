"""Windows of latent stores, read from disk while a run trains: batches of one shape, loaded ahead of the steps that need them.

A window costs its latents, its sentence and its targets, a few megabytes, whatever the backbone; nothing stays in memory after its batch.
Which windows a step sees depends on (seed, step) alone: every epoch goes once through the windows of each shape in a new order.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from physisforcing.core.errors import DatasetError, UserError

from ..physics.config import PhysicsConfig
from .batches import step_generator
from .latent_actions import ACTION, STATE, RecordedActions, read_actions
from .latent_shards import LatentWindow, StoreInfo, read_window, sentence_length
from .target_shards import EpisodeTargets, TargetRecipe, open_shard
from .window_targets import check_recipe, reduce_shard

#: Tokens that a Wan sentence is padded to, as in its training.
WAN_TOKENS = 512


@dataclass(slots=True, kw_only=True)
class EpochSampler:
    """Batches of rows of one shape. An epoch goes through the rows of each shape in a random order; what does not fill a batch is left
    out of it (another rest in every epoch), and a shape with fewer rows than a batch repeats them."""

    groups: list[Tensor]
    _epoch: tuple[tuple[int, int, int], list[Tensor], Tensor] | None = None

    def rows(self, batch: int, seed: int, step: int) -> Tensor:
        """int64 [batch] on the CPU: a function of (seed, step)."""
        counts = [max(1, len(group) // batch) for group in self.groups]
        epoch, place = divmod(step, sum(counts))
        if self._epoch is None or self._epoch[0] != (batch, seed, epoch):
            # kept: half a million windows take milliseconds to put in order
            self._epoch = ((batch, seed, epoch), *self._order(counts, seed, epoch))
        _, orders, turns = self._epoch
        number = int(turns[place])
        first = batch * int((turns[:place] == number).sum())
        return orders[number][torch.arange(first, first + batch) % len(orders[number])]

    def _order(self, counts: list[int], seed: int, epoch: int) -> tuple[list[Tensor], Tensor]:
        """-> (rows of each shape in the order of an epoch, which shape each of its batches has)."""
        generator = step_generator(seed, epoch)
        orders = [group[torch.randperm(len(group), generator=generator)] for group in self.groups]
        turns = torch.cat([torch.full((count,), number) for number, count in enumerate(counts)])
        return orders, turns[torch.randperm(len(turns), generator=generator)]


@dataclass(slots=True, kw_only=True)
class StoreTargets:
    """Physics targets of a bank's windows, behind ``data.batches.Targets``."""

    bank: LatentBank
    teacher_dim: int
    identity: dict[str, Any]

    def available_rows(self) -> Tensor:
        return torch.tensor([row for row, (_, w) in enumerate(self.bank.windows) if w.targets], dtype=torch.int64)

    def batch(self, rows_B: Tensor) -> dict[str, Tensor]:
        return self.bank.batch(rows_B)["targets"]


@dataclass(slots=True, kw_only=True)
class LatentBank:
    """``windows``: (store, window), a row each. ``physics``: None where a run has no physics losses. ``ahead``: threads that read.

    ``close`` ends them. ``sentence_tokens``: what a Wan sentence is padded to (``pad_sentences``).
    """

    info: StoreInfo
    windows: list[tuple[Path, LatentWindow]]
    device: torch.device
    physics: PhysicsConfig | None = None
    ahead: int = 4
    sentence_tokens: int = WAN_TOKENS
    targets: StoreTargets | None = None
    #: The setting that names the windows.
    SETTING: ClassVar[str] = "data.latents"
    #: What to do where targets are missing.
    AGAIN: ClassVar[str] = "physis data latents again, or copy the whole store"
    _lenders: dict[tuple[int, ...], int] = field(default_factory=dict)
    _pool: ThreadPoolExecutor | None = None
    _coming: dict[int, Future[dict[str, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.physics is None:
            return
        for row, (_, window) in enumerate(self.windows):
            if window.targets:
                self._lenders.setdefault(window.shape, row)
        known = next(iter(self._lenders.values()), None)
        if known is None:
            fix = "physis data latents with a teacher=, or physics=none"
            raise UserError(
                "data.latents", got="windows without physics targets", wanted="some that have them", fix=fix
            )
        recipe, channels = self._made_by(known)
        check_recipe(recipe, self.physics)
        dim = channels or self.physics.feature_dim  # relations of bodies have no encoder
        self.targets = StoreTargets(bank=self, teacher_dim=dim, identity=self.info.teachers or {})

    def __len__(self) -> int:
        return len(self.windows)

    def name(self, row: int) -> str:
        """Dataset, episode and first step of a window."""
        return self.windows[row][1].name

    @property
    def fingerprint(self) -> str:
        """12 hex digits that tell the windows, in their order, from others; wherever the stores lie."""
        digest = hashlib.sha256()
        for _, window in self.windows:
            digest.update(f"{window.shard} {window.row} {window.targets} {window.target_row}\n".encode())
        return digest.hexdigest()[:12]

    def sampler(self, _start: float = 0.0, _end: float = 0.0) -> EpochSampler:
        """What draws the rows of the steps: all windows alike, wherever they start. ``UserError`` where physics losses are wanted of a shape
        that has no targets at all, of which a run would hear with its first batch."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, (_, window) in enumerate(self.windows):
            groups.setdefault(window.shape, []).append(row)
        if self.physics is not None:
            for shape in sorted(groups):
                self._lender(shape)
        return EpochSampler(groups=[torch.tensor(rows) for _, rows in sorted(groups.items())])

    def pad_sentences(self, tokens: int) -> None:
        """Pad Wan sentences to so many ``tokens``, the setting ``text_tokens`` of a policy. ``UserError`` for a longer one: of each only the length
        is read."""
        if self.info.kind == "wan":
            once = {window.caption: row for row, (_, window) in reversed(list(enumerate(self.windows)))}
            for row in sorted(once.values()):
                self._check_sentence(self._sentence_length(row), tokens, self.name(row))
        self.sentence_tokens = tokens

    def _check_sentence(self, found: int, tokens: int, name: str) -> None:
        if found > tokens:
            got, wanted = f"a sentence of {found} tokens, {name}", f"at most {tokens}"
            raise UserError(
                self.SETTING, got=got, wanted=wanted, fix=f"a shorter one, or text_tokens={found} of a policy"
            )

    def _sentence_length(self, row: int) -> int:
        """Tokens of a window's sentence, without those that it is padded by."""
        return sentence_length(*self.windows[row])

    @property
    def text_tokens(self) -> int:
        """Tokens of a sentence as the blocks read it; of Cosmos3 those of the first window's."""
        return self.sentence_tokens if self.info.kind == "wan" else self._sentence_length(0)

    def latent_shape(self, rows_B: Tensor) -> tuple[int, ...]:
        """[B,C,F,h,w] of the latents of rows of one shape."""
        return len(rows_B), *self.windows[int(rows_B[0])][1].shape

    def alike(self, *, physics: bool = True) -> Tensor:
        """Rows of the windows with the most common shape, with ``physics`` of those that have targets, where any have: int64 on the CPU."""
        rows = self.physics_rows().tolist() if physics and self.targets is not None else list(range(len(self)))
        shapes = [self.windows[row][1].shape for row in rows]
        common = max(sorted(set(shapes)), key=shapes.count)
        return torch.tensor([row for row, shape in zip(rows, shapes, strict=True) if shape == common])

    def physics_rows(self) -> Tensor:
        """Rows of the windows that have physics targets, on the CPU."""
        assert self.targets is not None
        return self.targets.available_rows()

    def expect(self, rows_B: Tensor) -> None:
        """Begin to read rows that ``batch`` will be asked for soon."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=self.ahead, thread_name_prefix="latents")
        for row in rows_B.tolist():
            if row not in self._coming:
                self._coming[row] = self._pool.submit(self._load, row)

    def batch(self, rows_B: Tensor) -> dict[str, Any]:
        """``latents_BCFhw`` (float32), ``text``, ``condition_BCFhw`` where there is one, and ``targets`` of rows of one shape."""
        self.expect(rows_B)
        rows = rows_B.tolist()
        made_of = {row: self._complete(row, self._coming.pop(row).result()) for row in dict.fromkeys(rows)}
        samples = [made_of[row] for row in rows]
        made: dict[str, Any] = {"targets": None}
        made["latents_BCFhw"] = self._stack([sample["latents_CFhw"] for sample in samples]).float()
        if "condition_CFhw" in samples[0]:
            made["condition_BCFhw"] = self._stack([sample["condition_CFhw"] for sample in samples])
        made["text"] = self._text(rows, samples)
        if self.targets is not None:
            names = samples[0]["targets"]
            made["targets"] = {name: self._stack([sample["targets"][name][0] for sample in samples]) for name in names}
        return made

    def recorded(self, row: int) -> RecordedActions:
        """States and actions of the episode of a window. ``DatasetError`` where there are none."""
        store, window = self.windows[row]
        if not window.actions:
            raise self._without_actions(row)
        return read_actions(store / window.actions, f"{window.source} episode {window.episode}")

    def _without_actions(self, row: int) -> DatasetError:
        window = self.windows[row][1]
        fix = "physis data latents again adds them where the dataset has them; else leave that dataset out"
        wanted = f"the columns {STATE} and {ACTION}"
        return DatasetError(f"actions of {window.source} episode {window.episode}", got="none", wanted=wanted, fix=fix)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = None
        self._coming.clear()

    def _stack(self, parts: Sequence[Tensor]) -> Tensor:
        """[B,...] on the device; the copy does not hold up the host."""
        whole = torch.stack(list(parts))
        if self.device.type != "cuda" or whole.device.type == "cuda":
            return whole
        return whole.pin_memory().to(self.device, non_blocking=True)

    def _text(self, rows: Sequence[int], samples: Sequence[Mapping[str, Any]]) -> Tensor:
        """Embeddings [B,512,D] with zeros behind the sentence (``sentence_tokens``), or ids [B,L] with -1 behind it."""
        if self.info.kind == "cosmos3":
            ids = [sample["text_L"] for sample in samples]
            return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1).to(self.device)
        first = samples[0]["text_LD"]
        for row, sample in zip(rows, samples, strict=True):
            self._check_sentence(len(sample["text_LD"]), self.sentence_tokens, self.name(row))
        text = torch.zeros(len(samples), self.sentence_tokens, first.shape[1], dtype=first.dtype, device=self.device)
        for row, sample in enumerate(samples):
            text[row, : len(sample["text_LD"])] = sample["text_LD"].to(self.device, non_blocking=True)
        return text

    def _read(self, row: int) -> dict[str, Any]:
        """Everything of a window but its targets, in a thread that reads."""
        return dict(read_window(*self.windows[row]))

    def _complete(self, row: int, sample: dict[str, Any]) -> dict[str, Any]:
        """What is left to do once a batch needs the window, in the thread that asks for it."""
        return sample

    def _load(self, row: int) -> dict[str, Any]:
        found = self._read(row)
        if self.physics is not None:
            found["targets"] = self._target(row)
        return found

    def _target(self, row: int) -> dict[str, Tensor]:
        """Targets of one window, [1,...]; of one without any, those of another with nothing selected in them."""
        _, window = self.windows[row]
        if window.targets:
            recipe, shard = _targets(*self._targets_path(row))
            start = int(shard.starts_W[window.target_row])
            return reduce_shard(shard, [start], start + 1, recipe, self._physics()).batch(
                torch.zeros(1, dtype=torch.int64)
            )
        empty = self._target(self._lender(window.shape))
        for name in ("select_BN", "token_mask_BFhw", "relation_valid_BK"):
            if name in empty:
                empty[name] = torch.zeros_like(empty[name])
        return empty

    def _made_by(self, row: int) -> tuple[TargetRecipe, int]:
        """-> (what the targets of a window were made by, channels of its encoder)."""
        recipe, shard = _targets(*self._targets_path(row))
        return recipe, shard.channels

    def _lender(self, shape: tuple[int, ...]) -> int:
        """Row of a window of this shape that has targets, whose form those without any take."""
        if shape not in self._lenders:
            got = f"no targets of any window with latents of {list(shape)}"
            fix = "physis data latents with a teacher= for these buckets as well, or physics=none"
            raise UserError("data.latents", got=got, wanted="some windows of every shape with targets", fix=fix)
        return self._lenders[shape]

    def _physics(self) -> PhysicsConfig:
        assert self.physics is not None
        return self.physics

    def _targets_path(self, row: int) -> tuple[Path, int, int]:
        path = self._targets_file(row)
        if not path.is_file():
            raise DatasetError(f"targets of {self.name(row)}", got="none", wanted=str(path), fix=self.AGAIN)
        state = path.stat()
        return path, state.st_mtime_ns, state.st_size

    def _targets_file(self, row: int) -> Path:
        store, window = self.windows[row]
        return store / window.targets


@functools.lru_cache(maxsize=64)
def _targets(path: Path, _modified: int, _size: int) -> tuple[TargetRecipe, EpisodeTargets]:
    """A shard of targets, mapped; the last few stay open."""
    return open_shard(path)
