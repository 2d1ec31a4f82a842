"""RoboTwin 2.0's own task classes behind ``gymnasium.make("RoboTwin/<task>-v0")``.

Importing this package registers the tasks and imports no simulator.
"""

from .tasks import list_tasks, register_tasks, task_info

__all__ = ["list_tasks", "register_tasks", "task_info"]

register_tasks()
