"""Single episodes of ``physis compare``: a world model or a control acts, and what was imagined is held against what happened."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.executed import ExecutedChunk
from physisforcing.core.results import config_hash
from physisforcing.core.types import DT, WorldModelSpec
from physisforcing.planner.imagination_media import ImaginedChunk
from physisforcing.planner.imagination_rows import merge_rows
from physisforcing.planner.imagination_scores import SCORES_VERSION, score_chunk
from physisforcing.planner.imagined_success import chunk_end

from .compare_controls import VIDEOS, control_model
from .plan_episodes import EpisodeRunner, SparsePictures
from .plan_scenes import Scenes, training_demonstrations

if TYPE_CHECKING:
    from .compare import CompareConfig, ComparedModel

#: Controls that act without a world model.
POLICIES = ("noop", "random", "retrieval")


def identify(
    config: CompareConfig, specs: Mapping[str, WorldModelSpec], models: Sequence[str], controls: Sequence[str]
) -> dict[str, str]:
    """Fingerprints of the models and controls that act: weights, decoder and planner's settings."""
    from physisforcing.core.lerobot import LeRobotDataset
    from physisforcing.envs.simulator_world_model import VERSION as SIMULATOR_VERSION
    from physisforcing.planner.train import weights_folder
    from physisforcing.planner.worldarena import read_template
    from physisforcing.worldmodel.storage import fingerprint

    from .planners import picture_decoder_name, result_settings

    settings: dict[str, Any] = result_settings(config.planner, None)
    if config.planner.prompt_template != "{instruction}":
        settings["prompt"] = read_template(config.planner.prompt_template)
    if config.classifier:
        settings["classifier"] = fingerprint(Path(config.classifier))
    settings["scores"] = SCORES_VERSION
    decoder, pictures = (
        fingerprint(weights_folder(name, "idm", field="planner.decoder"))
        for name in (config.planner.decoder, picture_decoder_name(config.planner))
    )
    found = {}
    for name in models:
        parts = settings | {"decoder": decoder, "world_model": specs[name].fingerprint}
        found[name] = f"{name}-{config_hash(parts)}"
    for name in controls:
        own: dict[str, Any] = {}
        if name in VIDEOS:
            own |= settings | {"decoder": pictures}
        if name == "perfect" and SIMULATOR_VERSION != 1:  # version 1 is not part of the key
            own["simulator"] = SIMULATOR_VERSION
        if name in VIDEOS and VIDEOS[name].needs_demos:
            own["demos"] = LeRobotDataset(config.demos).fingerprint()
        if name.startswith("retrieval"):
            own["train_demos"] = training_demonstrations(config.train_demos).fingerprint()
        if name == "retrieval_video":
            own["decoder"] = pictures
        found[name] = f"{name}-{config_hash(own)}" if own else name
    return found


def load_compared(config: CompareConfig, source: str, device: str) -> Any:
    """A compared world model from any source; codec and denoising steps of the settings are for folders of ours."""
    from .world_models import load_any

    codec, steps = source_codec(source, config.planner.codec), config.planner.denoising_steps or None
    return load_any(source, device, codec=codec, steps=steps)


class ComparisonRunner(EpisodeRunner):
    """Runs episodes in one process (``envs.seeds.Handler``): keeps the models, and one environment a task."""

    def __init__(
        self,
        config: CompareConfig,
        models: Mapping[str, ComparedModel],
        scenes: Scenes,
        filmed: set[tuple[str, int]],
    ) -> None:
        super().__init__(config, scenes.entries, {}, scenes.environments)  # type: ignore[arg-type]
        self.config: CompareConfig = config  # type: ignore[assignment]
        self.models, self.filmed_scenes = models, filmed
        self._key = ""
        self._model: Any = None

    def close(self) -> None:
        self._drop_model()
        super().close()

    def _episode(self, task: str, policy_name: str, seed: int) -> dict[str, Any]:
        from physisforcing.envs.executed import ChunkRecorder
        from physisforcing.envs.rollout import run_episode
        from physisforcing.planner.videos import ImaginationRecorder

        env, imagination = self._environment(task), ImaginationRecorder()
        imagines = policy_name in self.models or policy_name in VIDEOS
        if imagines:
            decoder = self.decoder if policy_name in self.models else self.picture_decoder
            model = self._shown(policy_name, env, decoder)
            show, frame_dt = "frames" in model.spec.returns, model.spec.frame_dt
            policy = self._planner(model, env, imagination, decoder, show=show)
            chunks = ChunkRecorder(env.unwrapped, every=self.config.planner.execute_horizon)
        else:
            (policy, every), chunks = self._policy(policy_name, env, imagination), None
        result = run_episode(
            env if imagines else SparsePictures(env, every),
            policy,
            seed=seed,
            max_steps=self.config.max_steps,
            record=imagines,
            recorder=chunks,
            expect=self.entries.get((task, seed)),
        )
        row = result.row() | {"status": result.status, "success": result.success}
        row["policy_fingerprint"] = result.fingerprint
        if chunks is None or result.status == "error" or not imagination.videos:
            return row
        assert result.frames is not None
        executed = chunks.finish()
        imagined = scored_chunks(imagination.videos, frame_dt, executed, result.frames)
        row["scores"] = merge_rows([chunk.scored.row for chunk in imagined if chunk.scored is not None])
        if policy_name == "other":
            row["scores"] |= self._follows(task, seed, result.executed_PA)
        if self.config.classifier:
            last = imagination.videos[-1][1]
            row["imagined_success"] = float(self._classifier().probability(last[None], [task])[0])
            row["imagined_success_chunks"] = judged_ends(self._classifier(), task, imagined, executed)
        if self._films(policy_name, task, seed, result.success):
            row["panels"] = self._film(policy_name, task, seed, imagined, result)
        return row

    # ------------------------------------------------------------------ who imagines

    def _shown(self, name: str, env: Any, decoder: Any) -> Any:
        """The world model, or the control in its place, as the decoder reads it. One is kept, since a model may fill the memory."""
        from physisforcing.worldmodel.adapters.resampled import for_decoder

        key = name if name in self.models else f"{name}/{env.unwrapped.task_name}"
        if self._key != key:
            self._drop_model()
            if name in self.models:
                made = load_compared(self.config, self.models[name].source, self.device)
            else:
                horizon, prompt = self.config.planner.execute_horizon, self.config.planner.prompt_template
                made = control_model(name, env.unwrapped, self.config.demos, horizon, prompt)
            self._model, self._key = for_decoder(made, decoder.needs), key
        return self._model

    def _drop_model(self) -> None:
        close = getattr(self._model, "close", None)
        if close is not None:
            close()
        self._key, self._model = "", None

    # ------------------------------------------------------------------ what is measured

    def _follows(self, task: str, seed: int, executed_PA: NDArray[np.float32] | None) -> dict[str, float]:
        """Of the control ``other``: how far the executed targets are from the own demonstration's, and from the other's."""
        from physisforcing.planner.oracle import target_errors

        assert executed_PA is not None
        demos, shown = self._demonstrations(), getattr(self._model, "world_model", self._model)
        own, other = demos.load(task, seed), demos.load(task, shown.other_seed(task, seed))
        return {
            "joint_deg": target_errors(executed_PA, own)["joint_deg"],
            "joint_deg_to_other": target_errors(executed_PA, other)["joint_deg"],
        }

    def _classifier(self) -> Any:
        if "classifier" not in self._parts:
            from physisforcing.planner.success_classifier import load_success_classifier

            self._parts["classifier"] = load_success_classifier(self.config.classifier, self.device)
        return self._parts["classifier"]

    # ------------------------------------------------------------------ films

    def _films(self, name: str, task: str, seed: int, success: bool) -> bool:
        """Every model and control in the filmed scenes; beyond them what a model failed at."""
        return (task, seed) in self.filmed_scenes or (name in self.models and not success)

    def _film(
        self, name: str, task: str, seed: int, imagined: list[ImaginedChunk], result: Any
    ) -> list[dict[str, str]]:
        """Films of one episode; their panels as plain values."""
        from physisforcing.planner.imagination_media import film_label, write_panels

        stem = f"{task}_{seed}_{name}_{config_hash({'policy': result.fingerprint})[:8]}"
        label = film_label(name, result.fingerprint, seed)
        executed = dict(enumerate(result.frames))
        panels = write_panels(self.config.output, stem, executed, imagined, model=name, label=label)
        return [dataclasses.asdict(panel) for panel in panels]


def scored_chunks(
    videos: Sequence[tuple[int, NDArray[np.uint8]]],
    frame_dt: float,
    executed: Sequence[ExecutedChunk],
    frames_THWC: NDArray[np.uint8],
) -> list[ImaginedChunk]:
    """Each imagined video (control step, frames) with its scores against the chunk that was executed from there on.

    ``frames_THWC``: pictures of the whole episode, one a control step.
    """
    chunks = {chunk.start_step: chunk for chunk in executed}
    found = []
    for step, video in videos:
        times_T = np.arange(len(video), dtype=np.float64) * frame_dt
        scored = None
        if (chunk := chunks.get(step)) is not None and chunk.steps * DT >= frame_dt:
            real = frames_THWC[step : step + chunk.steps + 1]
            scored = score_chunk(video, times_T, chunk, real, np.arange(len(real)) * DT)
        found.append(ImaginedChunk(step=step, frames_THWC=video, times_T=times_T, scored=scored))
    return found


def judged_ends(
    classifier: Any, task: str, imagined: Sequence[ImaginedChunk], executed: Sequence[ExecutedChunk]
) -> list[tuple[float, bool]]:
    """Of every executed plan: the probability that its imagination shows success at its end, and whether the task was done then."""
    chunks = {chunk.start_step: chunk for chunk in executed}
    found = []
    for plan in imagined:
        chunk = chunks.get(plan.step)
        end = None if chunk is None else chunk_end(plan.frames_THWC, plan.times_T, chunk)
        if end is not None:
            found.append((float(classifier.probability(end[0][None], [task])[0]), end[1]))
    return found


def source_codec(source: str, codec: str) -> str | None:
    """The codec's folder for a world-model folder of ours: the planner's, where the folder has none beside it."""
    from physisforcing.planner.train import weights_folder

    folder = Path(source)
    ours = source == "shipped" or (folder / "world_model.json").is_file()
    if not ours or (source != "shipped" and codec == "shipped" and (folder.parent / "vae").is_dir()):
        return None
    return str(weights_folder(codec, "vae", field="planner.codec"))
