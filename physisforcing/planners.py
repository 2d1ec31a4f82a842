"""From settings to a planner and its parts: world model (here or in a server), decoders, verifier, and what identifies its results."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from physisforcing.core.errors import UserError

if TYPE_CHECKING:
    from physisforcing.core.protocols import InverseDynamics, Policy, VideoRecorderHook, WorldModel
    from physisforcing.core.types import ActionSpec
    from physisforcing.planner.action_planner import ActionPlannerConfig
    from physisforcing.planner.verifiers import Verifier

    from .episode_settings import PlannerSettings
    from .model_process import ServerAddress


def check_planner(settings: PlannerSettings) -> None:
    """``UserError`` for settings that would fail only once models are loaded; no weights are looked at."""
    from physisforcing.core.errors import check_at_least
    from physisforcing.core.message_client import parse_address
    from physisforcing.planner.success_classifier import SuccessClassifier, SuccessConfig
    from physisforcing.planner.verifiers import make_verifier
    from physisforcing.planner.worldarena import read_template

    check_at_least(settings, candidates=1, rollout_chunks=1, execute_horizon=1, denoising_steps=0, max_resamples=0)
    read_template(settings.prompt_template)
    if settings.server not in ("", "auto"):
        parse_address(settings.server, field="planner.server")
    if settings.candidates > 1:
        if not settings.verifier:
            fix = "planner.verifier=spread (or smoothness, track_consistency, success, combined, random)"
            raise UserError("planner.verifier", got="", wanted="a way to choose among candidates", fix=fix)
        named = SuccessClassifier(SuccessConfig(tasks=("any",))) if settings.success else None
        make_verifier(settings.verifier, classifier=named)


def check_device(device: str, workers: int, *, field: str = "planner.device") -> None:
    """``UserError`` for a word that names no device, and for one of several GPUs where processes take them in turn."""
    from physisforcing.planner.train import check_device_name

    check_device_name(device, field=field)
    if workers and ":" in device:
        fix = f"{field}=cuda; CUDA_VISIBLE_DEVICES chooses among GPUs, and processes share those in turn"
        raise UserError(field, got=device, wanted="cuda or cpu with workers=", fix=fix)


def require_device(device: str, output: str, *, field: str = "planner.device") -> None:
    """``UserError`` for a device that is not there. Results that ``output`` holds already can be reported without it."""
    from physisforcing.planner.train import choose_device

    results = Path(output) / "results.jsonl"
    if not results.exists() or not results.stat().st_size:
        choose_device(device, field=field)


def check_control(control: str) -> None:
    """``UserError`` for a control mode that RoboTwin's environment does not know."""
    from physisforcing.core.errors import unknown_name
    from physisforcing.envs.robotwin.env import CONTROLS

    if control not in CONTROLS:
        raise unknown_name("control", control, CONTROLS, see="docs/robotwin.md")


def planner_config(settings: PlannerSettings) -> ActionPlannerConfig:
    """The planner's own part of the settings; its horizon follows from model and decoder (``make_planner``)."""
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


def make_planner(
    settings: PlannerSettings,
    world_model: WorldModel,
    decoder: InverseDynamics,
    *,
    recorder: VideoRecorderHook | None = None,
    action_spec: ActionSpec | None = None,
    verifier: Verifier | None = None,
    show: bool = False,
) -> Policy:
    """The planner of the settings. The model's frames are chosen at the times that the decoder reads, and as many as it takes.

    ``show``: what is imagined is recorded also where the decoder does not read pictures. Raises ``UserError`` for a model and a decoder
    that do not belong together.
    """
    from physisforcing.planner.action_planner import ActionPlanner
    from physisforcing.planner.plannable import planning_horizon
    from physisforcing.planner.worldarena import prompted

    fitted = check_model(world_model, decoder)
    if (own := getattr(world_model, "text", None)) is not None and hasattr(decoder, "text"):
        decoder.text = own  # a feature decoder reads sentences as they were embedded in its training
    config = planner_config(settings)
    config.horizon = planning_horizon(fitted.spec, decoder.needs)
    planner = ActionPlanner(fitted, decoder, config, recorder, action_spec, verifier=verifier, show=show)
    return prompted(planner, settings.prompt_template)


def check_model(world_model: WorldModel, decoder: InverseDynamics) -> WorldModel:
    """The model as the decoder reads it. ``UserError`` naming what is wrong where it cannot be planned with, or not with this decoder."""
    from physisforcing.planner.plannable import check_conditions, check_plannable, planning_horizon
    from physisforcing.worldmodel.adapters.resampled import for_decoder

    check_conditions(world_model.spec)
    check_sentences(world_model, decoder)
    fitted = for_decoder(world_model, decoder.needs)
    check_plannable(fitted.spec, decoder.needs, horizon=planning_horizon(fitted.spec, decoder.needs))
    return fitted


def check_sentences(world_model: WorldModel, decoder: InverseDynamics) -> None:
    """``UserError`` for a decoder that reads sentences as only the world model itself embeds them, and a model that cannot be asked."""
    from physisforcing.worldmodel.text import TEXT_WIDTH

    width = getattr(getattr(decoder, "config", None), "goal_dim", TEXT_WIDTH)
    if width == TEXT_WIDTH or getattr(world_model, "text", None) is not None:
        return
    got = f"{world_model.spec.name}, which embeds no sentences here"
    wanted = f"a model whose encoder makes {width} numbers a token, as in the decoder's training"
    raise UserError(
        "planner.world_model", got=got, wanted=wanted, fix="load it in this process: leave planner.server out"
    )


def open_decoder(name: str, device: str, *, field: str = "planner.decoder") -> InverseDynamics:
    """The decoder of a folder of any kind, or ``shipped``. ``field``: the setting that says it."""
    from physisforcing.planner.decoder_files import load_decoder
    from physisforcing.planner.train import weights_folder

    return load_decoder(weights_folder(name, "idm", field=field), device)


def reads_pictures(decoder: InverseDynamics) -> bool:
    """Whether recorded or drawn video is enough for a decoder."""
    return decoder.needs.returns == {"frames"}


def picture_decoder_name(settings: PlannerSettings) -> str:
    """The decoder that reads the controls' pictures: the planner's own where it reads pictures, else ``planner.picture_decoder``.

    Only the folders' configurations are read. ``UserError`` where that one does not read pictures either.
    """
    from physisforcing.planner.decoder_files import PICTURE_KINDS, read_config
    from physisforcing.planner.train import weights_folder

    for field in ("decoder", "picture_decoder"):
        name = str(getattr(settings, field))
        kind = read_config(weights_folder(name, "idm", field=f"planner.{field}"))["decoder"]
        if kind in PICTURE_KINDS:
            return name
    wanted, fix = f"a decoder that reads pictures ({' or '.join(PICTURE_KINDS)})", "planner.picture_decoder=shipped"
    raise UserError("planner.picture_decoder", got=f"a {kind} decoder in {name}", wanted=wanted, fix=fix)


def recorded_video_needs(settings: PlannerSettings) -> str:
    """What is missing for whole recorded videos to be decoded (``planner.video_decoding``); empty where nothing is. ``UserError`` for a
    second decoder that does not read pictures."""
    from physisforcing.core.types import DT
    from physisforcing.planner.video_decoding import STRIDE, WINDOW_FRAMES

    needs = open_decoder(picture_decoder_name(settings), "cpu").needs
    fits = not needs.horizons or WINDOW_FRAMES in needs.horizons
    fits = fits and (needs.frame_dt is None or abs(needs.frame_dt - STRIDE * DT) < 1e-6)
    return (
        ""
        if fits
        else f"a decoder that reads {WINDOW_FRAMES} pictures, one every {STRIDE * DT:g} s (planner.picture_decoder)"
    )


def is_ours(source: str) -> bool:
    """Whether a world model is weights of ours: shipped, or a folder of ``physis train worldmodel``."""
    return source == "shipped" or (Path(source) / "world_model.json").is_file()


def check_source(settings: PlannerSettings) -> None:
    """``UserError`` for a world model that does not exist, a folder of ours that must be given actions, and settings that only our own
    folders have. Nothing is loaded."""
    from physisforcing.planner.plannable import needs_more

    from .world_models import find_loader

    find_loader(settings.world_model)
    if (Path(settings.world_model) / "actions.safetensors").is_file():
        raise needs_more(settings.world_model, ["actions"])
    for name in () if is_ours(settings.world_model) else ("codec", "denoising_steps"):
        if (value := getattr(settings, name)) not in ("shipped", 0):
            fix = f"leave planner.{name} out; a pipeline folder says its steps in physis_pipeline.json"
            wanted = f"nothing: {settings.world_model} is no world-model folder of ours"
            raise UserError(f"planner.{name}", got=value, wanted=wanted, fix=fix)


def source_name(source: str) -> str:
    """A source as a server and its clients both call it: the whole path of something on disk, else as it is given."""
    return str(Path(source).resolve()) if Path(source).exists() else source


def open_world_model(
    settings: PlannerSettings, folders: Mapping[str, Path], device: str, server: ServerAddress | None
) -> WorldModel:
    """The world model of the settings, from any source (``world_models``): loaded here, or the one in ``server``, which must be the same.

    ``folders``: those of world model and codec where it is ours. ``UserError`` where the server has another model, other weights, another
    number of denoising steps or another way to compute.
    """
    ours = "world_model" in folders
    if server is None:
        from .world_models import load_any

        if not ours:
            return load_any(settings.world_model, device)
        from physisforcing.worldmodel.model import load_world_model

        steps = settings.denoising_steps or None
        return load_world_model(folders["world_model"], device, codec=folders["codec"], steps=steps)
    from physisforcing.planner.model_client import SocketWorldModel
    from physisforcing.worldmodel.storage import fingerprint, read_json

    model = SocketWorldModel(server.address, token=server.token, connect_s=server.connect_s)
    wanted: dict[str, Any] = {"source": source_name(settings.world_model)}
    if ours:
        steps = settings.denoising_steps or int(
            read_json(folders["world_model"] / "world_model.json")["denoising_steps"]
        )
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
    from physisforcing.planner.model_client import SocketWorldModel

    from .model_process import about_server, computed_by

    about = None if server is None or settings.server == "auto" else about_server(server, SocketWorldModel)
    return computed_by(about, settings.device, threads)


def result_settings(settings: PlannerSettings, server: ServerAddress | None, threads: int = 0) -> dict[str, Any]:
    """The settings that results depend on, weights apart: what cannot change them is left out, and so is what came later and is
    not used, so that older results stay valid. ``threads``: of this evaluation; a server may have others."""
    from .model_process import meant_device

    values = dataclasses.asdict(settings) | {"device": meant_device(settings.device)}
    for name in ("world_model", "codec", "decoder", "picture_decoder", "server", "success", "prompt_template"):
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
