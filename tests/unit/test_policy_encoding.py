"""A picture is the same latent where a policy acts as where its training windows were made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_paper
from physisforcing.core.paths import weights_root
from physisforcing.policy.encoding import first_frame_by, open_first_frame
from physisforcing.worldmodel.codec import load_codec
from physisforcing.worldmodel.data import batches
from physisforcing.worldmodel.data.batches import build_bank
from physisforcing.worldmodel.data.latent_maker import LatentMaker
from physisforcing.worldmodel.data.windows import Episode, FrameStore, WindowTable
from physisforcing.worldmodel.pipeline_vae import load_vae
from physisforcing.worldmodel.text import TextEmbedder

CPU = torch.device("cpu")


def pictures(count: int, height: int, width: int) -> np.ndarray:
    """A gradient that moves."""
    rows, columns = np.mgrid[:height, :width]
    moving = [np.stack([rows + 3 * k, columns + 5 * k, rows + columns], -1) % 256 for k in range(count)]
    return np.stack(moving).astype(np.uint8)


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_of_a_small_model_it_is_that_of_the_bank(kept: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """``kept``: bfloat16 is how a bank is computed and kept on a GPU."""
    monkeypatch.setattr(batches, "kept_dtype", lambda _device: kept)
    monkeypatch.setattr(TextEmbedder, "batch", lambda _self, some: (torch.zeros(len(some), 1, 1), None))
    frames, states = pictures(20, 120, 160), np.zeros((40, 14), np.float32)
    episode = Episode(
        frames=frames, states_TA=states, instruction="go", task="t", index=0, seed=0, success=True
    )  # fmt: skip
    codec, folder = load_codec(weights_root() / "vae"), weights_root() / "vae"
    bank = build_bank(FrameStore.build([episode], CPU), WindowTable.build([40], 8), codec, (0,))
    trained = bank.latents_WCFhw[:1, :, :1].float()
    acted = open_first_frame(folder, CPU, small=True)(torch.from_numpy(frames[:1]))
    assert bank.latents_WCFhw.dtype == kept and acted.dtype == torch.float32
    plain = codec.encode(torch.from_numpy(frames[None, :1]))
    assert torch.equal(acted, acted.to(kept).float()) and torch.equal(acted, plain) == (kept == torch.float32)
    # convolutions over one picture and over a window may add up in another order
    tolerance = 1e-4 if kept == torch.float32 else 2e-2
    torch.testing.assert_close(acted, trained, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_of_a_large_model_it_is_that_of_the_store(stored: torch.dtype, tmp_path: Path) -> None:
    model = tiny_paper.ti2v(tmp_path)
    maker = LatentMaker(model, device=CPU, dtype=stored)
    maker.load()
    frames = torch.from_numpy(pictures(5, 32, 48))
    acted = first_frame_by(load_vae(model / "vae"), CPU, stored)(frames[:1])
    assert torch.equal(acted[0], maker.encode(frames[:1])["latents_CFhw"].float())
    torch.testing.assert_close(acted[0], maker.encode(frames)["latents_CFhw"][:, :1].float(), rtol=1e-2, atol=1e-4)
