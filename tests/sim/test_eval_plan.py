"""``physis eval plan`` in the real simulator: oracle check, closed loop, resuming, equal results of equal commands.

Weights are tiny and untrained here: what is tested is that episodes run, are counted, continue and repeat. What good pictures
lead to is tested with exact stand-ins for world model and decoder, which know one recorded demonstration.
"""

import json

import numpy as np
import pytest
import torch

from physisforcing.core.errors import UserError
from physisforcing.core.types import DT, ActionChunk, DecoderNeeds, Rollout, ViewLayout, WorldModelSpec
from physisforcing.eval_plan import EvalPlanConfig, PlannerSettings, evaluate, main
from physisforcing.plan_episodes import SparsePictures

pytestmark = pytest.mark.sim
TASK = "click_bell"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Tiny untrained decoder, codec and world model in folders as the commands write them."""
    from physisforcing.planner.inverse_dynamics import (
        InverseDynamicsConfig,
        PixelInverseDynamics,
        save_inverse_dynamics,
    )
    from physisforcing.worldmodel.autoencoder import CausalVideoAutoencoder
    from physisforcing.worldmodel.backbones.wan import ConditionerConfig, WanConfig, build_denoiser
    from physisforcing.worldmodel.model import save_world_model
    from physisforcing.worldmodel.storage import latents_fingerprint, save_diffusers

    root = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = InverseDynamicsConfig(
            channels=(16, 16), blocks=(1, 1), keypoints=4, flat_channels=2, dim=48, layers=1, heads=2
        )
        decoder = PixelInverseDynamics(small)
        decoder.set_statistics(torch.zeros(14), torch.ones(14), torch.full((14,), 0.2))
        save_inverse_dynamics(decoder, root / "idm")
        codec = CausalVideoAutoencoder(
            latent_channels=4,
            fine_channels=16,
            decoder_fine_channels=16,
            coarse_channels=16,
            group_channels=16,
            fine_blocks=1,
            decoder_fine_blocks=1,
        )
        codec.set_statistics(torch.zeros(4), torch.ones(4))
        save_diffusers(codec, root / "vae")
        size = WanConfig(latent_channels=4, num_heads=1, head_dim=24, num_layers=2, ffn_dim=48, tap=1)
        denoiser = build_denoiser(size, ConditionerConfig(hidden=16))
        save_world_model(
            root / "worldmodel",
            denoiser,
            None,
            sample_shift=3.0,
            latents_fingerprint=latents_fingerprint(root / "vae"),
            home_state=[0.0] * 14,
        )
    return root


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    """Two held-out demonstrations with ground truth."""
    from physisforcing.envs.collect import CollectConfig, collect

    root = tmp_path_factory.mktemp("heldout") / "bell"
    settings = CollectConfig(output=str(root), tasks=[TASK], episodes=2, start_seed=100_000, workers=0)
    summary = collect(settings, progress=False)
    assert summary["tasks"][TASK]["successes"] == 2
    return root


def settings(weights, **changes):
    planner = {name: str(weights / folder) for name, folder in FOLDERS.items()} | {"denoising_steps": 2}
    mine = ("oracle", "execute_horizon", "candidates", "verifier", "rollout_chunks", "server")
    planner |= {name: changes.pop(name) for name in mine if name in changes}
    values = {"tasks": [TASK], "episodes": 2, "manifest": "none", "threads": 1, "videos": 1, "baselines": ["noop"]}
    return EvalPlanConfig(planner=PlannerSettings(**planner), **(values | changes))


FOLDERS = {"world_model": "worldmodel", "codec": "vae", "decoder": "idm"}


def test_oracle_check_reports_controls_and_ceiling(weights, demonstrations, tmp_path):
    config = settings(weights, oracle="video", demos=str(demonstrations), output=str(tmp_path / "oracle"))
    summary = evaluate(config, progress=False)
    policies = summary["tasks"][TASK]
    assert list(policies) == ["oracle", "oracle_roundtrip", "black", "other", "recorded"]
    assert all(entry["n"] == 2 and entry["errors"] == 0 for entry in policies.values())
    recorded = policies["recorded"]
    assert recorded["successes"] == 2 and recorded["joint_deg"] == 0.0 and recorded["tool_mm_max"] < 1.0
    assert policies["oracle"]["successes"] == 0, "untrained"
    assert policies["oracle"]["tool_mm"] > 20 and policies["oracle"]["joint_deg"] > 5
    assert policies["other"]["joint_deg_other_to_scene"] > 1
    lines = json.loads((tmp_path / "oracle/measurements.json").read_text())
    claims = {line["claim"]: line for line in lines}
    assert claims[f"planner/oracle/{TASK}/success"]["value"] == 0.0
    assert claims[f"planner/oracle/recorded/{TASK}/success"]["seeds"] == "100000-100001"
    assert list((tmp_path / "oracle/videos").glob("*.mp4"))

    # Everything is there: the same command runs no episode again.
    before = (tmp_path / "oracle/results.jsonl").read_bytes()
    assert evaluate(config, progress=False)["tasks"] == summary["tasks"]
    assert (tmp_path / "oracle/results.jsonl").read_bytes() == before


def test_the_gap_to_the_perfect_model_stands_in_the_report(weights, tmp_path):
    """The simulator as world model under the same planner and the shipped decoder, with RoboTwin's own take_action."""
    config = settings(
        weights, baselines=["perfect"], episodes=1, control="topp", max_steps=64, videos=0, output=str(tmp_path)
    )
    config.planner.decoder = "shipped"
    policies = evaluate(config, progress=False)["tasks"][TASK]
    assert policies["perfect"]["successes"] == 1 and policies["model"]["successes"] == 0 == policies["model"]["errors"]
    assert policies["perfect"]["telemetry"]["plans"] == 2, "planned again after 32 steps"
    gap = policies["model"]["gap"]
    assert (gap["difference"], gap["n"], gap["only_perfect"]) == (1.0, 1, 1) and gap["low"] < 1
    assert (
        "Perfect model minus model in the scene that both finished: +100 points"
        in (tmp_path / "summary.md").read_text()
    )
    lines = {line["claim"]: line for line in json.loads((tmp_path / "measurements.json").read_text())}
    assert lines[f"planner/topp/perfect-minus-model/{TASK}/success_difference"]["value"] == 1.0


def test_closed_loop_repeats_and_continues(weights, demonstrations, tmp_path):
    arguments = {"baselines": ["noop", "random"], "max_steps": 40, "execute_horizon": 24}
    first = evaluate(settings(weights, output=str(tmp_path / "a"), **arguments), progress=False)
    assert list(first["tasks"][TASK]) == ["model", "noop", "random"]
    model = first["tasks"][TASK]["model"]
    assert model["n"] == 2 and model["telemetry"]["plans"] == 2 and "noop" in model["against"]
    video = next((tmp_path / "a/videos").glob("*.mp4"))

    from physisforcing.core.video import probe_mp4

    assert "generated by physis-pico" in probe_mp4(video).metadata["comment"]

    # A run that was killed in its third episode: whole lines stay, the torn one runs again, the result is the same.
    lines = (tmp_path / "a/results.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 6
    (tmp_path / "b").mkdir()
    (tmp_path / "b/results.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:60])
    second = evaluate(settings(weights, output=str(tmp_path / "b"), **arguments), progress=False)
    assert stable(tmp_path / "b") == stable(tmp_path / "a")
    assert second["tasks"][TASK]["model"]["successes"] == model["successes"]
    evaluate(settings(weights, output=str(tmp_path / "c"), **(arguments | {"baselines": []})), progress=False)
    alone, beside = stable(tmp_path / "c"), stable(tmp_path / "a")
    assert len(alone) == 2 and alone == {key: beside[key] for key in alone}, "imagines and decodes bit-equally"
    assert all(row["steps"] == 40 and row["telemetry"]["spread"] > 0 for row in alone.values())
    assert len({row["telemetry"]["spread"] for row in alone.values()}) == 2, "two scenes, two imaginations"


def test_several_candidates_and_a_model_in_a_process_of_its_own(weights, tmp_path):
    """The served model gives the same rows under the same keys; candidates and chunks are other results."""
    arguments = {"baselines": [], "max_steps": 40, "episodes": 1, "videos": 0}
    several = {"candidates": 2, "verifier": "smoothness", "rollout_chunks": 2, "execute_horizon": 40}
    evaluate(settings(weights, output=str(tmp_path / "here"), **arguments, **several), progress=False)
    (row,) = stable(tmp_path / "here").values()
    assert row["status"] in ("success", "failure") and row["steps"] == 40, "one plan of two chunks"
    telemetry = row["telemetry"]
    assert telemetry["plans"] == 1 and telemetry["candidates"] == 2 * (1 + telemetry["resampled"])
    assert telemetry["verifier_chosen"] >= telemetry["verifier_mean"]
    served = settings(weights, output=str(tmp_path / "served"), **arguments, **several, server="auto", workers=1)
    evaluate(served, progress=False)
    assert stable(tmp_path / "served") == stable(tmp_path / "here"), "bit-equal, and under the same key"
    evaluate(settings(weights, output=str(tmp_path / "single"), **arguments), progress=False)
    (single,) = stable(tmp_path / "single").values()
    assert single["fingerprint"] != row["fingerprint"] and "verifier_chosen" not in single["telemetry"]
    with pytest.raises(UserError, match=r"planner\.server.*HOST:PORT"):
        evaluate(settings(weights, output=str(tmp_path / "x"), **arguments, server="nowhere"), progress=False)


def stable(folder):
    """Rows of a results file by policy and seed, without what a clock measured."""
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_bytes().splitlines() if line.endswith(b"}")]
    kept = {}
    for row in rows:
        plain = {name: value for name, value in row.items() if name != "seconds" and not name.endswith("_s")}
        plain["telemetry"] = {name: value for name, value in row["telemetry"].items() if not name.endswith("_s")}
        kept[row["policy"], row["seed"]] = plain
    return kept


def test_keys_without_a_manifest_hold_what_the_scenes_are_made_of(weights, demonstrations, tmp_path, monkeypatch):
    """Another asset folder, runtime or robot makes other scenes of the same seeds."""
    import dataclasses
    import shutil

    from physisforcing.envs.robotwin import embodiment, runtime
    from physisforcing.envs.robotwin.embodiment import resolve_assets
    from physisforcing.envs.seeds import Job
    from physisforcing.eval_plan import _Plan

    oracle = settings(weights, oracle="video", demos=str(demonstrations), output=str(tmp_path))
    configs = [(settings(weights, output=str(tmp_path)), "model"), (oracle, "oracle")]

    def keys():
        return [_Plan(config).key(Job(task=f"{TASK}/{policy}", seed=100_000)) for config, policy in configs]

    monkeypatch.delenv("ROBOTWIN_ASSETS", raising=False)
    found = [keys()]
    assert keys() == found[0]
    with monkeypatch.context() as change:
        # The pack elsewhere: under its own name it is recognised as the pack.
        change.setenv("ROBOTWIN_ASSETS", str(shutil.copytree(resolve_assets(None).root, tmp_path / "assets")))
        found.append(keys())
    with monkeypatch.context() as change:
        other = dataclasses.replace(runtime.load_runtime(), version="0.0.0")
        change.setattr(runtime, "load_runtime", lambda: other)
        found.append(keys())
    with monkeypatch.context() as change:
        robot = dataclasses.replace(embodiment.load_embodiment(resolve_assets(None), None), name="another")
        change.setattr(embodiment, "load_embodiment", lambda *_: robot)
        found.append(keys())
    for policy in range(2):
        assert len({key[policy] for key in found}) == 4
    assert _Plan(settings(weights, manifest="auto")).scenes.manifests[TASK].startswith(f"test_{TASK}@")


class RecordedDemonstration:
    """Test double for both models: imagines the recorded future of the picture it is shown and reads its recorded targets."""

    fingerprint = "recorded"
    needs = DecoderNeeds()

    def __init__(self, demo) -> None:
        self.frames, self.actions = demo.frames_THWC, demo.actions_TA
        self.spec = WorldModelSpec(
            name="recorded",
            views=ViewLayout(),
            context_frames=1,
            horizons=(17,),
            frame_dt=2 * DT,
            conditions=frozenset({"text"}),
            returns=frozenset({"frames"}),
            fingerprint="recorded",
        )

    def _place(self, picture) -> int:
        distance = np.abs(self.frames.astype(np.int16) - picture).mean(axis=(1, 2, 3))
        return int(distance.argmin())

    def rollout(self, request):
        rows = self._place(request.context_BVTHWC[0, 0, 0]) + 2 * np.arange(17)
        frames = self.frames[np.minimum(rows, len(self.frames) - 1)]
        return Rollout(times_T=np.arange(17) * 2 * DT, frames_BSVTHWC=frames[None, None, None])

    def decode(self, rollout, state_BA, instructions):
        start = self._place(rollout.frames_BSVTHWC[0, 0, 0, 0])
        rows = np.minimum(start + np.arange(32), len(self.actions) - 1)
        return [[ActionChunk(actions_PA=self.actions[rows])]]


def test_perfect_imagination_and_decoder_press_the_bell(demonstrations):
    """Head picture -> imagined future -> targets -> simulator, replanned every 16 steps: succeeds like the recorded actions."""
    import gymnasium

    import physisforcing.envs.robotwin  # noqa: F401
    from physisforcing.envs.rollout import run_episode
    from physisforcing.planner.action_planner import ActionPlanner, ActionPlannerConfig
    from physisforcing.planner.oracle import HeldOutDemonstrations
    from physisforcing.planner.tool import tool_errors, tool_points

    demos = HeldOutDemonstrations(demonstrations)
    demo = demos.load(TASK, 100_000)
    env = gymnasium.make(f"RoboTwin/{TASK}-v0", disable_env_checker=True)
    try:
        models = RecordedDemonstration(demo)
        planner = ActionPlanner(models, models, ActionPlannerConfig(execute_horizon=16))
        result = run_episode(SparsePictures(env, 16), planner, seed=100_000, max_steps=len(demo.actions_TA) + 16)
        ids, poses = env.unwrapped.body_poses()
        tool = tool_points(poses[None], ids, env.unwrapped.body_names())
    finally:
        env.close()
    assert result.status == "success", result.error
    assert result.telemetry["plans"] >= 2 and result.scene_hash == demo.scene_hash
    at_success = demo.tools_T23[[min(result.steps, len(demo.tools_T23) - 1)]]
    moving = np.abs(demo.tools_T23 - demo.tools_T23[:1]).max((0, 2)).argmax()
    assert np.linalg.norm(tool[0, moving] - at_success[0, moving]) < 0.02
    assert tool_errors(demo.tools_T23, demo.tools_T23)["tool_mm_max"] == 0.0


def test_mistakes_are_named(weights, demonstrations, tmp_path, capsys):
    with pytest.raises(UserError, match="demos"):
        evaluate(settings(weights, oracle="video", output=str(tmp_path)), progress=False)
    with pytest.raises(UserError, match="click_bell"):
        evaluate(settings(weights, tasks=["clik_bell"], output=str(tmp_path)), progress=False)
    with pytest.raises(UserError, match=r"planner\.oracle"):
        main(["planner.orcale=video"])
    too_many = settings(weights, oracle="video", demos=str(demonstrations), episodes=9, output=str(tmp_path))
    with pytest.raises(UserError, match="episodes"):
        evaluate(too_many, progress=False)
    assert main(["--help"]) == 0 and "planner.oracle=video" in capsys.readouterr().out
