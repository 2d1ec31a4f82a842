"""``physis eval plan``: plan in closed loop on scenes nobody trained on, beside the baselines; or the oracle check."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from physisforcing.core.errors import UserError, unknown_name
from physisforcing.core.results import ResultKey, config_hash

from .episode_jobs import job_key, run_jobs
from .episode_report import RETRIEVAL_SKIPPED, print_summary, scene_notes, write_report
from .episode_settings import EpisodeSettings, PlannerSettings, as_lists
from .plan_episodes import (
    MODEL,
    PERFECT,
    EpisodeRunner,
    model_fingerprint,
    model_parts,
    model_settings,
    settings_hash,
)
from .plan_scenes import Scenes, plan_scenes, refuse_first_seed, scene_source, training_demonstrations

if TYPE_CHECKING:
    from physisforcing.planner.worldarena import ProtocolSettings

    from .model_process import ServerAddress

HELP = """usage: physis eval plan [field=value ...] [--json]

Closed-loop episodes with a world model and a decoder, beside baselines and the perfect model under the same planner.

settings (field=value):
  tasks=[click_bell] (task=NAME for one)   episodes=50   per task
  manifest=auto          frozen scenes: the shipped test_<task> (where there is none, or with manifest=none: first_seed=100000
                         upward); or a shipped set (validation, test_ood, test_embodiment, swapped_instruction), or a
                         manifest's name or .json file
  output=PATH            the same command again continues; results.jsonl, summary.md, summary.json, videos/, measurements.json
  planner=pico           weights and settings: planner.world_model (any source: physis check worldmodel --help), planner.codec,
                         planner.decoder (folders; 'shipped'), planner.execute_horizon=32, planner.denoising_steps=0 (0: the
                         model's own), planner.device=cpu; planner.picture_decoder (shipped) reads recorded video for retrieval
                         and the oracle where planner.decoder needs features or latents
  baselines=[noop,random,retrieval,perfect]    retrieval needs train_demos=FOLDER (a dataset with training seeds); perfect: the same
                         planner with the simulator itself as world model; the report says how far the model stays behind it
  planner.oracle=video   the decoder reads held-out demonstrations instead: needs demos=FOLDER with seeds from 100000
  workers=0 (processes; 0: this one)  threads=2 (numeric threads; part of the result's key)  videos=3  control=interpolated
  max_steps=null (null: the task's own limit)  retry_errors=false
  protocol=worldarena    adjust_bottle and click_bell, 100 frozen episodes, limit 400, control=topp, 45 executed rows a plan, and
                         the mean of both tasks beside the published rows (docs/worldarena.md); other settings given with it win
  planner.prompt_template=FILE.txt         what is put round the sentence: a text file with {instruction} in it, or the text itself in
                         quotes of its own: "planner.prompt_template='Do this: {instruction}'"
  planner.candidates=1   futures imagined for a plan; planner.verifier chooses: spread, smoothness, track_consistency, success (needs
                         planner.success=FOLDER, physis train success), combined, random, or a sum such as 2*spread+smoothness
  planner.rollout_chunks=1    rollouts a plan is long: the next one goes on from the last picture (planner.execute_horizon up to 32 each)
  planner.server=auto    one process holds the world model for all workers; or HOST:PORT of physis serve model

examples:
  physis eval plan tasks=[click_bell] episodes=50 train_demos=runs/bell output=runs/plan
  physis eval plan task=click_bell planner.oracle=video demos=runs/heldout episodes=20 output=runs/oracle
  physis eval plan protocol=worldarena output=runs/worldarena
  physis eval plan planner.candidates=4 planner.verifier=spread planner.server=auto workers=4 output=runs/best_of_4"""

ORACLES = ("none", "video")
BASELINES = ("noop", "random", "retrieval", "perfect")


@dataclass(slots=True, kw_only=True)
class EvalPlanConfig(EpisodeSettings):
    """Settings of ``physis eval plan`` (see ``HELP``)."""

    baselines: list[str] = field(default_factory=lambda: list(BASELINES))
    demos: str = ""
    output: str = "runs/plan"

    @property
    def oracle(self) -> bool:
        return self.planner.oracle == "video"

    @property
    def claims(self) -> str:
        """What claims call these episodes."""
        from physisforcing.planner.measurements import claims_of

        named = claims_of(protocol=self.protocol, control=self.control, manifest=self.manifest)
        return "oracle" if self.oracle else named

    def worldarena(self) -> ProtocolSettings:
        """These settings as the protocol's report states them."""
        from physisforcing.planner.worldarena import ProtocolSettings

        return ProtocolSettings.of(self)

    def check(self) -> None:
        """``UserError`` for what would fail only after the simulator has started."""
        from physisforcing.planner.worldarena import PROTOCOLS

        self.check_run()
        if self.protocol not in PROTOCOLS:
            raise unknown_name("protocol", self.protocol, PROTOCOLS, see="physis eval plan --help")
        if self.protocol == "worldarena":
            self.worldarena().check()
            if self.oracle:
                fix = "leave protocol=worldarena out"
                raise UserError("planner.oracle", got=self.planner.oracle, wanted="none in this protocol", fix=fix)
        self.check_scenes(BASELINES, see="physis eval plan --help")
        if self.planner.oracle not in ORACLES:
            raise unknown_name("planner.oracle", self.planner.oracle, ORACLES, see="physis eval plan --help")
        for name, low in {"episodes": 1, "workers": 0, "threads": 1, "videos": 0, "max_steps": 1}.items():
            if (value := getattr(self, name)) is not None and value < low:
                raise UserError(name, got=value, wanted=f"at least {low}", fix=f"{name}={low}")
        if self.oracle and not self.demos:
            fix = f"physis data collect tasks=[{self.tasks[0]}] start_seed=100000 episodes=20 output=F, then demos=F"
            raise UserError("demos", got=None, wanted="demonstrations with evaluation seeds", fix=fix)


def main(argv: Sequence[str]) -> int:
    """Entry of ``physis eval plan``. Exit code 3 when episodes ended in errors."""
    words = [word for word in argv if word != "--json"]
    if any(word in ("-h", "--help") for word in words):
        print(HELP)
        return 0
    from physisforcing.core.config import compose

    config = compose("eval_plan", as_lists(words), EvalPlanConfig)
    summary = evaluate(config, command=" ".join(["physis eval plan", *argv]))
    return print_summary(summary, config.output, as_json=len(words) < len(argv))


def evaluate(config: EvalPlanConfig, *, command: str = "physis eval plan", progress: bool = True) -> dict[str, Any]:
    """Run or continue an evaluation; returns the summary that ``summary.json`` holds."""
    from .model_process import model_server
    from .planners import require_device

    config.check()
    require_device(config.planner.device, config.output)
    output = Path(config.output)
    with model_server(config) as server:
        plan = _Plan(config, server)
        scenes = plan.scenes
        make = partial(EpisodeRunner, config, scenes.entries, plan.filmed, scenes.environments, server)
        rows = run_jobs(
            plan.jobs,
            plan.key,
            output,
            make,
            workers=config.workers,
            retry_errors=config.retry_errors,
            progress=progress,
        )
    return _write_summary(config, plan, rows, command, output)


class _Plan:
    """Which episodes, under which keys. A job's task is ``<task>/<policy>``."""

    def __init__(self, config: EvalPlanConfig, server: ServerAddress | None = None) -> None:
        from physisforcing.envs.seeds import Job

        self.config, self._server = config, server
        self.skipped: list[str] = []
        self.scenes = self._scenes()
        seeds = self.scenes.seeds
        self.policies = self._policies()
        self._fingerprints = self._identify()
        self._config_hash = settings_hash(config)
        filmed = "oracle" if config.oracle else MODEL
        #: (task, seed) -> name of the video. It tells evaluations with other weights or settings apart, as the key does.
        self.filmed = {
            (task, seed): f"{task}_{seed}_{filmed}_{config_hash(self.key(Job(task=f'{task}/{filmed}', seed=seed)))[:8]}"
            for task in config.tasks
            for seed in seeds[task][: config.videos]
        }
        # One task after the other, so that a worker rarely has to build another environment.
        self.jobs = [Job(task=f"{t}/{p}", seed=s) for t in config.tasks for p in self.policies for s in seeds[t]]

    def key(self, job: Any) -> ResultKey:
        return job_key(job, self.scenes, self._fingerprints, self._config_hash)

    def _scenes(self) -> Scenes:
        config = self.config
        if not config.oracle:
            return plan_scenes(config.tasks, config.episodes, config.manifest, config.first_seed)
        from physisforcing.planner.oracle import HeldOutDemonstrations

        refuse_first_seed(config.first_seed, "the scenes are those of demos=", "leave it out")
        demos = HeldOutDemonstrations(config.demos)
        name = f"demonstrations-{demos.dataset.fingerprint()[:12]}@{scene_source()}"
        seeds = {task: demos.seeds(task, config.episodes) for task in config.tasks}
        return Scenes(seeds=seeds, manifests=dict.fromkeys(config.tasks, name))

    def _policies(self) -> list[str]:
        from physisforcing.planner.oracle import ORACLE_POLICIES

        from .compare_models import picture_note, refused_controls
        from .planners import recorded_video_needs

        config = self.config
        retrieves = "retrieval" in config.baselines and config.train_demos
        needed = recorded_video_needs(config.planner) if config.oracle or retrieves else ""
        if config.oracle:
            if needed:
                fix = "planner.picture_decoder=shipped"
                raise UserError("planner.picture_decoder", got=config.planner.picture_decoder, wanted=needed, fix=fix)
            return list(ORACLE_POLICIES)
        policies = [MODEL]
        refused = refused_controls(config.planner, [PERFECT]) if PERFECT in config.baselines else {}
        if PERFECT in config.baselines and not refused and (note := picture_note(config.planner)):
            self.skipped.append(note)
        if needed and retrieves:
            self.skipped.append(f"retrieval_video skipped: needs {needed}")
        for name in config.baselines:
            if name == "retrieval" and not config.train_demos:
                self.skipped.append(RETRIEVAL_SKIPPED)
            elif name in refused:
                self.skipped.append(f"{name} skipped: needs {refused[name]}")
            else:
                policies += [name, "retrieval_video"] if name == "retrieval" and not needed else [name]
        return policies

    def _identify(self) -> dict[str, str]:
        from physisforcing.envs.simulator_world_model import VERSION as SIMULATOR_VERSION
        from physisforcing.worldmodel.storage import fingerprint

        config = self.config
        parts = model_parts(config, self._server, acts=MODEL in self.policies)
        retrieved = ""
        if "retrieval" in self.policies:
            retrieved = training_demonstrations(config.train_demos).fingerprint()[:12]
        settings = model_settings(config, self._server)
        perfect = ""
        if PERFECT in self.policies:
            planner = {name: value for name, value in settings.items() if name not in ("denoising_steps", "served")}
            shown = {"decoder": fingerprint(self._picture_decoder()), "simulator": SIMULATOR_VERSION}
            perfect = f"{PERFECT}-{config_hash(planner | shown)}"
        known = {
            PERFECT: perfect,
            MODEL: model_fingerprint(parts, settings),
            "noop": "noop",
            "random": "random",
            "retrieval": f"retrieval-{retrieved}",
            "retrieval_video": f"retrieval-{retrieved}-{fingerprint(self._picture_decoder())}",
            "recorded": "recorded",
        }
        return {policy: known.get(policy, f"{policy}-{config_hash(parts)}") for policy in self.policies}

    def _picture_decoder(self) -> Path:
        from physisforcing.planner.train import weights_folder

        from .planners import picture_decoder_name

        return weights_folder(picture_decoder_name(self.config.planner), "idm", field="planner.picture_decoder")


def _write_summary(
    config: EvalPlanConfig, plan: _Plan, rows: list[dict[str, Any]], command: str, output: Path
) -> dict[str, Any]:
    from physisforcing.planner import measurements, worldarena
    from physisforcing.planner.summary import markdown, summarise

    summary = summarise(rows)
    provenance = measurements.machine_provenance()
    notes = [*scene_notes(config, plan.scenes, rows), *plan.skipped]
    title = "Oracle check" if config.oracle else "Planning in closed loop"
    summary |= {
        "title": title,
        "notes": notes,
        "command": command,
        "provenance": provenance,
        "config": dataclasses.asdict(config),
    }
    lines = measurements.from_summary(summary, protocol=config.claims, manifests=plan.scenes.manifests)
    text = markdown(summary, title=title, notes=notes)
    if config.protocol == "worldarena":
        summary["worldarena"] = worldarena.block(summary["tasks"], config.worldarena())
        text += "\n" + worldarena.markdown(summary["worldarena"])
        lines += worldarena.measurements(summary["worldarena"], command=command, provenance=provenance)
    write_report(output, summary, text, lines)
    return summary


__all__ = ["EvalPlanConfig", "PlannerSettings", "evaluate", "main"]
