"""Table 2 of PhysisForcing as a protocol: its six tasks, what a run differs in, the mean over tasks, and the published rows beside ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from physisforcing.core.stats import mean_of_proportions, wilson

if TYPE_CHECKING:
    from .episode_settings import PlannerSettings
    from .policies import ActingPolicy

NAME = "table2"
#: What ``protocol=`` of the command may be.
PROTOCOLS = ("standard", NAME)
TASKS = ("place_empty_cup", "press_stapler", "grab_roller", "shake_bottle", "adjust_bottle", "stack_bowls_two")
#: Success in percent, 200 rollouts a task, as printed (arXiv 2606.28128, Table 2); in the order of ``TASKS``, then the printed average.
PUBLISHED = {
    "Fast-WAM on Wan2.2-TI2V-5B": (41.5, 49.0, 58.5, 97.5, 93.0, 69.5, 68.2),
    "Fast-WAM on Wan2.2-TI2V-5B + PhysisForcing": (63.0, 60.0, 63.0, 94.5, 93.0, 63.0, 72.8),
}
ROLLOUTS = 200
#: Executed rows of a chunk and denoising steps: the published policy's own on RoboTwin (24 of 32 rows), which the paper does not repeat.
EXECUTE, STEPS = 24, 10
OWN = "the tasks' own"
SOURCE = "PhysisForcing, arXiv 2606.28128, Table 2"
NOTE = (
    "One policy trained jointly on the six tasks, 200 rollouts each, as printed. Seeds, scenes, control mode, executed rows a plan, training "
    "data and training seeds were not published: these rows stand beside ours for orientation and are not on the same episodes."
)


@dataclass(slots=True, kw_only=True)
class Table2Settings:
    """What a run of this protocol states, whoever acts; the defaults are the protocol."""

    tasks: tuple[str, ...] = TASKS
    episodes: int = ROLLOUTS
    manifest: str = NAME
    first_seed: int | None = None
    max_steps: int | None = None
    control: str = "topp"

    @classmethod
    def of(cls, config: Any) -> Table2Settings:
        """Of a command's settings (``eval_policy.EvalPolicyConfig``)."""
        values = {one.name: getattr(config, one.name) for one in dataclasses.fields(cls)}
        return cls(**values | {"tasks": tuple(config.tasks)})

    def deviations(self) -> list[str]:
        """What differs from the protocol, in words; empty for a run that may be called by its name. ``interpolated`` is its second run."""
        found = []
        if missing := [task for task in TASKS if task not in self.tasks]:
            found.append(f"without {', '.join(missing)}")
        if more := [task for task in self.tasks if task not in TASKS]:
            found.append(f"also {', '.join(more)}")
        for name in ("episodes", "max_steps"):
            value, wanted = getattr(self, name), getattr(Table2Settings(), name)
            if value != wanted:
                found.append(f"{name} {value}, not {OWN if wanted is None else wanted}")
        if self.manifest != NAME:
            found.append(f"scenes of {self.manifest}, not of {NAME}")
        if self.first_seed is not None:
            found.append(f"scenes from seed {self.first_seed} on, not the frozen ones")
        return found


def acting(policy: ActingPolicy, planner: PlannerSettings) -> tuple[str, list[str]]:
    """How a row acts, and what of that differs from the protocol (as ``Table2Settings.deviations``)."""
    own = policy.settings
    if policy.is_planner:
        horizon = planner.execute_horizon
        found = [] if horizon == EXECUTE else [f"planner.execute_horizon {horizon}, not {EXECUTE}"]
        return f"the planner, {horizon} executed rows a plan", found
    found = [
        f"{name} {value}, not {wanted}"
        for name, value, wanted in (("execute", own.execute, EXECUTE), ("steps", own.steps, STEPS))
        if value != wanted
    ]
    words = f"{own.execute} executed rows a plan, {own.steps} denoising steps, {own.execution}"
    if own.execution != "receding":
        words += f" with delay {own.delay}"
        found.append(f"execution {own.execution} with delay {own.delay}, not receding")
    return words, found


def claims(control: str) -> str:
    """What measurements call the protocol."""
    return NAME if control == "topp" else f"{NAME}-{control}"


def published() -> list[dict[str, Any]]:
    """The printed rows, with the intervals that follow from them at 200 rollouts a task (computed here)."""
    rows = []
    for name, values in PUBLISHED.items():
        counts = [(round(value * ROLLOUTS / 100), ROLLOUTS) for value in values[:-1]]
        rows.append(
            {
                "policy": name,
                "tasks": dict(zip(TASKS, values[:-1], strict=True)),
                "intervals": {task: wilson(*count) for task, count in zip(TASKS, counts, strict=True)},
                "mean": values[-1],
                "mean_interval": mean_of_proportions(counts)[1:],
            }
        )
    return rows


def block(config: Any, policies: Mapping[str, ActingPolicy]) -> dict[str, Any]:
    """The protocol's part of a summary. ``deviations``: of all rows; ``rows``: how each policy acts, and what else differs there."""
    settings, told = Table2Settings.of(config), {name: acting(one, config.planner) for name, one in policies.items()}
    return {
        "protocol": dataclasses.asdict(settings) | {"tasks": list(settings.tasks)},
        "deviations": settings.deviations(),
        "rows": {name: {"acts": words, "deviations": found} for name, (words, found) in told.items()},
        "published": published(),
        "source": SOURCE,
        "note": NOTE,
    }


def row_deviations(part: Mapping[str, Any], names: Sequence[str]) -> str:
    """What differs from the protocol in the rows of these names, as a measurement says it; ``part``: ``block``'s."""
    found = list(part["deviations"])
    for name in names:
        own = (part["rows"].get(name) or {"deviations": []})["deviations"]
        found += own if len(names) == 1 else [f"{name}: {text}" for text in own]
    return "; ".join(found) or "none"


def markdown(part: Mapping[str, Any]) -> str:
    """How episodes were run, and the published rows under their own heading."""
    settings = part["protocol"]
    limit = OWN if settings["max_steps"] is None else settings["max_steps"]
    lines = [
        "## Protocol of Table 2",
        "",
        f"- step limit {limit}, control {settings['control']}; differs from the protocol: {'; '.join(part['deviations']) or 'nothing'}",
        *(
            f"- {name}: {row['acts']}; differs from the protocol: {'; '.join(row['deviations']) or 'nothing'}"
            for name, row in part["rows"].items()
        ),
        "",
        "## Published results (not measured here, not comparable: other scenes)",
        "",
        part["note"],
        "",
        "| policy | " + " | ".join(TASKS) + " | mean | 95 % interval of the mean |",
        "|" + " --- |" * (len(TASKS) + 3),
    ]
    for row in part["published"]:
        cells = [row["policy"], *(f"{row['tasks'][task]:.1f} %" for task in TASKS), f"{row['mean']:.1f} %"]
        low, high = row["mean_interval"]
        lines.append("| " + " | ".join([*cells, f"{100 * low:.1f}-{100 * high:.1f} %"]) + " |")
    lines += [
        "",
        f"- source: {part['source']}; intervals: computed here from the printed shares at n={ROLLOUTS} a task",
    ]
    return "\n".join(lines) + "\n"
