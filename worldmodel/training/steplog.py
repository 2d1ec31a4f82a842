"""One structured line a logged step: on the terminal, in ``metrics.jsonl`` and in TensorBoard."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from physisforcing.core.errors import UserError

from .flops import peak_flops


class StepLog:
    """Accumulates loss terms on the device and reads them only when a line is written (one host sync a line).

    ``done``: updates that the run holds already. Lines of later steps, which a killed process wrote after its last checkpoint,
    are dropped when the file is opened: those steps are made again. ``quiet``: write nothing (all processes of a run but the first).
    ``wandb``: a Weights & Biases project that is told the same lines, "" for none.
    """

    def __init__(
        self,
        run: Path,
        steps: int,
        batch: int,
        device: torch.device,
        done: int = 0,
        quiet: bool = False,
        wandb: str = "",
    ) -> None:
        self.run, self.steps, self.batch, self.device = run, steps, batch, device
        self._stream = None
        self._board = self._wandb = None
        if not quiet:
            _drop_lines_after(run / "metrics.jsonl", done)
            self._stream = (run / "metrics.jsonl").open("a", encoding="utf-8")
            self._board = _tensorboard(run, done)
            self._wandb = _wandb(run, wandb)
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._count = self._skipped = 0
        self._wait = self._operations = 0.0
        self._since = time.perf_counter()
        self._done = done
        self._peak = peak_flops(device)

    def add(self, terms: dict[str, Tensor], wait_s: float, operations: float = 0.0) -> None:
        """Loss terms and gradient norm of one step (device scalars), the host seconds spent on its batch, and its floating-point operations
        (0: not counted)."""
        for name, value in terms.items():
            total = self._sums.get(name)
            self._sums[name] = value.detach().float() if total is None else total + value.detach()
            self._counts[name] = self._counts.get(name, 0) + 1
        self._count += 1
        self._wait += wait_s
        self._operations += operations

    def skip(self, record: dict[str, object], wait_s: float) -> None:
        """A line of a step whose update was left out. It took its time, as others do, but its loss is no part of their mean."""
        self.event(record)
        self._skipped += 1
        self._wait += wait_s

    def line(self, step: int, lr: float) -> dict[str, float]:
        """Write the mean of the steps since the last line, once there are any. Raises ``FloatingPointError`` when a loss is not finite."""
        if not self._count:
            return {}
        # what some steps measure alone is the mean of those
        values = torch.stack([total / self._counts[name] for name, total in self._sums.items()]).tolist()
        now = time.perf_counter()
        steps = self._count + self._skipped
        seconds = (now - self._since) / steps
        record: dict[str, float] = {"step": step, **dict(zip(self._sums, values, strict=True)), "lr": lr}
        record["step_ms"] = 1e3 * seconds
        record["data_wait_pct"] = 100.0 * self._wait / max(1e-9, now - self._since)
        record["clips_per_s"] = self.batch / seconds
        if self._peak and self._operations:
            record["mfu_pct"] = 100.0 * self._operations / (seconds * self._count) / self._peak
        record["memory_gib"] = _memory_gib(self.device)
        record["eta_s"] = seconds * (self.steps - step)
        self._write(record)
        self._sums, self._counts, self._count, self._skipped = {}, {}, 0, 0
        self._wait, self._operations, self._since = 0.0, 0.0, now
        if not all(value == value and abs(value) != float("inf") for value in values):
            raise FloatingPointError(f"step {step}: a loss is not finite: {record}")
        return record

    def event(self, record: dict[str, object]) -> None:
        """A line outside the step rhythm (held-out values, timings)."""
        self._write(record)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens meanwhile (measuring, videos, checkpoints) is no part of the time of a step: the clock stands still, on a GPU between what
        it has computed before and after."""
        self._wait_for_device()
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._wait_for_device()
            self._since += time.perf_counter() - begun

    def _wait_for_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def takes_pictures(self) -> bool:
        """Whether there is a TensorBoard to show pictures in; the same in every process of a run, which all compute them."""
        return self._board is not None or (self._stream is None and _has_tensorboard())

    def picture(self, name: str, image_HWC: NDArray[np.uint8], step: int) -> None:
        """An RGB picture as image summary."""
        if self._board is not None:
            self._board.add_image(name, image_HWC, step, dataformats="HWC")

    def _write(self, record: dict) -> None:
        if self._stream is None:
            return
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()
        text = " ".join(
            f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in record.items()
        )
        print(text, file=sys.stderr, flush=True)
        if "step" not in record:
            return
        values = {name: value for name, value in record.items() if isinstance(value, float)}
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, int(record["step"]))
        if self._wandb is not None:
            self._wandb.log(values, step=int(record["step"]))

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _drop_lines_after(path: Path, done: int) -> None:
    """Keep the lines of steps up to ``done``; a run from its start keeps none, and a line cut short by a kill goes as well."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        if done > 0 and json.loads(line)["step"] <= done:
            kept.append(line)
    aside = path.with_name(f".{path.name}.part")
    aside.write_text("".join(kept), encoding="utf-8")
    os.replace(aside, path)


def _has_tensorboard() -> bool:
    return importlib.util.find_spec("tensorboard") is not None


def _tensorboard(run: Path, done: int) -> Any:
    if not _has_tensorboard():  # an environment that was put together by hand
        print("tensorboard is not installed: the log is metrics.jsonl alone", file=sys.stderr, flush=True)
        return None
    from torch.utils.tensorboard import SummaryWriter

    # what a killed process showed of steps that are made again is taken back
    return SummaryWriter(str(run / "tensorboard"), purge_step=done + 1 if done else 0)


def check_wandb(project: str) -> None:
    """``UserError`` where a project is named and wandb is not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        fix = "pip install 'physisforcing[wandb]', or leave run.wandb out: TensorBoard has the same"
        raise UserError("run.wandb", got=project, wanted="nothing without the package wandb", fix=fix)


def _wandb(run: Path, project: str) -> Any:
    """A run of the project under the folder's name, which a continued run goes on with; None without a project."""
    if not project:
        return None
    check_wandb(project)
    import wandb

    name = f"{run.name}-{hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:8]}"
    return wandb.init(project=project, id=name, name=run.name, dir=str(run), resume="allow")


def _memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
