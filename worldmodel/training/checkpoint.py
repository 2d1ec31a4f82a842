"""Atomic checkpoints: ``step-000500/{model/, training/, COMPLETE}``, safetensors and JSON only.

A checkpoint is written under a hidden name beside its place, every file and folder is synced, ``COMPLETE`` (sizes and SHA-256 of
all files) is written last, and the folder is renamed. ``last`` is a symbolic link that is swapped atomically. Whatever kills the
process, ``last`` or the newest folder with a ``COMPLETE`` that matches is a good checkpoint.
"""

from __future__ import annotations

import dataclasses
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

from ..storage import as_dtype
from .optim import WeightAverage

COMPLETE = "COMPLETE"
#: Settings that may differ when a run continues: they say where it runs and what it reports, not what it computes.
FREE_SETTINGS = (
    frozenset(f"run.{name}" for name in ("out", "resume", "device", "log_every", "save_every", "eval_every"))
    | frozenset(f"fit.{name}" for name in ("log_every", "save_every"))
    | frozenset(f"data.{name}" for name in ("workers", "text_cache", "targets_cache"))
    | frozenset(
        f"teacher.{kind}.{name}" for kind in ("tracker", "depth", "encoder") for name in ("path", "source", "device")
    )
)


def save_checkpoint(
    run: Path,
    step: int,
    write_model: Callable[[Path], None],
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
) -> Path:
    """Write ``run/step-000500`` (the step in six digits). ``write_model(folder)`` fills ``model/``; each entry of ``tensors``
    becomes ``training/<name>.safetensors`` bit-exactly; ``state`` becomes ``training/state.json`` with the step in it.

    Raises ``FloatingPointError`` and writes nothing where a tensor is not finite: a run must not go on from there.
    """
    from safetensors.torch import save_file

    for file, values in tensors.items():
        for entry, value in values.items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise FloatingPointError(f"step {step}: {file}/{entry} is not finite; the checkpoint is not written")
    run.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(run)
    aside = run / f".writing-{uuid.uuid4().hex}"
    (aside / "training").mkdir(parents=True)
    write_model(aside / "model")
    for name, group in tensors.items():
        save_file(as_dtype(group, None), aside / "training" / f"{name}.safetensors")
    (aside / "training" / "state.json").write_text(json.dumps({"step": step, **state}, indent=2) + "\n")
    files = sorted(path for path in aside.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    listing = {str(path.relative_to(aside)): [path.stat().st_size, _sha256(path)] for path in files}
    (aside / COMPLETE).write_text(json.dumps(listing, indent=1) + "\n")
    _sync(aside / COMPLETE)
    for folder in [path for path in aside.rglob("*") if path.is_dir()] + [aside]:
        _sync(folder)
    target = run / f"step-{step:06d}"
    if target.exists():  # the same step again, after a resume from an older checkpoint
        os.rename(target, run / f".writing-old-{uuid.uuid4().hex}")
    os.rename(aside, target)
    _sync(run)
    link = run / f".writing-link-{uuid.uuid4().hex}"
    link.symlink_to(target.name)
    os.replace(link, run / "last")
    _sync(run)
    _remove_leftovers(run)
    return target


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
    """-> (tensors by file name, state) of a checkpoint. Raises ``UserError`` for an incomplete one."""
    from safetensors.torch import load_file

    if not is_complete(checkpoint):
        raise UserError(
            "checkpoint", got=str(checkpoint), wanted="a complete checkpoint", fix="resume from the run folder's last"
        )
    folder = checkpoint / "training"
    tensors = {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    return tensors, json.loads((folder / "state.json").read_text())


def binding_settings(config: Any) -> dict[str, Any]:
    """The settings that a continued run must share with its checkpoints: dotted name -> plain value of the config dataclass."""
    flat: dict[str, Any] = {}

    def walk(values: Mapping[str, Any], prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{name}.")
            elif prefix + name not in FREE_SETTINGS:
                flat[prefix + name] = value

    walk(
        json.loads(json.dumps(dataclasses.asdict(config))), ""
    )  # through JSON: tuples become lists, as in the checkpoint
    return flat


def check_settings(checkpoint: Path, config: Any) -> None:
    """Raise ``UserError`` naming the first setting of ``config`` that is not that of the run which wrote ``checkpoint``. A setting that
    did not exist then has its default, which must mean what happened without it."""
    stored = json.loads((checkpoint / "training" / "state.json").read_text()).get("settings", {})
    now = binding_settings(config)
    stored = {name: value for name, value in _defaults(config).items() if name in now} | stored
    for name in sorted({*stored, *now}):
        if name not in stored or name not in now or stored[name] != now[name]:
            before = stored.get(name, "nothing")
            raise UserError(
                name,
                got=now.get(name, "nothing"),
                wanted=f"{before!r}, with which {checkpoint} was trained",
                fix=f"continue with {name}={before}, or start a new run in another run.out",
            )


def _defaults(config: Any) -> dict[str, Any]:
    """The settings of a config dataclass as it is without any choice; empty where it cannot be made so."""
    try:
        return binding_settings(type(config)())
    except TypeError:
        return {}


def training_tensors(
    module: nn.Module, average: WeightAverage, optimizer: torch.optim.Optimizer, device: torch.device
) -> dict[str, Mapping[str, Tensor]]:
    """Everything that ``restore_training`` needs, by file name."""
    return {
        "weights": module.state_dict(),
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
) -> int:
    """Continue from a checkpoint, bit-exactly; returns the number of updates it holds. RNG states come last."""
    tensors, state = load_training(checkpoint)
    module.load_state_dict(tensors["weights"])
    average.restore(tensors["average"])
    restore_optimizer(optimizer, dict(module.named_parameters()), tensors["optimizer"])
    restore_rng(tensors["rng"], device)
    return int(state["step"])


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimiser's per-parameter tensors as ``<parameter>/<entry>``."""
    flat = {}
    for name, parameter in names.items():
        for entry, value in optimizer.state.get(parameter, {}).items():  # a frozen parameter has none
            flat[f"{name}/{entry}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return flat


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor], flat: Mapping[str, Tensor]
) -> None:
    """Inverse of ``optimizer_tensors``; every parameter's state gets the parameter's device and memory layout."""
    for key, value in flat.items():
        name, entry = key.rsplit("/", 1)
        parameter = names[name]
        if entry == "step":
            fused = bool(optimizer.param_groups[0].get("fused"))
            optimizer.state[parameter][entry] = value.to(parameter.device if fused else "cpu")
        else:
            optimizer.state[parameter][entry] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


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
