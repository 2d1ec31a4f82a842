"""``physis train idm``: train an inverse dynamics model on demonstrations and write a weights folder.

The pixel decoder sees real frames and frames that went through the video codec only; feature and latent decoders are trained on a
frozen world model. Never on evaluation seeds.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from physisforcing.core.errors import UserError, unknown_name

from .decoder_files import KINDS
from .feature_decoder.training import FeatureTrainConfig
from .idm_training import IdmTrainConfig
from .latent_training import LatentTrainConfig

USAGE = """usage: physis train idm data=[FOLDER,...] [field=value ...]

Trains a decoder that reads joint targets out of an imagination: of its pictures (decoder=pixel), its latents (latent), or features of one
partial denoiser pass (feature). decoder=single_frame reads each picture alone: a reference.

examples:
  physis train idm data=[runs/demos]
  physis train idm data=[runs/bell,runs/blocks] codec=runs/vae/codec output=runs/idm device=cuda
  physis train idm data=[runs/cups] init=shipped train.lr=3e-4
  physis train idm data=[runs/bell] train.steps=200 train.batch=8 train.roundtrip_pool=32
  physis train idm decoder=feature data=[runs/bell] device=cuda feature.fit.time_limit_s=240 feature.fit.precision=bf16
  physis train idm decoder=feature feature_decoder=worldarena data=[runs/bell] world_model=my_package.models:wan_features
  physis train idm decoder=latent data=[runs/bell] world_model=runs/pico/export codec=runs/vae/codec latent.fit.steps=3000

feature_decoder=pico|paper|worldarena: the feature decoder's sizes (then feature.model.* for single ones). pico fits the shipped model.
paper and worldarena are the published geometry: they need a world model that offers features of width 3072 from 30 blocks, for 45 frames
one control step apart (12 latent frames of 15x20 tokens: Wan2.2-TI2V-5B at 480x640), and whose `text` embeds to 4096 numbers a token
(UMT5; with another encoder feature.model.goal_dim=384). world_model=FOLDER of a diffusers Wan pipeline with expand_timesteps, with its
physis_pipeline.json (docs/bring_your_world_model.md), is such a model; world_model=module:function is any other; importing it runs its code.

init=shipped (or a folder): a pixel decoder goes on from trained weights, with their normalisation.

fields: data, decoder (pixel, single_frame, latent, feature), init, codec and world_model (folders; 'shipped' are the packaged ones), output,
device (auto, cpu, cuda), threads, resume (feature and latent: go on from the checkpoints of fit.save_every), train.* for pictures (steps,
time_limit_s, batch, lr, seed, roundtrip_share, ...), feature.*, latent.*. See configs/train_idm.yaml."""


@dataclass(slots=True, kw_only=True)
class TrainIdmCommand:
    """Settings of ``physis train idm``."""

    data: list[str]
    decoder: str = "pixel"
    codec: str = "shipped"
    world_model: str = "shipped"
    init: str = ""
    output: str = "runs/idm"
    device: str = "auto"
    threads: int = 0
    resume: bool = False
    train: IdmTrainConfig = field(default_factory=IdmTrainConfig)
    feature: FeatureTrainConfig = field(default_factory=FeatureTrainConfig)
    latent: LatentTrainConfig = field(default_factory=LatentTrainConfig)


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    if any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0
    from physisforcing.core.config import compose

    run(compose("train_idm", list(argv), TrainIdmCommand))
    return 0


def run(command: TrainIdmCommand) -> dict[str, Any]:
    """Load, train, measure on held-out seeds, save. Returns the metrics that ``metrics.json`` holds."""
    import torch

    from .decoder_fit import check_folder
    from .idm_training import print_row
    from .train_decoders import train_on_world_model

    if command.decoder not in KINDS:
        raise unknown_name("decoder", command.decoder, KINDS, see="physis train idm --help")
    if command.resume and command.decoder in ("pixel", "single_frame"):
        fix = "repeat the run: it takes minutes"
        raise UserError("resume", got=True, wanted="a feature or latent decoder", fix=fix)
    if command.init and command.decoder != "pixel":
        raise UserError(
            "init", got=command.init, wanted="nothing for this decoder", fix="decoder=pixel, or leave it out"
        )
    if command.threads:
        torch.set_num_threads(command.threads)
    device, output = choose_device(command.device), Path(command.output)
    if command.decoder in ("feature", "latent"):
        check_folder(output, resume=command.resume)  # before the rows of that run are overwritten
    output.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with (output / "train.jsonl").open("a" if command.resume else "w") as lines:

        def log(row: dict[str, Any]) -> None:
            lines.write(json.dumps(row) + "\n")
            lines.flush()
            print_row(row)

        if command.decoder in ("feature", "latent"):
            folders = model_folders(command)
            metrics, save = train_on_world_model(command.decoder, command, device=device, folders=folders, log=log)
        else:
            metrics, save = train_on_pictures(command, device=device, log=log)
    metrics.setdefault("train_seconds", time.perf_counter() - began)
    metrics["hardware"] = torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
    metrics["torch"] = torch.__version__
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    (output / "config.json").write_text(json.dumps(dataclasses.asdict(command), indent=2) + "\n")
    save(output / "model")
    print_row({"event": "done", **{f"{k}_deg": v["joint_deg"] for k, v in metrics["start"].items()}})
    return metrics


def train_on_pictures(
    command: TrainIdmCommand, *, device: str, log: Callable[[dict[str, Any]], None]
) -> tuple[dict[str, Any], Callable[[Path], Path]]:
    """The pixel decoder or the single-frame reference. Returns the metrics and a function that writes the weights folder."""
    from physisforcing.worldmodel.codec import load_codec

    from .frame_store import load_frame_store
    from .idm_training import train_inverse_dynamics
    from .inverse_dynamics import PixelInverseDynamics, load_inverse_dynamics, save_inverse_dynamics
    from .single_frame import SingleFrameInverseDynamics, save_single_frame_decoder
    from .train_decoders import card

    config, codec = command.train, None
    if config.roundtrip_share > 0:
        codec = load_codec(weights_folder(command.codec, "vae", field="codec"), device)
    began = time.perf_counter()
    store = load_frame_store(command.data, height=config.model.height, width=config.model.width)
    loaded = {"episodes": store.episodes, "frames": len(store.frames_NHWC), "seconds": time.perf_counter() - began}
    log({"event": "loaded", **loaded})
    build = PixelInverseDynamics if command.decoder == "pixel" else SingleFrameInverseDynamics
    began = time.perf_counter()
    init = load_inverse_dynamics(weights_folder(command.init, "idm", field="init")) if command.init else None
    model, metrics = train_inverse_dynamics(config, store, codec, device=device, log=log, build=build, init=init)
    metrics["train_seconds"] = time.perf_counter() - began
    metrics["parameters"] = sum(p.numel() for p in model.parameters())
    if isinstance(model, SingleFrameInverseDynamics):
        single = model
        return metrics, lambda folder: save_single_frame_decoder(single, folder, card=card("single_frame", metrics))
    assert isinstance(model, PixelInverseDynamics)
    pixel = model
    return metrics, lambda folder: save_inverse_dynamics(pixel, folder, card=model_card(command, metrics))


def model_folders(command: TrainIdmCommand) -> dict[str, Path]:
    """World model and codec of a decoder that reads them; empty where the world model is a diffusers pipeline or comes from a factory."""
    from physisforcing.worldmodel.adapters.diffusers_pipeline import is_pipeline
    from physisforcing.worldmodel.adapters.factory import is_factory

    path = Path(command.world_model)
    pipeline = is_pipeline(path) and not (path / "world_model.json").is_file()
    if pipeline or (is_factory(command.world_model) and not path.exists()):
        if command.decoder != "feature":
            fix = "give a world-model folder, or train decoder=feature"
            raise UserError("world_model", got=command.world_model, wanted="a folder with its codec", fix=fix)
        return {}
    return {
        "world_model": weights_folder(command.world_model, "worldmodel", field="world_model"),
        "codec": weights_folder(command.codec, "vae", field="codec"),
    }


def check_device_name(name: str, *, field: str = "device") -> None:
    """``UserError`` for a word that names no device, whether it is there or not. ``field``: the setting that says it."""
    if name.partition(":")[0] not in ("auto", "cpu", "cuda", "mps", "xpu"):
        raise UserError(field, got=name, wanted="auto, cpu, cuda, cuda:N, mps or xpu", fix=f"{field}=auto")


def choose_device(name: str, *, field: str = "device") -> str:
    """'auto' is the GPU where torch sees one. Raises ``UserError`` for a device that is not there. ``field``: the setting that says it."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device_name(name, field=field)
    kind = name.partition(":")[0]
    if kind != "cpu" and not getattr(torch, kind).is_available():
        build = kind == "cuda" and torch.version.cuda is None
        more = "; this PyTorch is a build for the CPU: PHYSIS_CUDA=1 make setup installs the other" if build else ""
        raise UserError(field, got=name, wanted="a device torch can use", fix=f"{field}=cpu{more}")
    return name


def weights_folder(name: str, part: str, *, field: str) -> Path:
    """The folder of weights called ``name``: a path, or 'shipped' for the packaged ``part``. ``field``: the setting that says it."""
    from physisforcing.core.paths import weights_root

    folder = weights_root() / part if name == "shipped" else Path(name)
    if not folder.is_dir():
        raise UserError(field, got=str(folder), wanted="a folder with weights", fix=f"train it, or give {field}=FOLDER")
    return folder


def model_card(command: TrainIdmCommand, metrics: dict[str, Any]) -> str:
    """README.md of the weights folder, every figure from this run's held-out evaluation."""
    rows = []
    for place in ("start", "anywhere"):
        for name, value in metrics[place].items():
            rows.append(f"| {place} | {name} | {value['joint_deg']:.3f} | {value['gripper_percent']:.2f} |")
    c = command.train
    return "\n".join(
        [
            "---",
            "license: mit",
            "tags: [inverse-dynamics, robotics, robotwin]",
            "---",
            "# Pixel inverse dynamics model",
            "",
            "Reads 32 joint targets (0.06 s apart; radians, gripper 0..1) out of 17 head-camera frames (120x160, 0.12 s apart)",
            f"and the drive targets of the first frame. {metrics['parameters'] / 1e6:.2f} M parameters, float16 on disk.",
            "",
            f"Trained on {metrics['episodes']['train']} demonstrations ({metrics['episodes']['validation']} held out by seed,",
            f"{metrics['episodes']['left_out']} left out because an arm was further than 10 degrees from its target),",
            f"{metrics['steps']} steps of {c.batch} windows, {100 * c.roundtrip_share:.0f} % of them passed through the video codec;",
            "no imagined frames, no evaluation seeds (100000 upward). Simulated pictures of the self-made asset pack:",
            "expect nothing on other robots or cameras without retraining.",
            "",
            "Held-out error of the predicted targets (RMSE over joints in degrees, over grippers in percent of the opening),",
            f"at the start of each of the {metrics['windows']['start']} validation episodes once (start), and in",
            f"{metrics['windows']['anywhere']} windows at random frames of them, drawn with replacement (anywhere); `frozen` repeats",
            "the first picture, `hold` the start joints; `real_measured` is against measured joints instead of drive targets, and",
            "`drive_measured` the drive targets themselves against those (the least that can be reached):",
            "",
            "| window at | pictures | joints (deg) | grippers (%) |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            f"Hardware {metrics['hardware']}, torch {metrics['torch']}, {metrics['train_seconds']:.0f} s.",
            "",
        ]
    )


__all__ = ["IdmTrainConfig", "TrainIdmCommand", "choose_device", "main", "model_card", "run", "weights_folder"]
