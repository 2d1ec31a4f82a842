"""Training of a policy: it learns, a killed run goes on with the same bits, and each part of the loss reaches what it should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from physisforcing.core.config import compose
from physisforcing.core.errors import UserError
from physisforcing.core.paths import weights_root
from physisforcing.policy.checkpoint import load_policy
from physisforcing.policy.normalization import ActionStatistics
from physisforcing.policy.training import PolicyTrainer, train_policy
from physisforcing.policy.training_config import TrainPolicyConfig
from physisforcing.policy.training_start import adopt, prepare_policy_banks
from physisforcing.worldmodel.data.batches import step_generator
from physisforcing.worldmodel.training.checkpoint import latest_checkpoint, load_training
from ranks import fork, kill_once, update_lines
from tiny_policy_training import banks, config, episodes, trainer

CPU = torch.device("cpu")
Gradients = dict[str, torch.Tensor | None]


def gradients(found: PolicyTrainer, step: int = 0) -> tuple[Gradients, dict[str, torch.Tensor]]:
    """Of the loss of one step by the names of the parameters, and the loss's terms."""
    batch = found.batch(step)
    terms = found._backward(batch, found.draw(batch, step_generator(7, step)))
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in found.model.named_parameters()}
    found.model.zero_grad(set_to_none=True)
    return grads, terms


def test_a_killed_run_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    straight, killed = config(tmp_path, "straight", 8), config(tmp_path, "killed", 8)
    for made in (straight, killed):
        made.run.save_every, made.run.resume = 2, True
    export, run = train_policy(straight, banks()), tmp_path / "killed"
    child = fork(lambda: train_policy(killed, banks()), "killed")
    kill_once(child, lambda: (run / "step-000002").exists(), within_s=60)
    kept = latest_checkpoint(run)
    assert kept is not None and not (run / "step-000008").exists()
    torch.manual_seed(999)  # a new process has other global random numbers
    again = train_policy(killed, banks())
    for group in ("weights", "average", "optimizer", "rng"):
        one, two = (load_training(tmp_path / name / "last")[0][group] for name in ("straight", "killed"))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one), group
    done, lines = int(kept.name.removeprefix("step-")), {line["step"]: line for line in update_lines(run)}
    for line in update_lines(tmp_path / "straight")[done:]:
        assert all(line[name] == lines[line["step"]][name] for name in ("loss", "action", "video", "grad_norm"))
    files = [path.relative_to(export) for path in sorted(export.rglob("*")) if path.is_file()]
    assert {path.name for path in files} >= {"policy.json", "expert.safetensors", "statistics.json"}
    assert all((export / path).read_bytes() == (again / path).read_bytes() for path in files)


def test_it_learns_a_batch_by_heart(tmp_path: Path) -> None:
    made = config(tmp_path, "run", 40)
    made.policy.width, made.policy.ffn_dim, made.optim.final_lr = 32, 64, 0.1
    adopt(made)
    found = PolicyTrainer(made, banks()[0], CPU)
    always = found.draw
    found.rows = lambda step: torch.arange(4)  # type: ignore[method-assign]
    found.draw = lambda batch, _: always(batch, step_generator(1, 0))  # type: ignore[method-assign]
    terms = [found.step(step) for step in range(40)]
    assert terms[-1]["action"] < 0.02 * terms[0]["action"]
    assert terms[-1]["video"] < 0.5 * terms[0]["video"]


def test_every_parameter_is_in_one_group_at_its_rate(tmp_path: Path) -> None:
    made = config(tmp_path, "run", physics=True)
    made.action_rate, made.optim.heads, made.optim.weight_decay = 3.0, 10.0, 0.05
    found = trainer(made, physics=True)
    groups = found.optimizer.param_groups
    placed = [id(p) for group in groups for p in group["params"]]
    names = {id(p): name for name, p in found.model.named_parameters()}
    assert sorted(placed) == sorted(names) and len(set(placed)) == len(placed)
    found.step(0)
    rate, decayed = made.optim.lr / made.optim.warmup, set()
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            expert = ".action." in name or name.startswith(("policy.expert.", "policy.proprioception."))
            factor = 10.0 if name.startswith("forcing.") else 3.0 if expert else 1.0
            assert group["lr"] == pytest.approx(rate * factor), name
            assert (group["weight_decay"] > 0) == (parameter.ndim > 1 and "table" not in name), name
            decayed |= {name} if group["weight_decay"] else set()
    assert "policy.transformer.blocks.1.action.attn1.to_q.weight" in decayed
    assert "policy.transformer.patch_embedding.weight" in decayed


def test_gradients_are_clipped_to_the_norm_that_was_asked_for(tmp_path: Path) -> None:
    made = config(tmp_path, "run")
    made.optim.clip = 0.25
    found, seen = trainer(made), []
    update = found.optimizer.step
    found.optimizer.step = lambda: (  # type: ignore[method-assign]
        seen.append(torch.stack([p.grad.norm() for p in found.trained if p.grad is not None]).norm()), update()
    )  # fmt: skip
    assert found.step(0)["grad_norm"] > 0.25
    assert seen[0] == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize("mode", ["first_frame", "idm", "optional_idm"])
def test_without_its_loss_the_video_learns_from_the_actions_alone(tmp_path: Path, mode: str) -> None:
    """The gradients of both losses are those of either added up, though without one of them the noisy future is not computed."""
    parts = {}
    for weight in (0.0, 1.0, 2.0):
        made = config(tmp_path, "run")
        made.video_weight, made.policy.mode = weight, mode
        parts[weight] = gradients(trainer(made))
    assert "video" not in parts[0.0][1] and parts[1.0][1]["video"] > 0
    torch.testing.assert_close(parts[0.0][1]["action"], parts[1.0][1]["action"], rtol=1e-5, atol=0)
    alone = parts[0.0][0]
    for name in ("proj_out.weight", "scale_shift_table", "blocks.1.ffn.net.2.weight", "blocks.1.attn1.to_out.0.weight"):
        found = alone[f"policy.transformer.{name}"]
        assert found is None or not found.any(), f"{name} is read by the video alone"
    assert alone["policy.transformer.blocks.0.ffn.net.2.weight"].abs().max() > 0  # type: ignore[union-attr]
    for name, one in parts[1.0][0].items():
        none, two = alone[name], parts[2.0][0][name]
        assert one is not None and two is not None, name
        expected = 2.0 * one - (torch.zeros_like(one) if none is None else none)
        torch.testing.assert_close(two, expected, rtol=1e-3, atol=2e-6, msg=name)


def test_a_run_without_the_videos_loss_resumes_though_some_weights_have_no_gradient(tmp_path: Path) -> None:
    made = config(tmp_path, "run", 4)
    made.video_weight, made.run.save_every = 0.0, 2
    train_policy(made, banks())
    ends = load_training(tmp_path / "run" / "last")[0]
    assert not any("transformer.proj_out" in name for name in ends["optimizer"])
    (tmp_path / "run" / "last").unlink()
    for path in (tmp_path / "run" / "step-000004", tmp_path / "run" / "export"):
        path.rename(path.with_name(f"old-{path.name}"))
    made.run.resume = True
    train_policy(made, banks())
    again = load_training(tmp_path / "run" / "last")[0]
    assert all(torch.equal(value, again[group][name]) for group in ends for name, value in ends[group].items())


@pytest.mark.parametrize("mode", ["first_frame", "idm"])
def test_shares_of_the_physics_losses_are_those_of_their_gradients_at_the_tap(tmp_path: Path, mode: str) -> None:
    made = config(tmp_path, "run", physics=True)
    made.policy.mode = mode
    found, tapped = trainer(made, physics=True), []
    forcing = found.forcing
    assert forcing is not None
    forcing.measure = True
    terms, forcing.measure = gradients(found)[1], False
    forcing.watch = tapped.append  # type: ignore[method-assign, assignment]
    batch = found.batch(0)
    drawn, at = found.draw(batch, step_generator(7, 0)), {}
    for name in ("neither", "pix", "sem"):
        forcing.config.lambda_pix, forcing.config.lambda_sem = 0.5 * (name == "pix"), 0.5 * (name == "sem")
        at[name] = torch.autograd.grad(found.terms(batch, drawn, None)["loss"], tapped[-1])[0]
    for name in ("pix", "sem"):
        wanted = (at[name] - at["neither"]).norm() / at["neither"].norm()
        assert wanted > 0 and float(terms[f"share_{name}"]) == pytest.approx(float(wanted), rel=2e-2), name


def test_physics_losses_reach_what_lies_below_the_tap_alone(tmp_path: Path) -> None:
    with_them, terms = gradients(trainer(config(tmp_path, "run", physics=True), physics=True))
    without, _ = gradients(trainer(config(tmp_path, "run")))
    assert terms["pix"] > 0 and terms["sem"] > 0
    above = [name for name in without if ".blocks.1." in name or "proj_out" in name]
    assert len(above) > 40
    for name in above:
        torch.testing.assert_close(with_them[name], without[name], rtol=1e-4, atol=1e-7, msg=name)
    below = "policy.transformer.blocks.0.ffn.net.2.weight"
    assert not torch.allclose(with_them[below], without[below], rtol=1e-2)  # type: ignore[arg-type]


@pytest.mark.parametrize("physics", [False, True])
def test_parts_of_a_batch_give_the_gradients_of_all_of_it(tmp_path: Path, physics: bool) -> None:
    whole, parts = config(tmp_path, "run", physics=physics), config(tmp_path, "run", physics=physics)
    parts.run.micro = 1
    one, two = (gradients(trainer(made, physics=physics)) for made in (whole, parts))
    for name in one[1]:
        if "share" not in name:
            torch.testing.assert_close(one[1][name].float(), two[1][name].float(), rtol=1e-4, atol=1e-6, msg=name)
    for name, value in one[0].items():
        torch.testing.assert_close(value, two[0][name], rtol=1e-3, atol=2e-6, msg=name)


@pytest.mark.parametrize("mode", ["joint", "idm", "optional_idm"])
def test_every_mode_trains(tmp_path: Path, mode: str) -> None:
    made = config(tmp_path, "run", 2)
    made.policy.mode = mode
    export = train_policy(made, banks())
    assert load_policy(export)[0].config.mode == mode
    lines = update_lines(tmp_path / "run")
    assert len(lines) == 2 and all(line["action"] > 0 and line["video"] > 0 for line in lines)
    values = json.loads((tmp_path / "run" / "heldout.json").read_text())
    assert values["after"] != values["before"]


def test_a_frozen_backbone_stays_as_it_is(tmp_path: Path) -> None:
    made = config(tmp_path, "run", 3)
    made.freeze_video, made.video_weight = True, 0.0
    found = trainer(made)
    before = {name: value.clone() for name, value in found.policy.state_dict().items()}
    for step in range(3):
        found.step(step)
    for name, value in found.policy.state_dict().items():
        trained = ".action." in name or name.startswith(("expert.", "proprioception."))
        if not trained:
            assert torch.equal(value, before[name]), name
    assert not torch.equal(found.policy.expert.action_in.weight, before["expert.action_in.weight"])
    assert all(
        id(p) not in {id(q) for q in found.trained} for p in found.policy.transformer.patch_embedding.parameters()
    )
    with pytest.raises(UserError, match="freeze_video"):
        TrainPolicyConfig(freeze_video=True)


def test_statistics_are_those_of_the_training_episodes(tmp_path: Path) -> None:
    some = [item for seed in (0, 1) for item in episodes(seed, far=100.0 * seed)][2:7]
    for item in some:
        item.frames = np.zeros((21, 120, 160, 3), np.uint8)
    made = TrainPolicyConfig(codec=str(weights_root() / "vae"))
    made.data.heldout, made.data.start_stride = 1, 64
    train, held = prepare_policy_banks(made, CPU, some, quiet=True)
    assert (len(train), len(held)) == (4, 1)
    kept = [item.states_TA for place, item in enumerate(some) if place != 2]  # the middle one is held out
    wanted = np.concatenate(kept).astype(np.float64)
    for bank in (train, held):
        np.testing.assert_allclose(bank.statistics.state.offset_D, wanted.mean(0), rtol=1e-9)
        np.testing.assert_allclose(bank.statistics.state.scale_D, wanted.std(0), rtol=1e-9)
    moved = np.concatenate([rows[1:] for rows in kept]).astype(np.float64)
    np.testing.assert_allclose(train.statistics.action.offset_D, moved.mean(0), rtol=1e-9)
    assert train.statistics.episodes == 4 and train.statistics.steps == 4 * 39


def test_a_run_does_not_go_on_with_other_statistics(tmp_path: Path) -> None:
    made = config(tmp_path, "run", 2)
    train_policy(made, banks())
    made.run.resume = True
    grown = banks()
    shifted = [rows.states_TA + 1 for rows in episodes(0)]
    for bank in grown:
        bank.statistics = ActionStatistics.of(shifted, shifted, episodes=4)
    with pytest.raises(UserError, match=r"data\.roots.*offset of action"):
        train_policy(made, grown)


def test_the_recipes_compose_and_have_what_they_say() -> None:
    made = {
        name: compose("train_policy", [f"experiment=policy_{name}", "model=somewhere"], TrainPolicyConfig)
        for name in ("pico", "nano", "robotwin", "six_tasks", "libero")
    }
    assert made["six_tasks"].data.tasks == [
        "place_empty_cup", "press_stapler", "grab_roller", "shake_bottle", "adjust_bottle", "stack_bowls_two",
    ]  # fmt: skip
    for name in ("robotwin", "six_tasks", "libero"):
        some = made[name]
        assert (some.policy.width, some.policy.ffn_dim, some.policy.chunk, some.policy.steps_per_latent) == (
            1024,
            4096,
            32,
            16,
        )
        assert (some.optim.lr, some.optim.final_lr, some.optim.warmup) == (1e-4, 0.01, some.run.steps // 20)
        assert (some.policy.video_shift, some.policy.action_shift, some.video_weight) == (5.0, 1.0, 1.0)
    assert (made["libero"].policy.action_dim, made["libero"].policy.state_dim) == (7, 8)
    assert [made[name].normalization for name in ("robotwin", "libero")] == ["zscore", "minmax"]
    with pytest.raises(UserError, match=r"policy\.steps_per_latent"):
        compose("train_policy", ["experiment=policy_six_tasks"], TrainPolicyConfig)
    cell = ["experiment=policy_nano", "freeze_video=true"]
    with pytest.raises(UserError, match="freeze_video"):
        compose("train_policy", cell, TrainPolicyConfig)
    assert compose("train_policy", [*cell, "video_weight=0"], TrainPolicyConfig).freeze_video


@pytest.mark.parametrize("video", [1.0, 0.0])
@pytest.mark.parametrize("mode", ["first_frame", "joint", "idm"])
def test_operations_are_those_that_pytorch_counts(tmp_path: Path, mode: str, video: float) -> None:
    """But for the proprioception's own layers, which are left out."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    made = config(tmp_path, "run")
    made.policy.mode, made.video_weight = mode, video
    found = trainer(made)
    batch = found.batch(0)
    drawn = found.draw(batch, step_generator(7, 0))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        found._backward(batch, drawn)
    counted = found.flops(batch["latents_BCFhw"].shape)
    assert counter.get_total_flops() == pytest.approx(counted, rel=0.03)


def test_layers_that_stay_in_float32_are_multiplied_as_a_policy_multiplies_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, seen, terms = torch.get_float32_matmul_precision(), [], PolicyTrainer.terms

    def watched(self: PolicyTrainer, *given: Any) -> dict[str, torch.Tensor]:
        seen.append(torch.get_float32_matmul_precision())
        return terms(self, *given)

    monkeypatch.setattr(PolicyTrainer, "terms", watched)
    # what a training on a GPU begins with: TF32
    monkeypatch.setattr(
        "physisforcing.worldmodel.training.runtime.choose_kernels",
        lambda *_: torch.set_float32_matmul_precision("high"),
    )
    train_policy(config(tmp_path, "run", 1), banks())
    assert set(seen) == {"highest"} and torch.get_float32_matmul_precision() == usual
