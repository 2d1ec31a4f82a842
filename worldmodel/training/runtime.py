"""Small things every training needs: device, precision, provenance, the split."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import torch

from physisforcing.core.errors import UserError
from physisforcing.core.provenance import git_commit

from .checkpoint import check_settings, latest_checkpoint, refuse_used_folder
from .config import RunConfig, TrainVaeConfig, TrainWorldModelConfig
from .finite import check_policy
from .processes import Processes, pick_device

T = TypeVar("T")


def autocast(run: RunConfig, device: torch.device) -> AbstractContextManager:
    """The precision context of forward passes."""
    if run.precision not in ("auto", "bf16", "fp32"):
        raise UserError("run.precision", got=run.precision, wanted="auto, bf16 or fp32", fix="run.precision=auto")
    if run.precision == "bf16" or (run.precision == "auto" and device.type == "cuda"):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def compiles(run: RunConfig) -> bool:
    """Whether the network is to be compiled."""
    if run.compile not in ("none", "blocks"):
        raise UserError("run.compile", got=run.compile, wanted="none or blocks", fix="run.compile=blocks")
    return run.compile == "blocks"


def sharded(config: TrainWorldModelConfig, processes: Processes) -> bool:
    """Whether the transformer is spread over the processes. ``UserError`` for an unknown word."""
    kind = config.run.sharding
    if kind not in ("auto", "weights", "none"):
        raise UserError("run.sharding", got=kind, wanted="auto, weights or none", fix="run.sharding=auto")
    return processes.many and (kind == "weights" or (kind == "auto" and config.lora.rank == 0))


def gathers_once(run: RunConfig) -> bool:
    """Whether spread weights are put together once an update. ``UserError`` for an unknown word."""
    if run.gather not in ("part", "update"):
        raise UserError("run.gather", got=run.gather, wanted="part or update", fix="run.gather=part")
    return run.gather == "update"


@contextlib.contextmanager
def kernels_given_back() -> Iterator[None]:
    """After it the process computes with the kernels that it had before, whatever was chosen inside; also a decorator."""
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    precision, benchmark = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    attention = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        yield
    finally:
        if torch.are_deterministic_algorithms_enabled() != algorithms[0]:
            torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.benchmark = benchmark
        torch.backends.cuda.enable_cudnn_sdp(attention)


def choose_kernels(device: torch.device, deterministic: bool) -> None:
    """The fastest kernels, or with ``deterministic`` those that give the same bits every time; a process that has those keeps them."""
    if deterministic:
        torch.use_deterministic_algorithms(True)
    if device.type != "cuda":
        return
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        # its backward pass adds up in an order of its own; that of the flash kernel can be told not to
        torch.backends.cuda.enable_cudnn_sdp(False)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when it starts


def begin_run(
    config: TrainVaeConfig | TrainWorldModelConfig, processes: Processes | None = None
) -> tuple[Path, torch.device, Path | None]:
    """-> (run folder, device, checkpoint to continue from or None); writes the config and the provenance into the folder. Of several
    ``processes`` the first looks for the checkpoint and writes.

    Raises ``UserError`` for an unknown precision or way to compile, and where the folder holds checkpoints and ``run.resume`` is
    not set, or those of a run with other settings.
    """
    run = Path(config.run.out)
    together = processes if processes is not None else Processes(device=pick_device(config.run.device))
    device = together.device
    choose_kernels(device, config.run.deterministic)
    compiles(config.run)  # refuses a wrong name before any work
    autocast(config.run, device)
    check_policy(config.run.nonfinite)
    if not config.run.resume:
        refuse_used_folder(run)
    found = latest_checkpoint(run) if config.run.resume and together.first else None
    told = together.total([float(found.name.removeprefix("step-")) + 1.0 if found is not None else 0.0])[0]
    if told:
        found = run / f"step-{int(told) - 1:06d}"
        check_settings(found, config)
    if together.first:
        write_provenance(run, config)
    together.barrier()
    return run, device, found


def write_provenance(run: Path, config: object) -> None:
    """``config.yaml`` (resolved) and ``provenance.json`` (command, commit, versions, hardware) in the run folder."""
    from physisforcing.core.config import resolved_yaml

    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(resolved_yaml(config))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    record = {
        "command": sys.argv,
        "commit": git_commit(Path(__file__).resolve().parent),
        "hardware": {"machine": platform.machine(), "cpus": torch.get_num_threads(), "gpu": gpu},
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers", "numpy")}
        | {"python": platform.python_version()},
    }
    (run / "provenance.json").write_text(json.dumps(record, indent=2) + "\n")


def split_heldout(items: Sequence[T], heldout: int) -> tuple[list[T], list[T]]:
    """-> (training items, ``heldout`` held-out items spread evenly). Raises ``UserError`` for less than 0, or when no training
    item would be left."""
    if not 0 <= heldout < len(items):
        raise UserError(
            "data.heldout",
            got=heldout,
            wanted=f"0 or more, and fewer than the {len(items)} episodes",
            fix="collect more, or data.heldout=1",
        )
    places = {int((place + 0.5) * len(items) / heldout) for place in range(heldout)}
    assert len(places) == heldout
    return [x for i, x in enumerate(items) if i not in places], [x for i, x in enumerate(items) if i in places]
