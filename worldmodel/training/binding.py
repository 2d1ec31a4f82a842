"""The settings that a continued run must share with its checkpoints."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from physisforcing.core.errors import UserError

from .config import TrainWorldModelConfig

#: Settings that may differ when a run continues: they say where it runs and what it reports, not what it computes.
FREE_SETTINGS = (
    frozenset(
        f"run.{name}"
        for name in (
            "out",
            "resume",
            "device",
            "nonfinite",
            "checkpointing",
            "sharding",
            "gather",
            "sequence",
            "wandb",
            "log_every",
            "save_every",
            "keep",
            "eval_every",
        )
    )
    | frozenset(f"fit.{name}" for name in ("log_every", "save_every"))
    | frozenset(f"data.{name}" for name in ("workers", "text_cache", "targets_cache", "latents"))
    | frozenset(("model", "large.videos", "large.video_steps", "large.export"))
    | frozenset(
        f"teacher.{kind}.{name}" for kind in ("tracker", "depth", "encoder") for name in ("path", "source", "device")
    )
)


#: Beginnings of more of them with a large backbone: its windows and targets have a fingerprint, which is compared instead.
FREE_WITH_MODEL = ("data.roots", "data.live.", "teacher.")


def _free(name: str, config: Any) -> bool:
    if name in FREE_SETTINGS:
        return True
    large = isinstance(config, TrainWorldModelConfig) and bool(config.model)
    return large and name.startswith(FREE_WITH_MODEL)


def binding_settings(config: Any) -> dict[str, Any]:
    """The settings that a continued run must share with its checkpoints: dotted name -> plain value of the config dataclass."""
    flat: dict[str, Any] = {}

    def walk(values: Mapping[str, Any], prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{name}.")
            elif not _free(prefix + name, config):
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
    stored = {
        name: value for name, value in stored.items() if not _free(name, config)
    }  # what is free now may once have bound
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
