"""``physis generate``: a video from a first frame and an instruction, with our world models, the large ones or anyone's."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import UserError

if TYPE_CHECKING:
    from physisforcing.core.episodes import EpisodeSource
    from physisforcing.core.types import RolloutRequest, WorldModelSpec
    from physisforcing.worldmodel.generate import GenerateConfig
    from physisforcing.worldmodel.paper_generate import PaperConfig

OTHERS = """
model=SOURCE: also a diffusers pipeline folder, module:factory or the address of a service (docs/bring_your_world_model.md). Pictures of any
size are resized to its view; what it is conditioned on comes from dataset=, or from instruction= and state=.

  physis generate model=models/wan image=first.png instruction="click the bell" out=bell.mp4

A folder of Wan2.2-I2V-A14B, Wan2.2-TI2V-5B or Cosmos3 (docs/paper_scale.md), with settings of its own; several seeds write out_seed0.mp4,
out_seed1.mp4, ...:

  physis generate model=models/ti2v image=first.png prompt="click the bell" size=480x640 frames=81 seeds=[0,1] out=bell.mp4
  physis generate model=models/a14b image=first.png prompt="click the bell" device=cuda offload=model compile=blocks steps=40 guidance=3.5"""

#: Settings that the large models alone have: naming one asks for them.
LARGE = (
    "transformer", "negative_prompt", "size", "frames", "fps", "sampler", "shift", "guidance", "guidance_low", "boundary", "seeds",
    "first_latent", "experts", "dtype", "offload", "compile", "exact_times",
)  # fmt: skip
#: Classes of pipeline folders that are generated with here, not through the adapter for anyone's pipeline.
LARGE_CLASSES = ("WanImageToVideoPipeline", "Cosmos3OmniPipeline")


def main(argv: Sequence[str]) -> int:
    """Entry of ``physis generate``."""
    from physisforcing.worldmodel import generate as ours

    if not argv or "-h" in argv or "--help" in argv:
        print(ours.HELP + "\n" + OTHERS)
        return 0 if argv else 2
    from physisforcing.core.config import compose

    config = compose("generate", list(argv), ours.GenerateConfig)
    for path in run(config):
        print(path)
    return 0


def run(config: GenerateConfig) -> list[Path]:
    """What was written. Raises ``UserError`` for settings that the model does not have."""
    from physisforcing.planner.train import choose_device
    from physisforcing.worldmodel import generate as ours

    if config.model == "shipped":
        config.model = ""
    choose_device(config.device)
    if config.prompt and config.instruction:
        got = (config.prompt, config.instruction)
        raise UserError("prompt, instruction", got=got, wanted="one of them: they are the same", fix="leave prompt out")
    config.instruction = config.prompt or config.instruction
    said = {name: getattr(config, name) for name in LARGE}
    asked = [name for name, value in said.items() if value is not False and value not in (None, "", [], "none")]
    large = _is_large(config, bool(asked))
    if asked and not large and config.model and ":" not in config.model and not Path(config.model).is_dir():
        raise UserError("model", got=config.model, wanted="a folder that is there", fix="see physis generate --help")
    if asked and not large:
        wanted = f"nothing: only folders of {' and '.join(LARGE_CLASSES)} have {asked[0]}"
        raise UserError(asked[0], got=getattr(config, asked[0]), wanted=wanted, fix=f"leave {asked[0]} out")
    if config.image is not None:
        ours.read_picture(Path(config.image))  # one that is missing is said before a model is loaded for it
    if large:
        return generate_large(config)
    own = not config.model or (Path(config.model) / "world_model.json").is_file()
    return [ours.generate(config) if own else generate_any(config)]


def _is_large(config: GenerateConfig, asked: bool) -> bool:
    """Whether ``model`` is a folder that ``generate_large`` opens; one with settings for the adapter only if more is asked for."""
    folder = Path(config.model)
    if not config.model or not (folder / "model_index.json").is_file():
        return False
    from physisforcing.worldmodel.adapters.pipeline_classes import read_class

    if not asked and (folder / "physis_pipeline.json").is_file():
        return False
    return read_class(folder, config.transformer or "") in LARGE_CLASSES


def generate_large(config: GenerateConfig) -> list[Path]:
    """One video a seed with Wan2.2 or Cosmos3. Metadata say that it is generated, by what, from which seed and with which settings."""
    from tqdm import tqdm

    from physisforcing.core.video import write_mp4
    from physisforcing.worldmodel.adapters.diffusers_pipeline import folder_fingerprint
    from physisforcing.worldmodel.paper_generate import PaperGenerator

    for name in ("state", "actions_episode"):
        if getattr(config, name) not in (None, []):
            wanted = "nothing: this model reads a picture and a sentence"
            raise UserError(name, got=getattr(config, name), wanted=wanted, fix=f"leave {name} out")
    picture, instruction, _, _ = _source(config)
    if not instruction:
        raise UserError("prompt", got=config.instruction, wanted="a sentence", fix='prompt="click the bell"')
    seeds = config.seeds or [config.seed]
    if len(set(seeds)) < len(seeds):
        raise UserError("seeds", got=seeds, wanted="each seed once", fix="leave the repeated ones out")
    generator = PaperGenerator(config.model, _large_settings(config))
    parts = [Path(name) for name in (config.model, config.transformer, config.codec) if name]
    weights = "-".join(folder_fingerprint(part) for part in parts)
    scale, out, written = config.scale or 1, Path(config.out), []
    with tqdm(total=len(seeds) * generator.sampler.steps, unit="step", disable=None) as bar:
        for seed, frames in generator.generate(picture, instruction, seeds, advance=lambda: bar.update()):
            path = out.with_stem(f"{out.stem}_seed{seed}") if len(seeds) > 1 else out
            comment = f"generated by {parts[0].name} {weights}, seed {seed}, {generator.describe()}"
            frames = frames.repeat(scale, axis=1).repeat(scale, axis=2)
            write_mp4(path, frames, generator.fps, {"comment": comment, "title": instruction})
            written.append(path)
    return written


def _large_settings(config: GenerateConfig) -> PaperConfig:
    from physisforcing.worldmodel.paper_generate import PaperConfig

    found = re.fullmatch(r"(\d+)x(\d+)", config.size or "480x640")
    if found is None:
        raise UserError("size", got=config.size, wanted="height x width in pixels", fix="size=480x640")
    same = {name: getattr(config, name) for name in LARGE if name not in ("size", "seeds", "dtype")}
    dtype = config.dtype or ("fp32" if config.device == "cpu" else "bf16")
    height, width, steps = int(found[1]), int(found[2]), config.steps or None
    return PaperConfig(
        **same, height=height, width=width, steps=steps, dtype=dtype, device=config.device, codec=config.codec
    )


def generate_any(config: GenerateConfig) -> Path:
    """One video of a model that ``physisforcing.world_models`` opens; its shortest rollout. Its metadata says that it is generated."""
    from physisforcing.core.video import write_mp4

    from .world_models import load_any

    model = load_any(config.model, config.device, codec=config.codec or None, steps=config.steps or None)
    spec, request = model.spec, request_for(config, model.spec)
    if "frames" not in spec.returns:
        fix = "a model that returns frames"
        raise UserError("model", got=f"{spec.name}, which returns {sorted(spec.returns)}", wanted="frames", fix=fix)
    made = model.rollout(request).frames_BSVTHWC
    assert made is not None
    frames = np.concatenate(list(made[0, 0]), axis=2)  # views side by side
    scale = config.scale or 2
    frames = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    frames = frames[:, : len(frames[0]) // 2 * 2, : len(frames[0, 0]) // 2 * 2]  # MP4 wants even sides
    comment = f"generated by {spec.name} {spec.fingerprint}, seed {config.seed}"
    out = Path(config.out)
    write_mp4(out, frames, 1.0 / spec.frame_dt, {"comment": comment, "title": request.instructions[0]})
    return out


def request_for(config: GenerateConfig, spec: WorldModelSpec) -> RolloutRequest:
    """The request that the settings make of a model with this spec. Raises ``UserError`` for a condition that they do not give."""
    from physisforcing.core.types import RolloutRequest
    from physisforcing.worldmodel.adapters.fitting import place

    picture, instruction, states, start = _source(config)
    if not instruction and "text" in spec.conditions:
        raise UserError("instruction", got=config.instruction, wanted="a sentence", fix='instruction="click the bell"')
    if "goal" in spec.conditions or len(spec.views.names) > 1:
        got = f"{spec.name} with {len(spec.views.names)} cameras, conditions {sorted(spec.conditions)}"
        raise UserError("model", got=got, wanted="one camera and no goal picture", fix="ask it in Python")
    context = np.repeat(place(picture, spec.views.height, spec.views.width, "stretch")[None], spec.context_frames, 0)
    horizon, actions = min(spec.horizons), None
    if "actions" in spec.conditions:
        assert spec.action_spec is not None
        rows = round((horizon - 1) * spec.frame_dt / spec.action_spec.dt)
        executed = _executed(config)
        actions = executed[np.minimum(start + 1 + np.arange(rows), len(executed) - 1)]
    lags = np.asarray(spec.proprioception_lags, np.int64)
    if len(lags) and states is None:
        fix = "state=[...], or dataset=<demonstrations>"
        raise UserError("state", got=None, wanted=f"joint targets, which {spec.name} is conditioned on", fix=fix)
    return RolloutRequest(
        context_BVTHWC=context[None, None],
        instructions=[instruction],
        seeds_BS=np.array([[config.seed]], np.int64),
        horizon=horizon,
        proprioception_BKA=states[np.maximum(start - lags, 0)][None] if len(lags) else None,
        actions_BSPA=None if actions is None else actions[None, None],
    )


def _source(config: GenerateConfig) -> tuple[NDArray[np.uint8], str, Any, int]:
    """-> (picture, instruction, drive targets [T,A] or None, the step of now)."""
    from physisforcing.worldmodel.generate import read_picture

    if (config.image is None) == (config.dataset is None):
        got = (config.image, config.dataset)
        raise UserError("image, dataset", got=got, wanted="exactly one of them", fix="image=first.png")
    if config.image is not None:
        states = np.asarray([config.state], np.float32) if config.state else None
        return read_picture(Path(config.image)), config.instruction or "", states, 0
    assert config.dataset is not None
    from physisforcing.core.readers import open_dataset

    dataset = open_dataset(config.dataset)
    states = _states(dataset, config.episode, "episode", config.start)
    picture = dataset.frames(config.episode, [config.start])[0]
    return picture, config.instruction or dataset.episodes[config.episode].instruction, states, config.start


def _executed(config: GenerateConfig) -> NDArray[np.float32]:
    """Drive targets [T,A] of the episode whose actions are imagined."""
    from physisforcing.core.readers import open_dataset

    if config.dataset is None:
        fix = "dataset=<demonstrations> episode=0"
        raise UserError("dataset", got=None, wanted="a demonstration whose actions are imagined", fix=fix)
    other = config.actions_episode is not None
    episode = config.actions_episode if config.actions_episode is not None else config.episode
    return _states(open_dataset(config.dataset), episode, "actions_episode" if other else "episode", config.start)


def _states(dataset: EpisodeSource, episode: int, field: str, start: int) -> NDArray[np.float32]:
    if not 0 <= episode < dataset.num_episodes:
        raise UserError(field, got=episode, wanted=f"0..{dataset.num_episodes - 1}", fix=f"{field}=0")
    length = dataset.episodes[episode].length
    if not 0 <= start < length:
        raise UserError("start", got=start, wanted=f"0..{length - 1}, the steps of episode {episode}", fix="start=0")
    return np.asarray(dataset.columns(episode)["observation.state"], np.float32)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
