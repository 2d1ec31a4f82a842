"""A user's own RoboTwin checkout (``ROBOTWIN_ROOT``) behind the same ``Runtime``.

A checkout is imported as the top-level package ``envs``, as RoboTwin's own scripts do, so it needs a process in which
nothing else has that name; its interpreter is the one that RoboTwin was installed into. Its expert plans with cuRobo
where that is usable, else with inverse kinematics on the CPU. The cuRobo path is untested: no machine this was
developed on has cuRobo, and its results say so.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from physisforcing.core.errors import UserError

from .embodiment import resolve_assets
from .runtime import Runtime, found_assets, import_robotwin, no_clutter
from .task_facts import CHECKOUT_LAYOUT, task_config_folder

if TYPE_CHECKING:
    from ..remote import RemoteEnv

#: What a checkout must have, besides its task configurations.
NEEDED = ("envs/_base_task.py", "description/task_instruction")


def load_checkout(root: Path) -> Runtime:
    """Import the checkout below ``root``; ``UserError`` where it is none or the name ``envs`` is taken."""
    root = root.expanduser().absolute()
    needed = (*NEEDED, f"{task_config_folder(root)}/_eval_step_limit.yml")
    missing = [name for name in needed if not (root / name).exists()]
    if missing:
        raise UserError(
            "ROBOTWIN_ROOT",
            got=f"{root}, without {', '.join(missing)}",
            wanted=CHECKOUT_LAYOUT,
            fix="point it at the folder that has envs/, or unset it to use the installed runtime",
        )
    other = sys.modules.get("envs")
    if other is not None and root not in [Path(p).parent for p in other.__path__]:
        raise UserError(
            "ROBOTWIN_ROOT",
            got=f"a process that has already imported another 'envs' ({next(iter(other.__path__))})",
            wanted="the name 'envs' free for the checkout",
            fix="start a new process for it: `physis serve env`, or leave the other 'envs' out",
        )
    curobo = curobo_usable()
    # RoboTwin reads its list of clutter when it is imported
    with found_assets(resolve_assets(None).runtime_path, relative=True):
        sys.path.insert(0, str(root))
        try:
            modules = import_robotwin("envs", keep=("curobo", "mplib", "pytorch3d", "torch") if curobo else ())
        except FileNotFoundError as error:
            raise no_clutter(resolve_assets(None).runtime_path, error) from error
        finally:
            sys.path.remove(str(root))
    return Runtime(
        name="robotwin-checkout", version=_commit(root), package="envs", checkout=True, curobo=curobo, **modules
    )


def checkout_env(task: str, *, root: str | Path | None = None, python: str | None = None, **options: Any) -> RemoteEnv:
    """The task from a checkout in the checkout's own interpreter: a server process and its client, with the methods of
    ``RoboTwinEnv`` that the protocol has.

    ``root``: default ``$ROBOTWIN_ROOT``. ``python``: the interpreter that RoboTwin was installed into (physisforcing must
    be installed there too), default ``$ROBOTWIN_PYTHON``, else this one. ``options``: those of ``RoboTwinEnv``.
    """
    from ..remote import RemoteEnv

    chosen = root or os.environ.get("ROBOTWIN_ROOT")
    if not chosen:
        raise UserError(
            "ROBOTWIN_ROOT",
            got="nothing",
            wanted="the folder of a RoboTwin 2.0 checkout",
            fix="set ROBOTWIN_ROOT, or pass root=FOLDER",
        )
    variables = {"ROBOTWIN_ROOT": str(Path(chosen).expanduser().absolute())}
    return RemoteEnv.spawn(task, python=python or os.environ.get("ROBOTWIN_PYTHON"), env=variables, **options)


def curobo_usable() -> bool:
    """Whether cuRobo and mplib are installed and the CUDA driver has a device. Imports neither of the two."""
    if any(importlib.util.find_spec(name) is None for name in ("curobo", "mplib")):
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def _commit(root: Path) -> str:
    """The first 12 digits of the checkout's commit, read from its files, or ``(no commit)``."""
    git = root / ".git"
    if git.is_file():  # a submodule, or one of several work trees of a repository
        git = root / git.read_text(encoding="utf-8").strip().removeprefix("gitdir: ")
    head, common = git / "HEAD", git / "commondir"
    if not head.is_file():
        return "(no commit)"
    text = head.read_text(encoding="utf-8").strip()
    if text.startswith("ref: "):
        name = text.removeprefix("ref: ")
        shared = git / common.read_text(encoding="utf-8").strip() if common.is_file() else git
        packed = shared / "packed-refs"
        lines = packed.read_text(encoding="utf-8").splitlines() if packed.is_file() else []
        known = {ref: commit for commit, _, ref in (line.partition(" ") for line in lines)}
        loose = shared / name
        text = loose.read_text(encoding="utf-8").strip() if loose.is_file() else known.get(name, "(no commit)")
    return text[:12]
