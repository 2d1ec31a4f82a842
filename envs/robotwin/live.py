"""At most one live RoboTwin environment a process: RoboTwin keeps its state in globals."""

from __future__ import annotations

import weakref

from physisforcing.core.errors import UserError

_live: weakref.ReferenceType[object] | None = None


def claim(env: object) -> None:
    """Make ``env`` the live one; ``UserError`` while another is open."""
    global _live
    if _live is not None and _live() is not None:
        raise UserError(
            "gymnasium.make",
            got="a second live RoboTwin environment in this process",
            wanted="one (RoboTwin keeps its state in globals)",
            fix="close() the first, or give each a process: gymnasium.vector.AsyncVectorEnv, or the remote environment",
        )
    _live = weakref.ref(env)


def check_live(env: object) -> None:
    """``UserError`` when ``env`` was closed."""
    if _live is None or _live() is not env:
        raise UserError(
            "env", got="a closed environment", wanted="an open one", fix="make a new one with gymnasium.make"
        )


def release(env: object) -> None:
    """Let another environment be made, if ``env`` is the live one."""
    global _live
    if _live is not None and _live() is env:
        _live = None
