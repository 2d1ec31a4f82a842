"""``physis compare``: several world models under one planner in the same scenes, beside the controls, with a report."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from physisforcing.core.errors import IncompleteCoverageError, UserError, check_at_least, unknown_name
from physisforcing.core.results import ResultKey, config_hash

from .compare_controls import VIDEOS, check_demonstrations
from .compare_episodes import POLICIES, ComparisonRunner, identify
from .episode_settings import PlannerSettings
from .plan_scenes import FIRST_SEED, Scenes, plan_scenes

if TYPE_CHECKING:
    from physisforcing.planner.worldarena import ProtocolSettings

HELP = """usage: physis compare models={NAME:SOURCE,...} [field=value ...] [--json]

The same planner, decoder and scenes for several world models, with controls; says how much of what was imagined really happened.

settings (field=value):
  models={a:SOURCE,b:SOURCE}   SOURCE: shipped, a world-model folder, a diffusers image-to-video pipeline folder, a folder of videos,
                         http://HOST:PORT of a world-model service, or module:factory (docs/bring_your_world_model.md)
                         or {source:SOURCE,recipe:NAME,training_seed:N}: with five or more training seeds a recipe, seeds are the unit
  rows=[]                published models: table3 (all of the paper's Table 3), or names of configs/compare with a source
                         (rows=[wow:http://HOST:PORT]); what lacks a source is listed as skipped, with what it needs
  tasks=[click_bell]     episodes=10   per task, the same scenes for everyone       manifest=auto   first_seed=null
  controls=[noop,random,retrieval,frozen,noise,perfect,oracle,other,objects_erased]
                         retrieval needs train_demos=FOLDER (training seeds); perfect: the simulator itself as world model; oracle: the
                         demonstration's own video; other: another scene's video; objects_erased: the demonstration's video without
                         the task's objects
  demos=FOLDER           demonstrations of the same scenes (recorded into output/demonstrations if not given)
  planner=pico           decoder and planner: planner.decoder, planner.execute_horizon=32, planner.candidates=1, planner.device=cpu, ...
                         planner.picture_decoder=shipped reads the controls' pictures where planner.decoder needs features or latents
  sensitivity=2          scenes a task in which it is measured how much a model depends on its condition: text models on the sentence
                         (against another task's), action models on the actions (against other ones executed from there); 0: none
  classifier=FOLDER      success classifier (physis train success): imagined against true success
  output=PATH            the same command again continues; results.jsonl, report.html, report.md, summary.json, videos/
  protocol=worldarena    adjust_bottle and click_bell, 100 frozen episodes, limit 400, control=topp, 45 executed rows a plan
                         (docs/worldarena.md); other settings given with it win, and the report names what differs
  paired_seeds=false     true where one training seed fixes what two recipes share (the initial weights and the batches, say)
  workers=0  threads=2  videos=2 (filmed scenes a task)  control=interpolated  max_steps=null  retry_errors=false

examples:
  physis compare models={shipped:shipped} tasks=[click_bell] episodes=5 controls=[noop,frozen,perfect] output=runs/compare
  physis compare models={flow:runs/flow/export,physis:runs/physis/export} tasks=[click_bell,adjust_bottle] output=runs/compare"""

CONTROLS = (*POLICIES, *VIDEOS)
#: Names that results of a planner evaluation use besides.
SPOKEN_FOR = ("retrieval_video", "recorded", "black", "model")
NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")


@dataclass(slots=True, kw_only=True)
class ComparedModel:
    """A world model of the comparison. ``recipe`` and ``training_seed``: how it was trained, where that is compared."""

    source: str
    recipe: str = ""
    training_seed: int | None = None


@dataclass(slots=True, kw_only=True)
class CompareConfig:
    """Settings of ``physis compare`` (see ``HELP``)."""

    protocol: str = "standard"
    models: dict[str, Any] = field(default_factory=dict)
    rows: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=lambda: ["click_bell"])
    episodes: int = 10
    first_seed: int | None = None
    manifest: str = "auto"
    planner: PlannerSettings = field(default_factory=PlannerSettings)
    controls: list[str] = field(default_factory=lambda: list(CONTROLS))
    train_demos: str = ""
    demos: str = ""
    classifier: str = ""
    sensitivity: int = 2
    output: str = "runs/compare"
    control: str = "interpolated"
    max_steps: int | None = None
    workers: int = 0
    threads: int = 2
    videos: int = 2
    paired_seeds: bool = False
    retry_errors: bool = False

    def worldarena(self) -> ProtocolSettings:
        """These settings as the protocol's report states them."""
        from physisforcing.planner.worldarena import ProtocolSettings

        return ProtocolSettings.of(self)

    @property
    def claims(self) -> str:
        """What measurements call these episodes."""
        from physisforcing.planner.measurements import claims_of

        return claims_of(protocol=self.protocol, control=self.control, manifest=self.manifest)

    @property
    def oracle(self) -> bool:
        """The runner of ``physis eval plan`` asks for it."""
        return False

    def check(self) -> dict[str, ComparedModel]:
        """The models by name. ``UserError`` for what would fail only after the simulator has started."""
        from physisforcing.envs.robotwin.tasks import task_info
        from physisforcing.planner.worldarena import NAME as WORLDARENA
        from physisforcing.planner.worldarena import PROTOCOLS

        from .planners import check_control, check_device, check_planner

        if self.protocol not in PROTOCOLS:
            raise unknown_name("protocol", self.protocol, PROTOCOLS, see="physis compare --help")
        if self.protocol == WORLDARENA:
            self.worldarena().check()
        for task in self.tasks:
            task_info(task)
        for name in self.controls:
            if name not in CONTROLS:
                raise unknown_name("controls", name, CONTROLS, see="physis compare --help")
        for named, values in (("tasks", self.tasks), ("controls", self.controls), ("rows", self.rows)):
            if twice := sorted({value for value in values if values.count(value) > 1}):
                raise UserError(named, got=f"{twice[0]} twice", wanted="each once", fix="leave one out")
        check_at_least(self, episodes=1, workers=0, threads=1, videos=0, sensitivity=0)
        if self.max_steps is not None:
            check_at_least(self, max_steps=1)
        check_control(self.control)
        check_device(self.planner.device, self.workers)
        check_planner(self.planner)
        if self.planner.oracle != "none":
            fix = "leave it out; controls=[oracle] decodes the real future"
            raise UserError("planner.oracle", got=self.planner.oracle, wanted="none in a comparison", fix=fix)
        if self.classifier and not (Path(self.classifier) / "config.json").is_file():
            fix = "physis train success output=F, then classifier=F/model"
            raise UserError("classifier", got=self.classifier, wanted="a folder with config.json", fix=fix)
        if self.planner.server:
            fix = "leave it out: every process loads the models that it compares"
            raise UserError("planner.server", got=self.planner.server, wanted="nothing here", fix=fix)
        if self.first_seed is not None and self.first_seed < FIRST_SEED:
            fix = f"evaluation seeds start at {FIRST_SEED}"
            raise UserError("first_seed", got=self.first_seed, wanted=f"at least {FIRST_SEED}", fix=fix)
        models = {name: _model(name, given) for name, given in self.models.items()}
        if not models and not self.rows:
            raise UserError("models", got="none", wanted="at least one world model", fix="models={mine:FOLDER}")
        return models


def _model(name: str, given: Any) -> ComparedModel:
    if not NAME.fullmatch(name) or name in (*CONTROLS, *SPOKEN_FOR):
        wanted = "lower-case letters, digits and _ that no control is called"
        raise UserError("models", got=name, wanted=wanted, fix="models={mine:FOLDER}")
    if isinstance(given, str):
        return ComparedModel(source=given)
    known = [f.name for f in dataclasses.fields(ComparedModel)]
    if not isinstance(given, dict) or "source" not in given:
        fix = f"models={{{name}:{{source:FOLDER,recipe:NAME,training_seed:0}}}}"
        raise UserError(f"models.{name}", got=given, wanted="a source", fix=fix)
    for key in given:
        if key not in known:
            raise unknown_name(f"models.{name}", key, known, see="physis compare --help")
    return ComparedModel(**given)


def main(argv: Sequence[str]) -> int:
    """Entry of ``physis compare``. Exit code 3 when episodes ended in errors."""
    words = [word for word in argv if word != "--json"]
    if any(word in ("-h", "--help") for word in words):
        print(HELP)
        return 0
    from physisforcing.core.config import compose
    from physisforcing.envs.collect import expand_lists

    lists = {"task": "tasks", "tasks": "tasks", "controls": "controls", "rows": "rows"}
    config = compose("compare", expand_lists(words, lists), CompareConfig)
    summary = compare(config, command=" ".join(["physis compare", *argv]))
    folder = Path(config.output)
    print(json.dumps(summary, indent=2) if len(words) < len(argv) else (folder / "report.md").read_text())
    print(f"report: {folder / 'report.html'}")
    if summary["errors"]:
        raise IncompleteCoverageError(
            f"{summary['errors']} episodes ended in errors; retry_errors=true runs them again"
        )
    return 0


def compare(config: CompareConfig, *, command: str = "physis compare", progress: bool = True) -> dict[str, Any]:
    """Run or continue a comparison; returns the summary that ``summary.json`` holds."""
    from .compare_report import write_comparison
    from .compare_sensitivity import measure_sensitivity
    from .episode_jobs import run_jobs

    plan = ComparisonPlan(config, progress=progress)
    rows = run_jobs(
        plan.jobs,
        plan.key,
        Path(config.output),
        partial(ComparisonRunner, config, plan.models, plan.scenes, plan.filmed),
        workers=config.workers,
        retry_errors=config.retry_errors,
        progress=progress,
    )
    return write_comparison(config, plan, rows, measure_sensitivity(config, plan, progress=progress), command=command)


class ComparisonPlan:
    """Which episodes, under which keys. A job's task is ``<task>/<name>``, the name of a model or a control."""

    def __init__(self, config: CompareConfig, *, progress: bool = True) -> None:
        from physisforcing.envs.seeds import Job

        from .planners import require_device

        self.config, given = config, config.check()
        require_device(config.planner.device, config.output)
        #: name -> what it lacks.
        self.skipped: dict[str, str] = {}
        self._look_at(given)
        self.scenes: Scenes = plan_scenes(config.tasks, config.episodes, config.manifest, config.first_seed)
        self.controls = self._recordable(self._controls())
        if not config.demos and any(name in VIDEOS and VIDEOS[name].needs_demos for name in self.controls):
            config.demos = record_demonstrations(config, self.scenes, progress=progress)
        if not config.classifier:
            self.skipped["imagined success"] = "classifier=FOLDER (physis train success)"
        if any(name in VIDEOS and VIDEOS[name].needs_demos for name in self.controls):
            check_demonstrations(config.demos, self.scenes)
        self.names = [*self.models, *self.controls]
        self.fingerprints = identify(config, self.specs, list(self.models), self.controls)
        settings = {"control": config.control, "max_steps": config.max_steps, "threads": config.threads}
        self._config_hash = config_hash(settings)
        self.filmed = {(task, seed) for task in config.tasks for seed in self.scenes.seeds[task][: config.videos]}
        self.jobs = [
            Job(task=f"{t}/{p}", seed=s) for t in config.tasks for p in self.names for s in self.scenes.seeds[t]
        ]

    def key(self, job: Any) -> ResultKey:
        task, name = job.task.split("/")
        return ResultKey(
            manifest=self.scenes.manifests[task],
            episode=f"{task}/{job.seed}",
            fingerprint=self.fingerprints[name],
            config=self._config_hash,
        )

    def _look_at(self, given: dict[str, ComparedModel]) -> None:
        """``models`` act in closed loop; ``sensitive`` are those whose sensitivity is measured; ``specs`` of all of them."""
        from physisforcing.planner.model_sources import load_rows

        from .compare_models import look_at_models, picture_note, unmeasured_sensitivity

        rows = load_rows(self.config.rows)
        self.skipped |= {row.title: row.missing for row in rows if row.missing}
        found = {row.name: ComparedModel(source=row.source, recipe=row.recipe) for row in rows if not row.missing}
        if twice := sorted(given.keys() & found.keys()):
            fix = "give the model another name, or leave the row out"
            raise UserError("models", got=f"{twice[0]}, which is also a row", wanted="each name once", fix=fix)
        every = given | found
        looked = look_at_models(self.config, every, found)
        self.specs = looked.specs
        self.models = {name: model for name, model in every.items() if name not in looked.resting}
        self.skipped |= {f"{name} in closed loop": what for name, what in looked.resting.items()}
        unmeasured = unmeasured_sensitivity(self.specs) if self.config.sensitivity else dict.fromkeys(every, "")
        self.sensitive = {name: model for name, model in every.items() if name not in unmeasured}
        self.skipped |= {f"sensitivity of {name}": what for name, what in unmeasured.items() if what}
        self.note = picture_note(self.config.planner)

    def _controls(self) -> list[str]:
        from .compare_models import RETRIEVED, refused_controls

        controls = list(self.config.controls)
        if "retrieval" in controls and not self.config.train_demos:
            controls.remove("retrieval")
            self.skipped["retrieval"] = "train_demos=FOLDER (demonstrations with training seeds)"
        elif "retrieval" in controls:
            controls.insert(controls.index("retrieval") + 1, RETRIEVED)
        refused = refused_controls(self.config.planner, controls)
        self.skipped |= refused
        return [name for name in controls if name not in refused]

    def _recordable(self, controls: list[str]) -> list[str]:
        """Without the controls that show demonstrations, where there are none and the collector cannot build the scenes."""
        if self.config.demos or not any(built.get("scene_of") for built in self.scenes.environments.values()):
            return controls
        needing = [name for name in controls if name in VIDEOS and VIDEOS[name].needs_demos]
        self.skipped |= dict.fromkeys(
            needing, "demos=FOLDER: scenes of one task under another's sentence are not recorded here"
        )
        return [name for name in controls if name not in needing]


def record_demonstrations(config: CompareConfig, scenes: Scenes, *, progress: bool) -> str:
    """The expert's demonstrations of the compared scenes (and of one more, for ``other``); the folder."""
    from physisforcing.envs.collect import CollectConfig, collect

    folder = Path(config.output) / "demonstrations"
    for task, seeds in scenes.seeds.items():
        built = scenes.environments.get(task, {})
        settings = CollectConfig(
            output=str(folder),
            tasks=[task],
            episodes=max(2, len(seeds)),
            start_seed=min(seeds),
            keep="success",
            workers=config.workers,
            **{name: built[name] for name in ("embodiment", "randomization", "instruction") if name in built},
        )
        collect(settings, progress=progress)
    return str(folder)
