"""A policy of the settings as something that acts: loaded here, in a server, or anyone's; and what identifies its results.

This joins rooms: the policy's model here or in a server, and anyone's policy behind the same protocol.
"""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from physisforcing.core.errors import UserError
from physisforcing.core.results import config_hash

from .model_process import ServerAddress, about_server, computed_by, given_server, meant_device, served_at
from .policies import SERVED, PolicySettings, acting_mode, execution, policy_folder, refuse_served

if TYPE_CHECKING:
    from physisforcing.core.protocols import Policy
    from physisforcing.core.types import ActionSpec
    from physisforcing.policy.planning import ChunkModel
    from physisforcing.policy.remote import SocketChunks


@dataclass(slots=True, kw_only=True, frozen=True)
class PolicyIdentity:
    """``fingerprint``: of weights and settings, that of a result's key. ``plans``: of the plans of a policy's folder, as a server of it has to say
    it (``open_policy``). ``cameras``: whose pictures the policy wants. ``tasks``: what it was trained on, as far as it says."""

    fingerprint: str
    plans: str = ""
    cameras: tuple[str, ...] = ("head",)
    tasks: tuple[str, ...] = ()


def identify_policy(settings: PolicySettings, server: ServerAddress | None = None, threads: int = 0) -> PolicyIdentity:
    """What a policy is, without its weights in memory. A factory is called once: its policy says what it is, and has ``cameras`` where it
    wants more than the head's pictures. ``threads``: of this evaluation; a server may have others."""
    folder = policy_folder(settings.source)
    if folder is None:
        policy = open_policy(settings)
        try:
            given = _given(settings) | {"device": meant_device(settings.device)}
            if not settings.seed:
                del given["seed"]  # as in ``acting`` below: keys are those from before there was one
            fingerprint = f"{policy.fingerprint}-{config_hash(given)[:8]}"
            return PolicyIdentity(fingerprint=fingerprint, cameras=tuple(getattr(policy, "cameras", ("head",))))
        finally:
            close_policy(policy)
    from physisforcing.policy.checkpoint import read_settings
    from physisforcing.worldmodel.data.canvas import canvas_layout

    _, info, _ = read_settings(folder)
    acting: dict[str, Any] = {name: getattr(settings, name) for name in ("execute", "execution")}
    if settings.execution == "async":
        acting["delay"] = settings.delay
    if settings.seed:
        acting["seed"] = settings.seed
    plans = _plans(settings, folder)
    acting |= {"plans": plans} | _computed(settings, server, threads)
    cameras = canvas_layout(info.canvas).names
    return PolicyIdentity(fingerprint=f"policy-{config_hash(acting)}", plans=plans, cameras=cameras, tasks=info.tasks)


def _plans(settings: PolicySettings, folder: Path) -> str:
    """Fingerprint of the weights and of how plans are sampled, as the model itself gives it once it is loaded."""
    from physisforcing.policy.checkpoint import policy_fingerprint, read_settings
    from physisforcing.policy.planning import plans_fingerprint
    from physisforcing.policy.sampling import SamplingConfig

    config, _, _ = read_settings(folder)
    sampling = SamplingConfig(
        steps=settings.steps, video_steps=settings.video_steps, mode=acting_mode(settings, folder)
    )
    return plans_fingerprint(config.mode, sampling, policy_fingerprint(folder))


def _computed(settings: PolicySettings, server: ServerAddress | None, threads: int) -> dict[str, str]:
    """How plans are computed, as far as it may change them: the device; ``compute`` where it is not what that device usually does; ``served``
    where a server computes otherwise than this process would on a CPU, one by one."""
    from physisforcing.policy.planning import PlanningConfig
    from physisforcing.policy.remote import SocketChunks

    found = {"device": meant_device(settings.device)}
    about = about_server(server, SocketChunks) if server is not None and settings.server != "auto" else None
    if about is None:
        place, kind = found["device"], PlanningConfig(device=found["device"], compute=settings.compute).kind
    else:  # a server decides
        place, kind = str(about.get("device")), str(about.get("compute"))
    if kind != PlanningConfig(device=place).kind:
        found["compute"] = kind
    if settings.server and (served := computed_by(about, settings.device, threads)):
        found["served"] = served
    return found


# --------------------------------------------------------------------------------------------------------------- acting


def open_policy(
    settings: PolicySettings,
    server: ServerAddress | None = None,
    action_spec: ActionSpec | None = None,
    *,
    plans: str = "",
) -> Policy:
    """The policy of the settings: loaded here, or the one that ``server`` holds (None: at the settings' HOST:PORT, where they have one).

    A server must hold the policy of the source; without a source its own is taken. ``action_spec``: limits that targets are clipped to.
    ``plans``: what the server must say of its plans, where that is known (``PolicyIdentity``); else the source's weights are read for it.
    ``UserError`` for neither source nor server, for another policy there, and for settings that only the server decides.
    """
    from physisforcing.policy.act import WorldActionPolicy

    if server is None and settings.server:
        server = _address(settings.server)
    if not settings.source and server is None:
        fix = "policy.source=runs/policy/export, or policy.server=127.0.0.1:7100"
        raise UserError("policy", got="", wanted="a source or a server", fix=fix)
    folder = policy_folder(settings.source) if settings.source else None
    if settings.source and folder is None:
        return _made(settings)
    chunks: Any  # a ChunkSource
    if server is not None:
        chunks = _served(settings, folder, server, plans)
    else:
        assert folder is not None
        chunks = _loaded(settings, folder)
    return WorldActionPolicy(chunks, execution(settings), action_spec=action_spec)


def _address(server: str) -> ServerAddress:
    if server == "auto":
        fix = "start one with physis serve policy and give its HOST:PORT"
        raise UserError("policy.server", got="auto", wanted="HOST:PORT, or nothing", fix=fix)
    return given_server(server)


def _made(settings: PolicySettings) -> Policy:
    """Of a Python factory, which is given the settings."""
    from .deploy import make_policy

    return make_policy({"physis_policy": settings.source, "policy": _given(settings)}, field="policy")


def _given(settings: PolicySettings) -> dict[str, Any]:
    """What a Python factory is given: all of it may change what its policy does."""
    return {name: value for name, value in dataclasses.asdict(settings).items() if name not in ("source", "server")}


def _loaded(settings: PolicySettings, folder: Path) -> ChunkModel:
    from physisforcing.planner.train import choose_device
    from physisforcing.policy.planning import PlanningConfig, load_chunk_model

    own = {name: getattr(settings, name) for name in ("steps", "video_steps", "compute", "autoencoder")}
    device = choose_device(settings.device, field="policy.device")
    return load_chunk_model(folder, PlanningConfig(device=device, mode=acting_mode(settings, folder), **own))


def _served(settings: PolicySettings, folder: Path | None, server: ServerAddress, plans: str) -> SocketChunks:
    """The plans of a server, which must be those of ``folder`` (None: whatever it has), as ``plans`` says them (empty: read them)."""
    from physisforcing.policy.remote import SocketChunks

    if folder is None:
        values, usual = dataclasses.asdict(settings), dataclasses.asdict(PolicySettings())
        refuse_served({name: value for name, value in values.items() if value != usual[name]})
    source = SocketChunks(server.address, token=server.token, connect_s=server.connect_s)
    wanted = "" if folder is None else plans or _plans(settings, folder)
    if folder is not None and source.spec.fingerprint != wanted:
        source.close()
        fix = "start the server with the weights, steps and mode that this evaluation names, or policy.server=auto"
        got = f"plans {source.spec.fingerprint} at {server.address}"
        raise UserError("policy.server", got=got, wanted=f"plans {wanted}", fix=fix)
    return source


def policy_server(
    settings: PolicySettings, *, threads: int, workers: int
) -> contextlib.AbstractContextManager[ServerAddress | None]:
    """Where a policy is served while an evaluation runs: None where every process loads its own."""

    def told() -> dict[str, Any]:
        own = {name: getattr(settings, name) for name in SERVED}
        return {
            "policy": str(policy_folder(settings.source)),
            **own,
            "threads": threads,
            "clients": max(64, workers + 1),
        }

    return served_at(settings.server, told, module="physisforcing.serve_policy", what="the policy server")


def close_policy(policy: Policy) -> None:
    """Give back what a policy holds, where it has something to give back: for one of ours also the connection to its server."""
    from physisforcing.policy.act import WorldActionPolicy

    held: list[Any] = [policy, policy.source] if isinstance(policy, WorldActionPolicy) else [policy]
    for one in held:
        close = getattr(one, "close", None)
        if close is not None:
            close()
