"""Our policies for other people's runners: RoboTwin's ``policy_name: physisforcing.deploy``, XPolicyLab's ``Model``.

Settings come from the runner's ``usr_args`` or ``deploy.yml``: ``physis_policy`` is ``planner`` (default), ``world_action``, ``noop``, or
``module:factory`` with ``factory(settings) -> core.protocols.Policy``; ``planner`` holds fields of
``eval_plan.PlannerSettings``, for instance ``{device: cuda, execute_horizon: 32}``, and ``policy`` fields of
``policy.settings.PolicySettings``, for instance ``{folder: runs/policy/export, device: cuda}`` or ``{server: "127.0.0.1:7100"}``.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Mapping
from typing import Any

from physisforcing.core.errors import UserError, unknown_name
from physisforcing.core.protocols import Policy
from physisforcing.envs.deploy import XPolicyModel, deploy_interface

POLICIES = ("planner", "world_action", "noop")


def make_policy(settings: Mapping[str, Any]) -> Policy:
    """The policy that ``settings`` name; ``UserError`` for an unknown one."""
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
        raise unknown_name("physis_policy", name, POLICIES, see="or module:factory")
    try:
        make = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        fix = "check the spelling, and that the module can be imported here"
        raise UserError("physis_policy", got=name, wanted=f"module:factory ({error})", fix=fix) from error
    policy = make(dict(settings))
    if not isinstance(policy, Policy):
        fix = "see physisforcing.core.protocols.Policy"
        raise UserError("physis_policy", got=type(policy).__name__, wanted="a Policy", fix=fix)
    return policy


def _world_action(values: Mapping[str, Any]) -> Policy:
    from physisforcing.core.connection import TOKEN_VARIABLE
    from physisforcing.policy.settings import PolicySettings, open_policy

    from .policies import policy_folder

    chosen = PolicySettings.of(values)
    if chosen.folder and (folder := policy_folder(chosen.folder)) is not None:
        chosen.folder = str(folder)  # shipped weights have a name
    return open_policy(chosen, token=os.environ.get(TOKEN_VARIABLE, ""))


def _planner(values: Mapping[str, Any]) -> Policy:
    from physisforcing.core.connection import TOKEN_VARIABLE
    from physisforcing.eval_plan import PlannerSettings
    from physisforcing.planner.train import choose_device

    from .model_process import ServerAddress
    from .plan_episodes import model_folders
    from .planners import check_planner, make_planner, open_decoder, open_world_model, planner_verifier

    known = [field.name for field in dataclasses.fields(PlannerSettings)]
    for name in values:
        if name not in known:
            raise unknown_name("planner", name, known, see="physis eval plan --help")
    chosen = PlannerSettings(**values)
    check_planner(chosen)
    if chosen.server == "auto":
        fix = "start one with physis serve model and give its HOST:PORT"
        raise UserError("planner.server", got="auto", wanted="HOST:PORT, or nothing", fix=fix)
    device = choose_device(chosen.device)
    token = os.environ.get(TOKEN_VARIABLE, "")
    server = ServerAddress(address=chosen.server, token=token) if chosen.server else None
    world_model = open_world_model(chosen, model_folders(chosen), device, server)
    decoder = open_decoder(chosen.decoder, device)
    return make_planner(chosen, world_model, decoder, verifier=planner_verifier(chosen, device))


_interface = deploy_interface(make_policy)
get_model, eval, reset_model = _interface.get_model, _interface.eval, _interface.reset_model


class Model(XPolicyModel):
    """What XPolicyLab's server makes: ``Model(deploy_cfg)``."""

    def __init__(self, model_cfg: Mapping[str, Any]) -> None:
        super().__init__(model_cfg, make_policy)
