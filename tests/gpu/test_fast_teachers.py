"""Fast teachers on a GPU at the paper's size, with random weights: the kernel, and half precision against float32.

``benchmarks/teacher_parity.py`` measures the same on simulator clips and with a user's weights.
"""

from __future__ import annotations

import os

import pytest
import torch

from physisforcing.worldmodel.physics.relation import relation_matrix
from physisforcing.worldmodel.teachers import fast_cotracker
from physisforcing.worldmodel.teachers.cotracker3 import CoTracker3
from physisforcing.worldmodel.teachers.fast_cotracker import (
    PADDED,
    PLACES,
    FastCoTracker3,
    correlate_in_torch,
    correlate_in_triton,
    query_features,
)
from physisforcing.worldmodel.teachers.fast_vjepa2 import speed_up
from physisforcing.worldmodel.teachers.ground_truth import query_grid
from physisforcing.worldmodel.teachers.vjepa2 import VJepa2

GPU = pytest.mark.gpu
SOURCE = os.environ.get("COTRACKER_SOURCE")
needs_source = pytest.mark.skipif(not SOURCE, reason="needs CoTracker's source (COTRACKER_SOURCE)")


def video(frames: int) -> torch.Tensor:
    """Smooth random pictures that move, uint8 [1,T,480,640,3]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 40, 60, generator=generator)
    scene = torch.nn.functional.interpolate(coarse, (640, 960), mode="bicubic").clamp(0, 1)[0]
    cuts = [scene[:, t : t + 480, 2 * t : 2 * t + 640] for t in range(frames)]
    return (torch.stack(cuts).permute(0, 2, 3, 1)[None] * 255).to(torch.uint8)


@GPU
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_kernel_is_the_computation_in_torch(dtype: torch.dtype) -> None:
    if not fast_cotracker.has_triton():
        pytest.skip("needs Triton")
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    level = torch.nn.functional.normalize(draw(21, 24, 32, 128), dim=-1).to(dtype)
    queries = draw(50, 2) * 10 + 12
    support = query_features(level[0], queries, dtype)
    places = (queries[:, None] + draw(50, 21, 2) * 5).contiguous() * 2
    places[0, 0], places[1, 1] = torch.tensor([-1e6, 1e6]), torch.tensor([6.0, 8.0])
    found = torch.full((2, 50, 21, 4, PLACES * PADDED), 7.0, device="cuda", dtype=dtype)
    correlate_in_triton(level, support, places, found[0, :, :, 2], 0.5)
    correlate_in_torch(level.float(), support.float(), places, found[1, :, :, 2], 0.5)
    limit = 2e-3 if dtype == torch.float16 else 1e-2
    assert (found[0].float() - found[1].float()).abs().max() < limit
    places[3, 3] = torch.nan  # reads nothing outside of the map
    correlate_in_triton(level, support, places, found[0, :, :, 2], 0.5)
    torch.cuda.synchronize()


@GPU
@needs_source
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_fast_tracker_at_full_size(dtype: str) -> None:
    exact = CoTracker3.with_random_weights(source=SOURCE, device="cuda")
    exact.network.updateformer.flow_head.weight.data *= 5
    exact.network.updateformer.vis_conf_head.weight.data *= 500
    pictures = video(81)
    queries = torch.from_numpy(query_grid((25, 25), (480, 640))).float()[None]
    slow = exact.track(pictures, queries)
    fast = FastCoTracker3(exact, dtype=dtype).track(pictures, queries)
    apart = (slow.points_BTN2 - fast.points_BTN2).norm(dim=-1)[:, 1:] / 2  # pixels of 240x320
    assert apart.median() <= 0.25 and apart.quantile(0.95) <= 1
    assert (slow.visible_BTN == fast.visible_BTN).float().mean() >= 0.99


@GPU
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_fast_encoder_at_full_size(dtype: torch.dtype) -> None:
    pictures, grid = video(81), (21, 15, 20)
    cosines = [
        relation_matrix(teacher.encode(pictures, grid).flatten(1, 3)[:, ::13])
        for teacher in (VJepa2.from_config(device="cuda"), speed_up(VJepa2.from_config(device="cuda", dtype=dtype)))
    ]
    assert (cosines[0] - cosines[1]).abs().max() <= 0.01
