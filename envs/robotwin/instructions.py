"""The sentence that an episode is given: RoboTwin's own templates, filled for the scene."""

from __future__ import annotations

import random
from typing import Any

from physisforcing.core.errors import UserError, unknown_name

from .runtime import Runtime

INSTRUCTIONS = ("template", "full")


def check_instruction(kind: str) -> str:
    if kind not in INSTRUCTIONS:
        raise unknown_name("instruction", kind, INSTRUCTIONS, see="envs/robotwin/instructions.py")
    return kind


def instruction_for(runtime: Runtime, task_name: str, task: Any, seed: int, kind: str) -> str:
    """``template``: one of the task's training templates, drawn by (task, seed) and filled with the scene's objects and
    arm; ``full``: the task's one general description.
    """
    texts = runtime.instructions.load_task_instructions(task_name)
    if kind == "full":
        return texts["full_description"]
    scene = task.get_info()
    rng = random.Random(f"{task_name}/{seed}")  # a string seeds through SHA-512: the same in every process
    fitting = runtime.instructions.filter_instructions(texts["seen"], scene, rng)
    if not fitting:
        raise UserError(
            "instruction",
            got=f"no template of '{task_name}' that fits {sorted(scene)}",
            wanted="templates for the scene's objects",
            fix="use instruction='full'",
        )
    return runtime.instructions.replace_placeholders(fitting[0], scene, rng)
