"""Errors a user can act on: each names the field, what was got, what was wanted and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """The user's mistake (exit code 2). The message names field, got, wanted and fix.

    >>> str(UserError("task", got="clik_bell", wanted="a RoboTwin task", fix="did you mean 'click_bell'?"))
    "task: got 'clik_bell', wanted a RoboTwin task. Fix: did you mean 'click_bell'?"
    """

    exit_code = 2

    def __init__(self, field: str, *, got: object, wanted: str, fix: str) -> None:
        self.field, self.got, self.wanted, self.fix = field, got, wanted, fix
        super().__init__(f"{field}: got {got!r}, wanted {wanted}. Fix: {fix}")

    def __reduce__(self) -> tuple:  # keyword-only arguments do not survive the default exception reduction
        return (_rebuild, (type(self), self.field, self.got, self.wanted, self.fix))


class IncompleteCoverageError(RuntimeError):
    """Part of what was asked for could not be evaluated or collected (exit code 3)."""

    exit_code = 3


class MissingCapabilityError(UserError):
    """A model was asked for something its spec does not offer."""


class DatasetError(UserError):
    """A dataset on disk is incomplete or damaged."""


class UnstableSceneError(RuntimeError):
    """The scene of this seed does not come to rest. Collectors skip and count it; nothing moves to another seed."""


class ServerLostError(ConnectionError):
    """The process on the other side died, hung or went away; the message names where it was."""


class VulkanUnavailableError(RuntimeError):
    """No Vulkan device can render."""


def _rebuild(cls: type[UserError], field: str, got: object, wanted: str, fix: str) -> UserError:
    return cls(field, got=got, wanted=wanted, fix=fix)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to ``name``, or None when nothing is close."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return found[0] if found else None


def unknown_name(field: str, name: str, known: Iterable[str], *, see: str) -> UserError:
    """A ``UserError`` for a name that is not in ``known``, offering the nearest one."""
    names = sorted(known)
    close = nearest(name, names)
    fix = f"did you mean '{close}'?" if close else f"choose from {', '.join(names[:12])}"
    return UserError(field, got=name, wanted=f"one of {len(names)} known names ({see})", fix=fix)


def check_at_least(settings: object, prefix: str = "", /, **lowest: float) -> None:
    """``UserError`` for the first of these fields of ``settings`` that is below its lowest value. ``prefix``: before its name in the message."""
    for name, low in lowest.items():
        if (value := getattr(settings, name)) < low:
            said = f"{prefix}{name}"
            raise UserError(said, got=value, wanted=f"at least {low}", fix=f"write {said}={low} or more")
