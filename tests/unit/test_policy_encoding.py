"""A picture is the same latent where a policy acts as where its training windows were made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_paper
from physisforcing.core.errors import UserError
from physisforcing.core.paths import weights_root
from physisforcing.policy.checkpoint import PolicyInfo
from physisforcing.policy.encoding import Sentences, first_frame_by, open_first_frame
from physisforcing.worldmodel.codec import load_codec
from physisforcing.worldmodel.data import batches
from physisforcing.worldmodel.data.batches import build_bank
from physisforcing.worldmodel.data.latent_maker import LatentMaker
from physisforcing.worldmodel.data.windows import Episode, FrameStore, WindowTable
from physisforcing.worldmodel.first_frame import FirstFrameEncoder
from physisforcing.worldmodel.pipeline_vae import PipelineVae, load_vae
from physisforcing.worldmodel.text import TextEmbedder
from physisforcing.worldmodel.text_encoders import UMT5Text

pytestmark = pytest.mark.usefixtures("own_cache")  # sentences are embedded
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
    tolerance = 1e-5 if kept == torch.float32 else 2e-2
    torch.testing.assert_close(acted, trained, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_of_a_large_model_it_is_that_of_the_store(stored: torch.dtype, tmp_path: Path) -> None:
    model = tiny_paper.ti2v(tmp_path)
    maker = LatentMaker(model, device=CPU, dtype=stored)
    maker.load()
    frames = torch.from_numpy(pictures(5, 32, 48))
    acted = first_frame_by(load_vae(model / "vae"), CPU, stored)(frames[:1])
    assert torch.equal(acted[0], maker.encode(frames[:1])["latents_CFhw"].float())
    # of the window's first latent: rounding to the type in which it is stored may fall to either side
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if stored == torch.float32 else {"rtol": 1e-2, "atol": 1e-4}
    torch.testing.assert_close(acted[0], maker.encode(frames)["latents_CFhw"][:, :1].float(), **tolerance)


def test_a_sentence_is_as_long_as_in_training_or_refused(tmp_path: Path) -> None:
    """Released weights say nothing of their training's padding: their encoder cuts, with a warning."""
    source, short, long = str(tiny_paper.ti2v(tmp_path)), "turn the cube", "turn the cube " * 8
    fits = len(UMT5Text(source).tokens(short))
    width = UMT5Text(source).tokens(short).shape[1]
    text = {"encoder": "umt5-xxl", "tokens": fits, "padded": 512, "fingerprint": UMT5Text(source).fingerprint}
    trained = Sentences(PolicyInfo(text=text), source, width, CPU)
    trained.prepare([short])
    assert trained.batch([short]).shape == (1, fits, width)
    for read in (trained.prepare, trained.batch):
        with pytest.raises(UserError, match=rf"instruction: got .*turn the cube.* tokens\", wanted at most {fits}"):
            read([long])
    released = Sentences(PolicyInfo(text={"encoder": "umt5-xxl", "tokens": fits}), source, width, CPU)
    with pytest.warns(UserWarning, match=f"longer than the {fits} that are read"):
        assert released.batch([long]).shape == (1, fits, width)


@pytest.mark.parametrize("side", [8, 16])
def test_a_single_picture_needs_no_frames_before_it(side: int) -> None:
    """The encoder of single pictures against the one of videos, which stays."""
    made = [PipelineVae(tiny_paper.vae(4, side)) for _ in range(2)]
    canvas = torch.from_numpy(pictures(2, 32, 48))
    plain = first_frame_by(made[0], CPU)(canvas)
    flat = first_frame_by(made[1], CPU, fast=True)(canvas)
    assert plain.shape == flat.shape == (2, 4, 1, 32 // side, 48 // side)
    torch.testing.assert_close(flat, plain, rtol=1e-5, atol=1e-5)
    video = torch.randn(1, 3, 5, 32, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(made[1].encode(video), made[0].encode(video))
    assert made[1].vae.state_dict().keys() == made[0].vae.state_dict().keys()
    half = first_frame_by(made[1], CPU, fast=True, half=True)(canvas)
    gap = float((half - plain).abs().max() / plain.std())
    assert 0.0 < gap < 0.1 and half.dtype == torch.float32
    with pytest.raises(UserError, match="height"):
        FirstFrameEncoder(made[1])(torch.zeros(1, 3, 20, 48))


def test_the_encoder_of_single_pictures_is_one_graph() -> None:
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(len(inputs))
        return graph.forward

    vae, picture = PipelineVae(tiny_paper.vae(4, 16)), torch.linspace(-1, 1, 3 * 32 * 48).view(1, 3, 32, 48)
    wanted = vae.encode(picture.unsqueeze(2))
    encode = FirstFrameEncoder(vae, compiled=True, backend=backend)
    for _ in range(2):
        torch.testing.assert_close(encode(picture), wanted, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1
