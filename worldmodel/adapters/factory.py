"""World models from Python: ``module:function``, where the function takes nothing and returns a ``WorldModel``."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable

from physisforcing.core.errors import UserError, unknown_name
from physisforcing.core.protocols import WorldModel

#: A dotted module, a colon, a dotted name in it. A Windows path has a separator behind the colon and does not match.
PATTERN = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")


def is_factory(text: str) -> bool:
    """Whether ``text`` has the form ``module:function``."""
    return PATTERN.fullmatch(text) is not None


def find_here() -> None:
    """Let modules in the current folder be found, behind all others, as where Python itself is started: a command is not."""
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)


def find_factory(text: str) -> Callable[[], WorldModel]:
    """Import the module and return the function. This runs the module's code: pass nothing that you would not run.

    Raises ``UserError`` for a module that is not found and a name that it does not have; what the module itself raises passes through.
    """
    name, _, path = text.partition(":")
    find_here()
    try:
        found = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # the module is there and misses something itself
        fix = f"start in the folder that holds {name.split('.')[0]}.py, or install it"
        raise UserError("world_model", got=text, wanted="a module that can be imported", fix=fix) from error
    made: object = found
    for part in path.split("."):
        if not hasattr(made, part):
            raise unknown_name("world_model", part, [n for n in vars(found) if not n.startswith("_")], see=name)
        made = getattr(made, part)
    if not callable(made):
        fix = "write a function without arguments that returns the world model"
        raise UserError("world_model", got=f"{text}, a {type(made).__name__}", wanted="something to call", fix=fix)
    return made
