"""``physis data export``: demonstrations, or what a world model imagines from their pictures, in WorldArena's layouts."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from physisforcing.core.errors import UserError, check_at_least, unknown_name

from .episode_settings import PlannerSettings

HELP = """usage: physis data export input=FOLDER output=FOLDER [field=value ...] [--json]

Write demonstrations in WorldArena's layouts, or what the planner imagines from their pictures (docs/worldarena.md).

settings (field=value):
  layout=worldarena      whole episodes: video, actions, states, instructions, metadata
         worldarena_chunks   pictures with 45 rows of actions, as the released data engine writes them
         worldarena_track2   pictures with 40 rows of actions, as the challenge wants them
  input=FOLDER           a dataset of any known layout      tasks=[] (all)      episodes=0 (all; per task)
  source=recorded        pictures and actions of the demonstrations
         imagined        worldarena: pictures and actions of the planner; the other layouts: its actions for real pictures
  first=0                number of the first episode of each task (theirs: 0-39 for training, 40-49 held out)
  states=left_first      columns of states/: as documented; right_first: as their script writes; joint14: drive targets
  hdf5=false             worldarena: also data/episodeN.hdf5 (needs h5py)
  stride=45              chunks: control steps between two pictures (theirs: 1)       rows=0 (0: the layout's own number)
  numbering=number       chunks: names hold the episode's number; list_index: its place in the list, as theirs do
  name=model             track2: name of the model
  seed=0  prompt_template={instruction}  min_rows=128   imagined: noise; text around the sentence; control steps of an episode
  planner=pico           imagined: planner.world_model (any, see physis check worldmodel --help), planner.codec, planner.decoder,
                         planner.denoising_steps, planner.device

examples:
  physis data export input=runs/bell output=runs/worldarena
  physis data export input=runs/bell output=runs/engine layout=worldarena_chunks source=imagined
  physis data export input=runs/bell output=runs/imagined source=imagined states=joint14 episodes=2"""

LAYOUTS = ("worldarena", "worldarena_chunks", "worldarena_track2")
SOURCES = ("recorded", "imagined")
#: What of the planner's settings an export reads.
READ = ("world_model", "codec", "decoder", "denoising_steps", "device")


@dataclass(slots=True, kw_only=True)
class DataExportConfig:
    """Settings of ``physis data export`` (see ``HELP``)."""

    input: str
    output: str
    layout: str = "worldarena"
    source: str = "recorded"
    tasks: list[str] = field(default_factory=list)
    episodes: int = 0
    first: int = 0
    states: str = "left_first"
    hdf5: bool = False
    stride: int = 45
    rows: int = 0
    numbering: str = "number"
    name: str = "model"
    seed: int = 0
    min_rows: int = 128
    prompt_template: str = "{instruction}"
    planner: PlannerSettings = field(default_factory=PlannerSettings)

    def check(self) -> None:
        """``UserError`` for settings that do not go together."""
        from physisforcing.planner.worldarena import read_template
        from physisforcing.planner.worldarena_states import state_names

        for name, known in (("layout", LAYOUTS), ("source", SOURCES)):
            if (value := getattr(self, name)) not in known:
                raise unknown_name(name, value, known, see="physis data export --help")
        check_at_least(self, episodes=0, first=0, stride=1, rows=0, min_rows=1, seed=0)
        state_names(self.states)
        read_template(self.prompt_template)
        for name, usual in dataclasses.asdict(PlannerSettings()).items():
            if name not in READ and getattr(self.planner, name) != usual:
                fix = "prompt_template=" if name == "prompt_template" else "leave it out"
                wanted = f"{usual!r}: an export imagines once and plans nothing"
                raise UserError(f"planner.{name}", got=getattr(self.planner, name), wanted=wanted, fix=fix)
        if self.source == "imagined" and self.layout == "worldarena" and self.states != "joint14":
            fix = "states=joint14"
            raise UserError("states", got=self.states, wanted="joints: imagined arms have no measured poses", fix=fix)


def main(argv: Sequence[str]) -> int:
    """Entry of ``physis data export``."""
    words = [word for word in argv if word != "--json"]
    if not words or any(word in ("-h", "--help") for word in words):
        print(HELP)
        return 0 if words else 2
    from physisforcing.core.config import compose
    from physisforcing.envs.collect import expand_lists

    config = compose("data_export", expand_lists(words, {"task": "tasks", "tasks": "tasks"}), DataExportConfig)
    about = export(config)
    if len(words) < len(argv):
        print(json.dumps(about, indent=2))
    else:
        kind = "episodes" if "episodes" in about else "pairs"
        made = sum(row["generated"] for row in about[kind])
        print(f"{config.output}: {len(about[kind])} {kind} in layout {about['layout']}, {made} of them generated")
    return 0


def export(config: DataExportConfig, *, progress: bool = True) -> dict[str, Any]:
    """Write the folder; returns what its ``physisforcing_export.json`` holds."""
    from tqdm import tqdm

    from physisforcing.core.readers import open_dataset

    config.check()
    dataset = open_dataset(config.input)
    chosen = _chosen(dataset, config)
    bar = tqdm(chosen, desc="episodes", unit="ep", disable=not progress, file=sys.stderr)
    if config.layout == "worldarena":
        return _export_episodes(dataset, bar, config)
    return _export_pairs(dataset, bar, chosen, config)


def _chosen(dataset: Any, config: DataExportConfig) -> list[tuple[int, int]]:
    """(index in the dataset, number in the layout) of the episodes that are written."""
    known = list(dict.fromkeys(episode.task_name for episode in dataset.episodes))
    for task in config.tasks:
        if task not in known:
            raise unknown_name("tasks", task, known, see=config.input)
    counts: dict[str, int] = {}
    chosen = []
    for episode in dataset.episodes:
        place = counts.get(episode.task_name, 0)
        if episode.task_name in (config.tasks or known) and (not config.episodes or place < config.episodes):
            chosen.append((episode.index, config.first + place))
            counts[episode.task_name] = place + 1
    return chosen


def _export_episodes(dataset: Any, chosen: Iterator[tuple[int, int]] | Any, config: DataExportConfig) -> dict[str, Any]:
    from physisforcing.planner.worldarena_layouts import DemonstrationWriter, from_dataset

    imaginer = _Imagining(config) if config.source == "imagined" else None
    fps = imaginer.fps if imaginer else dataset.fps
    writer = DemonstrationWriter(config.output, states=config.states, hdf5=config.hdf5, fps=fps)
    for index, number in chosen:
        if imaginer:
            writer.add(imaginer.episode(dataset, index, number))
        else:
            writer.add(from_dataset(dataset, index, number, poses=config.states != "joint14"))
    return writer.finalize()


def _export_pairs(
    dataset: Any, bar: Iterator[tuple[int, int]] | Any, chosen: list[tuple[int, int]], config: DataExportConfig
) -> dict[str, Any]:
    from physisforcing.core.lerobot_format import HEAD
    from physisforcing.planner.worldarena_data_engine import Pair, PairWriter, rows_from

    imaginer = _Imagining(config) if config.source == "imagined" else None
    numbers: dict[str, list[int]] = {}
    for index, number in chosen:
        numbers.setdefault(dataset.episode(index).task_name, []).append(number)
    # Theirs is a list of names: episode10 stands before episode2.
    lists = {task: sorted(found, key=lambda n: f"episode{n}.mp4") for task, found in numbers.items()}
    options: dict[str, Any] = {"rows": config.rows, "numbering": config.numbering, "episodes": lists}
    writer = PairWriter(config.output, config.layout, name=config.name, **options)
    for index, number in bar:
        info = dataset.episode(index)
        joints = np.asarray(dataset.columns(index)["observation.state"], np.float32)
        # As theirs: pictures after which the episode goes on for all rows; a shorter one gives its first, the last row repeated.
        starts = range(0, max(1, info.length - writer.rows + 1), config.stride)
        pictures = dataset.frames(index, list(starts), HEAD)
        for start, picture in zip(starts, pictures, strict=True):
            about: dict[str, Any] = {"task": info.task_name, "number": number, "start": start, "picture_HW3": picture}
            about |= {"instruction": info.instruction, "state_A": joints[start]}
            if imaginer:
                planned, label = imaginer.actions(info, picture, joints[: start + 1], start, writer.rows)
                about |= {"actions_PA": rows_from(config.layout, planned, 0, writer.rows), "label": label}
            else:
                about["actions_PA"] = rows_from(config.layout, joints, start, writer.rows)
            writer.add(Pair(**about))
    return writer.finalize({"Source": f"{config.source} from {Path(config.input).name}"})


class _Imagining:
    """The planner's models, imagining from the pictures of demonstrations."""

    def __init__(self, config: DataExportConfig) -> None:
        from physisforcing.planner.imagined import EpisodeImaginer
        from physisforcing.planner.train import choose_device
        from physisforcing.planner.worldarena import PLAIN_PROMPT, read_template
        from physisforcing.worldmodel.adapters.resampled import for_decoder

        from .planners import check_source, open_decoder
        from .world_models import load_any

        planner, self.config = config.planner, config
        check_source(planner)
        device = choose_device(planner.device)
        decoder = open_decoder(planner.decoder, device)
        codec = None if planner.codec == "shipped" else planner.codec
        model = load_any(planner.world_model, device, codec=codec, steps=planner.denoising_steps or None)
        model = for_decoder(model, decoder.needs)
        self._imaginer = EpisodeImaginer(model, decoder)
        self._before, self._after = read_template(config.prompt_template).split(PLAIN_PROMPT)
        self._spec = model.spec
        self.fps = 1 / model.spec.frame_dt

    def _label(self, what: str, seed: int) -> str:
        return f"{what} by {self._spec.name} {self._spec.fingerprint}, decoder {self._imaginer.decoder.fingerprint}, seed {seed}"

    def _imagine(self, info: Any, picture: Any, history: Any, start: int, rows: int) -> tuple[Any, int]:
        from physisforcing.planner.action_planner import noise_seed

        # Noise depends on (seed of this export, scene, picture), never on the order of episodes.
        seed = noise_seed(self.config.seed, max(0, info.seed if info.seed >= 0 else info.index), start)
        prompt = f"{self._before}{info.instruction}{self._after}"
        about = (info.task_name, info.seed, start // self.config.stride)
        made = self._imaginer.imagine(picture, history, prompt, seed=seed, min_rows=rows, about=about)
        return made, seed

    def episode(self, dataset: Any, index: int, number: int) -> Any:
        """A whole imagined episode from the first picture of a demonstration."""
        from physisforcing.planner.worldarena_layouts import LayoutEpisode

        info = dataset.episode(index)
        joints = np.asarray(dataset.columns(index)["observation.state"], np.float32)
        made, seed = self._imagine(info, dataset.frames(index, [0])[0], joints[:1], 0, self.config.min_rows)
        return LayoutEpisode(
            task=info.task_name,
            number=number,
            frames_THWC=made.frames_THWC,
            joints_TA=made.joints_at_frames(),
            instructions=[info.instruction],
            label=self._label("pictures and actions generated", seed),
            source={"seed": info.seed, "scene_hash": info.scene_hash, "success": None, "noise_seed": seed},
        )

    def actions(self, info: Any, picture: Any, history: Any, start: int, rows: int) -> tuple[Any, str]:
        """Drive targets [N,A] from a real picture on, row 0 the real ones, and the label of the pair."""
        made, seed = self._imagine(info, picture, history, start, rows)
        return made.joints_NA, self._label("picture recorded in a simulator, actions generated", seed)
