"""Feature, latent and single-frame decoders behind ``physis train idm decoder=...``: data, world model, training, folder and card."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from physisforcing.core.protocols import WorldModel

from .feature_decoder.goal import TextEncoder
from .frame_store import FrameStore, load_frame_store


def train_on_world_model(
    decoder: str,
    command: Any,
    *,
    device: str,
    folders: dict[str, Path],
    log: Callable[[dict[str, Any]], None],
) -> tuple[dict[str, Any], Callable[[Path], Path]]:
    """``feature`` or ``latent`` on the demonstrations of ``command`` (``planner.train.TrainIdmCommand``).

    ``folders``: ``world_model`` and ``codec``; empty where ``command.world_model`` is a pipeline or a factory, whose features are read through the
    contract. Returns the metrics and a function that writes the weights folder.
    """
    from physisforcing.worldmodel.model import FlowWorldModel, load_world_model
    from physisforcing.worldmodel.storage import latents_fingerprint

    from .decoder_checks import source_of
    from .decoder_windows import DecoderWindows, FrozenWorldModel
    from .offered_features import OfferedFeatures

    began = time.perf_counter()
    model: Any = (
        load_world_model(folders["world_model"], device, codec=folders["codec"])
        if folders
        else make_model(command, device)
    )
    text = encoder_of(model)
    views = model.spec.views
    store = load_frame_store(command.data, height=views.height, width=views.width).to(device)
    log({"event": "loaded", "episodes": store.episodes, "seconds": time.perf_counter() - began})
    settings = command.feature.model if decoder == "feature" else command.latent.model
    shape = {"frames": settings.frames, "stride": settings.steps_per_frame}
    tokens, prompt = (settings.goal_tokens, settings.prompt) if decoder == "feature" else (1, "{instruction}")
    windows = DecoderWindows.build(store, text, **shape, tokens=tokens, prompt=prompt)
    output = Path(command.output)
    if decoder == "feature":
        ours = isinstance(model, FlowWorldModel)
        offered = FrozenWorldModel(model, windows) if ours else OfferedFeatures(model, windows, text)
        from .feature_decoder.files import save_feature_decoder
        from .feature_decoder.training import train_feature_decoder

        command.feature.model.features_fingerprint = source_of(model.spec, "features")
        made, metrics = train_feature_decoder(command.feature, offered, folder=output, resume=command.resume, log=log)
        metrics |= _facts(made, store, source_of(model.spec, "features"))
        return metrics, lambda folder: save_feature_decoder(made, folder, card=card(decoder, metrics))
    frozen = FrozenWorldModel(model, windows)
    from .latent_decoder import save_latent_decoder
    from .latent_training import train_latent_decoder

    settings.latents_fingerprint = latents_fingerprint(folders["codec"])
    trained, metrics = train_latent_decoder(command.latent, frozen, folder=output, resume=command.resume, log=log)
    metrics |= _facts(trained, store, model.spec.fingerprint) | {"latents": settings.latents_fingerprint}
    return metrics, lambda folder: save_latent_decoder(trained, folder, card=card(decoder, metrics))


def make_model(command: Any, device: str) -> WorldModel:
    """The diffusers pipeline in ``command.world_model``, or what the factory (module:function) of that name makes."""
    from physisforcing.worldmodel.adapters.diffusers_pipeline import is_pipeline, open_pipeline
    from physisforcing.worldmodel.adapters.factory import find_factory

    path = Path(command.world_model)
    return open_pipeline(path, device) if is_pipeline(path) else find_factory(command.world_model)()


def encoder_of(model: Any) -> TextEncoder:
    """A model's own encoder of instructions (``text``), else the sentence encoder that the shipped models use."""
    found = getattr(model, "text", None)
    if found is not None:
        return found  # type: ignore[no-any-return]
    from physisforcing.worldmodel.text import TextEmbedder

    return TextEmbedder()


def _facts(model: Any, store: FrameStore, world_model: str) -> dict[str, Any]:
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "world_model": world_model,
        "tasks": sorted(set(store.tasks_E)),
        "seeds": [int(seed) for seed in store.seeds_E],
    }


#: What each row of a card's table is.
ROWS = {
    "model": "decoded, against drive targets",
    "model_measured": "decoded, against measured joints",
    "drive_measured": "recorded drive targets, against measured joints",
    "hold": "start joints repeated",
    "real": "real pictures or latents, against drive targets",
    "real_measured": "real pictures or latents, against measured joints",
    "denoised": "latents denoised in one step from level 0.5",
    "frozen": "the first latent or picture repeated",
    "roundtrip": "pictures through the codec",
}
TITLES = {
    "feature": "Feature decoder: joint targets from one partial denoiser pass",
    "latent": "Latent decoder: joint targets from imagined latents",
    "single_frame": "Single-frame decoder: the pose in each picture alone (a reference, not something to plan with)",
}


def card(decoder: str, metrics: dict[str, Any]) -> str:
    """README.md of a decoder's folder, every figure from this run's held-out evaluation."""
    lines = ["---", "license: mit", "tags: [inverse-dynamics, robotics, robotwin]", "---", f"# {TITLES[decoder]}", ""]
    lines += [
        f"{metrics['parameters'] / 1e6:.2f} M parameters, float16 on disk. Trained on {metrics['episodes']['train']} demonstrations",
        f"({metrics['episodes']['validation']} held out by seed, {metrics['episodes']['left_out']} left out because an arm was further than 10",
        f"degrees from its target), {metrics['steps']} steps; no evaluation seeds (100000 upward).",
    ]
    if decoder == "feature":
        lines.append(f"Reads features of the world model {metrics['world_model']} and of no other.")
    if decoder == "latent":
        lines.append(f"Reads latents of the codec {metrics['latents']}, whichever model imagined them.")
    lines += [
        "",
        "Held-out error (RMSE over joints in degrees, over grippers in percent of the opening), at the start of each of the",
    ]
    lines += [
        f"{metrics['windows']['start']} held-out episodes once and in {metrics['windows']['anywhere']} windows at random frames:",
        "",
    ]
    lines += ["| window at | row | joints (deg) | grippers (%) |", "| --- | --- | --- | --- |"]
    for place in ("start", "anywhere"):
        for name, value in metrics[place].items():
            said = ROWS.get(name, name)
            lines.append(f"| {place} | {said} | {value['joint_deg']:.3f} | {value['gripper_percent']:.2f} |")
    return "\n".join([*lines, ""])
