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
        """As ``use``, for a ``VideoBackbone`` whose blocks may stream through the device; what a block writes into its weights is then
        lost with each call."""
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
    """Weights of ``blocks`` stay where they are on the CPU, and the next block's are copied to the device while one computes.

    ``run`` is the ``run_block`` of a backbone: it works around the call of a block, compiled or not. There are buffers for two blocks on the
    device and, page-locked, two on the CPU, which copies into them first: locking all weights would take time and as much memory again as
    weights that are mapped from a file. Weights of another layout in memory become contiguous, and kernels may round them differently.
    For passes without gradients (a backward pass would miss the weights), on the stream that is current when this is made, until ``close``.
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device) -> None:
        self.device = device
        self._order = {id(block): index for index, block in enumerate(blocks)}
        self._home = [[(value, value.data, begin, end) for value, begin, end in _layout(block)] for block in blocks]
        size = max((end for block in self._home for *_, end in block), default=0)
        self._slots = [_Slot(size, device) for _ in range(2)]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:  # kernels may still use what was freed for the slots
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self._waiting: dict[int, _Slot] = {}

    def run(self, block: nn.Module, *inputs: Any) -> Any:
        """The block's output, computed with copies of its weights on the device."""
        index = self._order[id(block)]
        self._fetch(index)
        slot = self._waiting.pop(index)
        if slot.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.copied)
        for value, home, begin, end in self._home[index]:
            value.data = _as(home, slot.there[begin:end])
        try:
            made = block(*inputs)
        finally:
            self._leave(index)
            if self._stream is not None:
                slot.computed = torch.cuda.current_stream(self.device).record_event()
        self._fetch((index + 1) % len(self._order))
        return made

    def close(self) -> None:
        """Forget what was fetched ahead and leave every weight on the CPU."""
        if self._stream is not None:
            self._stream.synchronize()  # it may still write into what is freed
        self._waiting.clear()
        self._slots.clear()
        for index in range(len(self._home)):
            self._leave(index)

    def _fetch(self, index: int) -> None:
        """Begin to copy a block into the slot that was used longest ago."""
        if index in self._waiting:
            return
        slot = self._slots[0]
        self._slots.reverse()
        self._waiting.clear()
        self._copy(index, slot)
        self._waiting[index] = slot

    def _copy(self, index: int, slot: _Slot) -> None:
        if self._stream is None:
            for _, home, begin, end in self._home[index]:
                _as(home, slot.there[begin:end]).copy_(home)
            return
        if slot.copied is not None:
            slot.copied.synchronize()  # the device still read from the page-locked half
        with torch.cuda.stream(self._stream):
            if slot.computed is not None:
                self._stream.wait_event(slot.computed)
            for _, home, begin, end in self._home[index]:
                _as(home, slot.locked[begin:end]).copy_(home)
                slot.there[begin:end].copy_(slot.locked[begin:end], non_blocking=True)
            slot.copied = self._stream.record_event()

    def _leave(self, index: int) -> None:
        for value, home, *_ in self._home[index]:
            value.data = home


class _Slot:
    """Room for one block: bytes on the device, bytes on the CPU that it copies from, and what was last done with them."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.there = torch.empty(size, dtype=torch.uint8, device=device)
        gpu = device.type == "cuda"
        self.locked = torch.empty(size if gpu else 0, dtype=torch.uint8, pin_memory=gpu)
        self.copied: torch.cuda.Event | None = None
        self.computed: torch.cuda.Event | None = None


def _layout(block: nn.Module) -> Iterator[tuple[Tensor, int, int]]:
    """The block's weights, each with its first and last byte in a slot: aligned as the allocator aligns tensors."""
    end = 0
    for value in _values(block):
        begin = -(-end // 256) * 256
        end = begin + value.nbytes
        yield value, begin, end


def _as(home: Tensor, part: Tensor) -> Tensor:
    """Bytes as a tensor of the type and shape of ``home``."""
    return part.view(home.dtype).view(home.shape)


def _values(part: nn.Module) -> list[Tensor]:
    return [*part.parameters(), *part.buffers()]
