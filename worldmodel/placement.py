"""Where the parts of a pipeline are while it runs: on the device all along, one at a time, or a block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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
    def use(self, part: nn.Module, blocks: Sequence[nn.Module] = ()) -> Iterator[None]:
        """``part`` is usable on the device inside; ``blocks``: those of its modules that may stream through it."""
        streamed = StreamedBlocks(blocks, self.device) if self.offload == "block" and blocks else None
        if streamed is None:
            part.to(self.device)
        else:
            inside = {id(value) for block in blocks for value in (*block.parameters(), *block.buffers())}
            for value in (*part.parameters(), *part.buffers()):
                if id(value) not in inside:
                    value.data = value.data.to(self.device)
        try:
            yield
        finally:
            if streamed is not None:
                streamed.close()
            if self.offload != "none":
                part.to("cpu")
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()


class StreamedBlocks:
    """Weights of ``blocks`` live on the CPU (page-locked beside a GPU); the next block's are copied while one computes.

    On the device are never more than two blocks. ``close`` takes the hooks away and puts the weights back on the CPU. For passes without
    gradients: the weights of a backward pass would be gone.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self.device, self._blocks = device, list(blocks)
        gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if gpu else None
        self._home: list[list[tuple[Tensor, Tensor]]] = []
        for block in self._blocks:
            values = [*block.parameters(), *block.buffers()]
            self._home.append([(value, value.data.pin_memory() if gpu else value.data) for value in values])
        self._waiting: dict[int, list[Tensor]] = {}
        self._handles = []
        for index, block in enumerate(self._blocks):
            self._handles += [
                block.register_forward_pre_hook(lambda _m, _i, index=index: self._enter(index)),
                block.register_forward_hook(lambda _m, _i, _o, index=index: self._leave(index)),
            ]

    def close(self) -> None:
        """Undo everything; safe to call in the middle of a pass that failed."""
        for handle in self._handles:
            handle.remove()
        self._waiting.clear()
        for index in range(len(self._blocks)):
            self._leave(index)

    def _enter(self, index: int) -> None:
        self._fetch(index)
        copies = self._waiting.pop(index)
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            for copy in copies:
                copy.record_stream(current)  # made on the other stream, freed by this one
        for (value, _), copy in zip(self._home[index], copies, strict=True):
            value.data = copy
        self._fetch((index + 1) % len(self._blocks))

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
