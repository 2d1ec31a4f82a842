"""WorldArena's action-planner protocol: its settings, the mean of its two tasks, and the published rows in a block of their own.

WorldArena released a decoder but not the loop that executes it: how many rows of a plan were executed, the control mode and the
episodes are not known. What is set here and not there is in ``docs/worldarena.md`` and stands in every report.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import UserError, unknown_name
from physisforcing.core.protocols import Policy, WorldModel
from physisforcing.core.stats import mean_of_proportions, wilson
from physisforcing.core.types import Observation, Rollout, RolloutRequest, WorldModelSpec

from .summary import mean_over_tasks, means_table

NAME = "worldarena"
#: What ``protocol=`` of a command may be.
PROTOCOLS = ("standard", NAME)
TASKS = ("adjust_bottle", "click_bell")
CONTROLS = ("topp", "interpolated")
#: A prompt that is the instruction itself.
PLAIN_PROMPT = "{instruction}"
#: Rollouts that a plan of 45 rows may be made of: one, or two of the 32 rows that the shipped models have.
ROLLOUT_CHUNKS = (1, 2)
#: Settings that the report states whatever they are.
STATED = ("execute_horizon", "rollout_chunks", "max_steps", "control", "denoising_steps", "candidates", "verifier")


@dataclass(slots=True, kw_only=True)
class ProtocolSettings:
    """What a report of this protocol says about how episodes were run; the defaults are the protocol. ``denoising_steps`` 0: the
    model's own. ``rollout_chunks``: rollouts a plan is made of; one or two as the model's horizon asks for 45 rows."""

    tasks: tuple[str, ...] = TASKS
    episodes: int = 100
    manifest: str = "test"
    max_steps: int | None = 400
    execute_horizon: int = 45
    control: str = "topp"
    prompt_template: str = PLAIN_PROMPT
    candidates: int = 1
    verifier: str = ""
    denoising_steps: int = 0
    rollout_chunks: int = 2
    first_seed: int | None = None

    @classmethod
    def of(cls, config: Any) -> ProtocolSettings:
        """Of a command's settings (``EvalPlanConfig``, ``CompareConfig``)."""
        planned = {"execute_horizon", "prompt_template", "candidates", "verifier", "denoising_steps", "rollout_chunks"}
        names = [field.name for field in dataclasses.fields(cls)]
        values = {name: getattr(config.planner if name in planned else config, name) for name in names}
        return cls(**values | {"tasks": tuple(values["tasks"])})

    def check(self) -> None:
        """``UserError`` for what this protocol does not know at all."""
        if self.control not in CONTROLS:
            raise unknown_name("control", self.control, CONTROLS, see="docs/worldarena.md")
        for task in self.tasks:
            if task not in TASKS:
                fix = "leave tasks out, or leave protocol=worldarena out"
                raise UserError("tasks", got=task, wanted=f"tasks of the protocol: {', '.join(TASKS)}", fix=fix)
        read_template(self.prompt_template)

    def deviations(self) -> list[str]:
        """What differs from the protocol, in words; empty for a run that may be called by its name. ``interpolated`` is its second run."""
        found = []
        if missing := [task for task in TASKS if task not in self.tasks]:
            found.append(f"without {', '.join(missing)}")
        for name in ("episodes", "max_steps", "execute_horizon"):
            value, wanted = getattr(self, name), getattr(ProtocolSettings(), name)
            if value != wanted:
                found.append(f"{name} {value}, not {wanted}")
        if self.manifest not in ("auto", "test"):
            found.append(f"scenes of {self.manifest}, not of the test set")
        if self.first_seed is not None:
            found.append(f"scenes from seed {self.first_seed} on, not the frozen ones")
        if self.candidates != 1:
            found.append(f"best of {self.candidates} imaginations by {self.verifier}, not the only one")
        if self.denoising_steps:
            found.append(f"denoising_steps {self.denoising_steps}, not the model's own")
        if self.rollout_chunks not in ROLLOUT_CHUNKS:
            found.append(f"plans of {self.rollout_chunks} chained rollouts, not of 1 or 2")
        if read_template(self.prompt_template) != PLAIN_PROMPT:
            found.append("a prompt around the instruction, not the instruction alone")
        return found


def claims(control: str) -> str:
    """What measurements call the protocol."""
    return NAME if control == "topp" else f"{NAME}-{control}"


# ---------------------------------------------------------------------------------------------------------------- prompts


def read_template(text: str) -> str:
    """The prompt template: ``text`` itself, or the content of the file it names (``*.txt``). It holds ``{instruction}`` once."""
    if text.endswith(".txt"):
        path = Path(text)
        if not path.is_file():
            raise UserError("prompt_template", got=text, wanted="an existing file", fix="correct the path")
        text = path.read_text(encoding="utf-8").rstrip("\n")
    if text.count(PLAIN_PROMPT) != 1:
        fix = "put {instruction} where the episode's sentence belongs"
        raise UserError("prompt_template", got=text[:200], wanted="a text with {instruction} once", fix=fix)
    return text


class PromptedPolicy:
    """A policy whose world model and decoder are told ``template`` with the episode's sentence in it (``core.protocols.Policy``)."""

    def __init__(self, policy: Policy, template: str) -> None:
        self._policy, self._before, self._after = policy, *template.split(PLAIN_PROMPT)

    @property
    def fingerprint(self) -> str:
        from physisforcing.core.results import config_hash

        return f"{self._policy.fingerprint}-prompt-{config_hash({'prompt': [self._before, self._after]})[:8]}"

    def reset(self, *, task: str, seed: int, instruction: str) -> None:
        self._policy.reset(task=task, seed=seed, instruction=self._prompt(instruction))

    def act(self, observation: Observation) -> NDArray[np.float32]:
        told = Observation(
            images=observation.images,
            state_A=observation.state_A,
            measured_A=observation.measured_A,
            instruction=self._prompt(observation.instruction),
            step=observation.step,
        )
        return self._policy.act(told)

    def telemetry(self) -> dict[str, float]:
        return self._policy.telemetry()

    def _prompt(self, instruction: str) -> str:
        return f"{self._before}{instruction}{self._after}"


def prompted(policy: Policy, template: str) -> Policy:
    """``policy`` itself for the plain template."""
    template = read_template(template)
    return policy if template == PLAIN_PROMPT else PromptedPolicy(policy, template)


class Unprompted:
    """A world model that is told the episode's own sentence where the planner was told ``template`` with it: the simulator knows no other.

    The decoder still gets the whole prompt. Everything else is the inner model's.
    """

    def __init__(self, world_model: WorldModel, template: str) -> None:
        self.world_model, (self._before, self._after) = world_model, template.split(PLAIN_PROMPT)

    @property
    def spec(self) -> WorldModelSpec:
        return self.world_model.spec

    def rollout(self, request: RolloutRequest) -> Rollout:
        bare = [self._bare(text) for text in request.instructions]
        return self.world_model.rollout(dataclasses.replace(request, instructions=bare))

    def close(self) -> None:
        close = getattr(self.world_model, "close", None)
        if close is not None:
            close()

    def _bare(self, text: str) -> str:
        whole = len(text) >= len(self._before) + len(self._after)
        inside = whole and text.startswith(self._before) and text.endswith(self._after)
        return text[len(self._before) : len(text) - len(self._after)] if inside else text


def unprompted(world_model: WorldModel, template: str) -> WorldModel:
    """``world_model`` itself for the plain template."""
    template = read_template(template)
    return world_model if template == PLAIN_PROMPT else Unprompted(world_model, template)


# ---------------------------------------------------------------------------------------------------------------- results


def block(tasks: Mapping[str, Mapping[str, Any]], settings: ProtocolSettings) -> dict[str, Any]:
    """The protocol's part of a summary. ``tasks``: task -> policy -> counts, as ``planner.summary.summarise`` gives them.

    ``means``: policy -> rate, low, high, n, errors of the mean of both tasks, or ``skipped`` with what is missing.
    """
    names = list(dict.fromkeys(name for policies in tasks.values() for name in policies))
    return {
        "protocol": dataclasses.asdict(settings)
        | {"tasks": list(settings.tasks), "prompt_template": read_template(settings.prompt_template)},
        "deviations": settings.deviations(),
        "method": "mean of two independent proportions of equal weight; limits from their 95 % Wilson limits (Newcombe's method)",
        "means": {name: mean_over_tasks({task: tasks.get(task, {}).get(name) for task in TASKS}) for name in names},
        "published": {name: value for name, value in published().items() if name != "policy_evaluator"},
    }


def markdown(part: Mapping[str, Any]) -> str:
    """The block as Markdown: the means, how episodes were run, and the published rows under their own heading."""
    settings = part["protocol"]
    lines = ["## WorldArena protocol: mean of the two tasks", "", *means_table(part["means"])]
    prompt = "none" if settings["prompt_template"] == PLAIN_PROMPT else settings["prompt_template"]
    lines += [
        "",
        f"- executed rows a plan {settings['execute_horizon']}, step limit {settings['max_steps']}, control {settings['control']}",
        f"- rollouts a plan {settings['rollout_chunks']}, denoising steps {settings['denoising_steps'] or 'of the model'}, candidates "
        f"{settings['candidates']}",
        f"- prompt around the instruction: {prompt}",
        f"- differs from the protocol: {'; '.join(part['deviations']) or 'nothing'}",
        f"- interval: {part['method']}",
        "",
    ]
    return "\n".join(lines) + "\n" + published_markdown(part["published"])


def measurements(part: Mapping[str, Any], *, command: str, provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Lines ``planner/<protocol>/<policy>/mean/success``; what was executed and what differs stands in ``against``."""
    from .measurements import measurement

    settings = part["protocol"]
    against = {name: settings[name] for name in STATED if name != "verifier" or settings["candidates"] > 1}
    against["deviations"] = "; ".join(part["deviations"]) or "none"
    return [
        measurement(
            f"planner/{claims(settings['control'])}/{name}/mean/success",
            mean["rate"],
            unit="share",
            low=mean["low"],
            high=mean["high"],
            n=mean["n"],
            seeds=mean["seeds"],
            against=against,
            command=command,
            provenance=provenance,
        )
        for name, mean in part["means"].items()
        if "rate" in mean
    ]


# -------------------------------------------------------------------------------------------------------------- published


def published() -> dict[str, Any]:
    """The printed results, with sources, and the intervals that follow from them at 100 episodes a task (computed here)."""
    content = json.loads((Path(__file__).parent / "worldarena_published.json").read_text(encoding="utf-8"))
    n = content["episodes_per_task"]
    for row in content["rows"]:
        counts = [(round(row[task] * n / 100), n) for task in content["tasks"]]
        row["intervals"] = {task: wilson(*count) for task, count in zip(content["tasks"], counts, strict=True)}
        row["mean_interval"] = mean_of_proportions(counts)[1:]
    return content


def published_markdown(content: Mapping[str, Any] | None = None) -> str:
    """The published rows as a table of their own."""
    content = published() if content is None else content
    tasks = content["tasks"]
    lines = [f"## {content['title']} (not measured here)", "", content["note"], ""]
    lines += ["| planner | " + " | ".join(tasks) + " | mean | 95 % interval of the mean | source |"]
    lines += ["|" + " --- |" * (len(tasks) + 4)]
    for row in content["rows"]:
        cells = [f"{row[task]} %" for task in tasks] + [f"{row['mean']:.1f} %"]
        low, high = row["mean_interval"]
        sources = ", ".join(row["sources"])
        lines.append("| " + " | ".join([row["planner"], *cells, f"{100 * low:.1f}-{100 * high:.1f} %", sources]) + " |")
    lines += ["", *(f"- {name}: {where}" for name, where in content["sources"].items())]
    lines.append(f"- intervals: computed here from the printed shares at n={content['episodes_per_task']} a task")
    return "\n".join(lines) + "\n"
