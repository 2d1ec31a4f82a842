"""The contract suite: does a ``core.protocols.WorldModel`` do what its spec and the contract say?

``check_world_model(load)`` runs every check here and gives a result for each: ``pass``, ``fail``, or ``skipped`` with what it needs, and
the figures that were measured. A model that raises fails the check in question. ``physis check worldmodel`` runs the same checks in a
process of their own, so that a model that hangs or dies fails one check as well.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import UserError, unknown_name
from physisforcing.core.protocols import WorldModel

from . import contract_checks as checks
from .contract_checks import Check, ContractBroken, NotApplicable
from .contract_probe import CONDITIONS, CheckSettings, Probe
from .contract_refusals import REFUSALS

LOAD = "load"
#: Name of each check -> the check, in the order in which they run.
CHECKS: dict[str, Check] = {
    "spec": checks.check_spec,
    "shapes": checks.check_shapes,
    "times": checks.check_times,
    "first-frame": checks.check_first_frame,
    "horizons": checks.check_horizons,
    "returns": checks.check_returns,
    "features": checks.check_features,
    "determinism": checks.check_determinism,
    "seeds": checks.check_seeds,
    "request-kept": checks.check_request_kept,
    "batch-invariance": checks.check_batch,
    "max-batch": checks.check_max_batch,
    **{f"{name}-sensitivity": checks.check_sensitivity(name) for name in ("text", *sorted(CONDITIONS - {"text"}))},
    **REFUSALS,
    "fingerprint": checks.check_fingerprint,
}


@dataclass(slots=True, kw_only=True)
class CheckResult:
    """``status``: pass, fail or skipped. ``detail``: one sentence; of a skipped check what it needs."""

    name: str
    status: str
    detail: str
    measured: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def line(self) -> str:
        """One line for people."""
        text = f"skipped: needs {self.detail}" if self.status == "skipped" else self.detail
        return f"{self.status:<8}{self.name:<28}{text}"


class ContractSuite:
    """The checks of one model, one at a time: ``load`` first, then any of ``CHECKS`` by name.

    ``load`` makes the model; it is called again for the fingerprint. Its ``UserError`` is the caller's (a folder that is not there), any
    other exception fails the check ``load``, and what follows is skipped.
    """

    def __init__(
        self,
        load: Callable[[], WorldModel],
        settings: CheckSettings | None = None,
        pictures: Sequence[NDArray[np.uint8]] = (),
    ) -> None:
        self.settings, self._load, self._pictures = settings or CheckSettings(), load, pictures
        self.probe: Probe | None = None

    def run(self, name: str) -> CheckResult:
        """One check; never raises for what the model does, ``SystemExit`` included."""
        begun = time.perf_counter()
        if name == LOAD:
            result = self._run_load()
        elif self.probe is None:
            result = CheckResult(name=name, status="skipped", detail="a model that loads")
        else:
            result = _run_check(name, CHECKS[name], self.probe)
        result.seconds = round(time.perf_counter() - begun, 3)
        return result

    def _run_load(self) -> CheckResult:
        try:
            model = self._load()
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            return CheckResult(name=LOAD, status="fail", detail=_where(error))
        if not isinstance(model, WorldModel):
            detail = f"{type(model).__name__} has no spec or no rollout: see core.protocols.WorldModel"
            return CheckResult(name=LOAD, status="fail", detail=detail)
        self.probe = Probe(model, self.settings, self._pictures, self._load)
        return CheckResult(name=LOAD, status="pass", detail=f"{type(model).__module__}.{type(model).__qualname__}")

    def identity(self) -> dict[str, str]:
        """Name and fingerprint as the spec gives them, for reports."""
        try:
            assert self.probe is not None
            return {"model": str(self.probe.spec.name), "fingerprint": str(self.probe.spec.fingerprint)}
        except Exception:
            return {"model": "", "fingerprint": ""}


def check_world_model(
    load: Callable[[], WorldModel],
    settings: CheckSettings | None = None,
    *,
    pictures: Sequence[NDArray[np.uint8]] = (),
    only: Sequence[str] = (),
) -> list[CheckResult]:
    """Every check (or ``only`` those named) in this process, without time limits. ``load``: makes the model under test.

    ``pictures`` uint8 [H,W,3]: contexts to use instead of made-up ones, resized to the model's view.
    """
    return list(run_checks(ContractSuite(load, settings, pictures), only))


def run_checks(suite: ContractSuite, only: Sequence[str] = ()) -> Iterator[CheckResult]:
    """The results one by one, ``load`` first."""
    for name in check_names(only):
        yield suite.run(name)


def check_names(only: Sequence[str] = ()) -> list[str]:
    """``load`` and the checks in their order; raises ``UserError`` for a name in ``only`` that is none."""
    for name in only:
        if name not in CHECKS:
            raise unknown_name("only", name, CHECKS, see="physis check worldmodel --help")
    return [LOAD, *(name for name in CHECKS if not only or name in only)]


def summary(results: Sequence[CheckResult]) -> dict[str, int]:
    """How many passed, failed and were skipped."""
    return {status: sum(r.status == status for r in results) for status in ("pass", "fail", "skipped")}


def _run_check(name: str, check: Check, probe: Probe) -> CheckResult:
    def result(status: str, detail: str, measured: dict[str, Any] | None = None) -> CheckResult:
        return CheckResult(name=name, status=status, detail=detail, measured=dict(measured or {}))

    try:
        outcome = check(probe)
    except NotApplicable as why:
        return result("skipped", str(why), why.measured)
    except ContractBroken as broken:
        return result("fail", str(broken), broken.measured)
    except (Exception, SystemExit) as error:
        return result("fail", _where(error))
    return result("pass", outcome.detail, outcome.measured)


def _where(error: BaseException) -> str:
    """Type, message and the last line of code of an exception."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    lines = str(error).strip().splitlines()
    return f"raised {type(error).__name__}: {lines[0][:300] if lines else 'no message'}{place}"
