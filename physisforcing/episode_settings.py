"""What ``physis eval plan`` and ``physis eval policy`` are both told: scenes, planner, how episodes are run; and what of it is refused."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from physisforcing.core.errors import UserError, unknown_name

from .plan_scenes import FIRST_SEED


@dataclass(slots=True, kw_only=True)
class PlannerSettings:
    """Weights and settings of the planner; ``planner=NAME`` selects ``configs/planner/NAME.yaml``."""

    world_model: str = "shipped"
    codec: str = "shipped"
    decoder: str = "shipped"
    picture_decoder: str = "shipped"
    oracle: str = "none"
    execute_horizon: int = 32
    min_motion: float = 0.02
    max_resamples: int = 3
    denoising_steps: int = 0
    device: str = "cpu"
    prompt_template: str = "{instruction}"
    candidates: int = 1
    verifier: str = ""
    success: str = ""
    rollout_chunks: int = 1
    server: str = ""


@dataclass(slots=True, kw_only=True)
class EpisodeSettings:
    """Fields that both commands have; each one's ``HELP`` says what they do, and its own class what else there is."""

    protocol: str = "standard"
    tasks: list[str] = field(default_factory=lambda: ["click_bell"])
    episodes: int = 50
    first_seed: int | None = None
    manifest: str = "auto"
    planner: PlannerSettings = field(default_factory=PlannerSettings)
    baselines: list[str] = field(default_factory=list)
    train_demos: str = ""
    output: str = ""
    control: str = "interpolated"
    max_steps: int | None = None
    workers: int = 0
    threads: int = 2
    videos: int = 3
    retry_errors: bool = False

    @property
    def oracle(self) -> bool:
        """Whether recorded video takes the place of a world model's."""
        return False

    @property
    def demos(self) -> str:
        """Whose video it is."""
        return ""

    def check_run(self) -> None:
        """``UserError`` for a planner or a way to act in the simulator that there is not."""
        from .planners import check_control, check_device, check_planner

        if (Path(self.output) / "meta" / "info.json").is_file():
            fix = "output=runs/<a new folder>"
            raise UserError("output", got=self.output, wanted="a folder for results, not a dataset", fix=fix)
        check_control(self.control)
        check_planner(self.planner)
        check_device(self.planner.device, self.workers)

    def check_scenes(self, baselines: Collection[str], *, see: str) -> None:
        """``UserError`` for unknown tasks, for a baseline that is none of ``baselines``, and for scenes that may have been trained on."""
        from physisforcing.envs.robotwin.tasks import task_info

        for task in self.tasks:
            task_info(task)
        for name in self.baselines:
            if name not in baselines:
                raise unknown_name("baselines", name, baselines, see=see)
        if self.first_seed is not None and self.first_seed < FIRST_SEED:
            fix = f"evaluation seeds start at {FIRST_SEED}"
            raise UserError("first_seed", got=self.first_seed, wanted=f"at least {FIRST_SEED}", fix=fix)


def as_lists(words: Sequence[str]) -> list[str]:
    """``task=NAME`` and single names as lists: what people type."""
    from physisforcing.envs.collect import expand_lists

    return expand_lists(words, {"task": "tasks", "tasks": "tasks", "baselines": "baselines"})
