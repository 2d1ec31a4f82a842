"""Atomic checkpoints: ``step-000500/{model/, training/, COMPLETE}``, safetensors and JSON only.

A checkpoint is written under a hidden name beside its place, every file and folder is synced, ``COMPLETE`` (sizes and SHA-256 of
all files) is written last, and the folder is renamed. ``last`` is a symbolic link that is swapped atomically. Whatever kills a
process, ``last`` or the newest folder with a ``COMPLETE`` that matches is a good checkpoint. With several processes each writes, syncs
and hashes the file of its parts, and the first does the rest once all have.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from physisforcing.core.errors import UserError

from .binding import binding_settings, check_settings
from .optim import WeightAverage, is_sharded, local
from .processes import Processes
from .tensors import read_tensors, read_whole, shard_name, stored_tensors, write_tensors

__all__ = ["binding_settings", "check_settings", "is_complete", "latest_checkpoint", "load_training", "save_checkpoint"]

COMPLETE = "COMPLETE"


def save_checkpoint(
    run: Path,
    step: int,
    write_model: Callable[[Path], None],
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    processes: Processes | None = None,
    keep: int = 0,
) -> Path:
    """Write ``run/step-000500`` (the step in six digits). ``write_model(folder)`` fills ``model/``; ``tensors`` go into ``training/``
    bit-exactly under ``<group>/<name>``; ``state`` becomes ``training/state.json`` with the step in it. Every one of ``processes`` calls
    this, and ``write_model`` in each of them. ``keep``: how many checkpoints stay, this one and the newest before it; 0: all.

    Raises ``FloatingPointError`` and writes nothing where a tensor is not finite: a run must not go on from there.
    """
    together = processes if processes is not None else Processes()
    flat = {f"{group}/{name}": value for group, values in tensors.items() for name, value in values.items()}
    bad = _not_finite(flat)
    if together.total([float(bad is not None)])[0]:
        name = bad or "a tensor of another process"
        raise FloatingPointError(f"step {step}: {name} is not finite; the checkpoint is not written")
    aside, target = run / f".writing-{step:06d}", run / f"step-{step:06d}"
    if together.first:
        _remove_leftovers(run)
        (aside / "training").mkdir(parents=True)
    together.barrier()
    write_model(aside / "model")
    write_tensors(aside / "training", flat, together)
    hashes = _hashes(aside / "training", together)
    if together.first:
        (aside / "training" / "state.json").write_text(json.dumps({"step": step, **state}, indent=2) + "\n")
        _complete(aside, hashes)
        _put(aside, target)
        if keep:
            _keep(run, step, keep)
    together.barrier()
    return target


def _not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The first tensor with a value that is not finite in the part that lies here."""
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(local(value)).all()):
            return name
    return None


def _hashes(folder: Path, processes: Processes) -> dict[str, str]:
    """SHA-256 of the file that each process wrote into ``folder``, by name; each hashes and syncs its own."""
    mine, digest = folder / shard_name(processes.rank), [0.0] * 32
    if mine.is_file():
        _sync(mine)
        digest = [float(byte) for byte in bytes.fromhex(_sha256(mine))]
    before, after = [0.0] * 32 * processes.rank, [0.0] * 32 * (processes.world - 1 - processes.rank)
    known = [int(value) for value in processes.total(before + digest + after)]
    found = {shard_name(rank): bytes(known[32 * rank : 32 * rank + 32]).hex() for rank in range(processes.world)}
    return {name: value for name, value in found.items() if (folder / name).is_file()}


def _complete(aside: Path, hashes: Mapping[str, str]) -> None:
    """Sync what lies in ``aside`` and write ``COMPLETE``. ``hashes``: of files in ``training`` that are hashed and synced already."""
    listing: dict[str, list[Any]] = {}
    for path in sorted(path for path in aside.rglob("*") if path.is_file()):
        known = hashes.get(path.name) if path.parent.name == "training" else None
        if known is None:
            _sync(path)
        listing[str(path.relative_to(aside))] = [path.stat().st_size, known or _sha256(path)]
    (aside / COMPLETE).write_text(json.dumps(listing, indent=1) + "\n")
    _sync(aside / COMPLETE)
    for folder in [path for path in aside.rglob("*") if path.is_dir()] + [aside]:
        _sync(folder)


def _put(aside: Path, target: Path) -> None:
    """Give a complete checkpoint its name and make it ``last``."""
    run = target.parent
    if target.exists():  # the same step again, after a resume from an older checkpoint
        os.rename(target, run / f".writing-old-{uuid.uuid4().hex}")
    os.rename(aside, target)
    _sync(run)
    link = run / f".writing-link-{uuid.uuid4().hex}"
    link.symlink_to(target.name)
    os.replace(link, run / "last")
    _sync(run)
    _remove_leftovers(run)


def _keep(run: Path, step: int, count: int) -> None:
    """Remove the checkpoints up to ``step`` but the newest ``count`` complete ones. Each loses its name first: one that is half removed is
    none. What only looks like one (``step-000500-best``, which somebody copied) stays."""
    found = [path for path in _checkpoints(run) if path.name[5:].isdigit() and int(path.name[5:]) <= step]
    whole = [path for path in found if (path / COMPLETE).is_file() and not path.is_symlink()]
    for path in whole[:-count]:
        os.rename(path, run / f".writing-old-{uuid.uuid4().hex}")
    _remove_leftovers(run)


def is_complete(checkpoint: Path) -> bool:
    """Whether every file that ``COMPLETE`` lists is there with its size and content."""
    try:
        listing = json.loads((checkpoint / COMPLETE).read_text())
        return all(
            (checkpoint / name).stat().st_size == size and _sha256(checkpoint / name) == digest
            for name, (size, digest) in listing.items()
        )
    except (OSError, ValueError):
        return False


def latest_checkpoint(run: Path) -> Path | None:
    """The checkpoint that a run goes on from: the one written last, or, where that is damaged, the complete one of most steps."""
    last = run / "last"
    if last.is_symlink() and is_complete(last):
        return run / last.readlink().name
    return next((path for path in reversed(_checkpoints(run)) if is_complete(path)), None)


def refuse_used_folder(run: Path) -> None:
    """Raise ``UserError`` where a new run would mix its checkpoints with those of an earlier one."""
    if found := _checkpoints(run):
        raise UserError(
            "run.out",
            got=f"{run}, which holds {found[-1].name} of an earlier run",
            wanted="a folder without checkpoints",
            fix="run.resume=true continues that run; for a new one name another run.out or delete the folder",
        )


def _checkpoints(run: Path) -> list[Path]:
    """The folders ``step-N``, complete or not, by number of steps."""
    named = [(path, path.name.removeprefix("step-")) for path in run.glob("step-*")]
    return [path for path, number in sorted(named, key=lambda item: int(item[1]) if item[1].isdigit() else -1)]


def load_training(checkpoint: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """-> (whole tensors by group, state) of a checkpoint. Raises ``UserError`` for an incomplete one."""
    _require_complete(checkpoint)
    folder = checkpoint / "training"
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in read_whole(folder).items():
        group, name = key.split("/", 1)
        groups.setdefault(group, {})[name] = value
    return groups, json.loads((folder / "state.json").read_text())


def _require_complete(checkpoint: Path) -> None:
    if not is_complete(checkpoint):
        raise UserError(
            "checkpoint", got=str(checkpoint), wanted="a complete checkpoint", fix="resume from the run folder's last"
        )


def training_tensors(
    module: nn.Module,
    average: WeightAverage,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    *,
    frozen: bool = True,
) -> dict[str, Mapping[str, Tensor]]:
    """Everything that ``restore_training`` needs, by group. ``frozen``: also the parameters that are not trained; without them the run
    continues with those that the module has."""
    return {
        "weights": _weights(module, frozen),
        "average": average.tensors(),
        "optimizer": optimizer_tensors(optimizer, dict(module.named_parameters())),
        "rng": rng_tensors(device),
    }


def restore_training(
    checkpoint: Path,
    module: nn.Module,
    average: WeightAverage,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    *,
    frozen: bool = True,
    processes: Processes | None = None,
) -> int:
    """Continue from a checkpoint, bit-exactly, also one of another number of processes; returns the number of updates it holds. RNG
    states come last. Raises ``UserError`` for an incomplete checkpoint and for tensors of another model."""
    if processes is None or processes.first:
        _require_complete(checkpoint)
    folder = checkpoint / "training"
    stored = stored_tensors(folder)
    fresh: dict[str, Mapping[str, Tensor]] = {"weights": _weights(module, frozen), "average": average.tensors()}
    into = {f"{group}/{name}": value for group, values in fresh.items() for name, value in values.items()}
    states = {name.removeprefix("optimizer/"): meta for name, meta in stored.items() if name.startswith("optimizer/")}
    prepare_optimizer(optimizer, dict(module.named_parameters()), states)
    into |= {f"optimizer/{name}": value for name, value in _entries(optimizer, module).items()}
    rng = {name: torch.empty(meta.shape, dtype=meta.dtype) for name, meta in stored.items() if name.startswith("rng/")}
    into |= rng
    for name in sorted({*into} ^ {*stored}):
        where = "the checkpoint" if name in stored else "this run"
        raise UserError("checkpoint", got=f"{name} only in {where}", wanted="the same model", fix="start another run")
    read_tensors(folder, into, processes)
    restore_rng({name.removeprefix("rng/"): value for name, value in rng.items()}, device)
    return int(json.loads((folder / "state.json").read_text())["step"])


def _weights(module: nn.Module, frozen: bool) -> dict[str, Tensor]:
    left_out = set() if frozen else {name for name, p in module.named_parameters() if not p.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name not in left_out}


def _entries(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    return optimizer_tensors(optimizer, dict(module.named_parameters()))


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimiser's per-parameter tensors as ``<parameter>/<entry>``; of 8-bit moments their codes and scales."""
    flat = {}
    for name, parameter in names.items():
        for entry, value in optimizer.state.get(parameter, {}).items():  # a frozen parameter has none
            found = value if isinstance(value, Tensor) else torch.tensor(value)
            flat |= {f"{name}/{entry}{part}": tensor for part, tensor in _plain_parts(found).items()}
    return flat


def _plain_parts(value: Tensor) -> dict[str, Tensor]:
    """Plain tensors, or sharded ones of such, that hold what ``value`` does, in its memory."""
    here = local(value)
    if not hasattr(here, "codes"):
        return {"": value}
    parts = {".codes": here.codes, ".scale": here.scale}
    if not is_sharded(value):
        return parts
    from torch.distributed.tensor import DTensor

    # every process has as many rows (``build_optimizer`` has looked), and so as many scales
    mesh, places = value.device_mesh, value.placements  # type: ignore[attr-defined]
    return {name: DTensor.from_local(part, mesh, places, run_check=False) for name, part in parts.items()}


def prepare_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor], stored: Mapping[str, Tensor]
) -> None:
    """Give the optimiser empty state for what is ``stored``; every parameter's has its device, layout and sharding."""
    fused = bool(optimizer.param_groups[0].get("fused"))
    for key, meta in stored.items():
        name, entry = key.rsplit("/", 1)
        if name not in names:
            continue
        parameter = names[name]
        entry, _, part = entry.partition(".")
        if part:
            if entry not in optimizer.state[parameter]:
                optimizer.state[parameter][entry] = optimizer._new_buffer(parameter, entry == "exp_avg")  # type: ignore[attr-defined]
        elif entry == "step":
            device = local(parameter).device if fused else "cpu"
            optimizer.state[parameter][entry] = torch.zeros(meta.shape, dtype=meta.dtype, device=device)
        else:
            optimizer.state[parameter][entry] = torch.zeros_like(parameter, dtype=meta.dtype, requires_grad=False)


def rng_tensors(device: torch.device) -> dict[str, Tensor]:
    """States of torch's global generators."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_rng(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _remove_leftovers(run: Path) -> None:
    """Half-written folders and links of killed processes (a run folder has one writer)."""
    for path in run.glob(".writing-*"):
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path)
