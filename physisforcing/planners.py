"""From settings to a planner's parts: world model (here or in a server), verifier, configuration, and what identifies its results."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from physisforcing.core.errors import UserError

if TYPE_CHECKING:
    from physisforcing.core.protocols import WorldModel
    from physisforcing.planner.action_planner import ActionPlannerConfig
    from physisforcing.planner.verifiers import Verifier

    from .eval_plan import PlannerSettings
    from .model_process import ServerAddress

#: Samples that a server on a GPU computes together, always exactly so many.
GPU_BATCH = 16


def check_planner(settings: PlannerSettings) -> None:
    """``UserError`` for settings that would fail only once models are loaded; no file is looked at."""
    from physisforcing.core.errors import check_at_least
    from physisforcing.planner.model_client import parse_address
    from physisforcing.planner.success_classifier import SuccessClassifier, SuccessConfig
    from physisforcing.planner.verifiers import make_verifier

    check_at_least(settings, candidates=1, rollout_chunks=1)
    if settings.server not in ("", "auto"):
        parse_address(settings.server)
    if settings.candidates > 1:
        if not settings.verifier:
            fix = "planner.verifier=spread (or smoothness, track_consistency, success, combined, random)"
            raise UserError("planner.verifier", got="", wanted="a way to choose among candidates", fix=fix)
        named = SuccessClassifier(SuccessConfig(tasks=("any",))) if settings.success else None
        make_verifier(settings.verifier, classifier=named)


def planner_config(settings: PlannerSettings) -> ActionPlannerConfig:
    """The planner's own part of the settings."""
    from physisforcing.planner.action_planner import ActionPlannerConfig

    names = [field.name for field in dataclasses.fields(ActionPlannerConfig)]
    return ActionPlannerConfig(**{name: getattr(settings, name) for name in names if hasattr(settings, name)})


def planner_verifier(settings: PlannerSettings, device: str) -> Verifier | None:
    """The verifier of several candidates, with its weights; None for a single one."""
    from physisforcing.planner.success_classifier import load_success_classifier
    from physisforcing.planner.verifiers import make_verifier

    if settings.candidates == 1:
        return None
    classifier = load_success_classifier(settings.success, device) if settings.success else None
    return make_verifier(settings.verifier, classifier=classifier)


def open_world_model(
    settings: PlannerSettings, folders: Mapping[str, Path], device: str, server: ServerAddress | None
) -> WorldModel:
    """The world model of the settings: loaded here, or the one in ``server``, which must be the same.

    ``UserError`` where the server has other weights, another number of denoising steps or another way to compute.
    """
    if server is None:
        from physisforcing.worldmodel.model import load_world_model

        steps = settings.denoising_steps or None
        return load_world_model(folders["world_model"], device, codec=folders["codec"], steps=steps)
    from physisforcing.planner.model_client import SocketWorldModel
    from physisforcing.worldmodel.storage import fingerprint, read_json

    model = SocketWorldModel(server.address, token=server.token, connect_s=server.connect_s)
    steps = settings.denoising_steps or int(read_json(folders["world_model"] / "world_model.json")["denoising_steps"])
    wanted = {name: fingerprint(folders[name]) for name in ("world_model", "codec")} | {"denoising_steps": steps}
    for name, value in wanted.items():
        if model.about.get(name) != value:
            model.close()
            fix = "start the server with the weights and steps that this evaluation names, or planner.server=auto"
            got = f"{name} {model.about.get(name)} at {server.address}"
            raise UserError("planner.server", got=got, wanted=f"{name} {value}", fix=fix)
    return model


def state_dim(world_model: Any) -> int | None:
    """How many numbers an action has that the model was trained on; None where it does not say."""
    about = getattr(world_model, "about", None)
    if about is not None:
        return about.get("state_dim")
    denoiser = getattr(world_model, "denoiser", None)
    return None if denoiser is None else int(denoiser.conditioner.config.state_dim)


def served_on(settings: PlannerSettings, server: ServerAddress | None, threads: int) -> str:
    """How a server computes pictures where that is not how this process would on a CPU; empty where it is the same."""
    if not settings.server or (server is None and settings.server != "auto"):
        return ""
    if settings.server == "auto":
        from physisforcing.planner.train import choose_device

        device, batch, others = choose_device(settings.device), GPU_BATCH, threads
    else:
        from physisforcing.planner.model_client import SocketWorldModel

        assert server is not None  # see above
        with SocketWorldModel(server.address, token=server.token, connect_s=server.connect_s) as model:
            device, batch = str(model.about.get("device")), int(model.about.get("batch") or 0)
            others = int(model.about.get("threads") or 0)
    if device == "cpu":
        return "" if (settings.device, threads) == ("cpu", others) else f"cpu with {others} threads"
    return f"{device.partition(':')[0]} in batches of {batch}"


def result_settings(settings: PlannerSettings, server: ServerAddress | None, threads: int = 0) -> dict[str, Any]:
    """The settings that results depend on, weights apart: what cannot change them is left out, and so is what came later and is
    not used, so that older results stay valid. ``threads``: of this evaluation; a server may have others."""
    values = dataclasses.asdict(settings)
    for name in ("world_model", "codec", "decoder", "server", "success", "prompt_template"):
        del values[name]
    if settings.candidates == 1:
        del values["candidates"], values["verifier"]
    else:
        verifier = planner_verifier(settings, "cpu")
        assert verifier is not None
        values["verifier"] = verifier.fingerprint
    if settings.rollout_chunks == 1:
        del values["rollout_chunks"]
    if served := served_on(settings, server, threads):
        values["served"] = served
    return values
