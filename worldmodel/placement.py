"""Where the parts of a pipeline are while it runs: on the device all along, one at a time, or a block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from physisforcing.core.errors import unknown_name

#: ``none``: everything stays on the device. ``model``: a part goes there for its turn. ``block``: so do the blocks of a denoiser, each
#: copied while the one before it computes; the rest of the denoiser goes as with ``model``.
OFFLOAD = ("none", "model", "block")


class Placement:
    """Moves parts to ``device`` for their turn, by one of ``OFFLOAD``. ``UserError`` for another name."""

    def __init__(self, device: str | torch.device, offload: str = "none") -> None:
        if offload not in OFFLOAD:
            raise unknown_name("offload", offload, OFFLOAD, see="docs/paper_scale.md")
        self.device, self.offload = torch.device(device), offload

    @contextmanager
    def use(self, part: nn.Module) -> Iterator[None]:
        """``part`` is usable on the device inside. With ``offload`` what it writes into its weights there is lost, and a
        buffer that it replaces by another one stays there."""
        with self._lent(_values(part)):
            yield

    @contextmanager
    def use_backbone(self, backbone: Any) -> Iterator[None]:
        """As ``use``, for a ``VideoBackbone`` whose blocks may stream through the device."""
        if self.offload != "block":
            with self.use(backbone):
                yield
            return
        inside = {id(value) for value in _values(backbone.blocks)}
        with self._lent([value for value in _values(backbone) if id(value) not in inside]):
            streamed, plain = StreamedBlocks(backbone.blocks, self.device), backbone.run_block
            backbone.run_block = streamed.run
            try:
                yield
            finally:
                backbone.run_block = plain
                streamed.close()

    @contextmanager
    def _lent(self, values: list[Tensor]) -> Iterator[None]:
        """``values`` are on the device inside. With ``offload`` what they were stays where it is and is theirs again afterwards: nothing is copied back."""
        home: list[tuple[Tensor, Tensor]] = []
        try:
            for value in values:
                if self.offload != "none":
                    home.append((value, value.data))
                value.data = value.data.to(self.device)
            yield
        finally:
            for value, data in home:
                value.data = data
            if home and self.device.type == "cuda":
                torch.cuda.empty_cache()


class StreamedBlocks:
    """Weights of ``blocks`` live on the CPU (page-locked beside a GPU); the next block's are copied while one computes.

    ``run`` is the ``run_block`` of a backbone: it works around the call of a block, compiled or not. On the device are never more than
    two blocks. For passes without gradients: a backward pass would miss the weights.
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device) -> None:
        self.device = device
        gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if gpu else None
        self._order = {id(block): index for index, block in enumerate(blocks)}
        self._home: list[list[tuple[Tensor, Tensor]]] = []
        for index, block in enumerate(blocks):
            self._home.append([(value, value.data.pin_memory() if gpu else value.data) for value in _values(block)])
            self._leave(index)  # else the weights would lie in memory twice until each block has run
        self._waiting: dict[int, list[Tensor]] = {}
        self._last: torch.cuda.Event | None = None

    def run(self, block: nn.Module, *inputs: Any) -> Any:
        """The block's output, computed with copies of its weights on the device."""
        index = self._order[id(block)]
        self._lend(index)
        try:
            made = block(*inputs)
        finally:
            self._leave(index)
        self._keep_pace()
        self._fetch((index + 1) % len(self._order))
        return made

    def _lend(self, index: int) -> None:
        """The copies become the block's weights."""
        self._fetch(index)
        copies = self._waiting.pop(index)
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            for copy in copies:
                copy.record_stream(current)  # made on the other stream, freed by this one
        for (value, _), copy in zip(self._home[index], copies, strict=True):
            value.data = copy

    def _keep_pace(self) -> None:
        """Wait until the block before this one has been computed, which frees its copies for those of the next: Python is many blocks ahead of
        the device if it may be, and would have all their copies there at once."""
        if self._stream is None:
            return
        if self._last is not None:
            self._last.synchronize()
        self._last = torch.cuda.current_stream(self.device).record_event()

    def close(self) -> None:
        """Forget what was fetched ahead and leave every weight on the CPU."""
        self._waiting.clear()
        for index in range(len(self._home)):
            self._leave(index)

    def _fetch(self, index: int) -> None:
        if index in self._waiting:
            return
        if self._stream is None:
            self._waiting[index] = [home.to(self.device, copy=True) for _, home in self._home[index]]
            return
        with torch.cuda.stream(self._stream):
            self._waiting[index] = [home.to(self.device, non_blocking=True) for _, home in self._home[index]]

    def _leave(self, index: int) -> None:
        for value, home in self._home[index]:
            value.data = home


def _values(part: nn.Module) -> list[Tensor]:
    return [*part.parameters(), *part.buffers()]
