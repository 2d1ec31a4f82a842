"""A comparison whose decoder reads latents: the controls that show pictures are read by a second decoder, and the models are still scored."""

from __future__ import annotations

import pytest
import torch

from physisforcing.compare import CompareConfig, compare
from physisforcing.core.results import ResultsFile
from physisforcing.planner.latent_decoder import LatentDecoderConfig, LatentInverseDynamics, save_latent_decoder

pytestmark = [pytest.mark.sim, pytest.mark.slow]


def test_controls_run_beside_a_latent_decoder(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = LatentInverseDynamics(
            LatentDecoderConfig(channels=8, blocks=1, keypoints=2, flat_channels=1, dim=12, heads=2)
        )
    decoder.set_statistics(torch.zeros(14), torch.full((14,), 0.5), torch.full((14,), 0.1))
    config = CompareConfig(
        models={"mine": "shipped"},
        controls=["frozen", "oracle"],
        episodes=1,
        sensitivity=0,
        max_steps=40,
        threads=1,
        videos=0,
        output=str(tmp_path / "run"),
    )
    config.planner.decoder = str(save_latent_decoder(decoder, tmp_path / "latent"))
    config.planner.denoising_steps = 1
    summary = compare(config, progress=False)
    assert summary["errors"] == 0 and list(summary["skipped"]) == ["imagined success"]
    names = {cell["model"]: cell["n"] for cell in summary["success"]}
    assert names == dict.fromkeys(["mine", *config.controls], 1)
    assert any("reads latents" in note for note in summary["notes"])
    rows = {row["policy"]: row for row in ResultsFile(tmp_path / "run" / "results.jsonl").rows}
    for name in ("mine", "frozen", "oracle"):
        assert rows[name]["scores"]["chunks"] == 2, (
            "what was imagined is scored, also where the decoder does not read it"
        )
    oracle = rows["oracle"]["scores"]
    assert oracle["gripper_px_0.48s"] < 0.5 * oracle["gripper_moved_px_0.48s"], "the second decoder repeats the expert"
