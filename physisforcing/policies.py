"""Which policies act, and how: their settings and names, where they come from, and what is refused before anything is loaded."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from physisforcing.core.config import build
from physisforcing.core.errors import UserError, check_at_least, unknown_name

if TYPE_CHECKING:
    from physisforcing.policy.act import ExecutionConfig

#: What stands for the planner of the same command in the place of a policy.
PLANNER = "planner"
#: How an ``optional_idm`` policy may act; every other one has the mode that it was trained in.
ACTING_MODES = ("first_frame", "idm")
#: Names that rows of other kinds have.
TAKEN = (
    "noop", "random", "retrieval", "retrieval_video", "expert", "model", "perfect", "oracle", "frozen", "noise", "other",
    "objects_erased", "recorded", "black", "mean", "all", "interpolated", "topp", "table2",
)  # fmt: skip
#: Settings that a server is started with, and that it decides.
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
    package holds it. ``seed``: of the noise, apart from the scenes' (``policy.sampling.plan_seed``). ``server``: ``auto`` (an evaluation starts one), or HOST:PORT of ``physis serve policy``; with a source beside it, its
    plans must be that source's."""

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
    seed: int = 0
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
    field of the settings}}``; none of them: ``common`` alone; an empty list: no policy, for baselines alone. ``UserError`` for none at all, unknown
    fields, names that clash, and one recipe and training seed given twice."""
    if several == [] and not common.source:
        return {}
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
    found = {str(name): _acting(str(name), given, common) for name, given in several.items()}
    _refuse_one_seed_twice(found)
    return found


def _refuse_one_seed_twice(policies: Mapping[str, ActingPolicy]) -> None:
    """``UserError`` for two policies with one recipe and training seed: recipes are compared with the seed as unit, which stands for one set of
    weights acting in one way."""
    taken: dict[tuple[str, int], str] = {}
    for name, policy in policies.items():
        if policy.recipe and policy.training_seed is not None:
            first = taken.setdefault((policy.recipe, policy.training_seed), name)
            if first != name:
                got = f"{first} and {name}, both {policy.recipe} with training seed {policy.training_seed}"
                fix = "give them different recipes, as recipe:forced_idm, or leave one out"
                raise UserError("policies", got=got, wanted="one policy a recipe and training seed", fix=fix)


def _acting(name: str, given: Any, common: PolicySettings) -> ActingPolicy:
    given = {"source": given} if isinstance(given, str) else given
    planner = isinstance(given, dict) and given.get("source") == PLANNER
    if not NAME.fullmatch(name) or name in TAKEN or (name == PLANNER and not planner):
        wanted = "lower-case letters, digits and _ that no baseline is called"
        raise UserError("policies", got=name, wanted=wanted, fix="policies={mine:FOLDER}")
    if not isinstance(given, dict) or not given.get("source"):
        fix = f"policies={{{name}:{{source:FOLDER,recipe:NAME,training_seed:0}}}}"
        raise UserError(f"policies.{name}", got=given, wanted="a source", fix=fix)
    if planner and (own := [key for key in given if key not in ("source", "recipe", "training_seed")]):
        raise _unused(f"policies.{name}.{own[0]}", given[own[0]])
    usual = dataclasses.asdict(common)
    try:
        made = build(_Entry, usual | given)
    except UserError as error:
        field = f"policies.{name}.{error.field}"
        raise UserError(field, got=error.got, wanted=error.wanted, fix=error.fix) from error
    if made.recipe and not NAME.fullmatch(made.recipe):
        fix = f"recipe:{re.sub(r'[^a-z0-9]+', '_', made.recipe.lower()).strip('_') or 'mine'}"
        raise UserError(f"policies.{name}.recipe", got=made.recipe, wanted="lower-case letters, digits and _", fix=fix)
    settings = PolicySettings(**{key: getattr(made, key) for key in usual})
    return ActingPolicy(settings=settings, recipe=made.recipe, training_seed=made.training_seed)


@dataclass(slots=True, kw_only=True)
class _Entry(PolicySettings):
    """A policy of ``policies`` as it is written."""

    recipe: str = ""
    training_seed: int | None = None


def refuse_unused(common: PolicySettings, usual: Iterable[PolicySettings]) -> None:
    """``UserError`` for a setting that is in none of ``usual`` (the defaults, a protocol's own), where the planner acts alone and reads none."""
    for name, value in dataclasses.asdict(common).items():
        if name != "source" and value not in [getattr(one, name) for one in usual]:
            raise _unused(f"policy.{name}", value)


def _unused(field: str, got: Any) -> UserError:
    fix = "leave it out; the planner's own settings are planner.execute_horizon, planner.denoising_steps, planner.device and others"
    return UserError(field, got=got, wanted="nothing for the planner", fix=fix)


def named(source: str) -> str:
    """What a source is called in tables: the function of a factory (its module, where that says more), the run of an export, the name of shipped
    weights."""
    if source == PLANNER:
        return PLANNER
    from physisforcing.worldmodel.adapters.factory import is_factory

    if is_factory(source):
        module, _, text = source.rpartition(":")
        text = module.rpartition(".")[2] if text in ("make", "build", "create") else text
    else:
        parts = [part for part in Path(source).parts if part not in ("export", "model", "/")]
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
    from physisforcing.core.message_client import parse_address
    from physisforcing.policy.act import EXECUTIONS
    from physisforcing.policy.planning import PlanningConfig

    from .model_process import meant_device
    from .planners import check_device

    check_at_least(settings, execute=1, steps=1, video_steps=1, delay=0, seed=0)
    if settings.execution not in EXECUTIONS:
        raise unknown_name("policy.execution", settings.execution, EXECUTIONS, see="docs/eval_policy.md")
    if settings.mode and settings.mode not in ACTING_MODES:
        raise unknown_name("policy.mode", settings.mode, ACTING_MODES, see="docs/eval_policy.md")
    if settings.server not in ("", "auto"):
        parse_address(settings.server, field="policy.server")
    check_device(settings.device, workers, field="policy.device")
    PlanningConfig(device=meant_device(settings.device), compute=settings.compute)


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
    execution(settings).check(config.chunk)
    ways = WAYS[config.mode]
    if settings.mode and settings.mode not in ways:
        wanted = f"{' or '.join(ways)}, as it was trained"
        raise UserError("policy.mode", got=settings.mode, wanted=wanted, fix="leave policy.mode out")
    return settings.mode or ways[0]


def execution(settings: PolicySettings) -> ExecutionConfig:
    """How the rows of its plans are executed."""
    from physisforcing.policy.act import ExecutionConfig

    names = ("execute", "execution", "delay", "seed")
    return ExecutionConfig(**{name: getattr(settings, name) for name in names})


def refuse_served(given: Mapping[str, Any]) -> None:
    """``UserError`` for a setting beside a server that has no source beside it: what the server decides could not be compared with it."""
    for name in SERVED:
        if name in given:
            fix = f"leave policy.{name} out, and say it to physis serve policy"
            raise UserError(f"policy.{name}", got=given[name], wanted="nothing: the server decides it", fix=fix)


def require_devices(policies: Iterable[ActingPolicy], planner_device: str, output: str) -> None:
    """``UserError`` for a device that is not there. Results that ``output`` holds already can be reported without it, and a policy that somebody
    else serves needs none here."""
    from .planners import require_device

    for policy in policies:
        if policy.is_planner:
            require_device(planner_device, output)
        elif policy.settings.server in ("", "auto"):
            require_device(policy.settings.device, output, field="policy.device")
