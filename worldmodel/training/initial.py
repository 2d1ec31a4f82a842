"""Fine-tuning: the sizes in a run's config are those of the model it starts from.

A model folder fixes the shape of the network, the conditioner's lags and the latents. These values are taken into the config
before anything uses it, so that windows, ``config.yaml`` and the exported model agree.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from physisforcing.core.errors import UserError
from physisforcing.core.paths import weights_root

from ..backbones.wan import PATCH
from ..model import HEADS_NAME
from ..storage import latents_fingerprint, read_json
from .config import TrainVaeConfig, TrainWorldModelConfig


def adopt_model(config: TrainWorldModelConfig) -> None:
    """Check what a run starts from and take its sizes into the config: of a large backbone (``model``) or one of our own."""
    from .large import check_large, check_small

    if config.model:
        check_large(config)
        if config.run.init:
            adopt_heads(config, Path(config.run.init))
    else:
        check_small(config)
        adopt_world_model(config)


def adopt_world_model(config: TrainWorldModelConfig) -> None:
    """Set ``backbone``, ``conditioner`` and the widths of the physics heads to those of ``run.init``, and ``actions`` where it is an
    action model; nothing without it.

    Raises ``UserError`` for a setting that was changed to something else, for a codec with other latents than the model was
    trained on, and for a missing codec or model.
    """
    config.conditioner.lags = tuple(config.conditioner.lags)
    if not config.codec or not (Path(config.codec) / "config.json").is_file():
        fix = f"codec={weights_root() / 'vae'}, which comes with the package, or the folder that physis train vae wrote"
        raise UserError("codec", got=config.codec, wanted="the folder of a video codec", fix=fix)
    if not config.run.init:
        return
    folder = _model_folder(config.run.init, "world_model.json")
    wanted, found = (
        read_json(folder / "world_model.json")["latents_fingerprint"],
        latents_fingerprint(Path(config.codec)),
    )
    if found != wanted:
        raise UserError(
            "codec",
            got=f"{config.codec} (latents {found})",
            wanted=f"a codec with the latents {wanted} that run.init was trained on",
            fix="codec=<the codec of that model>, or train without run.init",
        )
    transformer, denoiser = read_json(folder / "transformer" / "config.json"), read_json(folder / "denoiser.json")
    if tuple(transformer["patch_size"]) != PATCH:
        raise UserError(
            "run.init",
            got=f"patches of {transformer['patch_size']}",
            wanted=f"a model with patches of {list(PATCH)}",
            fix="start from a model of physis train worldmodel",
        )
    backbone = {
        "latent_channels": transformer["in_channels"],
        "num_heads": transformer["num_attention_heads"],
        "head_dim": transformer["attention_head_dim"],
        **{name: transformer[name] for name in ("num_layers", "ffn_dim", "text_dim")},
        "tap": denoiser["tap"],
    }
    conditioner = denoiser["conditioner"] | {"lags": tuple(denoiser["conditioner"]["lags"])}
    _adopt(config.backbone, backbone, "backbone")
    _adopt(config.conditioner, conditioner, "conditioner")
    adopt_heads(config, folder)
    if "actions" in denoiser and not config.actions:
        print("actions=true (from run.init; the default is false)", file=sys.stderr, flush=True)
        config.actions = True


def adopt_heads(config: TrainWorldModelConfig, folder: Path) -> None:
    """Set the widths of the physics heads to those stored in ``folder``; nothing where there are none."""
    _adopt(config.physics, _head_widths(folder), "physics")


def adopt_codec(config: TrainVaeConfig) -> None:
    """Set ``model`` to the sizes of the codec ``run.init``; nothing without it. Raises ``UserError`` as above."""
    if not config.run.init:
        return
    stored = read_json(_model_folder(config.run.init, "config.json") / "config.json")
    names = [item.name for item in fields(config.model)]
    if missing := [name for name in names if name not in stored]:
        raise UserError(
            "run.init",
            got=f"{config.run.init} without {missing[0]}",
            wanted="a codec of physis train vae",
            fix="name one",
        )
    _adopt(config.model, {name: stored[name] for name in names}, "model")


def _model_folder(init: str, needed: str) -> Path:
    folder = Path(init)
    if not (folder / needed).is_file():
        raise UserError(
            "run.init", got=init, wanted=f"a folder with {needed}", fix="name the folder of a trained model"
        )
    return folder


def _head_widths(folder: Path) -> dict[str, int]:
    """Widths of the stored physics heads; none where the model was trained without, whose heads are drawn."""
    from safetensors import safe_open

    path = folder / HEADS_NAME
    if not path.is_file():
        return {}
    with safe_open(path, framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)
    return {
        "phi_hidden": shapes["phi.1.weight"][0],
        "feature_dim": shapes["phi.5.weight"][0],
        "psi_hidden": shapes["psi.1.weight"][0],
    }


def _adopt(settings: Any, stored: Mapping[str, Any], section: str) -> None:
    """Take ``stored`` into the dataclass ``settings``; a field that is neither that nor its default was chosen: ``UserError``."""
    usual = type(settings)()
    for name, value in stored.items():
        chosen = getattr(settings, name)
        if chosen == value:
            continue
        if chosen != getattr(usual, name):
            raise UserError(
                f"{section}.{name}",
                got=chosen,
                wanted=f"{value!r}, with which run.init was trained",
                fix=f"leave {section}.{name} out, or train without run.init",
            )
        print(f"{section}.{name}={value} (from run.init; the default is {chosen})", file=sys.stderr, flush=True)
        setattr(settings, name, value)
