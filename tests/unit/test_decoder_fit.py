"""The training loop of decoders: its schedule and average, and runs that continue exactly or stop."""

from __future__ import annotations

import math

import pytest
import torch

from physisforcing.core.errors import UserError
from physisforcing.planner.decoder_fit import Fit, FitConfig, tri_stage
from physisforcing.planner.feature_decoder.training import train_feature_decoder
from toy_decoders import feature_run


def test_tri_stage():
    c = FitConfig(warmup_share=0.1, hold_share=0.2, first_scale=0.1, last_scale=0.01)
    assert tri_stage(0.0, c) == pytest.approx(0.1) and tri_stage(0.05, c) == pytest.approx(0.55)
    assert tri_stage(0.1, c) == 1.0 and tri_stage(0.29, c) == 1.0
    half = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * 0.5))
    assert tri_stage(0.65, c) == pytest.approx(half) and tri_stage(1.0, c) == pytest.approx(0.01)
    theirs = FitConfig()
    assert tri_stage(1.0, theirs) == pytest.approx(1e-6) and tri_stage(0.02, theirs) == 1.0


def test_a_run_that_was_interrupted_ends_with_the_same_weights(frozen, tmp_path):
    def go(folder, stop_after=None, resume=False):
        seen = []

        def log(row):
            seen.append(row["step"])
            if stop_after is not None and row["step"] >= stop_after:
                raise KeyboardInterrupt

        config = feature_run(save_every=2, log_every=1)
        config.model.head.residual_dropout = 0.2
        return train_feature_decoder(config, frozen, folder=folder, resume=resume, log=log)[0], seen

    straight, _ = go(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "stopped", stop_after=5)
    with pytest.raises(UserError, match="resume=true"):
        go(tmp_path / "stopped")
    continued, seen = go(tmp_path / "stopped", resume=True)
    assert seen == [5, 6], "it goes on from step 4"
    for (name, a), b in zip(straight.state_dict().items(), continued.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(UserError, match=r"fit\.lr"):
        train_feature_decoder(feature_run(save_every=2, lr=1.0), frozen, folder=tmp_path / "stopped", resume=True)


def test_the_average_is_what_is_left(tmp_path):
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    lives = []

    def loss(generator):
        lives.append(model.weight.item())
        return {"loss": -model.weight.sum()}

    config = FitConfig(steps=5, lr=0.1, ema=0.5, weight_decay=0.0)
    fit = Fit(model, loss, config, folder=tmp_path)
    fit.run()
    lives.append(float(fit.average.tensors()["weight"]))  # swapped: the live weight after the last step
    average = 0.0
    for step, live in enumerate(lives[1:]):
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * live
    assert model.weight.item() == pytest.approx(average) != pytest.approx(lives[-1])


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    model = torch.nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match="step 1"):
        Fit(model, lambda g: {"loss": model.weight.sum() * math.nan}, FitConfig(), folder=tmp_path).run()
    for change, match in (({"precision": "fp16"}, "bf16"), ({"ema": 1.0}, "ema"), ({"steps": 0}, "steps")):
        with pytest.raises(UserError, match=match):
            Fit(model, lambda g: {}, FitConfig(**change), folder=tmp_path)


def test_half_precision_trains_the_same_loss(frozen, tmp_path):
    losses = {}
    for precision in ("fp32", "bf16"):
        rows = []
        config = feature_run(steps=2, precision=precision, log_every=1)
        model, _ = train_feature_decoder(config, frozen, folder=tmp_path / precision, log=rows.append)
        losses[precision] = [row["loss"] for row in rows]
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.03) and losses["bf16"] != losses["fp32"]
