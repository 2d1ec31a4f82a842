"""Released Fast-WAM checkpoints: every tensor in its place, back again bit for bit, and what does not fit is named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from physisforcing import cli
from physisforcing.core.errors import UserError
from physisforcing.policy import fastwam
from physisforcing.policy.backbone import build_policy
from physisforcing.policy.checkpoint import TRANSFORMER, PolicyInfo, load_policy, packaged_backbone, save_policy
from physisforcing.policy.config import PolicyModelConfig, fastwam_compat
from physisforcing.policy.convert import ConvertPolicyConfig, run
from physisforcing.policy.fastwam_statistics import read_released
from physisforcing.policy.model import WorldActionModel
from physisforcing.policy.normalization import ActionStatistics
from physisforcing.policy.objective import draw
from physisforcing.policy.planning import PlanningConfig, load_chunk_model
from physisforcing.policy.requests import PlanRequest
from physisforcing.worldmodel.storage import latents_fingerprint
from released_fastwam import flat, release, skeleton, statistics, write_release
from tests.helpers.tiny_paper import ti2v
from tests.helpers.tiny_policy import tiny_transformer

pytestmark = pytest.mark.usefixtures("own_cache")  # sentences are embedded


def settings(path: Path, output: Path, **more: Any) -> ConvertPolicyConfig:
    options: dict[str, Any] = {"config": str(path.parent / "sizes.json"), "chunk": 8}
    return ConvertPolicyConfig(source=str(path), output=str(output), **(options | more))


@pytest.fixture(scope="module")
def payload() -> dict[str, Any]:
    return release()


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory, payload: dict[str, Any]) -> Path:
    return write_release(tmp_path_factory.mktemp("release"), payload)


@pytest.fixture(scope="module")
def converted(released: Path) -> tuple[Path, dict[str, Any]]:
    output = released.parent / "policy"
    return output, run(settings(released, output))


def test_there_and_back_no_bit_changes(
    converted: tuple[Path, dict[str, Any]], payload: dict[str, Any], tmp_path: Path
) -> None:
    folder, report = converted
    assert report["parts"]["video"]["dtypes"] == ["bfloat16"] and report["left_out"] == {}
    count = {"video": 15 + 3 * 27, "action_expert": 14 + 3 * 27, "proprioception": 2}  # beside and in the blocks
    assert {name: part["tensors"] for name, part in report["parts"].items()} == count
    back = run(ConvertPolicyConfig(source=str(folder), output=str(tmp_path / "back"), kind="to_fastwam"))
    stored, began = load_file(tmp_path / "back" / "model.safetensors"), flat(payload)
    assert set(stored) == {f"model.{name}" for name in began} and back["parts"]["model"]["tensors"] == len(began)
    for name, value in began.items():
        assert stored[f"model.{name}"].dtype == value.dtype and torch.equal(stored[f"model.{name}"], value), name
    beside = (tmp_path / "back" / "dataset_stats.json").read_text()
    assert json.loads(beside) == statistics(14, 14)
    again = run(
        settings(tmp_path / "back" / "model.safetensors", tmp_path / "again", config=str(folder.parent / "sizes.json"))
    )
    assert again["parts"] == report["parts"]
    for name in ("expert.safetensors", f"{TRANSFORMER}/diffusion_pytorch_model.safetensors"):
        one, two = load_file(folder / name), load_file(tmp_path / "again" / name)
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def trained_further(folder: Path, output: Path, model: dict[str, Any], info: dict[str, Any]) -> Path:
    """A copy of a policy with other settings of ``model`` and beside it, as one that was trained from it has."""
    shutil.copytree(folder, output)
    values = json.loads((output / "policy.json").read_text())
    values["model"] |= model
    values |= info | {"text": values["text"] | info.get("text", {})}
    (output / "policy.json").write_text(json.dumps(values))
    return output


def test_there_and_back_no_setting_changes(converted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """What ``config.json`` can say comes back equal; what it cannot is named when the release is written."""
    model = {"chunk": 16, "action_shift": 1.0, "video_shift": 3.0, "steps_per_latent": 8.0}
    info = {"frames": 17, "frame_stride": 2, "text": {"tokens": 64, "template": "Robot: {instruction}"}}
    mine = trained_further(converted[0], tmp_path / "mine", model, info)
    export = run(ConvertPolicyConfig(source=str(mine), output=str(tmp_path / "release"), kind="to_fastwam"))
    assert not any("cannot say" in note for note in export["notes"])
    back = run(ConvertPolicyConfig(source=str(tmp_path / "release"), output=str(tmp_path / "back")))
    assert back["config"] == "config.json"
    ours, theirs = (json.loads((folder / "policy.json").read_text()) for folder in (mine, tmp_path / "back"))
    assert {name for name in ours if ours[name] != theirs[name]} == {"source"}
    for name, value in {"chunk": 32, "action_shift": 5.0}.items():
        asked = {"source": str(tmp_path / "release"), "output": str(tmp_path / "none"), name: value}
        with pytest.raises(UserError, match=rf"{name}.*config\.json beside the weights"):
            run(ConvertPolicyConfig(**asked))
    run(
        ConvertPolicyConfig(source=str(tmp_path / "release"), output=str(tmp_path / "same"), chunk=16, action_shift=1.0)
    )
    asked = {"source": str(tmp_path / "release"), "output": str(tmp_path / "plain"), "template": "{instruction}"}
    bare = run(ConvertPolicyConfig(**asked))
    assert any("in place of the file's 'Robot: {instruction}'" in note for note in bare["notes"])
    stored = json.loads((tmp_path / "plain" / "policy.json").read_text())
    assert stored["text"].get("template", "{instruction}") == "{instruction}", "it can be trained further"
    assert not any("template" in note for note in back["notes"])

    lost = {
        "control_hz": 30.0,
        "canvas": "head",
        "size": [120, 160],
        "text": {"encoder": "all-MiniLM-L6-v2", "padded": 512},
    }
    other = trained_further(
        mine, tmp_path / "other", {"mode": "idm", "weighting": "uniform", "steps_per_latent": 16.0}, lost
    )
    notes = run(ConvertPolicyConfig(source=str(other), output=str(tmp_path / "told"), kind="to_fastwam"))["notes"]
    said = next(note for note in notes if "cannot say" in note)
    for words in (
        "mode idm, read back as first_frame", "weighting uniform, read back as bell", "control_hz 30, read back as 16.67",
        "steps_per_latent 16, read back as 8", "canvas head, read back as robotwin", "text.encoder all-MiniLM-L6-v2",
        "text.padded 512, read back as 64",
    ):  # fmt: skip
        assert words in said


@pytest.mark.parametrize(
    "change, word",
    [
        ({"action_horizon": "16"}, r"action_horizon.*'?16'?.*whole number"),
        ({"num_video_frames": 34}, r"num_video_frames.*34.*multiple of 16"),
        ({"action_scheduler": {"train_shift": 5.0, "infer_shift": 1.0}}, "action_scheduler.*infer_shift 1.*one shift"),
        ({"prompt_template": "do it"}, r"prompt_template.*\{task\} in it"),
        ({"video_dit_config": {"num_heads": "two"}}, r"video_dit_config\.num_heads: got 'two'"),
        ({"video_dit_config": {"eps": None}}, r"video_dit_config\.eps: got .*more than 0"),
    ],
)
def test_a_config_that_cannot_be(change: dict[str, Any], word: str, payload: dict[str, Any], tmp_path: Path) -> None:
    path = write_release(tmp_path, payload)
    (tmp_path / "config.json").write_text(json.dumps(change))
    with pytest.raises(UserError, match=word):
        run(settings(path, tmp_path / "policy"))


def test_a_policy_opens_with_the_published_design(
    converted: tuple[Path, dict[str, Any]], payload: dict[str, Any]
) -> None:
    folder, _ = converted
    model, info = load_policy(folder, dtype=None)
    sizes = {"action_dim": 14, "state_dim": 14, "width": 16, "ffn_dim": 24, "chunk": 8}
    assert model.config == fastwam_compat(**sizes)
    assert (info.canvas, info.size, info.frames, info.frame_stride) == ("robotwin", (384, 320), 9, 4)
    assert info.text["tokens"] == 128 and str(folder.parent) not in (folder / "policy.json").read_text()
    weights = model.state_dict()
    # one of each kind, named by hand
    for ours, theirs in {
        "transformer.blocks.1.action.attn1.to_out.0.weight": "mot.mixtures.action.blocks.1.self_attn.o.weight",
        "transformer.blocks.2.attn2.norm_k.weight": "mot.mixtures.video.blocks.2.cross_attn.norm_k.weight",
        "transformer.blocks.0.action.norm2.bias": "mot.mixtures.action.blocks.0.norm3.bias",
        "transformer.blocks.0.action.scale_shift_table": "mot.mixtures.action.blocks.0.modulation",
        "transformer.scale_shift_table": "mot.mixtures.video.head.modulation",
        "transformer.proj_out.weight": "mot.mixtures.video.head.head.weight",
        "expert.proj_out.weight": "mot.mixtures.action.head.weight",
        "expert.action_in.bias": "mot.mixtures.action.action_encoder.bias",
        "expert.condition_embedder.time_proj.weight": "mot.mixtures.action.time_projection.1.weight",
        "proprioception.weight": "proprio_encoder.weight",
    }.items():
        assert torch.equal(weights[ours], flat(payload)[theirs]), ours


def test_newer_files_of_the_port_hold_the_same(payload: dict[str, Any], released: Path, tmp_path: Path) -> None:
    moved = {}
    for name, value in flat(payload).items():
        found = re.fullmatch(r"mot\.mixtures\.(\w+)\.blocks\.(\d+)\.(.*)", name)
        name = f"mot.layers.{found[2]}.blocks.{found[1]}.{found[3]}" if found else name
        moved[f"model.{name}"] = value
    (tmp_path / "port").mkdir()
    save_file(moved, tmp_path / "port" / "model.safetensors")
    one = fastwam.match_released(fastwam.open_released(released)[0], {"num_heads": 2})
    two = fastwam.match_released(fastwam.open_released(tmp_path / "port")[0], {"num_heads": 2})
    assert one.config == two.config and all(torch.equal(one.read(name), two.read(name)) for name in one.origin)


def test_libero_goes_by_its_widths(tmp_path: Path) -> None:
    path = write_release(tmp_path, release(7, 8), "libero_uncond_2cam224")
    run(settings(path, tmp_path / "policy"))
    model, info = load_policy(tmp_path / "policy")
    assert (info.canvas, info.size, info.control_hz) == ("libero", (224, 448), 20.0)
    assert (model.config.action_dim, model.config.state_dim) == (7, 8)
    stored = ActionStatistics.load(tmp_path / "policy", action_dim=7, state_dim=8)
    assert stored.kind == "minmax" and (stored.steps, stored.episodes) == (90, 3)
    path = write_release(tmp_path / "other", release(6, 6))
    with pytest.raises(UserError, match="layout"):
        run(settings(path, tmp_path / "none"))
    run(settings(path, tmp_path / "six", layout="robotwin"))
    assert load_policy(tmp_path / "six")[1].canvas == "robotwin"


@pytest.mark.parametrize("kind", ["zscore", "minmax"])
def test_statistics_give_the_published_numbers(kind: str, tmp_path: Path) -> None:
    values = statistics(8, 7)
    (tmp_path / "dataset_stats.json").write_text(json.dumps(values))
    found = read_released(tmp_path / "dataset_stats.json", kind, action_dim=7, state_dim=8)
    x = np.linspace(-1.0, 1.0, 21).reshape(3, 7)
    row = {key: np.array(value) for key, value in values["action"]["default"].items()}
    if kind == "zscore":
        wanted = (x - row["global_mean"]) / (row["global_std"] + 1e-8)
    else:
        span = row["global_max"] - row["global_min"]
        span[-1] = 2.0  # hardly moves: only its smallest value is taken off
        wanted = 2 * (x - row["global_min"]) / span - 1
        wanted[:, -1] += 1
    normalised = found.action.normalise(torch.from_numpy(x))
    np.testing.assert_allclose(normalised, wanted.clip(-5, 5), rtol=1e-6, atol=1e-6)
    for damage in ("key", "width"):
        broken = json.loads(json.dumps(values))
        name = "global_std" if kind == "zscore" else "global_max"
        broken["action"]["default"][name] = None if damage == "key" else [1.0] * 6
        (tmp_path / "broken.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match=f"action.default.{name}"):
            read_released(tmp_path / "broken.json", kind, action_dim=7, state_dim=8)


def _missing(p: dict[str, Any]) -> None:
    del p["mot"]["mixtures.action.blocks.1.ffn.2.bias"]


def _extra(p: dict[str, Any]) -> None:
    p["mot"]["mixtures.action.blocks.1.cross_attn.k_img.weight"] = torch.zeros(48, 16)


def _shape(p: dict[str, Any]) -> None:
    p["mot"]["mixtures.action.blocks.2.self_attn.q.weight"] = torch.zeros(47, 16)


def _dtype(p: dict[str, Any]) -> None:
    p["mot"]["mixtures.video.blocks.0.ffn.0.bias"] = torch.zeros(64, dtype=torch.float8_e4m3fn)


def _layers(p: dict[str, Any]) -> None:
    p["mot"] = {name: value for name, value in p["mot"].items() if "action.blocks.2." not in name}


def _stateless(p: dict[str, Any]) -> None:
    del p["proprio_encoder"]


def _section(p: dict[str, Any]) -> None:
    p["ema"] = {"x": torch.zeros(1)}


def _video_only(p: dict[str, Any]) -> None:
    video = {name.removeprefix("mixtures.video."): value for name, value in p["mot"].items() if ".video." in name}
    del p["mot"], p["proprio_encoder"]
    p["dit"] = video


def _nan(p: dict[str, Any]) -> None:
    p["mot"]["mixtures.action.head.bias"] = torch.full((14,), torch.nan)


@pytest.mark.parametrize(
    "damage, word",
    [
        (_missing, r"no mot\.mixtures\.action\.blocks\.1\.ffn\.2\.bias"),
        (_extra, r"action\.blocks\.1\.cross_attn\.k_img\.weight"),
        (_shape, r"action\.blocks\.2\.self_attn\.q\.weight.*47, 16.*48, 16"),
        (_dtype, r"video\.blocks\.0\.ffn\.0\.bias.*float8"),
        (_layers, r"no mot\.mixtures\.action\.blocks\.2\..* and 26 more"),
        (_stateless, r"no proprio_encoder\.weight"),
        (_section, "ema"),
        (_video_only, "an action expert are not in this file"),
        (_nan, r"action\.head\.bias.*NaN"),
    ],
)
def test_damage_is_named_and_nothing_is_written(
    damage: Callable[[dict[str, Any]], None], word: str, tmp_path: Path
) -> None:
    broken = release()
    whole = write_release(tmp_path, broken)
    damage(broken)
    torch.save(broken, whole)
    with pytest.raises(UserError, match=word):
        run(settings(whole, tmp_path / "policy"))
    assert not (tmp_path / "policy").exists()


def test_wrong_bytes_and_code_are_refused(tmp_path: Path, released: Path) -> None:
    digest = "0" * 64
    with pytest.raises(UserError, match=f"sha256 of {released.name}"):
        run(settings(released, tmp_path / "policy", sha256={released.name: digest}))
    torch.save({"mot": {"x": Path}, "step": 1}, tmp_path / "code.pt")
    with pytest.raises(UserError, match=r"code\.pt"):
        fastwam.open_released(tmp_path / "code.pt")
    (tmp_path / "cut.pt").write_bytes(released.read_bytes()[:4000])
    with pytest.raises(UserError, match=r"cut\.pt"):
        fastwam.open_released(tmp_path / "cut.pt")
    lonely = tmp_path / "alone" / "weights.pt"
    lonely.parent.mkdir()
    lonely.write_bytes(released.read_bytes())
    alone = settings(lonely, tmp_path / "policy", config=str(released.parent / "sizes.json"))
    with pytest.raises(UserError, match="statistics"):
        run(alone)
    alone.statistics = "none"
    report = run(alone)
    assert report["statistics"] == "none" and "cannot act" in report["notes"][0]


def test_the_command_converts_both_ways(released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there, back = tmp_path / "policy", tmp_path / "back"
    words = ["convert", "kind=fastwam", f"source={released}", f"output={there}", "chunk=8"]
    assert cli.main([*words, f"config={released.parent / 'sizes.json'}"]) == 0
    told = capsys.readouterr().out
    assert "action_expert: 95 tensors" in told and "canvas: robotwin" in told and "autoencoder= was not given" in told
    assert cli.main(["convert", "kind=to_fastwam", f"source={there}", f"output={back}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"]["model"]["dtypes"] == ["bfloat16"]
    assert cli.main([*words, "lay_out=libero"]) == 2
    assert "layout" in capsys.readouterr().err


def test_an_optimizer_is_counted_and_left_out(tmp_path: Path) -> None:
    path = write_release(tmp_path, release(optimizer={"state": {0: {"m": torch.zeros(2), "v": torch.zeros(2)}}}))
    report = run(settings(path, tmp_path / "policy"))
    assert report["left_out"] == {"state of the optimizer": 2}


def test_a_converted_policy_acts(tmp_path: Path) -> None:
    """With a pipeline whose latents it has: chunks in the robot's units, from its canvas and the sentence it was trained with."""
    pipeline = ti2v(tmp_path / "wan")
    payload = release(video={"in_dim": 8, "out_dim": 8, "text_dim": 16})
    run(settings(write_release(tmp_path, payload), tmp_path / "policy", autoencoder=str(pipeline)))
    model = load_chunk_model(tmp_path / "policy", PlanningConfig(autoencoder=str(pipeline), steps=2))
    assert model.info.latents == latents_fingerprint(pipeline / "vae")
    canvas = np.zeros((1, *model.spec.size, 3), np.uint8)
    asked = {"canvas_BHWC": canvas, "state_BKA": np.zeros((1, 1, 14), np.float32), "seeds_B": np.array([3])}
    answers = [
        model.plan(PlanRequest(instructions=[text], **asked)).actions_BPA for text in ("press the bell", "lift it")
    ]
    assert answers[0].shape == (1, 8, 14) and np.isfinite(answers[0]).all()
    assert not np.array_equal(*answers)
    row = statistics(14, 14)["action"]["default"]
    normalised = (answers[0] - np.array(row["global_mean"])) / np.array(row["global_std"])
    found, _ = model.normalised(PlanRequest(instructions=["press the bell"], **asked))
    np.testing.assert_allclose(normalised, found, rtol=1e-3, atol=1e-4)


def test_a_policy_without_a_copy_of_its_backbone_goes_back_whole(tmp_path: Path) -> None:
    config = fastwam_compat(action_dim=3, state_dim=3, width=16, ffn_dim=24, chunk=8)
    model, _ = build_policy("shipped", config)
    save_policy(tmp_path / "policy", model, PolicyInfo(), packaged=packaged_backbone())
    run(ConvertPolicyConfig(source=str(tmp_path / "policy"), output=str(tmp_path / "back"), kind="to_fastwam"))
    stored = load_file(tmp_path / "back" / "model.safetensors")
    assert len(stored) == len(model.state_dict()) and not (tmp_path / "policy" / TRANSFORMER).exists()
    video = stored["model.mot.mixtures.video.blocks.0.ffn.0.weight"]
    assert torch.equal(video.float(), model.blocks[0].ffn.net[0].proj.weight)


@pytest.mark.parametrize("field", ["head", "positions", "proprioception"])
def test_designs_that_a_release_cannot_express(field: str, tmp_path: Path) -> None:
    sizes = {"action_dim": 3, "state_dim": 3, "width": 16, "ffn_dim": 24}
    published = {"head": "bare", "positions": "separate", "proprioception": "linear"}
    other = {"head": "modulated", "positions": "shared", "proprioception": "backbone"}
    config = PolicyModelConfig(**sizes, **(published | {field: other[field]}))
    conditioner = None
    if field == "proprioception":
        from physisforcing.worldmodel.backbones.wan import ConditionerConfig, ProprioceptionConditioner

        conditioner = ProprioceptionConditioner(ConditionerConfig(state_dim=3, hidden=8, width=12))
    save_policy(tmp_path / "p", WorldActionModel(tiny_transformer(), config, conditioner=conditioner), PolicyInfo())
    with pytest.raises(UserError, match=f"{field}.*{other[field]}"):
        run(ConvertPolicyConfig(source=str(tmp_path / "p"), output=str(tmp_path / "out"), kind="to_fastwam"))


def test_levels_are_mixed_as_the_model_is_told_them() -> None:
    """Published: the timestep is rounded once, before it is embedded and before noise is mixed in."""
    for coarse in (True, False):
        config = PolicyModelConfig(mode="idm", condition_noise=1.0, coarse_times=coarse)
        drawn = draw((64, 1, 2, 1, 1), config, torch.Generator().manual_seed(0))
        for sigma in (drawn.sigma_B, drawn.action_sigma_B, drawn.copy_sigma_B):
            assert sigma is not None
            told = (1000 * sigma).bfloat16().float()
            apart = (told - 1000 * sigma).abs().max()
            assert (apart < 1e-3) == coarse and sigma.min() >= 0 and sigma.max() <= 1
            assert torch.equal(told, (told / 1000 * 1000).bfloat16().float())


def test_full_size_counts_and_names() -> None:
    """Parameters of reference section 1.1, and one place for each tensor of the original modules at their published sizes."""
    video = {"dim": 3072, "ffn_dim": 14336, "freq_dim": 256, "in_dim": 48, "num_layers": 30, "out_dim": 48}
    action = {"width": 1024, "ffn_dim": 4096, "attention": 3072, "freq_dim": 256, "num_layers": 30, "text_dim": 4096}
    with torch.device("meta"):
        original = skeleton(14, 14, video | {"text_dim": 4096}, action).state_dict()
    config = {
        "patch_size": [1, 2, 2], "num_attention_heads": 24, "attention_head_dim": 128, "in_channels": 48, "out_channels": 48,
        "text_dim": 4096, "freq_dim": 256, "ffn_dim": 14336, "num_layers": 30,
    }  # fmt: skip
    ours = fastwam.hollow(fastwam_compat(), config).state_dict()
    keys = fastwam.PolicyKeys()
    places = {name: keys.stock(name) for name in original}
    assert set(places.values()) == set(ours) and len(original) == len(ours) == 15 + 14 + 2 + 2 * 30 * 27
    assert all(original[name].shape == ours[place].shape for name, place in places.items() if place)
    assert all(keys.original(place) == name for name, place in places.items() if place)
    counts = {"video": 0, "action": 0, "proprio": 0}
    for name, value in original.items():
        counts[next(part for part in counts if part in name.split(".blocks.")[0])] += value.numel()
    assert round(counts["video"] / 1e9, 4) == 4.9998 and round(counts["action"] / 1e9, 4) == 1.0209
    assert counts["proprio"] == 15 * 4096 and round(sum(counts.values()) / 1e9, 2) == 6.02
