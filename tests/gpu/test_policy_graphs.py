"""On a GPU, plans of CUDA graphs and of compiled blocks are those of kernels called one by one, whatever was planned before and beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from physisforcing.core.paths import weights_root
from physisforcing.policy import graphs
from physisforcing.policy.checkpoint import PolicyInfo
from physisforcing.policy.encoding import first_frame_by, open_first_frame
from physisforcing.policy.normalization import ActionStatistics
from physisforcing.policy.planning import ChunkModel, PlanningConfig
from physisforcing.policy.requests import PlanRequest, rows_of
from physisforcing.worldmodel.codec import load_codec
from physisforcing.worldmodel.data.batches import bank_latents
from physisforcing.worldmodel.data.canvas import CANVASES, compose
from physisforcing.worldmodel.data.canvas_device import compose_on
from physisforcing.worldmodel.pipeline_vae import PipelineVae
from tests.helpers import tiny_paper
from tests.helpers.tiny_policy import tiny_policy

pytestmark = pytest.mark.gpu

WIDTH, STEPS = 3, 3
#: Of normalised actions that the same kernels made.
SAME = 1e-4
DRAW = np.random.default_rng(0)
STATISTICS = ActionStatistics.of([DRAW.normal(2.0, 3.0, (50, WIDTH))], [DRAW.normal(-1.0, 0.5, (50, WIDTH))])


class Words:
    """As many random tokens as a sentence has letters."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def prepare(self, instructions: list[str]) -> None:
        """Nothing takes long here."""

    def batch(self, instructions: list[str]) -> Tensor:
        made = [torch.randn(len(s), 12, generator=torch.Generator().manual_seed(len(s))) for s in instructions]
        return torch.stack(made).to(self.device)


def first_frame(device: torch.device) -> Callable[[Tensor], Tensor]:
    """The packaged autoencoder; of its latents as much as the tiny policy reads."""
    encode = open_first_frame(weights_root() / "vae", device, small=True)
    return lambda canvas_BHWC: encode(canvas_BHWC)[:, :4, :, 4:8, 6:12].contiguous()


def chunk_model(compute: str, mode: str = "first_frame", device: str = "cuda", batch: int = 1) -> ChunkModel:
    config = PlanningConfig(device=device, compute=compute, batch=batch, steps=STEPS, video_steps=2)
    where, info = torch.device(device), PolicyInfo(frames=9, frame_stride=1)
    return ChunkModel(tiny_policy(mode), info, STATISTICS, first_frame(where), Words(where), config, fingerprint="tiny")


def a_request(count: int, sentence: str = "press") -> PlanRequest:
    draw = np.random.default_rng(count)
    coarse = draw.integers(0, 256, (count, 15, 20, 3), dtype=np.uint8)
    return PlanRequest(
        canvas_BHWC=np.kron(coarse, np.ones((1, 8, 8, 1), np.uint8)),
        instructions=[sentence] * count,
        state_BKA=draw.normal(size=(count, 1, WIDTH)).astype(np.float32),
        seeds_B=np.arange(count, dtype=np.int64),
    )


def actions(made: ChunkModel, sentence: str = "press") -> Tensor:
    return made.normalised(a_request(1, sentence))[0].clone()


def largest(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize(
    ("compute", "mode"),
    [
        ("graph", "first_frame"), ("graph", "joint"), ("graph", "optional_idm"), ("compile", "optional_idm"),
        ("fused", "first_frame"), ("fused", "joint"), ("fused", "optional_idm"),
    ],
)  # fmt: skip
def test_plans_are_those_of_single_kernels(compute: str, mode: str) -> None:
    """``optional_idm`` calls all that a block does: it imagines, keeps keys and acts. Beside them a plan in float32 on the CPU, which tells how
    far bfloat16 is off: nothing else may be further off."""
    exact, eager, made = (
        actions(chunk_model(*how)) for how in (("eager", mode, "cpu"), ("eager", mode), (compute, mode))
    )
    rounding = largest(eager, exact)
    assert 0.0 < rounding < 0.1 * float(exact.abs().max())
    if compute == "graph":  # the same kernels
        assert largest(made, eager) <= SAME
    assert largest(made, exact) < 3.0 * rounding + 1e-3


@pytest.mark.parametrize("compute", ["graph", "fused"])
def test_another_length_captures_again_and_leaves_the_others_as_they_are(
    compute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``fused``: rooms of one length are not those of another, and are filled anew by each plan."""
    monkeypatch.setattr(graphs, "MOST_KEPT", 2)
    eager, made = chunk_model("eager"), chunk_model(compute)
    same = SAME if compute == "graph" else 0.05
    stages: Any = made.stages
    captures = []
    for sentence in ("press", "lift it", "press", "turn", "press", "lift it"):
        torch.testing.assert_close(actions(made, sentence), actions(eager, sentence), rtol=0.0, atol=same)
        captures.append(stages.captures)
        assert len(stages._kept) <= 2
    # turn pushes out what was not used for longest
    assert captures == [1, 2, 2, 3, 3, 4]
    assert not torch.allclose(actions(made, "press"), actions(made, "lift it"), atol=1e-3), "sentences count"


@pytest.mark.parametrize("compute", ["eager", "graph", "fused"])
def test_equal_seeds_give_equal_plans_wherever_they_stand(compute: str) -> None:
    made, asked = chunk_model(compute, batch=4), a_request(6)
    together = made.plan(asked).actions_BPA
    order = np.array([5, 3, 0, 1, 4, 2])
    np.testing.assert_array_equal(made.plan(rows_of(asked, order)).actions_BPA, together[order])
    for row in range(6):  # alone, beside copies of itself
        np.testing.assert_array_equal(made.plan(rows_of(asked, np.array([row]))).actions_BPA[0], together[row])
    assert len({plan.tobytes() for plan in together}) == 6


def test_a_picture_is_the_latent_that_a_bank_has_of_it() -> None:
    """Of a bank: the first of a window's, under autocast and kept in bfloat16."""
    device, folder = torch.device("cuda"), weights_root() / "vae"
    window = torch.from_numpy(a_request(17).canvas_BHWC)[None].to(device)
    kept = bank_latents(load_codec(folder, device), window)
    acted = open_first_frame(folder, device, small=True)(window[:, 0])
    assert kept.dtype == torch.bfloat16 and torch.equal(acted, acted.bfloat16().float())
    scale = float(kept.float().std())
    assert largest(acted, kept[:, :, :1].float()) < 0.1 * scale


def test_a_canvas_of_the_gpu_has_pillows_bytes() -> None:
    draw = np.random.default_rng(0)
    pictures = {name: draw.integers(0, 256, (240, 320, 3), dtype=np.uint8) for name in CANVASES["robotwin"].names}
    assert np.array_equal(compose_on(torch.device("cuda"), "robotwin", pictures), compose("robotwin", pictures))


def test_a_single_picture_needs_no_frames_before_it() -> None:
    """Both may round what they multiply to TF32, each in its own order."""
    device, canvas = torch.device("cuda"), torch.from_numpy(a_request(2).canvas_BHWC[:, :64, :96]).cuda()
    plain, other = (first_frame_by(PipelineVae(tiny_paper.vae(4, 16)), device, fast=fast) for fast in (False, True))
    wanted = plain(canvas)
    assert largest(other(canvas), wanted) < 5e-3 * float(wanted.std())
