"""Our policies for other people's runners: RoboTwin's ``policy_name: physisforcing.deploy``, XPolicyLab's ``Model``.

Settings come from the runner's ``usr_args`` or ``deploy.yml``: ``physis_policy`` is ``planner`` (default), ``world_action``, ``noop``, or
``module:factory`` with ``factory(settings) -> core.protocols.Policy``; ``planner`` holds fields of
``episode_settings.PlannerSettings``, for instance ``{device: cuda, execute_horizon: 32}``, and ``policy`` fields of
``policies.PolicySettings``, for instance ``{source: runs/policy/export, device: cuda}`` or ``{server: "127.0.0.1:7100"}``.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, TypeVar

from physisforcing.core.errors import UserError, unknown_name
from physisforcing.core.protocols import Policy
from physisforcing.envs.deploy import XPolicyModel, deploy_interface

T = TypeVar("T")

POLICIES = ("planner", "world_action", "noop")


def make_policy(settings: Mapping[str, Any], *, field: str = "physis_policy") -> Policy:
    """The policy that ``settings`` name; ``UserError`` for an unknown one, which calls it ``field``."""
    from physisforcing.worldmodel.adapters.factory import find_here

    name = str(settings.get("physis_policy") or "planner")
    if name == "noop":
        from physisforcing.envs.baselines import NoOp

        return NoOp()
    if name == "planner":
        return _planner(settings.get("planner") or {})
    if name == "world_action":
        return _world_action(settings.get("policy") or {})
    module, colon, factory = name.partition(":")
    if not colon:
        raise unknown_name(field, name, POLICIES, see="or module:factory")
    find_here()
    try:
        make = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        fix = f"check the spelling, and start in the folder that holds {module.split('.')[0]}.py, or install it"
        raise UserError(field, got=name, wanted=f"module:factory ({error})", fix=fix) from error
    policy = make(dict(settings))
    if not isinstance(policy, Policy):
        fix = "see physisforcing.core.protocols.Policy"
        raise UserError(field, got=type(policy).__name__, wanted="a Policy", fix=fix)
    return policy


def _world_action(values: Mapping[str, Any]) -> Policy:
    from .policies import PLANNER, PolicySettings, check_policy, check_source, refuse_served
    from .policy_opening import open_policy

    chosen = _settings(PolicySettings, values, "policy", see="docs/bring_your_policy.md")
    check_policy(chosen)
    if chosen.source == PLANNER:
        raise UserError("policy.source", got=PLANNER, wanted="a policy", fix="physis_policy: planner")
    if chosen.source:
        check_source(chosen)
    elif chosen.server:
        refuse_served(values)  # also where it is what the server would do anyway
    return open_policy(chosen)


def _planner(values: Mapping[str, Any]) -> Policy:
    from physisforcing.planner.train import choose_device

    from .episode_settings import PlannerSettings
    from .model_process import given_server
    from .plan_episodes import model_folders
    from .planners import check_planner, make_planner, open_decoder, open_world_model, planner_verifier

    chosen = _settings(PlannerSettings, values, "planner", see="physis eval plan --help")
    check_planner(chosen)
    if chosen.server == "auto":
        fix = "start one with physis serve model and give its HOST:PORT"
        raise UserError("planner.server", got="auto", wanted="HOST:PORT, or nothing", fix=fix)
    device = choose_device(chosen.device)
    server = given_server(chosen.server) if chosen.server else None
    world_model = open_world_model(chosen, model_folders(chosen), device, server)
    decoder = open_decoder(chosen.decoder, device)
    return make_planner(chosen, world_model, decoder, verifier=planner_verifier(chosen, device))


def _settings(kind: type[T], values: Mapping[str, Any], field: str, *, see: str) -> T:
    """The dataclass ``kind`` of these values; ``UserError`` with the nearest name for one that it does not have."""
    known = [one.name for one in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise unknown_name(field, str(name), known, see=see)
    return kind(**values)


_interface = deploy_interface(make_policy)
get_model, eval, reset_model = _interface.get_model, _interface.eval, _interface.reset_model


class Model(XPolicyModel):
    """What XPolicyLab's server makes: ``Model(deploy_cfg)``."""

    def __init__(self, model_cfg: Mapping[str, Any]) -> None:
        super().__init__(model_cfg, make_policy)
