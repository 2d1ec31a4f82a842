"""What a world model must refuse: capabilities it does not have, and inputs that are wrong. Same form as ``contract_checks``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.types import FeatureRequest, RolloutRequest

from .contract_checks import ContractBroken, NotApplicable, Outcome
from .contract_probe import RETURNS, Probe

Change = Callable[[Probe, RolloutRequest], RolloutRequest]
Check = Callable[[Probe], Outcome]


def refused(probe: Probe, request: RolloutRequest, kind: type[UserError]) -> str:
    """The message of the refusal. ``ContractBroken`` where there is none, or an error of another kind."""
    try:
        probe.model.rollout(request)
    except kind as error:
        return str(error)
    except Exception as error:
        text = f"raised {type(error).__name__} ({_short(error)})"
        raise ContractBroken(f"{text} instead of {kind.__name__}") from error
    raise ContractBroken(f"answered instead of raising {kind.__name__}")


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else "no message"


def _refusal(change: Change, kind: type[UserError], needs: Callable[[Probe], str] | None = None) -> Check:
    """A check that the base request, changed, is refused. ``needs(probe)``: why it cannot be made, or ''."""

    def check(probe: Probe) -> Outcome:
        missing = needs(probe) if needs is not None else ""
        if missing:
            raise NotApplicable(missing)
        return Outcome(detail=refused(probe, change(probe, probe.base_request()), kind)[:200])

    return check


# ---------------------------------------------------------------------- changes


def _horizon(probe: Probe, request: RolloutRequest) -> RolloutRequest:
    other = next(length for length in range(2, 10**6) if length not in probe.spec.horizons)
    return replace(request, horizon=other)


def _actions(probe: Probe, request: RolloutRequest) -> RolloutRequest:
    spec = probe.spec
    dim = spec.action_spec.dim if spec.action_spec is not None else probe.settings.state_dim
    return replace(request, actions_BSPA=np.zeros((1, 1, 2 * (probe.horizon - 1), dim), np.float32))


def _goal(probe: Probe, request: RolloutRequest) -> RolloutRequest:
    return replace(request, goal_BVHWC=request.context_BVTHWC[:, :, -1])


def _unknown_return(probe: Probe, request: RolloutRequest) -> RolloutRequest:
    return replace(request, returns=frozenset({"sound"}))


def _not_offered(probe: Probe, request: RolloutRequest) -> RolloutRequest:
    name = sorted(RETURNS - frozenset(probe.spec.returns))[0]
    return replace(request, returns=frozenset({name}), features=probe.features if name == "features" else None)


def _tap(probe: Probe, request: RolloutRequest) -> RolloutRequest:
    features = FeatureRequest(taps=(probe.spec.blocks + 1,))
    return replace(request, returns=frozenset({"features"}), features=features)


def _float_context(probe: Probe, request: RolloutRequest) -> RolloutRequest:
    return replace(request, context_BVTHWC=request.context_BVTHWC.astype(np.float32) / 255)


def _small_context(probe: Probe, request: RolloutRequest) -> RolloutRequest:
    return replace(request, context_BVTHWC=request.context_BVTHWC[..., ::2, ::2, :])


def _nan_state(probe: Probe, request: RolloutRequest) -> RolloutRequest:
    assert request.proprioception_BKA is not None
    state = request.proprioception_BKA.copy()
    state[0, 0, 0] = np.nan
    return replace(request, proprioception_BKA=state)


def _nan_action(probe: Probe, request: RolloutRequest) -> RolloutRequest:
    assert request.actions_BSPA is not None
    actions = request.actions_BSPA.copy()
    actions[0, 0, 0, 0] = np.nan
    return replace(request, actions_BSPA=actions)


def _short_actions(probe: Probe, request: RolloutRequest) -> RolloutRequest:
    assert request.actions_BSPA is not None
    return replace(request, actions_BSPA=request.actions_BSPA[:, :, :-1])


def _rows(probe: Probe, request: RolloutRequest) -> RolloutRequest:
    return replace(request, instructions=[*request.instructions, "one sentence too many"])


def _without(condition: str) -> Callable[[Probe], str]:
    return lambda probe: f"a model without {condition}" if condition in probe.spec.conditions else ""


def _with(condition: str) -> Callable[[Probe], str]:
    return lambda probe: "" if condition in probe.spec.conditions else f"conditions with {condition}"


def _offers_less(probe: Probe) -> str:
    return "a model that does not return everything" if frozenset(probe.spec.returns) >= RETURNS else ""


def _offers_features(probe: Probe) -> str:
    return "" if "features" in probe.spec.returns else "returns with features"


#: Name of the check -> the check.
REFUSALS: dict[str, Check] = {
    "refuses-horizon": _refusal(_horizon, MissingCapabilityError),
    "refuses-actions": _refusal(_actions, MissingCapabilityError, _without("actions")),
    "refuses-goal": _refusal(_goal, MissingCapabilityError, _without("goal")),
    "refuses-unknown-return": _refusal(_unknown_return, MissingCapabilityError),
    "refuses-other-return": _refusal(_not_offered, MissingCapabilityError, _offers_less),
    "refuses-tap": _refusal(_tap, UserError, _offers_features),
    "refuses-float-context": _refusal(_float_context, UserError),
    "refuses-small-context": _refusal(_small_context, UserError),
    "refuses-nan-proprioception": _refusal(_nan_state, UserError, _with("proprioception")),
    "refuses-nan-actions": _refusal(_nan_action, UserError, _with("actions")),
    "refuses-short-actions": _refusal(_short_actions, UserError, _with("actions")),
    "refuses-uneven-rows": _refusal(_rows, UserError),
}
