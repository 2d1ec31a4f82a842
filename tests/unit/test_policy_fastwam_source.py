"""Against Fast-WAM's own source, of which nothing is in this repository: same weights, same inputs, same numbers in float32.

git clone https://github.com/yuantianyuan01/FastWAM /path/to/FastWAM
FASTWAM_SOURCE=/path/to/FastWAM pytest tests/unit/test_policy_fastwam_source.py
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from physisforcing.policy import fastwam
from physisforcing.policy.checkpoint import load_policy
from physisforcing.policy.config import fastwam_compat
from physisforcing.policy.convert import ConvertPolicyConfig, run
from physisforcing.policy.fastwam_statistics import write_released
from physisforcing.policy.initial import interpolate
from physisforcing.policy.model import Copy, WorldActionModel
from physisforcing.policy.normalization import ActionStatistics
from physisforcing.policy.objective import level_weights
from physisforcing.policy.sampling import Sampler, SamplingConfig
from physisforcing.worldmodel.flow_matching import sampling_sigmas

SOURCE = os.environ.get("FASTWAM_SOURCE")
pytestmark = pytest.mark.skipif(not SOURCE, reason="needs a checkout of yuantianyuan01/FastWAM (FASTWAM_SOURCE)")

#: Largest difference beside the largest number: sums in another order, and their sinusoids are computed in float64.
TOLERANCE = 2e-6
SHARED = {"text_dim": 12, "freq_dim": 16, "eps": 1e-6, "num_heads": 2, "attn_head_dim": 24, "num_layers": 3}


@pytest.fixture(scope="module")
def theirs() -> Iterator[Any]:
    """Their modules. What writes videos and what downloads weights is not imported."""
    assert SOURCE
    root = Path(SOURCE).expanduser() / "src"
    utils = types.ModuleType("fastwam.utils")
    utils.__path__ = [str(root / "fastwam" / "utils")]
    loader = types.ModuleType("fastwam.models.wan22.helpers.loader")
    loader.load_wan22_ti2v_5b_components = None  # type: ignore[attr-defined]
    sys.path.insert(0, str(root))
    sys.modules |= {module.__name__: module for module in (utils, loader)}
    names = (
        "fastwam",
        "fastwam_joint",
        "fastwam_idm",
        "action_dit",
        "mot",
        "wan_video_dit",
        "schedulers.scheduler_continuous",
    )
    yield types.SimpleNamespace(
        **{name.split(".")[-1]: importlib.import_module(f"fastwam.models.wan22.{name}") for name in names}
    )
    sys.path.remove(str(root))
    for name in [name for name in sys.modules if name.split(".")[0] == "fastwam"]:
        del sys.modules[name]


def build(theirs: Any, kind: str = "FastWAM") -> Any:
    """Their model in tiny size, no layer at a constant."""
    torch.manual_seed(0)
    video = theirs.wan_video_dit.WanVideoDiT(
        hidden_dim=48, in_dim=4, ffn_dim=64, out_dim=4, patch_size=(1, 2, 2), has_image_input=False,
        seperated_timestep=True, video_attention_mask_mode="first_frame_causal", **SHARED,
    )  # fmt: skip
    action = theirs.action_dit.ActionDiT(hidden_dim=16, action_dim=14, ffn_dim=24, **SHARED)
    module = {"FastWAM": "fastwam", "FastWAMJoint": "fastwam_joint", "FastWAMIDM": "fastwam_idm"}[kind]
    model = getattr(getattr(theirs, module), kind)(
        video_expert=video, action_expert=action, mot=theirs.mot.MoT({"video": video, "action": action}, False),
        vae=torch.nn.Module(), text_dim=12, proprio_dim=14,
    )  # fmt: skip
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn(value.shape))
    return model.eval()


@pytest.fixture(scope="module")
def pair(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, WorldActionModel, Path]:
    """Their model, ours of the checkpoint that it wrote, and the folder of ours."""
    folder = tmp_path_factory.mktemp("pair")
    model = build(theirs)
    model.save_checkpoint(folder / "theirs.pt", step=7)
    (folder / "sizes.json").write_text('{"num_heads": 2}')
    run(
        ConvertPolicyConfig(
            source=str(folder / "theirs.pt"), output=str(folder / "ours"), chunk=8, statistics="none",
            config=str(folder / "sizes.json"),
        )
    )  # fmt: skip
    return model, load_policy(folder / "ours")[0], folder / "ours"


def inputs() -> dict[str, Tensor]:
    """Times and actions that bfloat16 holds exactly, as the published settings round them."""
    draw = torch.Generator().manual_seed(5)
    shapes = {
        "latents": (2, 4, 3, 4, 6),
        "copy": (2, 4, 3, 4, 6),
        "text": (2, 5, 12),
        "state": (2, 14),
        "actions": (2, 8, 14),
    }
    made = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    made["actions"] = made["actions"].bfloat16().float()
    made["copy"][:, :, :1] = made["latents"][:, :, :1]
    return made | {"times": torch.tensor([504.0, 252.0]), "action_times": torch.tensor([880.0, 1000.0])}


def context(model: Any, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return model._append_proprio_to_context(given["text"], torch.ones(2, 5, dtype=torch.bool), given["state"])


def close(found: Tensor, wanted: Tensor) -> None:
    assert wanted.abs().max() > 0.5
    assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


@pytest.mark.parametrize("kind, mode", [("FastWAM", "first_frame"), ("FastWAMJoint", "joint")])
@torch.no_grad()
def test_velocities(
    theirs: Any, pair: tuple[Any, WorldActionModel, Path], kind: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ours, _ = pair
    monkeypatch.setattr(ours.config, "mode", mode)
    model, given = build(theirs, kind), inputs()
    seen, mask = context(model, given)
    wanted = model._predict_joint_noise(
        given["latents"], given["actions"], given["times"], given["action_times"], seen, mask, True
    )
    mine = ours.context(given["text"], given["state"])
    assert torch.equal(mine, seen)
    video, action, _ = ours(
        given["latents"], given["times"] / 1000, given["actions"], given["action_times"] / 1000, mine
    )
    close(video, wanted[0])
    close(action, wanted[1])  # type: ignore[arg-type]


@torch.no_grad()
def test_actions_over_kept_keys(pair: tuple[Any, WorldActionModel, Path]) -> None:
    model, ours, _ = pair
    given = inputs()
    seen, mask = context(model, given)
    first = given["latents"][:, :, :1]
    wanted = model._predict_action_noise(first, given["actions"], given["action_times"], seen, mask, True)
    kept = ours.prefill(first, torch.zeros(2), seen)
    close(ours.act(given["actions"], ours.action_times(given["action_times"] / 1000), kept), wanted)


@torch.no_grad()
def test_ten_steps_from_noise(pair: tuple[Any, WorldActionModel, Path]) -> None:
    """Their loop in float32 with exact times, ours with times that are not rounded."""
    model, _, folder = pair
    ours, _ = load_policy(folder)
    ours.config = dataclasses.replace(ours.config, coarse_times=False)
    given = inputs()
    seen, mask = context(model, given)
    first, actions = given["latents"][:, :, :1], given["actions"]
    times, deltas = model.infer_action_scheduler.build_inference_schedule(10, torch.device("cpu"), torch.float32)
    for time, delta in zip(times, deltas, strict=True):
        velocity = model._predict_action_noise(first, actions, time.expand(2), seen, mask, True)
        actions = model.infer_action_scheduler.step(velocity, delta, actions)
    sampler = Sampler(ours, SamplingConfig(steps=10), frames=3)
    began = sampler.begin(first, given["text"], given["state"], None)
    found = sampler.steps(began, given["actions"])
    assert (found - actions).abs().max() <= 10 * TOLERANCE * actions.abs().max()


@torch.no_grad()
def test_actions_over_a_copy_of_the_video(
    theirs: Any, pair: tuple[Any, WorldActionModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their sequence of noisy video, whole copy and actions; ours does not repeat the first frame."""
    _, ours, _ = pair
    monkeypatch.setattr(ours.config, "mode", "idm")
    model, given = build(theirs, "FastWAMIDM"), inputs()
    seen, mask = context(model, given)
    copied = torch.tensor([0.0, 640.0])
    pres = [
        model.video_expert.pre_dit(x, t, seen, mask, None, True)
        for x, t in ((given["latents"], given["times"]), (given["copy"], copied))
    ]
    acting = model.action_expert.pre_dit(given["actions"], given["action_times"], seen, mask)
    lengths = [pre["tokens"].shape[1] for pre in pres]
    frame = pres[0]["meta"]["tokens_per_frame"]
    shown = model._build_teacher_forcing_attention_mask(*lengths, 8, frame, frame, torch.device("cpu"))
    both = {
        name: torch.cat([pre[name] for pre in pres], 0 if name == "freqs" else 1)
        for name in ("tokens", "freqs", "t_mod", "context_mask")
    }
    out = model.mot(
        embeds_all={"video": both["tokens"], "action": acting["tokens"]}, attention_mask=shown,
        freqs_all={"video": both["freqs"], "action": acting["freqs"]},
        context_all={
            "video": {"context": pres[0]["context"], "mask": both["context_mask"]},
            "action": {"context": acting["context"], "mask": acting["context_mask"]},
        },
        t_mod_all={"video": both["t_mod"], "action": acting["t_mod"]},
    )  # fmt: skip
    wanted = model.action_expert.post_dit(out["action"], acting)
    copy = Copy(given["copy"], copied / 1000)
    video, action, _ = ours(
        given["latents"],
        given["times"] / 1000,
        given["actions"],
        given["action_times"] / 1000,
        seen,
        copy=copy,
    )
    close(action, wanted)  # type: ignore[arg-type]
    close(video, model.video_expert.post_dit(out["video"][:, : lengths[0]], pres[0]))


def test_the_way_back_fills_their_model(theirs: Any, pair: tuple[Any, WorldActionModel, Path], tmp_path: Path) -> None:
    began, _, folder = pair
    run(ConvertPolicyConfig(source=str(folder), output=str(tmp_path / "back"), kind="to_fastwam"))
    sections: dict[str, Any] = {"mot": {}, "proprio_encoder": {}}
    for name, value in load_file(tmp_path / "back" / "model.safetensors").items():
        _, section, rest = name.split(".", 2)
        sections[section][rest] = value
    model = build(theirs)
    for value in model.parameters():
        torch.nn.init.zeros_(value)
    model.mot.load_state_dict(sections["mot"], strict=True)
    model.proprio_encoder.load_state_dict(sections["proprio_encoder"], strict=True)
    for (name, one), (_, two) in zip(began.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("kind, mode", [("zscore", "z-score"), ("minmax", "min/max")])
def test_their_normaliser_reads_our_statistics(
    theirs: Any, kind: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = types.ModuleType("git")  # asked for a commit hash only
    repository.Repo = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "git", repository)
    assert SOURCE
    path = Path(SOURCE).expanduser() / "src" / "fastwam" / "datasets" / "lerobot" / "utils" / "normalizer.py"
    spec = importlib.util.spec_from_file_location("fastwam_normalizer", path)  # not its package, which imports datasets
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = torch.randn(40, 14, generator=torch.Generator().manual_seed(3))
    rows[:, 0], rows[:, 1] = 0.1, torch.arange(40).sub(5).sign()
    ours = ActionStatistics.of([rows.numpy()], [rows.numpy() * 2], kind, episodes=1)
    (tmp_path / "dataset_stats.json").write_text(json.dumps(write_released(ours)[0]))
    meta = {name: [{"key": "default"}] for name in ("action", "state")}
    stats = module.load_dataset_stats_from_json(str(tmp_path / "dataset_stats.json"))
    normaliser = module.LinearNormalizer(meta, False, mode, None, stats)
    done = normaliser.forward({name: {"default": rows.clone()} for name in meta})
    for name in meta:
        torch.testing.assert_close(done[name]["default"], getattr(ours, name).normalise(rows), rtol=1e-5, atol=1e-4)
    back = normaliser.backward({name: {"default": torch.full((1, 14), 0.5)} for name in meta})
    wanted = ours.action.denormalise(torch.full((1, 14), 0.5))
    torch.testing.assert_close(back["action"]["default"], wanted, rtol=1e-5, atol=1e-6)


def test_noise_levels_and_weights(theirs: Any) -> None:
    scheduler = theirs.scheduler_continuous.WanContinuousFlowMatchScheduler(shift=5.0)
    times, deltas = scheduler.build_inference_schedule(10, torch.device("cpu"), torch.float32)
    sigmas = sampling_sigmas(10, 5.0).float()
    torch.testing.assert_close(sigmas[:-1] * 1000, times, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(sigmas.diff(), deltas, rtol=0, atol=1e-6)
    levels = torch.linspace(0.0, 1.0, 41)
    torch.testing.assert_close(
        level_weights(levels, 5.0, "bell"), scheduler.training_weight(levels * 1000), rtol=0, atol=1e-5
    )


def test_interpolated_weights(theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their script's resizing and scaling, tensor by tensor, against ours on the whole expert."""
    assert SOURCE
    path = Path(SOURCE).expanduser() / "scripts" / "preprocess_action_dit_backbone.py"
    spec = importlib.util.spec_from_file_location("fastwam_preprocess", path)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    model = build(theirs)
    video, action = model.video_expert.state_dict(), model.action_expert.state_dict()
    config = {
        "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4, "text_dim": 12,
        "freq_dim": 16, "ffn_dim": 64, "num_layers": 3,
    }  # fmt: skip
    ours = fastwam.hollow(fastwam_compat(width=16, ffn_dim=24), config)
    ours.to_empty(device="cpu")
    keys = fastwam.PolicyKeys()
    by_ours = {keys.stock(fastwam.VIDEO + name): value for name, value in video.items()}
    plain = {name.removeprefix("transformer."): value for name, value in by_ours.items() if name}
    interpolate(ours.expert, plain, published=True)
    for index, block in enumerate(ours.blocks):
        prefix = f"blocks.{index}."
        own = {name.removeprefix(prefix): value for name, value in plain.items() if name.startswith(prefix)}
        interpolate(block.action, own, published=True)
    made, checked = ours.state_dict(), 0
    for name, target in action.items():
        if name.startswith(("action_encoder.", "head.")):
            continue
        wanted = script._resize_tensor_to_shape(video[name], tuple(target.shape))
        if wanted.ndim >= 2 and video[name].shape[-1] != target.shape[-1]:
            wanted = wanted * (video[name].shape[-1] / target.shape[-1]) ** 0.5
        torch.testing.assert_close(
            made[keys.stock(fastwam.ACTION + name) or ""], wanted, rtol=0, atol=2e-5
        )  # places in float32 there
        checked += 1
    assert checked == len(action) - 4
