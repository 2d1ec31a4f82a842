"""Single episodes of ``physis eval plan``: environment, policy and models meet here."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from physisforcing.core.errors import UserError
from physisforcing.core.results import config_hash
from physisforcing.planner.summary import MODEL, PERFECT

if TYPE_CHECKING:
    from .episode_settings import EpisodeSettings, PlannerSettings
    from .model_process import ServerAddress

#: Control steps an oracle episode goes on after the last target, holding it: the recorded episodes end at rest, too.
SETTLE = 10


def weight_folders(config: EpisodeSettings) -> dict[str, Path]:
    """The folders this evaluation reads: decoder, and codec and world model where they are ours; the oracle needs no world model."""
    from physisforcing.planner.train import weights_folder

    from .planners import picture_decoder_name

    planner = config.planner
    folders = {"decoder": weights_folder(planner.decoder, "idm", field="planner.decoder")}
    if config.oracle:
        folders["decoder"] = weights_folder(picture_decoder_name(planner), "idm", field="planner.decoder")
        return folders | {"codec": weights_folder(planner.codec, "vae", field="planner.codec")}
    return folders | model_folders(planner)


def model_folders(planner: PlannerSettings) -> dict[str, Path]:
    """Codec and world model, where the world model is a folder of ours; nothing for any other source. ``UserError`` for none at all."""
    from physisforcing.planner.train import weights_folder

    from .planners import check_source, is_ours

    check_source(planner)
    if not is_ours(planner.world_model):
        return {}
    return {
        "codec": weights_folder(planner.codec, "vae", field="planner.codec"),
        "world_model": weights_folder(planner.world_model, "worldmodel", field="planner.world_model"),
    }


def model_parts(config: EpisodeSettings, server: ServerAddress | None, *, acts: bool = True) -> dict[str, str]:
    """Fingerprints of what this evaluation reads. ``acts``: the world model acts, and one that is no folder of ours says itself what it is,
    after a look at whether it can be planned with."""
    from physisforcing.worldmodel.storage import fingerprint

    from .planners import check_model, open_decoder, open_world_model

    parts = {name: fingerprint(folder) for name, folder in weight_folders(config).items()}
    if not acts or "world_model" in parts:
        return parts
    planner = config.planner
    model = open_world_model(planner, {}, "cpu", server)
    try:
        check_model(model, open_decoder(planner.decoder, "cpu"))
        return parts | {"world_model": str(model.spec.fingerprint)}
    finally:
        if hasattr(model, "close"):
            model.close()


def model_settings(config: EpisodeSettings, server: ServerAddress | None) -> dict[str, Any]:
    """The planner's settings that results depend on; the prompt only where it is another than the sentence."""
    from physisforcing.planner.worldarena import PLAIN_PROMPT, read_template

    from .planners import result_settings

    settings = result_settings(config.planner, server, config.threads)
    template = read_template(config.planner.prompt_template)
    return settings | ({} if template == PLAIN_PROMPT else {"prompt_template": template})


def settings_hash(config: EpisodeSettings) -> str:
    """The ``config`` of a result's key: what may change an episode whoever acts in it."""
    return config_hash(
        {"control": config.control, "max_steps": config.max_steps, "threads": config.threads, "settle": SETTLE}
    )


def model_fingerprint(parts: dict[str, str], settings: dict[str, Any]) -> str:
    """The ``fingerprint`` of a result's key for the planner with its world model."""
    return f"{MODEL}-{config_hash(parts | settings)}"


class EpisodeRunner:
    """Runs episodes in one process (``envs.seeds.Handler``): keeps the models, and one environment a task."""

    def __init__(
        self,
        config: EpisodeSettings,
        entries: dict[tuple[str, int], Any],
        filmed: dict[tuple[str, int], str],
        environments: dict[str, dict[str, Any]],
        server: ServerAddress | None = None,
    ) -> None:
        # cuBLAS reads this when it starts; without it its matrix products may differ between runs.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        import torch

        from physisforcing.planner.train import choose_device

        torch.set_num_threads(config.threads)
        self.config, self.entries, self.filmed, self.environments = config, entries, filmed, environments
        self.device, self._server = choose_device(config.planner.device), server
        self._env: Any = None
        self._made: tuple[str, dict[str, Any]] = ("", {})
        self._parts: dict[str, Any] = {}

    @functools.cached_property
    def folders(self) -> dict[str, Path]:
        """Of the planner's weights; looked for where they are read, since other policies act without."""
        return weight_folders(self.config)

    def handle(self, job: Any) -> Any:
        import torch

        from physisforcing.envs.seeds import Outcome

        # Here and not when the runner is made: after a crash it is closed, and goes on with the next episode. What this sets is what
        # use_deterministic_algorithms sets, without importing torch's compiler (seconds of every process), which nothing here uses.
        torch.set_deterministic_debug_mode("error")
        task, policy = job.task.split("/")
        run = self._oracle_episode if self.config.oracle else self._episode
        return Outcome(task=job.task, seed=job.seed, kind="recorded", details=run(task, policy, job.seed))

    def close(self) -> None:
        import torch

        self._close_perfect_model()

        env, self._env = self._env, None
        if env is not None:
            env.close()
        if hasattr(self._parts.get("world_model"), "close"):
            self._parts.pop("world_model").close()
        torch.set_deterministic_debug_mode("default")

    # ------------------------------------------------------------------ closed loop

    def _episode(self, task: str, policy_name: str, seed: int) -> dict[str, Any]:
        from physisforcing.envs.rollout import run_episode
        from physisforcing.planner.videos import ImaginationRecorder, side_by_side, write_labelled

        env, imagination = self._environment(task), ImaginationRecorder()
        film = policy_name == MODEL and (task, seed) in self.filmed
        policy, every = self._policy(policy_name, env, imagination, show=film)
        result = run_episode(
            env if film else SparsePictures(env, every),
            policy,
            seed=seed,
            max_steps=self.config.max_steps,
            record=film,
            expect=self.entries.get((task, seed)),
        )
        row = result.row() | {
            "status": result.status,
            "success": result.success,
            "policy_fingerprint": result.fingerprint,
        }
        if film and result.frames is not None and imagination.videos:
            label = f"left: generated by {result.fingerprint}, episode seed {seed}; right: executed in simulation"
            frames = side_by_side(imagination.videos, dict(enumerate(result.frames)))
            path = Path(self.config.output) / "videos" / f"{self.filmed[task, seed]}_{result.status}.mp4"
            row["video"] = str(write_labelled(path, frames, label=label).relative_to(self.config.output))
        return row

    def _policy(self, name: str, env: Any, imagination: Any, *, show: bool = False) -> tuple[Any, int]:
        """The policy, and after how many control steps it wants to see a picture again (0: never). ``show``: what it imagines is wanted as
        pictures, where the model has them."""
        from physisforcing.envs import baselines

        if name == MODEL:
            model = self._world_model()
            show = show and "frames" in model.spec.returns
            return self._planner(model, env, imagination, show=show), self.config.planner.execute_horizon
        if name == PERFECT:
            model = self._perfect_model(env)
            planner = self._planner(model, env, imagination, self.picture_decoder)
            return planner, self.config.planner.execute_horizon
        if name == "noop":
            return baselines.NoOp(), 0
        if name == "random":
            return baselines.Random(env.unwrapped.action_spec), 0
        if name == "retrieval":
            return self._retrieval(), 0
        from physisforcing.planner.video_decoding import RetrievedVideo

        return RetrievedVideo(self._retrieval(), self.picture_decoder), 0

    def _planner(self, world_model: Any, env: Any, imagination: Any, decoder: Any = None, *, show: bool = False) -> Any:
        """The planner of the settings with this world model; ``imagination`` receives what it imagines. ``decoder``: in place of the
        settings'; ``show`` as in ``planners.make_planner``."""
        from .planners import make_planner, state_dim

        limits, known = env.unwrapped.action_spec, state_dim(world_model)
        if known not in (None, limits.dim):
            fix = "train one on this robot, or use scenes of the robot that the model knows"
            got = f"scenes of a robot with {limits.dim} numbers an action"
            raise UserError("planner.world_model", got=got, wanted=f"{known}, as the model was trained", fix=fix)
        return make_planner(
            self.config.planner,
            world_model,
            self.decoder if decoder is None else decoder,
            recorder=imagination,
            action_spec=limits,
            verifier=self._verifier(),
            show=show,
        )

    # ------------------------------------------------------------------ oracle

    def _oracle_episode(self, task: str, policy_name: str, seed: int) -> dict[str, Any]:
        from physisforcing.envs.rollout import run_episode
        from physisforcing.planner import oracle
        from physisforcing.planner.tool import tool_errors, tool_points
        from physisforcing.planner.video_decoding import OpenLoopPolicy
        from physisforcing.planner.videos import side_by_side, write_labelled

        env, demos = self._environment(task), self._demonstrations()
        # Of all demonstrations, however many of them are evaluated: the partner must not depend on that number.
        seeds = demos.seeds(task)
        demo = demos.load(task, seed)
        other = demos.load(task, seeds[(seeds.index(seed) + 1) % len(seeds)])
        targets = oracle.oracle_targets(policy_name, demo, other, self.picture_decoder, self._round_trip)
        poses: list[Any] = []
        policy = OpenLoopPolicy(policy_name, targets, lambda step: poses.append(env.unwrapped.body_poses()[1]))
        film = policy_name == "oracle" and (task, seed) in self.filmed
        result = run_episode(
            env if film else SparsePictures(env, 0), policy, seed=seed, max_steps=len(targets) + SETTLE, record=film
        )
        row = result.row() | {"status": result.status, "success": result.success}
        row |= oracle.target_errors(targets, demo)
        if result.scene_hash != demo.scene_hash:
            row |= {
                "status": "error",
                "success": None,
                "error": f"scene hash {result.scene_hash}, recorded {demo.scene_hash}",
            }
        if poses:
            ids, _ = env.unwrapped.body_poses()
            executed = tool_points(np.stack(poses), ids, env.unwrapped.body_names())
            row |= tool_errors(executed, demo.tools_T23)
        if policy_name == "other":
            row |= oracle.other_errors(targets, demo, other)
        if film and result.frames is not None:
            frames = side_by_side([(0, demo.frames_THWC[::2])], dict(enumerate(result.frames)))
            path = Path(self.config.output) / "videos" / f"{self.filmed[task, seed]}_{result.status}.mp4"
            label = f"left: demonstration {seed}; right: its video decoded and executed in simulation"
            row["video"] = str(write_labelled(path, frames, label=label).relative_to(self.config.output))
        return row

    def _round_trip(self, window_THWC: Any) -> Any:
        import torch

        from physisforcing.planner.roundtrip import round_trip
        from physisforcing.worldmodel.codec import load_codec

        if "codec" not in self._parts:
            self._parts["codec"] = load_codec(self.folders["codec"], self.device)
        frames = torch.from_numpy(np.ascontiguousarray(window_THWC))[None].to(self.device)
        generator = torch.Generator(self.device)
        return round_trip(self._parts["codec"], frames, latent_noise=0.0, generator=generator)[0].cpu().numpy()

    # ------------------------------------------------------------------ parts, made when first needed

    @property
    def decoder(self) -> Any:
        """Reads joint targets out of what the world model imagines."""
        return self._opened(self.config.planner.decoder, "planner.decoder")

    @property
    def picture_decoder(self) -> Any:
        """Reads joint targets out of recorded pictures: the same one, or a second one where that needs features or latents."""
        from .planners import picture_decoder_name

        return self._opened(picture_decoder_name(self.config.planner), "planner.picture_decoder")

    def _opened(self, name: str, field: str) -> Any:
        from .planners import open_decoder

        if (key := f"decoder {name}") not in self._parts:
            self._parts[key] = open_decoder(name, self.device, field=field)
        return self._parts[key]

    def _environment(self, task: str, **options: Any) -> Any:
        """The environment of this task, with ``options`` beside those that its scenes have; one is kept."""
        import gymnasium

        import physisforcing.envs.robotwin  # noqa: F401  (registers the tasks)

        options = {**self.environments.get(task, {}), **options}
        if self._env is None or self._made != (task, options):
            if self._env is not None:
                self._close_perfect_model()
                self._env.close()
            self._env = gymnasium.make(
                f"RoboTwin/{task}-v0", control=self.config.control, disable_env_checker=True, **options
            )
            self._made = task, options
        return self._env

    def _perfect_model(self, env: Any) -> Any:
        """The simulator itself as world model of this environment; a process of its own."""
        from .compare_controls import control_model

        if PERFECT not in self._parts:
            planner = self.config.planner
            template = planner.prompt_template
            self._parts[PERFECT] = control_model(PERFECT, env.unwrapped, "", planner.execute_horizon, template)
        return self._parts[PERFECT]

    def _close_perfect_model(self) -> None:
        if (model := self._parts.pop(PERFECT, None)) is not None:
            model.close()

    def _world_model(self) -> Any:
        if "world_model" not in self._parts:
            from .planners import open_world_model

            planner = self.config.planner
            self._parts["world_model"] = open_world_model(planner, self.folders, self.device, self._server)
        return self._parts["world_model"]

    def _verifier(self) -> Any:
        if "verifier" not in self._parts:
            from .planners import planner_verifier

            self._parts["verifier"] = planner_verifier(self.config.planner, self.device)
        return self._parts["verifier"]

    def _retrieval(self) -> Any:
        if "retrieval" not in self._parts:
            from physisforcing.core.lerobot import LeRobotDataset
            from physisforcing.envs.baselines import Retrieval

            self._parts["retrieval"] = Retrieval(LeRobotDataset(self.config.train_demos))
        return self._parts["retrieval"]

    def _demonstrations(self) -> Any:
        if "demos" not in self._parts:
            from physisforcing.planner.oracle import HeldOutDemonstrations

            self._parts["demos"] = HeldOutDemonstrations(self.config.demos)
        return self._parts["demos"]


class SparsePictures:
    """The environment without the pictures that nobody looks at: draws at reset and every ``every`` control steps (0: never)."""

    def __init__(self, env: Any, every: int) -> None:
        self.unwrapped, self.action_space, self._env = env.unwrapped, env.action_space, env
        self._every, self._steps = every, 0

    def reset(self, **arguments: Any) -> Any:
        self._steps = 0
        return self._env.reset(**arguments)

    def step(self, action: Any) -> Any:
        self._steps += 1
        seen = self._every and self._steps % self._every == 0
        return self.unwrapped.step(action) if seen else self.unwrapped.step_blind(action)

    def step_blind(self, action: Any) -> Any:
        self._steps += 1
        return self.unwrapped.step_blind(action)
