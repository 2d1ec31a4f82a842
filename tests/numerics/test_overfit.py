"""L_pix alone brings the end-point error of a few clips below half a cell; the benchmark's read-outs see what the losses see."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch

from physisforcing.worldmodel.backbones.wan import ConditionerConfig, WanConfig, build_denoiser
from physisforcing.worldmodel.data.batches import BankTargets, WindowBank, step_generator
from physisforcing.worldmodel.data.window_targets import WindowTargets
from physisforcing.worldmodel.data.windows import WindowTable
from physisforcing.worldmodel.flow_matching import FlowMatchingConfig, add_noise, frame_timesteps
from physisforcing.worldmodel.physics.config import PhysicsConfig
from physisforcing.worldmodel.physics.forcing import REPORT_SIZE, PhysisForcing
from physisforcing.worldmodel.training.config import RunConfig, TrainWorldModelConfig
from physisforcing.worldmodel.training.objective import draw_noise

GRID, POINTS, CLIPS = (3, 6, 8), 24, 2
SMALL = WanConfig(num_heads=2, head_dim=32, num_layers=3, ffn_dim=128, tap=2)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, repository) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    return {name: importlib.import_module(name) for name in ("probe", "readouts")}


def clips() -> WindowBank:
    """Two clips of noise whose points move on straight lines, further than a cell, and differently in each."""
    generator = torch.Generator().manual_seed(0)
    frames, height, width = GRID
    start = torch.rand(CLIPS, 1, POINTS, 2, generator=generator) * 0.6 + 0.2
    way = torch.rand(CLIPS, 1, POINTS, 2, generator=generator) * 0.5 - 0.25
    time = torch.linspace(0, 1, frames)[None, :, None, None]
    targets = WindowTargets(
        points_WFN2=(start + way * time).clamp(0.05, 0.95),
        visible_WFN=torch.ones(CLIPS, frames, POINTS, dtype=torch.bool),
        select_WN=torch.ones(CLIPS, POINTS, dtype=torch.bool),
        mask_WFhw=torch.ones(CLIPS, *GRID, dtype=torch.bool),
        body_WFhw=torch.zeros(CLIPS, 0, height, width, dtype=torch.int32),
        teacher_WF=torch.zeros(CLIPS, frames, dtype=torch.long),
        token_WK=torch.zeros(CLIPS, 0, dtype=torch.int16),
        relation_WR=torch.zeros(CLIPS, 0, dtype=torch.int8),
        teacher_EhwC=torch.ones(1, height, width, 4, dtype=torch.float16),
        channels=4,
    )
    return WindowBank(
        table=WindowTable(episode_W=torch.arange(CLIPS), start_W=torch.zeros(CLIPS, dtype=torch.long)),
        latents_WCFhw=torch.randn(CLIPS, SMALL.latent_channels, *GRID, generator=generator),
        text_SLD=torch.zeros(1, 32, 384),
        sentence_W=torch.zeros(CLIPS, dtype=torch.long),
        proprioception_WKA=torch.zeros(CLIPS, 3, 14),
        targets=BankTargets(row_W=torch.arange(CLIPS), targets=targets),
    )


@pytest.mark.slow
def test_a_small_network_learns_two_clips_by_heart(benchmark: dict[str, ModuleType]) -> None:
    config = TrainWorldModelConfig(backbone=SMALL, physics=PhysicsConfig(lambda_pix=1.0, lambda_sem=0.0))
    config.run = RunConfig(seed=0, steps=600, device="cpu")
    config.optim.warmup, config.optim.lr = 20, 2e-3
    curve = benchmark["probe"].overfit(clips(), config, every=50)
    assert curve[0] == (0, pytest.approx(2.0, abs=1.2))
    assert curve[-1][1] < 0.5, curve


def test_read_outs_are_those_of_the_losses(benchmark: dict[str, ModuleType]) -> None:
    """The error of a head is ``PhysisForcing``'s own metric, and the collected blocks are what the denoiser taps."""
    readouts, bank = benchmark["readouts"], clips()
    torch.manual_seed(0)
    denoiser = build_denoiser(SMALL, ConditionerConfig())
    forcing = PhysisForcing(PhysicsConfig(), width=SMALL.dim, teacher_dim=4)
    batch = bank.batch(torch.arange(CLIPS))
    sigma = torch.full((CLIPS,), 0.3)
    noise = torch.randn(batch["latents_BCFhw"].shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, outputs = readouts.block_outputs(denoiser, batch, noise, sigma)
        assert len(outputs) == SMALL.num_layers
        for tap in range(1, SMALL.num_layers + 1):
            denoiser.tap = tap
            context = denoiser.context(batch["text_BLD"], batch["proprioception_BKA"])
            noisy, times = add_noise(batch["latents_BCFhw"], noise, sigma), frame_timesteps(sigma, GRID[0])
            torch.testing.assert_close(denoiser(noisy, times, context, need_tap=True)[1], outputs[tap - 1])
        found = readouts.measure(denoiser, {"head": readouts.ReadOut.of_head(2, forcing)}, bank, sigmas=(0.3,), chunk=1)
        evaluation = step_generator(0, readouts.EVALUATION_STEP)
        drawn = draw_noise(bank.latents_WCFhw.shape, FlowMatchingConfig(), evaluation)
        _, outputs = readouts.block_outputs(denoiser, batch, drawn[0], sigma)
        said = forcing(outputs[1], GRID, batch["targets"]).metrics
    assert found.mean("head", "soft", 0.3) == pytest.approx(float(said["epe_cells"]), rel=1e-5)
    scale = REPORT_SIZE[0] / GRID[1]
    assert found.mean("still", "soft", None) * scale == pytest.approx(float(said["epe_still_px"]), rel=1e-4)
