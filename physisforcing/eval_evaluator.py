"""``physis eval evaluator``: policies act inside a world model, a judge looks at the videos, and success there meets the simulator's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from physisforcing.core.errors import IncompleteCoverageError, UserError, check_at_least, unknown_name
from physisforcing.core.files import replace_text
from physisforcing.core.lerobot_format import write_json
from physisforcing.planner.evaluator_config import JudgeSettings, PolicyInModelConfig

HELP = """usage: physis eval evaluator world_model=MODEL demos=FOLDER policies=[NAME,...] [field=value ...] [--json]

Policies act inside a world model; a judge says from pictures whether they succeeded; success there is correlated with success in the
simulator (docs/worldarena.md). The same command again continues.

settings (field=value):
  world_model=MODEL      any: see physis check worldmodel --help     codec=FOLDER (or shipped)  denoising_steps=0  device=cpu  threads=2
         simulator       RoboTwin itself in the place of the world model: what is wrong then is the judge
  demos=FOLDER           held-out demonstrations: first pictures, sentences, lengths, and the recordings that the judge sees
  tasks=[] (all)  episodes=10   per task
  policies=[noop,random] also retrieval (needs train_demos=FOLDER), recorded (the demonstration's own actions), recorded+0.05 (with
                         joint noise, radians), module:factory (a Python function that returns a policy)
  real=simulate          run the same policies in RoboTwin, in the same scenes; or a folder of physis eval plan, or a JSON file
                         {"policy": [successes, episodes]}; empty: none, and no correlation
  rollout.conditioning=actions    text: the sentence drives the model, commands reach it as joint targets only
  rollout.length_scale=1.2  rollout.remainder=drop (keep)  rollout.seed=0
  judge.kind=openai      judge.base_url=http://127.0.0.1:8000/v1 judge.model=NAME judge.key_variable=NAME_OF_VARIABLE
         replay          from judge.log (of an earlier evaluation; no network)
         scripted        judge.rule=module:function, called with each planner.judges.JudgeRequest; truth: what a simulator knows
         none            imagine only; judge later with the same command and another kind
  judge.frames=5         pictures of either video     judge.timeout_s=60 judge.retries=2 judge.json_mode=true judge.max_tokens=300
  output=PATH            results.jsonl, frames/ (what was judged), videos/, judge_log.jsonl, summary.md, summary.json, measurements.json
  videos=3 (a policy)    control=interpolated (real=simulate)    retry_errors=false

examples:
  physis eval evaluator world_model=runs/actions/export codec=shipped demos=runs/heldout policies=[noop,recorded,recorded+0.1] judge.kind=none
  physis eval evaluator world_model=runs/actions/export codec=shipped demos=runs/heldout judge.base_url=http://127.0.0.1:8000/v1 judge.model=qwen"""

POLICIES = ("noop", "random", "retrieval", "recorded")
#: Demonstrations below this seed may have been trained on.
FIRST_SEED = 50_000


@dataclass(slots=True, kw_only=True)
class EvaluatorConfig:
    """Settings of ``physis eval evaluator`` (see ``HELP``)."""

    world_model: str = "shipped"
    codec: str = ""
    denoising_steps: int = 0
    device: str = "cpu"
    threads: int = 2
    demos: str = ""
    train_demos: str = ""
    tasks: list[str] = field(default_factory=list)
    episodes: int = 10
    policies: list[str] = field(default_factory=lambda: ["noop", "random"])
    real: str = ""
    control: str = "interpolated"
    rollout: PolicyInModelConfig = field(default_factory=PolicyInModelConfig)
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    output: str = "runs/evaluator"
    videos: int = 3
    retry_errors: bool = False

    def check(self) -> None:
        """``UserError`` for what would fail only after models are loaded."""
        check_at_least(self, episodes=1, threads=1, videos=0, denoising_steps=0)
        self.judge.check_kind()
        self.rollout.check()
        if not self.demos:
            fix = "physis data collect tasks=[click_bell] start_seed=100000 episodes=20 output=F, then demos=F"
            raise UserError("demos", got=None, wanted="held-out demonstrations", fix=fix)
        if len(set(self.policies)) < len(self.policies) or not self.policies:
            raise UserError("policies", got=self.policies, wanted="different policies", fix="policies=[noop,random]")
        for name in self.policies:
            check_policy(name)
        if "retrieval" in self.policies and not self.train_demos:
            fix = "train_demos=FOLDER, a dataset with training seeds"
            raise UserError("train_demos", got=None, wanted="demonstrations that retrieval remembers", fix=fix)


def check_policy(name: str) -> None:
    """``UserError`` for a policy that nobody knows."""
    base, plus, noise = name.partition("+")
    if base == "recorded" and plus:
        try:
            fits = 0 < float(noise) <= 1
        except ValueError:
            fits = False
        if not fits:
            raise UserError("policies", got=name, wanted="recorded+RADIANS, up to 1", fix="recorded+0.05")
    elif name not in POLICIES and (":" not in name or "/" in name):
        raise unknown_name("policies", name, POLICIES, see="or module:factory")


def main(argv: Sequence[str]) -> int:
    """Entry of ``physis eval evaluator``. Exit code 3 when verdicts are errors."""
    words = [word for word in argv if word != "--json"]
    if not words or any(word in ("-h", "--help") for word in words):
        print(HELP)
        return 0 if words else 2
    from physisforcing.core.config import compose

    config = compose("eval_evaluator", words, EvaluatorConfig)
    summary = evaluate(config, command=" ".join(["physis eval evaluator", *argv]))
    if len(words) < len(argv):
        print(json.dumps(summary, indent=2))
    else:
        print((Path(config.output) / "summary.md").read_text(encoding="utf-8"))
    errors = sum(entry["errors"] for entry in summary["policies"].values())
    if errors:
        raise IncompleteCoverageError(f"{errors} verdicts are errors; retry_errors=true asks again")
    return 0


def evaluate(
    config: EvaluatorConfig, *, command: str = "physis eval evaluator", progress: bool = True
) -> dict[str, Any]:
    """Run or continue an evaluation; returns the summary that ``summary.json`` holds."""
    from .evaluator_episodes import Setting, close_model, judged_rows
    from .evaluator_simulator import real_results

    config.check()
    setting = Setting(config)
    try:
        rows = judged_rows(setting, progress=progress)
    finally:
        close_model(setting)
    real = real_results(setting, progress=progress)
    return _write(config, setting, rows, real, command)


def _write(
    config: EvaluatorConfig, setting: Any, rows: list[dict[str, Any]], real: dict[str, tuple[int, int]], command: str
) -> dict[str, Any]:
    from physisforcing.planner import evaluator_summary as part
    from physisforcing.planner.measurements import machine_provenance

    output, spec = Path(config.output), setting.spec
    provenance = machine_provenance()
    summary = part.summarise(rows, real, seed=config.rollout.seed)
    notes = [
        f"world model {spec.name} {spec.fingerprint}, driven by {config.rollout.conditioning}; judge {setting.judge_name}",
        f"{len(setting.starts)} scenes of {config.demos}; videos {config.rollout.length_scale:g} times as long as the demonstration",
        f"rows too short for a rollout are {'dropped' if config.rollout.remainder == 'drop' else 'kept'}; measured joints are not "
        "known in a world model: policies are told the targets",
        "intervals of rates: 95 % Wilson; errors stand in no denominator where it says valid only",
    ]
    if config.rollout.conditioning == "text":
        notes.append(
            "the model follows the sentence: two policies differ only by the joint targets that its rollouts start from"
        )
    if not rows:
        summary["warnings"].append("nothing was judged: judge.kind=none")
    title = "Policies inside a world model"
    summary |= {"title": title, "notes": notes, "command": command, "provenance": provenance, "real": real}
    summary["config"] = dataclasses.asdict(config)
    text = part.markdown(summary, title=title, notes=notes) + "\n" + part.published_markdown()
    replace_text(output / "summary.md", text)
    write_json(output / "summary.json", summary)
    lines = part.measurements(summary, model=spec.name, command=command, provenance=provenance)
    write_json(output / "measurements.json", lines)
    return summary
