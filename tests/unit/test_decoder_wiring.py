"""Decoder folders of every kind where a decoder is opened, world models from every source, and what is refused with what is needed."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from physisforcing.compare import CompareConfig, ComparedModel, ComparisonPlan
from physisforcing.compare_controls import VIDEOS
from physisforcing.compare_models import RETRIEVED, look_at_models, picture_note, refused_controls
from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.lerobot import HEAD, LeRobotWriter, robot_features
from physisforcing.core.types import DT, ActionSpec, Observation, RolloutRequest, WorldModelSpec
from physisforcing.data_export import DataExportConfig, export
from physisforcing.deploy import make_policy
from physisforcing.envs.control_models import FrozenFrame
from physisforcing.eval_plan import MODEL, EvalPlanConfig, PlannerSettings, _Plan
from physisforcing.model_process import ServerAddress
from physisforcing.plan_episodes import EpisodeRunner, weight_folders
from physisforcing.planner.action_planner import ActionPlanner
from physisforcing.planner.feature_decoder.config import ActionHeadConfig as HeadConfig
from physisforcing.planner.feature_decoder.config import FeatureDecoderConfig, ResamplerConfig, SamplingConfig
from physisforcing.planner.feature_decoder.decoder import FeatureInverseDynamics
from physisforcing.planner.feature_decoder.files import save_feature_decoder
from physisforcing.planner.imagined import EpisodeImaginer
from physisforcing.planner.inverse_dynamics import InverseDynamicsConfig
from physisforcing.planner.latent_decoder import LatentDecoderConfig, LatentInverseDynamics, save_latent_decoder
from physisforcing.planner.plannable import planning_horizon
from physisforcing.planner.service.toy import ToyWorldModel
from physisforcing.planner.single_frame import SingleFrameInverseDynamics, save_single_frame_decoder
from physisforcing.planners import (
    check_model,
    make_planner,
    open_decoder,
    open_world_model,
    picture_decoder_name,
    recorded_video_needs,
    result_settings,
    source_name,
)
from physisforcing.worldmodel.storage import latents_fingerprint

KINDS = ("single_frame", "latent", "feature")
FROZEN = "physisforcing.envs.control_models:FrozenFrame"
STATE = np.linspace(-0.5, 0.5, 14, dtype=np.float32)


def statistics() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.zeros(14), torch.full((14,), 0.5), torch.full((14,), 0.1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Small untrained decoders with the geometry of the shipped world model."""
    from physisforcing.core.paths import weights_root

    root = tmp_path_factory.mktemp("decoders")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size: dict[str, Any] = {"channels": 8, "blocks": 1, "keypoints": 2, "flat_channels": 1, "dim": 12, "heads": 2}
        latents = latents_fingerprint(weights_root() / "vae")
        latent = LatentInverseDynamics(LatentDecoderConfig(**size, latents_fingerprint=latents))
        other = LatentInverseDynamics(LatentDecoderConfig(**size, latents_fingerprint="0123456789ab"))
        single = SingleFrameInverseDynamics(InverseDynamicsConfig(dim=16, heads=2))
        feature = FeatureInverseDynamics(
            FeatureDecoderConfig(
                resampler=ResamplerConfig(width=32, depth=1, heads=2, head_dim=16, latents_per_frame=2),
                head=HeadConfig(width=32, encoder_layers=1, decoder_layers=1, heads=2),
                sampling=SamplingConfig(steps=2, draws=2),
            )
        )
    for model in (latent, other, single, feature):
        model.set_statistics(*statistics())
    made = {
        "single_frame": save_single_frame_decoder(single, root / "single_frame"),
        "latent": save_latent_decoder(latent, root / "latent"),
        "feature": save_feature_decoder(feature, root / "feature"),
        "other_latents": save_latent_decoder(other, root / "other_latents"),
    }
    return {name: str(folder) for name, folder in made.items()}


def observation() -> Observation:
    picture = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    return Observation(images={"head": picture}, state_A=STATE, measured_A=STATE, instruction="click the bell", step=0)


# --- decoder folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_runner_of_others_gets_any_decoder(folders: dict[str, str], kind: str) -> None:
    policy = make_policy({"planner": {"decoder": folders[kind], "denoising_steps": 1}})
    policy.reset(task="click_bell", seed=1, instruction="click the bell")
    rows = policy.act(observation())
    assert rows.shape == (32, 14) and np.isfinite(rows).all()
    assert type(policy.inverse_dynamics).__name__.lower().startswith(kind.replace("_", ""))  # type: ignore[attr-defined]
    assert policy.telemetry()["plans"] == 1 and np.abs(rows - STATE).max() >= 0.02


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    writer = LeRobotWriter(
        tmp_path_factory.mktemp("data") / "demos",
        robot_features([f"joint{k}" for k in range(14)], height=120, width=160),
    )
    joints = np.repeat(STATE[None], 6, axis=0)
    columns = dict.fromkeys(("observation.state", "observation.state_measured", "action"), joints)
    pictures = np.random.default_rng(1).integers(0, 256, (6, 120, 160, 3), dtype=np.uint8)
    about = {"success": True, "policy": "expert", "embodiment": "robot", "assets_version": "1", "scene_hash": "x"}
    writer.add_episode(
        columns={**columns, "next.success": np.arange(6) == 5},
        frames={HEAD: pictures},
        instruction="click the bell",
        task_name="click_bell",
        seed=3,
        **about,
    )
    return Path(writer.finalize())


@pytest.mark.parametrize("kind", KINDS[1:])
def test_an_export_imagines_with_any_decoder(
    folders: dict[str, str], demonstrations: Path, tmp_path: Path, kind: str
) -> None:
    config = DataExportConfig(
        input=str(demonstrations), output=str(tmp_path), source="imagined", states="joint14", min_rows=32
    )
    config.planner = PlannerSettings(decoder=folders[kind], denoising_steps=1)
    told = export(config, progress=False)["episodes"][0]
    assert f"decoder {open_decoder(folders[kind], 'cpu').fingerprint}" in told["label"] and told["generated"]


def test_a_decoder_that_the_model_cannot_feed_is_refused_with_what_is_needed(
    folders: dict[str, str], demonstrations: Path, tmp_path: Path
) -> None:
    config = DataExportConfig(input=str(demonstrations), output=str(tmp_path), source="imagined", states="joint14")
    for kind, returns in (("feature", "features"), ("latent", "latents")):
        said = rf"returns .*{returns}.*planner.decoder=shipped.*{kind} decoder"
        with pytest.raises(MissingCapabilityError, match=said):
            make_policy({"planner": {"decoder": folders[kind], "world_model": FROZEN}})
        config.planner = PlannerSettings(decoder=folders[kind], world_model=FROZEN)
        with pytest.raises(MissingCapabilityError, match=said):
            export(config, progress=False)
    with pytest.raises(MissingCapabilityError, match=r"0123456789ab.*decoder=latent.*planner.decoder=shipped"):
        make_policy({"planner": {"decoder": folders["other_latents"]}})
    with pytest.raises(UserError, match=r"planner.decoder.*a folder with"):
        make_policy({"planner": {"decoder": str(tmp_path / "none")}})


def test_a_decoder_of_other_blocks_is_refused(folders: dict[str, str]) -> None:
    decoder = open_decoder(folders["feature"], "cpu")
    spec = dataclasses.replace(FrozenFrame().spec, returns=frozenset({"features"}), blocks=4)
    with pytest.raises(MissingCapabilityError, match=r"4 blocks.*blocks 2, 4, 6"):
        check_model(SimpleNamespace(spec=spec), decoder)  # type: ignore[arg-type]


def test_controls_read_pictures_with_a_second_decoder(folders: dict[str, str]) -> None:
    def chosen(**settings: str) -> str:
        return picture_decoder_name(PlannerSettings(**settings))  # type: ignore[arg-type]

    assert chosen() == "shipped" and chosen(decoder=folders["single_frame"]) == folders["single_frame"]
    assert chosen(decoder=folders["feature"]) == "shipped" == chosen(decoder=folders["latent"])
    assert chosen(decoder=folders["feature"], picture_decoder=folders["single_frame"]) == folders["single_frame"]
    with pytest.raises(UserError, match=r"planner.picture_decoder.*latent decoder.*pixel or single_frame"):
        chosen(decoder=folders["feature"], picture_decoder=folders["latent"])


def test_an_oracle_check_reads_its_pictures_with_the_second_decoder(folders: dict[str, str]) -> None:
    config = EvalPlanConfig(planner=PlannerSettings(decoder=folders["feature"], oracle="video"), demos="x")
    runner = EpisodeRunner(config, {}, {}, {})
    assert runner.decoder.needs.returns == {"features"} and runner.picture_decoder.needs.returns == {"frames"}
    assert weight_folders(config)["decoder"].name == "idm", "it is what the results are keyed by"
    same = EpisodeRunner(EvalPlanConfig(), {}, {}, {})
    assert same.decoder is same.picture_decoder


# --- comparisons -----------------------------------------------------------------------------------------------------


def compared(**planner: Any) -> CompareConfig:
    return CompareConfig(models={"mine": "shipped"}, planner=PlannerSettings(**planner))


def test_controls_that_no_decoder_can_read_are_listed(folders: dict[str, str], tmp_path: Path) -> None:
    controls = ["noop", "retrieval", RETRIEVED, *VIDEOS]
    assert refused_controls(PlannerSettings(decoder=folders["feature"]), controls) == {}
    assert "reads features" in picture_note(PlannerSettings(decoder=folders["feature"]))
    assert picture_note(PlannerSettings(decoder=folders["single_frame"])) == ""
    with torch.random.fork_rng():
        longer = SingleFrameInverseDynamics(InverseDynamicsConfig(frames=33, dim=16, heads=2))
    longer.set_statistics(*statistics())
    second = str(save_single_frame_decoder(longer, tmp_path / "longer"))
    found = refused_controls(PlannerSettings(decoder=folders["feature"], picture_decoder=second), controls)
    assert set(found) == {RETRIEVED, *VIDEOS}
    assert "17 pictures" in found[RETRIEVED] and "frames for 3.84 s" in found["oracle"]
    assert recorded_video_needs(PlannerSettings(decoder=second)) == found[RETRIEVED]
    assert recorded_video_needs(PlannerSettings(decoder=folders["feature"])) == ""
    # the models' plans may be longer than what the controls' decoder reads
    assert "1..32" in refused_controls(PlannerSettings(execute_horizon=40), ["frozen", "noop"])["frozen"]
    assert refused_controls(PlannerSettings(execute_horizon=40), ["noop"]) == {}


def test_models_are_looked_at_before_the_simulator_starts(folders: dict[str, str]) -> None:
    config = compared(decoder=folders["latent"])
    models = {"mine": ComparedModel(source="shipped"), "still": ComparedModel(source=FROZEN)}
    with pytest.raises(MissingCapabilityError, match=r"latents.*planner.decoder=shipped"):
        look_at_models(config, models, rows=())
    looked = look_at_models(config, models, rows={"still"})
    assert set(looked.specs) == {"mine", "still"} and set(looked.resting) == {"still"}
    assert "planner.decoder=shipped" in looked.resting["still"]
    toy = {"toy": ComparedModel(source="physisforcing.planner.service.toy:actions")}
    rests = look_at_models(compared(), toy, rows=()).resting["toy"]
    assert rests.startswith("a planner that gives it actions") and "is measured" in rests
    config = compared()
    config.sensitivity = 0
    with pytest.raises(MissingCapabilityError, match="must be given actions"):
        look_at_models(config, toy, rows=())


@pytest.mark.sim
def test_a_comparison_keys_controls_by_the_decoder_that_reads_them(folders: dict[str, str], tmp_path: Path) -> None:
    def plan_of(**planner: Any) -> ComparisonPlan:
        config = compared(**planner)
        config.controls, config.episodes, config.output = ["noop", "frozen", "perfect"], 1, str(tmp_path)
        return ComparisonPlan(config, progress=False)

    plain, feature = plan_of(), plan_of(decoder=folders["feature"])
    assert plain.names == feature.names == ["mine", "noop", "frozen", "perfect"]
    assert list(feature.skipped) == ["imagined success"], "no classifier was given"
    assert plain.fingerprints["frozen"] == feature.fingerprints["frozen"], "the shipped decoder reads it in both"
    assert plain.fingerprints["mine"] != feature.fingerprints["mine"] and feature.note and not plain.note
    third = plan_of(decoder=folders["feature"], picture_decoder=folders["single_frame"])
    assert third.fingerprints["mine"] == feature.fingerprints["mine"]
    assert third.fingerprints["frozen"] != feature.fingerprints["frozen"]


# --- models that a planner cannot use --------------------------------------------------------------------------------


def test_a_model_that_must_be_given_actions_is_refused_at_once() -> None:
    decoder = open_decoder("shipped", "cpu")
    model = ToyWorldModel(height=120, width=160, horizon=17)
    said = (
        r"world_model: got 'toy, which must be given actions'.*picture and an instruction.*text model.*eval evaluator"
    )
    for refused in (lambda: ActionPlanner(model, decoder), lambda: EpisodeImaginer(model, decoder)):
        with pytest.raises(MissingCapabilityError, match=said):
            refused()
    with pytest.raises(MissingCapabilityError, match=said):
        make_planner(PlannerSettings(), model, decoder)
    assert model.rollouts == 0
    spec = dataclasses.replace(FrozenFrame().spec, conditions=frozenset({"text", "goal"}))
    with pytest.raises(MissingCapabilityError, match="which must be given goal"):
        ActionPlanner(SimpleNamespace(spec=spec), decoder)  # type: ignore[arg-type]


def test_the_horizon_is_one_that_model_and_decoder_have() -> None:
    spec, needs = FrozenFrame().spec, open_decoder("shipped", "cpu").needs
    several = dataclasses.replace(spec, horizons=(9, 17, 33))
    assert planning_horizon(several, needs) == 17
    assert planning_horizon(several, dataclasses.replace(needs, horizons=(33, 45))) == 33
    assert planning_horizon(dataclasses.replace(spec, horizons=(9, 33)), dataclasses.replace(needs, horizons=())) == 9


# --- world models from every source ----------------------------------------------------------------------------------


class Fast:
    """Imagines twice as many pictures as the decoder reads."""

    def __init__(self) -> None:
        self.asked: list[RolloutRequest] = []
        self.spec: WorldModelSpec = dataclasses.replace(FrozenFrame().spec, horizons=(49,), frame_dt=DT, name="fast")

    def rollout(self, request: RolloutRequest) -> Any:
        from physisforcing.core.types import Rollout

        self.asked.append(request)
        shape = (*request.seeds_BS.shape, 1, 49, 120, 160, 3)
        return Rollout(times_T=np.arange(49) * DT, frames_BSVTHWC=np.zeros(shape, np.uint8))


def test_frames_of_another_rate_are_chosen_for_the_decoder() -> None:
    model = Fast()
    planner = make_planner(PlannerSettings(max_resamples=0), model, open_decoder("shipped", "cpu"))
    planner.reset(task="t", seed=0, instruction="click")
    assert planner.act(observation()).shape == (32, 14) and model.asked[0].horizon == 49


def plan(source: str, **settings: Any) -> _Plan:
    planner = PlannerSettings(world_model=source, **settings)
    return _Plan(EvalPlanConfig(planner=planner, baselines=["noop"], episodes=2))


def planned(config: EvalPlanConfig) -> tuple[Any, int]:
    """The planner of a runner in a scene that is never drawn."""
    runner = EpisodeRunner(config, {}, {}, {})
    limits = ActionSpec(names=tuple("abcdefghijklmn"), low=(-3.0,) * 14, high=(3.0,) * 14)
    policy, every = runner._policy(MODEL, SimpleNamespace(unwrapped=SimpleNamespace(action_spec=limits)), None)
    policy.reset(task="click_bell", seed=100_000, instruction="click the bell")
    return policy, every


def test_a_factory_and_a_folder_of_videos_plan(tmp_path: Path) -> None:
    from physisforcing.planner.imagination import context_pictures
    from physisforcing.worldmodel.adapters.video_folder import VideoFolderWriter, VideoManifest

    writer = VideoFolderWriter(
        tmp_path / "videos", VideoManifest(name="recorded", fps=25 / 3, frames=17, height=120, width=160)
    )
    first = context_pictures(observation(), FrozenFrame().spec)[0, 0]
    writer.add(("click_bell", 100_000, 0), np.repeat(first[None, None], 17, axis=1), source="toy 1f")
    writer.close()
    for source, name in ((FROZEN, "frozen"), (str(tmp_path / "videos"), "recorded")):
        policy, every = planned(EvalPlanConfig(planner=PlannerSettings(world_model=source, max_resamples=0)))
        assert policy.world_model.spec.name == name and every == 32 and policy.act(observation()).shape == (32, 14)


def test_a_diffusers_folder_plans(tiny_wan_folder: Path, tmp_path: Path) -> None:
    import json

    settings = tmp_path / "wan.json"
    values = {"height": 32, "width": 32, "frames": 17, "fps": 25 / 3, "steps": 1, "pipeline": str(tiny_wan_folder)}
    settings.write_text(json.dumps(values))
    policy, _ = planned(EvalPlanConfig(planner=PlannerSettings(world_model=str(settings), max_resamples=0)))
    assert policy.world_model.spec.name == "WanImageToVideo" and policy.act(observation()).shape == (32, 14)


@pytest.mark.sim
def test_another_source_has_results_of_its_own() -> None:
    keys = [
        {made.key(job).fingerprint for job in made.jobs if job.task.endswith(MODEL)}
        for made in (plan(FROZEN), plan(FROZEN.replace("FrozenFrame", "NoiseWorldModel")), plan("shipped"))
    ]
    assert [len(found) for found in keys] == [1, 1, 1] and len(set.union(*keys)) == 3
    with pytest.raises(UserError, match="must be given actions"):
        plan("physisforcing.planner.service.toy:actions")


def test_sources_that_do_not_fit_are_refused_before_the_simulator_starts(tmp_path: Path) -> None:
    for name in ("world_model.json", "actions.safetensors"):
        (tmp_path / name).touch()
    for source, settings, said in (
        ("nowhere/at/all", {}, "no such file or folder"),
        (FROZEN, {"denoising_steps": 4}, r"planner.denoising_steps.*no world-model folder of ours"),
        (FROZEN, {"codec": "mine"}, r"planner.codec.*no world-model folder of ours"),
        (str(tmp_path), {}, "must be given actions"),
    ):
        planner = PlannerSettings(world_model=source, **settings)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=said):
            weight_folders(EvalPlanConfig(planner=planner))
    assert set(weight_folders(EvalPlanConfig(planner=PlannerSettings(world_model=FROZEN)))) == {"decoder"}
    assert set(weight_folders(EvalPlanConfig())) == {"decoder", "codec", "world_model"}


def test_a_server_says_which_source_it_has(tmp_path: Path) -> None:
    from physisforcing.planner.model_server import ModelServer, ModelServerConfig
    from physisforcing.serve_model import ServeModelConfig, _about

    model = FrozenFrame()
    server = ModelServer(model, ModelServerConfig(), about=_about(ServeModelConfig(model=FROZEN), "cpu", model))
    address = ServerAddress(address=f"127.0.0.1:{server.open()}")
    threading.Thread(target=server.run, daemon=True).start()
    try:
        found = open_world_model(PlannerSettings(world_model=FROZEN), {}, "cpu", address)
        assert found.spec == model.spec
        with pytest.raises(UserError, match=r"planner.server.*source physisforcing.*wanted source physis.*Noise"):
            open_world_model(PlannerSettings(world_model=FROZEN.replace("FrozenFrame", "Noise")), {}, "cpu", address)
    finally:
        server.stop()
    assert source_name(str(tmp_path)) == str(tmp_path.resolve()) and source_name(FROZEN) == FROZEN


def test_the_second_decoder_is_no_part_of_older_keys(folders: dict[str, str]) -> None:
    plain = result_settings(PlannerSettings(), None, 2)
    assert result_settings(PlannerSettings(picture_decoder=folders["single_frame"]), None, 2) == plain
