"""Settings of a training of the large backbones: the recipes, what each does, what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import tiny_large
from physisforcing.core.config import compose
from physisforcing.core.errors import UserError
from physisforcing.worldmodel.physics.config import PhysicsConfig
from physisforcing.worldmodel.training.config import TrainWorldModelConfig
from physisforcing.worldmodel.training.runtime import choose_kernels, kernels_given_back
from physisforcing.worldmodel.training.worldmodel import Trainer, train_world_model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c, "codec", "runs/vae"), r"codec.*no such setting with model="),
        (lambda c: setattr(c.data, "roots", ["runs/bell"]), r"data\.roots.*no such setting with model="),
        (lambda c: setattr(c, "text_dropout", 0.2), r"text_dropout.*no such setting with model="),
        (lambda c: setattr(c.data, "latents", []), r"data\.latents.*no store.*physis data latents"),
        (lambda c: setattr(c.data, "heldout", 4), r"data\.heldout.*fewer than the 4 episodes"),
        (lambda c: setattr(c.large, "tap", 9), r"tap.*a block from 1 to 3"),
        (lambda c: setattr(c.large, "first_latent", "mask"), r"first_latent.*no place for a mask"),
        (lambda c: setattr(c.backbone, "tap", 2), r"backbone\.tap.*no such setting with model=.*large\.tap="),
        (lambda c: setattr(c.teacher.tracker, "name", "classical"), r"teacher\.tracker\.name.*leave teacher out"),
        (lambda c: setattr(c.data, "start_stride", 8), r"data\.start_stride.*no such setting with model="),
        (lambda c: setattr(c.data, "workers", 0), r"data\.workers.*1 or more"),
        (lambda c: setattr(c, "model", ""), r"large\.videos.*no such setting without model="),
        (lambda c: setattr(c.run, "wandb", "physis"), r"run\.wandb.*without the package wandb"),
    ],
)
def test_what_does_not_belong_to_a_large_backbone_is_refused(large_models, tmp_path, change, message, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else real(name, *rest))
    model, store = large_models["ti2v"]
    config = tiny_large.config(model, [store], tmp_path / "run", rank=0)
    change(config)
    with pytest.raises(UserError, match=message):
        train_world_model(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c.lora, "also", ["proj_out"]), r"lora\.also.*without lora\.rank"),
        (
            lambda c: (setattr(c.physics, "weights", "gradient"), setattr(c.run, "micro", 1)),
            r"physics\.weights.*run\.micro",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(large_models, tmp_path, change, message):
    model, store = large_models["ti2v"]
    config = tiny_large.config(model, [store], tmp_path / "run", rank=0)
    change(config)
    with pytest.raises(UserError, match=message):
        tiny_large.trainer(config)


def test_an_unknown_way_of_sharding_is_refused(large_models, tmp_path):
    model, store = large_models["ti2v"]
    config = tiny_large.config(model, [store], tmp_path / "run")
    config.run.sharding = "some"
    with pytest.raises(UserError, match=r"run\.sharding.*auto, weights or none"):
        tiny_large.trainer(config)


@pytest.mark.parametrize(
    ("name", "rank", "lr"), [("pf_wan_5b", 0, 1e-5), ("pf_wan_a14b", 0, 1e-5), ("pf_cosmos3_nano", 16, 5e-4)]
)
def test_the_recipes_of_the_paper_compose(name, rank, lr):
    config = compose(
        "train_worldmodel", [f"experiment={name}", "model=folder", "data.latents=[store]"], TrainWorldModelConfig
    )
    assert (config.run.steps, config.run.batch, config.lora.rank, config.optim.lr) == (20000, 128, rank, lr)
    assert (config.flow.train_shift, config.flow.motion_weight, config.optim.ema) == (1.0, 0.0, 0.0)
    assert config.large.tap is None, "the middle block: 15 of 30, 20 of 40, 18 of 36"
    assert config.physics.phi_hidden == config.physics.psi_hidden == 2048 and config.physics.feature_dim == 256


def test_the_heads_learn_at_their_own_rate(large_models, tmp_path):
    model, store = large_models["ti2v"]
    config = tiny_large.config(model, [store], tmp_path / "run")
    config.optim.heads = 10.0
    trainer = tiny_large.trainer(config)
    trainer.step(0)
    rates = {
        name: group["lr"]
        for group in trainer.optimizer.param_groups
        for name, p in trainer.model.named_parameters()
        if any(p is one for one in group["params"])
    }
    assert all(rate == pytest.approx(0.1) for name, rate in rates.items() if name.startswith("forcing."))
    assert all(rate == pytest.approx(0.01) for name, rate in rates.items() if name.startswith("denoiser."))


def test_the_heads_of_an_earlier_run_have_their_widths(large_models, tmp_path):
    model, store = large_models["ti2v"]
    export = train_world_model(tiny_large.config(model, [store], tmp_path / "first", steps=1))
    config = tiny_large.config(model, [store], tmp_path / "second", steps=1)
    config.run.init, usual = str(export), PhysicsConfig()
    config.physics.phi_hidden, config.physics.psi_hidden = usual.phi_hidden, usual.psi_hidden
    assert tiny_large.trainer(config).forcing.phi[1].out_features == 16
    config.physics.phi_hidden = 32
    with pytest.raises(UserError, match=r"physics\.phi_hidden: got 32, wanted 16"):
        tiny_large.trainer(config)


@pytest.fixture
def settings_of_the_process() -> Iterator[Callable[[], tuple]]:
    def read() -> tuple:
        return torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()

    before = read()
    yield read
    torch.use_deterministic_algorithms(before[0])
    torch.set_float32_matmul_precision(before[1])


@pytest.mark.parametrize("usual", [False, True])
@pytest.mark.parametrize("asked", [False, True])
def test_a_run_gives_back_the_kernels_of_its_process(
    large_models, tmp_path, monkeypatch, settings_of_the_process, usual, asked
):
    model, store = large_models["ti2v"]
    torch.use_deterministic_algorithms(usual)
    torch.set_float32_matmul_precision("medium")
    inside, step = [], Trainer.step
    monkeypatch.setattr(
        Trainer, "step", lambda self, number: inside.append(settings_of_the_process()[0]) or step(self, number)
    )
    config = tiny_large.config(model, [store], tmp_path / "run", steps=1)
    config.run.deterministic = asked
    train_world_model(config)
    assert inside == [asked or usual] and settings_of_the_process() == (usual, "medium")
    config.run.nonfinite = "ignore"  # refused once the kernels are chosen
    config.run.out = str(tmp_path / "other")
    with pytest.raises(UserError, match=r"run\.nonfinite"):
        train_world_model(config)
    assert settings_of_the_process() == (usual, "medium")


def test_faster_kernels_are_given_back(settings_of_the_process):
    before = torch.backends.cudnn.benchmark, torch.backends.cuda.cudnn_sdp_enabled(), settings_of_the_process()
    with kernels_given_back():
        choose_kernels(torch.device("cuda"), False)
        assert torch.backends.cudnn.benchmark and settings_of_the_process()[1] == "high"
        torch.backends.cuda.enable_cudnn_sdp(not before[1])
    assert before == (
        torch.backends.cudnn.benchmark, torch.backends.cuda.cudnn_sdp_enabled(), settings_of_the_process()
    )  # fmt: skip


def test_attention_that_was_switched_off_stays_off(settings_of_the_process):
    with kernels_given_back():
        torch.backends.cuda.enable_cudnn_sdp(False)
        choose_kernels(torch.device("cuda"), False)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    with kernels_given_back():
        torch.backends.cuda.enable_cudnn_sdp(True)
        choose_kernels(torch.device("cuda"), False)
        assert torch.backends.cuda.cudnn_sdp_enabled()
