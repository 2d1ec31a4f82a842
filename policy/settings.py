"""A policy from one set of settings: its folder here, or a server that holds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from physisforcing.core.errors import UserError, unknown_name
from physisforcing.core.types import ActionSpec

from .act import ExecutionConfig, WorldActionPolicy
from .planning import PlanningConfig, load_chunk_model
from .remote import SocketChunks


@dataclass(slots=True, kw_only=True)
class PolicySettings:
    """``folder``: an export of ``physis train policy``; or ``server``: HOST:PORT of ``physis serve policy``, which knows its own device, steps and
    mode. The others: ``PlanningConfig`` and ``ExecutionConfig``."""

    folder: str = ""
    server: str = ""
    device: str = "cpu"
    compute: str = "auto"
    autoencoder: str = ""
    steps: int = 10
    video_steps: int = 10
    mode: str = ""
    execute: int = 12
    execution: str = "receding"
    delay: int = 4

    @classmethod
    def of(cls, values: Mapping[str, Any], *, field: str = "policy") -> PolicySettings:
        """``UserError`` with the nearest name for a setting that there is none of."""
        known = [one.name for one in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise unknown_name(field, str(name), known, see="docs/bring_your_policy.md")
        return cls(**values)


def open_policy(
    settings: PolicySettings, *, token: str = "", action_spec: ActionSpec | None = None
) -> WorldActionPolicy:
    """The policy that they name, on its device or at its server. ``UserError`` for neither and for both."""
    if bool(settings.folder) == bool(settings.server):
        got = "both" if settings.folder else "neither"
        fix = "policy.folder=runs/policy/export, or policy.server=127.0.0.1:7100"
        raise UserError("policy", got=got, wanted="a folder or a server", fix=fix)
    values = dataclasses.asdict(settings)

    def fitting(kind: type) -> Any:
        names = {one.name for one in dataclasses.fields(kind)}
        return kind(**{name: value for name, value in values.items() if name in names})

    if settings.server:
        usual = PolicySettings()
        for name in ("device", "compute", "autoencoder", "steps", "video_steps", "mode"):
            if getattr(settings, name) != getattr(usual, name):
                fix = f"leave policy.{name} out, and say it to physis serve policy"
                raise UserError(f"policy.{name}", got=values[name], wanted="nothing: the server decides it", fix=fix)
        return WorldActionPolicy(
            SocketChunks(settings.server, token=token), fitting(ExecutionConfig), action_spec=action_spec
        )
    chunks = load_chunk_model(settings.folder, fitting(PlanningConfig))
    return WorldActionPolicy(chunks, fitting(ExecutionConfig), action_spec=action_spec)
