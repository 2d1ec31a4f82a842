"""From settings to a policy that acts: a policy's folder, shipped weights, a Python factory; and what identifies its results.

This joins rooms: the policy's model here or in a server, and anyone's policy behind the same protocol.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from physisforcing.core.errors import UserError, check_at_least, unknown_name
from physisforcing.core.results import config_hash

if TYPE_CHECKING:
    from physisforcing.core.protocols import Policy
    from physisforcing.core.types import ActionSpec
    from physisforcing.policy.act import ExecutionConfig

    from .model_process import ServerAddress

#: What stands for the planner of the same command in the place of a policy.
PLANNER = "planner"
#: How an ``optional_idm`` policy may act; every other one has the mode that it was trained in.
ACTING_MODES = ("first_frame", "idm")
#: Names that rows of other kinds have.
TAKEN = (
    "noop", "random", "retrieval", "retrieval_video", "expert", "model", "perfect", "oracle", "frozen", "noise", "other",
    "objects_erased", "recorded", "black", "mean", "all", "interpolated", "topp", "table2",
)  # fmt: skip
#: Plans that a server on a GPU computes together, always exactly so many; on a CPU one by one.
GPU_BATCH = 16
#: Settings that a server is started with.
SERVED = ("steps", "video_steps", "mode", "device", "compute", "autoencoder")
NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
SOURCES = "a policy's folder, the name of shipped weights, module:function, or planner"


@dataclass(slots=True, kw_only=True)
class PolicySettings:
    """Which policy acts, and how. ``source``: see ``SOURCES``. ``execute``: rows of a chunk that are executed before the next plan. ``steps``:
    denoising steps of the actions. ``mode``: one of ``ACTING_MODES`` for an ``optional_idm`` policy, empty: ``idm``. ``execution``:
    ``receding`` waits for every plan; ``async`` begins the next one before the last is executed, and drops its rows for the ``delay`` control
    steps that pass meanwhile (0: as long as it takes by the clock). ``video_steps``: denoising steps of the video, where a mode imagines it.
    ``compute``: how on a GPU (``policy.planning``). ``autoencoder``: its folder, or the pipeline's, where neither the policy's folder nor the
    package holds it. ``server``: ``auto``, or HOST:PORT of ``physis serve policy``."""

    source: str = ""
    execute: int = 12
    steps: int = 10
    video_steps: int = 10
    mode: str = ""
    execution: str = "receding"
    delay: int = 4
    device: str = "cpu"
    compute: str = "auto"
    autoencoder: str = ""
    server: str = ""


@dataclass(slots=True, kw_only=True)
class ActingPolicy:
    """A policy of a table. ``recipe``: what it was trained with, ``training_seed``: with which seed; both as the user says."""

    settings: PolicySettings = field(default_factory=PolicySettings)
    recipe: str = ""
    training_seed: int | None = None

    @property
    def is_planner(self) -> bool:
        return self.settings.source == PLANNER


def acting_policies(common: PolicySettings, several: Any) -> dict[str, ActingPolicy]:
    """Name -> policy. ``several``: what ``policies`` may be, a list of sources or ``{name: source or {source, recipe, training_seed, and any
    field of the settings}}``; none of them: ``common`` alone. ``UserError`` for none at all, unknown fields and names that clash."""
    if not several:
        if not common.source:
            raise UserError("policy", got="", wanted=SOURCES, fix="policy=runs/policy/export")
        return {named(common.source): ActingPolicy(settings=common)}
    if common.source:
        fix = "write all of them in policies, or one in policy"
        raise UserError("policy", got=common.source, wanted="nothing beside policies", fix=fix)
    if isinstance(several, list):
        sources = [source for source in several if isinstance(source, str)]
        if len(sources) < len(several):
            fix = "policies={mine:{source:FOLDER,mode:idm}}"
            raise UserError("policies", got=several, wanted="sources in a list, or a mapping by name", fix=fix)
        several = dict(zip(map(named, sources), sources, strict=True))
        if len(several) < len(sources):
            fix = "name them apart: policies={first:FOLDER,second:FOLDER}"
            raise UserError("policies", got=", ".join(map(named, sources)), wanted="different names", fix=fix)
    if not isinstance(several, dict):
        raise UserError("policies", got=several, wanted="a list or a mapping", fix="policies=[FOLDER,FOLDER]")
    return {name: _acting(str(name), given, common) for name, given in several.items()}


def _acting(name: str, given: Any, common: PolicySettings) -> ActingPolicy:
    given = {"source": given} if isinstance(given, str) else given
    planner = isinstance(given, dict) and given.get("source") == PLANNER
    if not NAME.fullmatch(name) or name in TAKEN or (name == PLANNER and not planner):
        wanted = "lower-case letters, digits and _ that no baseline is called"
        raise UserError("policies", got=name, wanted=wanted, fix="policies={mine:FOLDER}")
    if not isinstance(given, dict) or not given.get("source"):
        fix = f"policies={{{name}:{{source:FOLDER,recipe:NAME,training_seed:0}}}}"
        raise UserError(f"policies.{name}", got=given, wanted="a source", fix=fix)
    known = [one.name for one in dataclasses.fields(PolicySettings)]
    own = {key: value for key, value in given.items() if key in known}
    for key in given:
        if key not in (*known, "recipe", "training_seed"):
            raise unknown_name(
                f"policies.{name}", key, (*known, "recipe", "training_seed"), see="physis eval policy --help"
            )
    seed = given.get("training_seed")
    if seed is not None and not isinstance(seed, int):
        raise UserError(f"policies.{name}.training_seed", got=seed, wanted="a whole number", fix="training_seed:0")
    return ActingPolicy(
        settings=dataclasses.replace(common, **own), recipe=str(given.get("recipe") or ""), training_seed=seed
    )


def named(source: str) -> str:
    """What a source is called in tables: the function of a factory, the run of an export, the name of shipped weights."""
    if source == PLANNER:
        return PLANNER
    from physisforcing.worldmodel.adapters.factory import is_factory

    if is_factory(source):
        text = source.rpartition(":")[2]
    else:
        parts = [part for part in Path(source).parts if part not in ("export", "model", "policy", "/")]
        text = parts[-1] if parts else Path(source).name
    text = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:40]
    text = text if text[:1].isalpha() else f"policy_{text}"
    return f"{text}_policy" if text in (*TAKEN, PLANNER) else text


# ---------------------------------------------------------------------------------------------------------------- checks


def shipped_policies() -> dict[str, Path]:
    """Name -> folder of the policies that come with the package."""
    from physisforcing.core.paths import weights_root

    return {path.name: path for path in sorted(weights_root().glob("policy_*")) if (path / "policy.json").is_file()}


def policy_folder(source: str) -> Path | None:
    """The folder with the weights; None for a Python factory. ``UserError`` for what is neither, naming what ships."""
    from physisforcing.worldmodel.adapters.factory import is_factory

    if (Path(source) / "policy.json").is_file():
        return Path(source)
    shipped = shipped_policies()
    if source in shipped:
        return shipped[source]
    if is_factory(source):
        return None
    names = ", ".join(shipped) or "none in this version"
    fix = "give the export of physis train policy"
    if Path(source).exists():
        fix = f"{fix}; {source} holds no policy.json"
    raise UserError("policy", got=source, wanted=f"{SOURCES} (shipped: {names})", fix=fix)


def check_policy(settings: PolicySettings, workers: int = 0) -> None:
    """``UserError`` for settings that no policy can have; nothing on disk is looked at."""
    from physisforcing.planner.model_client import parse_address
    from physisforcing.planner.train import check_device_name
    from physisforcing.policy.act import EXECUTIONS

    check_at_least(settings, execute=1, steps=1, video_steps=1, delay=0)
    if settings.execution not in EXECUTIONS:
        raise unknown_name("policy.execution", settings.execution, EXECUTIONS, see="docs/eval_policy.md")
    if settings.mode and settings.mode not in ACTING_MODES:
        raise unknown_name("policy.mode", settings.mode, ACTING_MODES, see="docs/eval_policy.md")
    if settings.server not in ("", "auto"):
        parse_address(settings.server, field="policy.server")
    check_device_name(settings.device, field="policy.device")
    if workers and ":" in settings.device:
        fix = "policy.device=cuda; CUDA_VISIBLE_DEVICES chooses among GPUs, and processes share those in turn"
        raise UserError("policy.device", got=settings.device, wanted="cuda or cpu with workers=", fix=fix)


def check_source(settings: PolicySettings) -> None:
    """``UserError`` for a policy that is not there, and for settings that this one cannot have; of weights only the settings file is read."""
    if settings.source == PLANNER:
        return
    folder = policy_folder(settings.source)
    if folder is None:
        if settings.server or settings.mode:
            name = "server" if settings.server else "mode"
            wanted = f"nothing: {settings.source} is no policy's folder"
            raise UserError(
                f"policy.{name}", got=getattr(settings, name), wanted=wanted, fix=f"leave policy.{name} out"
            )
        return
    acting_mode(settings, folder)


def acting_mode(settings: PolicySettings, folder: Path) -> str:
    """How the policy of this folder acts. ``UserError`` for a mode that it was not trained in, and for rows that its chunk does not have."""
    from physisforcing.policy.checkpoint import read_settings
    from physisforcing.policy.sampling import WAYS

    config, _, _ = read_settings(folder)
    _execution(settings).check(config.chunk)
    ways = WAYS[config.mode]
    if settings.mode and settings.mode not in ways:
        wanted = f"{' or '.join(ways)}, as it was trained"
        raise UserError("policy.mode", got=settings.mode, wanted=wanted, fix="leave policy.mode out")
    return settings.mode or ways[0]


def require_devices(policies: Iterable[ActingPolicy], output: str) -> None:
    """``UserError`` for a device that is not there. Results that ``output`` holds already can be reported without it."""
    from physisforcing.planner.train import choose_device

    results = Path(output) / "results.jsonl"
    if not results.exists() or not results.stat().st_size:
        for policy in policies:
            choose_device(policy.settings.device, field="policy.device")


# ------------------------------------------------------------------------------------------------------------- identity


@dataclass(slots=True, kw_only=True, frozen=True)
class PolicyIdentity:
    """``fingerprint``: of weights and settings, that of a result's key. ``cameras``: whose pictures the policy wants. ``tasks``: what it was
    trained on, as far as it says."""

    fingerprint: str
    cameras: tuple[str, ...] = ("head",)
    tasks: tuple[str, ...] = ()


def identify_policy(settings: PolicySettings, server: ServerAddress | None = None, threads: int = 0) -> PolicyIdentity:
    """What a policy is, without its weights in memory. A factory is called once: its policy says what it is, and has ``cameras`` where it
    wants more than the head's pictures. ``threads``: of this evaluation; a server may have others."""
    folder = policy_folder(settings.source)
    acting: dict[str, Any] = {name: getattr(settings, name) for name in ("execute", "execution", "device")}
    if settings.execution == "async":
        acting["delay"] = settings.delay
    if folder is None:
        policy = open_policy(settings)
        try:
            fingerprint = f"{policy.fingerprint}-{config_hash(acting | {'steps': settings.steps})[:8]}"
            return PolicyIdentity(fingerprint=fingerprint, cameras=tuple(getattr(policy, "cameras", ("head",))))
        finally:
            close_policy(policy)
    from physisforcing.policy.checkpoint import read_settings
    from physisforcing.worldmodel.data.canvas import canvas_layout

    _, info, _ = read_settings(folder)
    acting["plans"] = _plans(settings, folder)
    if settings.compute != "auto":
        acting["compute"] = settings.compute
    if served := _served_on(settings, server, threads):
        acting["served"] = served
    cameras = canvas_layout(info.canvas).names
    return PolicyIdentity(fingerprint=f"policy-{config_hash(acting)}", cameras=cameras, tasks=info.tasks)


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


def _served_on(settings: PolicySettings, server: ServerAddress | None, threads: int) -> str:
    """How a server computes plans where that is not how this process would; empty where it is the same: on a CPU, one by one."""
    if not settings.server:
        return ""
    if settings.server == "auto" or server is None:
        from physisforcing.planner.train import choose_device

        # A named device is taken at its word: results of a GPU can be read, and reported, where there is none.
        device = choose_device("auto") if settings.device == "auto" else settings.device
        batch, others = GPU_BATCH, threads
    else:
        from physisforcing.policy.remote import SocketChunks

        with SocketChunks(server.address, token=server.token, connect_s=server.connect_s) as chunks:
            device, batch = str(chunks.about.get("device")), int(chunks.about.get("batch") or 0)
            others = int(chunks.about.get("threads") or 0)
    if device == "cpu":
        return "" if (settings.device, threads) == ("cpu", others) else f"cpu with {others} threads"
    return f"{device.partition(':')[0]} in batches of {batch}"


# --------------------------------------------------------------------------------------------------------------- acting


def open_policy(
    settings: PolicySettings, server: ServerAddress | None = None, action_spec: ActionSpec | None = None
) -> Policy:
    """The policy of the settings, loaded here or the one that ``server`` holds. ``action_spec``: limits that its targets are clipped to."""
    folder = policy_folder(settings.source)
    if folder is None:
        from .deploy import make_policy

        given = {
            name: value for name, value in dataclasses.asdict(settings).items() if name not in ("source", "server")
        }
        return make_policy({"physis_policy": settings.source, "policy": given})
    return _open_folder(settings, folder, server, action_spec)


def _open_folder(
    settings: PolicySettings, folder: Path, server: ServerAddress | None, action_spec: ActionSpec | None
) -> Policy:
    """A policy's folder as something that acts: its model here, or the one in ``server``, which must be the same."""
    from physisforcing.policy.act import WorldActionPolicy

    source: Any
    if server is None:
        from physisforcing.planner.train import choose_device
        from physisforcing.policy.planning import PlanningConfig, load_chunk_model

        own = {name: getattr(settings, name) for name in ("steps", "video_steps", "compute", "autoencoder")}
        device = choose_device(settings.device, field="policy.device")
        source = load_chunk_model(folder, PlanningConfig(device=device, mode=acting_mode(settings, folder), **own))
    else:
        from physisforcing.policy.remote import SocketChunks

        source = SocketChunks(server.address, token=server.token, connect_s=server.connect_s)
        if source.spec.fingerprint != (wanted := _plans(settings, folder)):
            source.close()
            fix = "start the server with the weights, steps and mode that this evaluation names, or policy.server=auto"
            got = f"plans {source.spec.fingerprint} at {server.address}"
            raise UserError("policy.server", got=got, wanted=f"plans {wanted}", fix=fix)
    return WorldActionPolicy(source, _execution(settings), action_spec=action_spec)


def _execution(settings: PolicySettings) -> ExecutionConfig:
    from physisforcing.policy.act import ExecutionConfig

    return ExecutionConfig(execute=settings.execute, execution=settings.execution, delay=settings.delay)


@contextlib.contextmanager
def policy_server(settings: PolicySettings, *, threads: int, workers: int) -> Iterator[ServerAddress | None]:
    """Where a policy is served while an evaluation runs: None where every process loads its own."""
    import os

    from physisforcing.core.connection import TOKEN_VARIABLE

    from .model_process import ModelProcess, ServerAddress

    if not settings.server or settings.source == PLANNER:
        yield None
        return
    if settings.server != "auto":
        yield ServerAddress(address=settings.server, token=os.environ.get(TOKEN_VARIABLE, ""))
        return
    process = ModelProcess(
        {
            "policy": str(policy_folder(settings.source)),
            **{name: getattr(settings, name) for name in SERVED},
            "threads": threads,
            "batch": GPU_BATCH,
            "clients": max(64, workers + 1),
        },
        module="physisforcing.serve_policy",
        what="the policy server",
    )
    try:
        yield process.address
    finally:
        process.stop()


def close_policy(policy: Policy) -> None:
    """Give back what a policy holds, where it has something to give back."""
    close = getattr(policy, "close", None)
    if close is not None:
        close()
