"""``physis eval policy``: policies in closed loop on frozen scenes, beside no-op, random, retrieval, the replayed expert and the planner."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from physisforcing.core.errors import UserError, check_at_least, unknown_name
from physisforcing.core.results import ResultKey, config_hash

from .episode_jobs import job_key
from .episode_report import RETRIEVAL_SKIPPED, print_summary, scene_notes, write_report
from .episode_settings import EpisodeSettings, as_lists
from .plan_episodes import model_fingerprint, model_parts, model_settings, settings_hash
from .plan_scenes import Scenes, plan_scenes, training_demonstrations
from .policies import PLANNER, ActingPolicy, PolicySettings, acting_policies
from .policy_episodes import EXPERT
from .policy_turns import known_servers, run_turns

if TYPE_CHECKING:
    from .model_process import ServerAddress

HELP = """usage: physis eval policy policy=NAME [field=value ...] [--json]

Closed-loop episodes of a policy (or several) on frozen scenes, beside baselines that ran in the same scenes.

settings (field=value):
  policy=NAME            the export of physis train policy, the name of shipped weights, module:factory (a Python function that is given the
                         settings and returns a policy), or planner (the planner of physis eval plan with the settings planner.*)
  policies=[A,B,planner] several, paired by scene; or with names, recipes and training seeds, and settings of their own:
                         policies={forced_0:{source:runs/f0/export,recipe:forced,training_seed:0},idm:{source:runs/i/export,mode:idm}}
                         policies=[]: the baselines alone
                         paired_seeds=true: equal training seeds of two recipes belong together
  policy.execute=12      rows of a chunk that are executed before the next plan      policy.steps=10   denoising steps of the actions
  policy.mode=           first_frame or idm, for a policy that was trained for both
  policy.execution=receding   async: a plan is begun before the last one is executed, and its first policy.delay=4 rows are dropped: the control
                         steps that it takes (0: as long as it takes by the clock; then results depend on the machine's speed)
  policy.seed=0          of the noise, apart from the scenes' seeds: other seeds show what of a result is the policy's chance
  policy.device=cpu      policy.compute=auto (eager, graph, compile, fused)   policy.autoencoder= (its folder, for large policies)
  policy.server=auto: one process holds the policy for all workers; or HOST:PORT of physis serve policy
  tasks=[click_bell] (task=NAME for one)   episodes=50   per task
  manifest=auto          frozen scenes, as in physis eval plan; or a folder of manifests, one <task>.json each
  baselines=[noop,random,retrieval,expert]   retrieval needs train_demos=FOLDER (training seeds); expert: the scripted expert's targets of
                         the same scene, replayed
  output=PATH            the same command again continues; results.jsonl, summary.md, summary.json, videos/, measurements.json
  control=interpolated   or topp     max_steps=null (null: the task's own limit)
  workers=0 (processes; 0: this one)   threads=2 (part of the result's key)   videos=3   retry_errors=false
  protocol=table2        the paper's six tasks, 200 frozen scenes each, control=topp, 24 rows of a chunk executed, and the mean over tasks
                         beside the published rows (docs/eval_policy.md); other settings given with it win

examples:
  physis eval policy policy=runs/policy/export tasks=[click_bell] train_demos=runs/bell output=runs/policy_eval
  physis eval policy policies=[runs/policy/export,planner] policy.server=auto policy.device=cuda workers=8 output=runs/table
  physis eval policy protocol=table2 policy=runs/policy/export output=runs/table2
  physis eval policy protocol=table2 policy=runs/policy/export control=interpolated output=runs/table2_interpolated"""

BASELINES = ("noop", "random", "retrieval", EXPERT)


@dataclass(slots=True, kw_only=True)
class EvalPolicyConfig(EpisodeSettings):
    """Settings of ``physis eval policy`` (see ``HELP``)."""

    policy: PolicySettings = field(default_factory=PolicySettings)
    policies: Any = None
    paired_seeds: bool = False
    baselines: list[str] = field(default_factory=lambda: list(BASELINES))
    output: str = "runs/policy_eval"

    @property
    def claims(self) -> str:
        """What claims call these episodes."""
        from physisforcing.planner.measurements import claims_of

        from . import policy_protocols

        if self.protocol == policy_protocols.NAME:
            return policy_protocols.claims(self.control)
        return claims_of(protocol=self.protocol, control=self.control, manifest=self.manifest)

    def check(self) -> dict[str, ActingPolicy]:
        """The policies by name. ``UserError`` for what would fail only after the simulator has started."""
        from .policies import check_policy, refuse_unused
        from .policy_protocols import EXECUTE, NAME, PROTOCOLS, STEPS

        if self.protocol not in PROTOCOLS:
            raise unknown_name("protocol", self.protocol, PROTOCOLS, see="physis eval policy --help")
        self.check_run()
        if self.planner.oracle != "none":
            fix = "leave it out; physis eval plan has it"
            raise UserError("planner.oracle", got=self.planner.oracle, wanted="none here", fix=fix)
        self.check_scenes(BASELINES, see="physis eval policy --help")
        for named, values in (("tasks", self.tasks), ("baselines", self.baselines)):
            if twice := sorted({value for value in values if values.count(value) > 1}):
                raise UserError(named, got=f"{twice[0]} twice", wanted="each once", fix="leave one out")
        check_at_least(self, episodes=1, workers=0, threads=1, videos=0)
        if self.max_steps is not None:
            check_at_least(self, max_steps=1)
        policies = acting_policies(self.policy, self.policies)
        if not policies and not self.baselines:
            raise UserError("policies", got="[]", wanted="baselines beside no policy", fix="baselines=[noop,random]")
        for policy in policies.values():
            check_policy(policy.settings, self.workers)
        if all(policy.is_planner for policy in policies.values()):
            preset = PolicySettings(execute=EXECUTE, steps=STEPS) if self.protocol == NAME else PolicySettings()
            refuse_unused(self.policy, (PolicySettings(), preset))
        return policies


def main(argv: Sequence[str]) -> int:
    """Entry of ``physis eval policy``. Exit code 3 when episodes ended in errors."""
    words = [word for word in argv if word != "--json"]
    if not words or any(word in ("-h", "--help") for word in words):
        print(HELP)
        return 0 if words else 2
    from physisforcing.core.config import compose

    config = compose("eval_policy", spelled_out(words), EvalPolicyConfig)
    summary = evaluate(config, command=" ".join(["physis eval policy", *argv]))
    return print_summary(summary, config.output, as_json=len(words) < len(argv))


def spelled_out(words: Sequence[str]) -> list[str]:
    """``policy=NAME`` as ``policy.source=NAME``, and what ``as_lists`` spells out."""
    given = [word.replace("policy=", "policy.source=", 1) if word.startswith("policy=") else word for word in words]
    return as_lists(given)


def evaluate(config: EvalPolicyConfig, *, command: str = "physis eval policy", progress: bool = True) -> dict[str, Any]:
    """Run or continue an evaluation; returns the summary that ``summary.json`` holds."""
    from .policies import check_source, require_devices

    policies = config.check()
    for policy in policies.values():
        check_source(policy.settings)
    require_devices(policies.values(), config.planner.device, config.output)
    with contextlib.ExitStack() as stack:
        servers = known_servers(config, policies, stack)
        plan = PolicyPlan(config, policies, servers)
        rows = run_turns(config, plan, servers, progress=progress)
    return write_summary(config, plan, rows, command)


class PolicyPlan:
    """Which episodes, under which keys. A job's task is ``<task>/<row>``, the name of a policy or a baseline.

    The keys of baselines and of the planner are those of ``physis eval plan``. ``films``: (task, row, seed) -> name of the video; it tells
    evaluations with other weights or settings apart, as the key does.
    """

    def __init__(
        self,
        config: EvalPolicyConfig,
        policies: Mapping[str, ActingPolicy],
        servers: Mapping[str, ServerAddress] | None = None,
    ) -> None:
        from physisforcing.envs.seeds import Job

        self.config, self.policies, self._servers = config, policies, dict(servers or {})
        #: What the report says of this plan: rows that were left out, tasks that a policy does not know.
        self.notes: list[str] = []
        self.scenes: Scenes = plan_scenes(config.tasks, config.episodes, config.manifest, config.first_seed)
        self.rows = [*policies, *self._baselines()]
        #: Row -> what a server of its policy must say of its plans.
        self.plans: dict[str, str] = {}
        #: Row -> whose pictures its policy wants, where it is not the head's alone.
        self.cameras: dict[str, tuple[str, ...]] = {}
        self.fingerprints = {name: self._identify(name) for name in self.rows}
        self._refuse_one_row_twice()
        self._config_hash = settings_hash(config)
        seeds = self.scenes.seeds
        self.jobs = [Job(task=f"{t}/{row}", seed=s) for t, row in self._cells() for s in seeds[t]]
        filmed = (*policies, EXPERT)
        self.films = {
            (task, row, seed): f"{task}_{seed}_{row}_{config_hash(self.key(Job(task=f'{task}/{row}', seed=seed)))[:8]}"
            for task in config.tasks
            for row in filmed
            if row in self.rows
            for seed in seeds[task][: config.videos]
        }

    def key(self, job: Any) -> ResultKey:
        return job_key(job, self.scenes, self.fingerprints, self._config_hash)

    def _cells(self) -> list[tuple[str, str]]:
        """(task, row) in the order of their episodes: one task after the other, so that a process rarely builds another environment. Several policies
        that processes load act before that, one after the other: a process keeps one, and would load each once a task."""
        loaded = [name for name, one in self.policies.items() if not one.is_planner and not one.settings.server]
        first = loaded if len(loaded) > 1 else []
        tasks, rest = self.config.tasks, [row for row in self.rows if row not in first]
        return [(task, row) for row in first for task in tasks] + [(task, row) for task in tasks for row in rest]

    def _refuse_one_row_twice(self) -> None:
        """``UserError`` for two names of the same weights and settings, whose episodes would have one key."""
        first: dict[str, str] = {}
        for name, fingerprint in self.fingerprints.items():
            if (taken := first.setdefault(fingerprint, name)) != name:
                got = f"{taken} and {name}, the same weights acting in the same way"
                raise UserError("policies", got=got, wanted="each policy once", fix=f"leave {name} out")

    def _baselines(self) -> list[str]:
        found = []
        for name in self.config.baselines:
            if name == "retrieval" and not self.config.train_demos:
                self.notes.append(RETRIEVAL_SKIPPED)
            else:
                found.append(name)
        return found

    def _identify(self, name: str) -> str:
        if name == "retrieval":
            return f"retrieval-{training_demonstrations(self.config.train_demos).fingerprint()[:12]}"
        if name not in self.policies:
            return name
        if self.policies[name].is_planner:
            server, config = self._servers.get(PLANNER), self.config
            parts = model_parts(config, server)
            return model_fingerprint(parts, model_settings(config, server))
        from .policy_opening import identify_policy

        server, threads = self._servers.get(name), self.config.threads
        identity = identify_policy(self.policies[name].settings, server, threads)
        self.plans[name] = identity.plans
        if (wanted := tuple(dict.fromkeys(("head", *identity.cameras)))) != ("head",):
            self.cameras[name] = wanted
        foreign = [task for task in self.config.tasks if identity.tasks and task not in identity.tasks]
        if foreign:
            self.notes.append(f"{name} was not trained on {', '.join(foreign)}, but on {', '.join(identity.tasks)}")
        return identity.fingerprint


def write_summary(
    config: EvalPolicyConfig, plan: PolicyPlan, rows: list[dict[str, Any]], command: str
) -> dict[str, Any]:
    """Write the report of these rows into ``config.output``; returns the summary."""
    from physisforcing.planner import measurements
    from physisforcing.planner.summary import markdown, summarise

    from . import policy_protocols, policy_report

    policies = plan.policies
    summary, provenance = summarise(rows), measurements.machine_provenance()
    found = policy_report.compare_policies(rows, policies, paired_seeds=config.paired_seeds)
    notes, title = _notes(config, plan, rows), "Policies in closed loop"
    summary |= {
        "title": title,
        "notes": notes,
        "command": command,
        "provenance": provenance,
        "config": dataclasses.asdict(config),
        "policies": {name: dataclasses.asdict(policy) for name, policy in policies.items()},
        "means": _means(summary["tasks"]),
        "comparison": found.to_json(),
    }
    deviations = None
    if config.protocol == policy_protocols.NAME:
        summary[policy_protocols.NAME] = block = policy_protocols.block(config, policies)
        deviations = partial(policy_protocols.row_deviations, block)
    lines = policy_report.measurement_lines(
        summary,
        claims=config.claims,
        manifests=plan.scenes.manifests,
        policies=policies,
        found=found,
        deviations=deviations,
    )
    parts = [markdown(summary, title=title, notes=notes)]
    if len(summary["tasks"]) > 1:
        parts.append(policy_report.means_markdown(summary["means"]))
    parts.append(policy_report.comparison_markdown(found))
    if config.protocol == policy_protocols.NAME:
        parts.append(policy_protocols.markdown(summary[policy_protocols.NAME]))
    write_report(Path(config.output), summary, "\n".join(part for part in parts if part), lines)
    return summary


def _means(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    from physisforcing.planner.summary import mean_over_tasks

    names = dict.fromkeys(name for rows in tasks.values() for name in rows)
    return {name: mean_over_tasks({task: rows.get(name) for task, rows in tasks.items()}) for name in names}


def _notes(config: EvalPolicyConfig, plan: PolicyPlan, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = scene_notes(config, plan.scenes, rows)
    for name, policy in plan.policies.items():
        settings = policy.settings
        if policy.is_planner:
            planner = config.planner
            notes.append(
                f"{name}: {planner.execute_horizon} rows executed a plan, the planner with {planner.world_model} weights"
            )
            continue
        words = [f"{settings.execute} rows executed a plan", f"{settings.steps} denoising steps", settings.execution]
        words += [f"delay {settings.delay}"] if settings.execution == "async" else []
        words += [f"mode {settings.mode}"] if settings.mode else []
        words += [f"noise of seed {settings.seed}"] if settings.seed else []
        words += [f"recipe {policy.recipe}"] if policy.recipe else []
        words += [f"training seed {policy.training_seed}"] if policy.training_seed is not None else []
        notes.append(f"{name}: {', '.join(words)}; {settings.source}")
    if any((p.settings.execution, p.settings.delay) == ("async", 0) for p in plan.policies.values()):
        notes.append(
            "async with policy.delay=0: what is executed depends on how fast this machine plans; another run may differ"
        )
    if EXPERT in plan.rows:
        notes.append(
            f"expert: the scripted expert's drive targets of the same scene, replayed with control {config.control}"
        )
    return notes + plan.notes


__all__ = ["EvalPolicyConfig", "PolicyPlan", "evaluate", "main", "spelled_out", "write_summary"]
