"""Training of large backbones in 8-bit floats, emulated on a CPU: near the same gradients by other numbers, the same names, exact continuing."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_large
from physisforcing.core.errors import UserError
from physisforcing.policy.training_config import TrainPolicyConfig
from physisforcing.worldmodel.data.batches import step_generator
from physisforcing.worldmodel.training.config import RunConfig, TrainVaeConfig, TrainWorldModelConfig
from physisforcing.worldmodel.training.float8 import check_float8, dither_weights, use_float8
from physisforcing.worldmodel.training.trainer import Trainer
from physisforcing.worldmodel.training.worldmodel import train_world_model

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def torchao() -> None:
    pytest.importorskip(
        "torchao", reason="needs the extra fp8 (torchao), which diffusers would import in every process"
    )


@pytest.fixture
def made(large_models: dict[str, tuple[Path, Path]]) -> tuple[Path, Path]:
    """A pipeline folder and a latent store."""
    return large_models["ti2v"]


def config(made: tuple[Path, Path], out: Path) -> TrainWorldModelConfig:
    found = tiny_large.config(made[0], [made[1]], out, rank=0)
    found.run.fp8 = True
    return found


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    batch = trainer.batch(0)
    trainer._backward(batch, trainer.draw(batch, step_generator(3, 0)))
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.usefixtures("torchao")
def test_gradients_are_near_those_without(made: tuple[Path, Path], tmp_path: Path) -> None:
    eight = config(made, tmp_path / "eight")
    plain = copy.deepcopy(eight)
    plain.run.fp8 = False
    trainers = [tiny_large.trainer(settings) for settings in (plain, eight)]
    kinds = [{type(layer).__name__ for layer in trainer.model.modules()} for trainer in trainers]
    assert "Float8Linear" in kinds[1] - kinds[0]
    exact, rounded = map(gradients, trainers)
    assert rounded.keys() == exact.keys()
    some = [name for name in exact if "blocks.1.ffn" in name or "blocks.1.attn1" in name]
    assert len(some) >= 8
    for name in some:
        gap = (rounded[name] - exact[name]).norm() / exact[name].norm()
        assert 1e-4 < gap < 0.2, (name, gap)


@pytest.mark.usefixtures("torchao")
def test_a_stopped_run_goes_on_with_the_same_bits_and_exports_stock_names(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    whole = train_world_model(config(made, tmp_path / "whole"))
    halved = config(made, tmp_path / "halved")
    trainer = tiny_large.trainer(copy.deepcopy(halved))
    for step in range(2):
        trainer.step(step)
    (tmp_path / "halved").mkdir()
    trainer.save(tmp_path / "halved", 2)
    halved.run.resume = True
    first, second = (load_file(folder / WEIGHTS) for folder in (whole, train_world_model(halved)))
    assert first.keys() == second.keys() == load_file(made[0] / WEIGHTS).keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("torchao")
def test_an_update_too_small_to_matter_does_not_tip_weights_that_were_stored_in_bfloat16() -> None:
    """Of such weights many lie just between two 8-bit floats where scales are powers of two (TorchAO's own choice), and all tip to one side."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    torch.manual_seed(0)
    stored = torch.nn.Linear(512, 256, bias=False)
    stored.weight.data = stored.weight.data.bfloat16().float()
    inputs = torch.randn(64, 512)
    ours, unrounded, theirs = (torch.nn.Sequential(copy.deepcopy(stored)) for _ in range(3))
    dither_weights(ours, torch.Generator().manual_seed(0))
    use_float8([ours, unrounded], torch.device("cpu"))
    recipe = dataclasses.replace(Float8LinearConfig.from_recipe_name("rowwise"), emulate=True)
    convert_to_float8_training(theirs, config=recipe)
    moved = []
    for holder in (ours, unrounded, theirs):
        with torch.no_grad():
            before = holder(inputs)
            holder[0].weight += 1e-9 * inputs.sum(0).sign()  # an update whose parts all push one way
            moved.append(float((holder(inputs) - before).norm() / before.norm()))
    assert moved[2] > 3e-3, "what the choice of scales is for"
    assert moved[1] < moved[2] / 4
    assert moved[1] > 3e-4, "what dithering is for"
    assert moved[0] < moved[1] / 3, (moved, "by what lies there by chance")


def test_dithered_weights_stay_what_they_are_in_bfloat16() -> None:
    torch.manual_seed(0)
    layer, trained = torch.nn.Linear(300, 200), torch.nn.Linear(300, 200)
    special = torch.tensor([0.0, -0.0, 0.5, -0.25, 1.0, 2.0**-120, -(2.0**-126), 3e-41, 2.0**100])
    layer.weight.data[0, : len(special)] = special
    layer.weight.data = layer.weight.data.bfloat16().float()
    kept = layer.weight.detach().clone(), trained.weight.detach().clone(), layer.bias.detach().clone()
    one, other = (copy.deepcopy(torch.nn.ModuleList([layer, trained])) for _ in range(2))
    for block in (one, other):
        dither_weights(block, torch.Generator().manual_seed(5))
    weight = one[0].weight.detach()
    assert torch.equal(weight, other[0].weight), "the same numbers of the same draw"
    assert torch.equal(weight.bfloat16().float(), kept[0])
    off = kept[1] != kept[1].bfloat16().float()
    assert off.float().mean() > 0.99
    assert torch.equal(one[1].weight[off], kept[1][off]), "of more digits than bfloat16 has"
    assert torch.equal(one[0].bias, kept[2])
    assert weight.isfinite().all()
    assert torch.equal(weight[0, :2], kept[0][0, :2])
    changed = (weight != kept[0])[:, len(special) :]
    assert changed.float().mean() > 0.999
    usual = kept[0][1:]
    above = 2.0 ** (usual.abs().log2().floor() - 7)  # from one number of bfloat16 to the next, away from zero
    parts = (weight[1:].abs() - usual.abs()) / above
    assert parts.max() <= 0.5
    assert parts.min() >= -0.5
    parts = parts[usual.abs().log2() % 1 != 0]  # below a power of two they lie half as far apart
    assert abs(float(parts.mean())) < 5 * (1 / 12) ** 0.5 / parts.numel() ** 0.5
    assert float(parts.std()) == pytest.approx((1 / 12) ** 0.5, rel=0.02)


def test_weights_are_dithered_to_both_sides_of_a_power_of_two_and_what_is_not_finite_stays() -> None:
    layer = torch.nn.Linear(4096, 1)
    layer.weight.data[:] = 1.0
    layer.weight.data[0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    dither_weights(torch.nn.ModuleList([layer]), torch.Generator().manual_seed(0))
    kept, moved = layer.weight[0, :3].tolist(), layer.weight[0, 3:].detach()
    assert kept[:2] == [float("inf"), -float("inf")]
    assert kept[2] != kept[2]
    assert 1 - 2.0**-9 <= float(moved.min()) < 1 - 0.9 * 2.0**-9
    assert 1 + 0.9 * 2.0**-8 < float(moved.max()) <= 1 + 2.0**-8
    assert float((moved == 1).float().mean()) < 0.01


@pytest.mark.usefixtures("torchao")
def test_a_training_in_8_bits_dithers_what_was_stored_in_bfloat16(made: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "bfloat16"
    shutil.copytree(made[0], folder)
    stored = {name: value.bfloat16() for name, value in load_file(folder / WEIGHTS).items()}
    save_file(stored, folder / WEIGHTS)
    found = {}
    for name, eight, seed in (("plain", False, 0), ("eight", True, 0), ("again", True, 0), ("other", True, 1)):
        settings = config((folder, made[1]), tmp_path / name)
        settings.run.fp8, settings.run.seed = eight, seed
        found[name] = tiny_large.trainer(settings).model.denoiser.backbone.transformer.state_dict()
    weight = "blocks.0.ffn.net.0.proj.weight"
    assert torch.equal(found["plain"][weight], stored[weight].float())
    assert (found["eight"][weight] != found["plain"][weight]).float().mean() > 0.95
    assert torch.equal(found["eight"][weight], found["again"][weight])
    assert not torch.equal(found["eight"][weight], found["other"][weight])
    for name, value in stored.items():
        assert torch.equal(found["eight"][name].bfloat16(), value), name


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # of norms, whose weights stay float32
@pytest.mark.usefixtures("torchao")
def test_ties_are_counted(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number in bfloat16 has four bits more than one in float8_e4m3: one in 16 lies just between two of these. What is in between of bfloat16 does not."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import float8_ties

    float8_ties.main(["--size", "tiny", "--seeds", "1", "--json", str(tmp_path / "ties.json")])
    found = {
        line["claim"].removeprefix("training/float8/"): line["value"]
        for line in json.loads((tmp_path / "ties.json").read_text())
    }
    assert found["powers_of_two/tie_share"] == pytest.approx(1 / 16, rel=0.02)
    assert 0 < found["unrounded/tie_share"] < 0.01
    assert found["ours/tie_share"] < 1e-5
    assert found["powers_of_two/loss_change"] < 5 * found["unrounded/loss_change"] < 0
    assert abs(found["ours/loss_change"]) < abs(found["unrounded/loss_change"]) / 3
    of = {arm: {"loss", "loss_change", "tie_share"} for arm in ("powers_of_two", "unrounded", "ours")}
    of |= {arm: {"loss", "loss_change"} for arm in ("bfloat16", "bfloat16_dithered")}
    assert found.keys() == {f"{arm}/{what}" for arm, some in of.items() for what in some}


def test_where_it_cannot_be_it_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    under = config(made, tmp_path / "lora")
    under.lora.rank = 2
    with pytest.raises(UserError, match=r"run\.fp8.*lora\.rank=2.*all weights trained"):
        tiny_large.trainer(under)
    with pytest.raises(UserError, match=r"run\.fp8.*model="):
        train_world_model(TrainWorldModelConfig(run=RunConfig(out=str(tmp_path / "small"), fp8=True)))
    for kind in (TrainVaeConfig, TrainPolicyConfig):
        with pytest.raises(UserError, match=r"run\.fp8.*large world models"):
            kind(run=RunConfig(fp8=True))


@pytest.mark.usefixtures("torchao")
def test_layers_that_have_no_such_products_are_told() -> None:
    with pytest.raises(UserError, match=r"run\.fp8.*multiples of 16"):
        use_float8([torch.nn.Sequential(torch.nn.Linear(24, 32))], torch.device("cpu"))


def test_without_torchao_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match=r"physisforcing\[fp8\]"):
        check_float8(True, rank=0)
    check_float8(False, rank=0)
