"""Fast teachers against their slow twins, at small sizes on a CPU; tests/gpu/test_fast_teachers.py runs the same at full size.

The tests of CoTracker3 want ``COTRACKER_SOURCE``, a checkout of github.com/facebookresearch/co-tracker, and draw its weights.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from transformers import VJEPA2Config

from physisforcing.core.errors import UserError
from physisforcing.worldmodel.teachers import cotracker3, fast_cotracker
from physisforcing.worldmodel.teachers.cotracker3 import CoTracker3
from physisforcing.worldmodel.teachers.fast_cotracker import (
    PADDED,
    PLACES,
    RADIUS,
    SIDE,
    FastCoTracker3,
    correlate,
    query_features,
)
from physisforcing.worldmodel.teachers.fast_vjepa2 import PatchProduct, speed_up
from physisforcing.worldmodel.teachers.protocols import PointTracker
from physisforcing.worldmodel.teachers.vjepa2 import VJepa2

SOURCE = os.environ.get("COTRACKER_SOURCE")
needs_source = pytest.mark.skipif(not SOURCE, reason="needs CoTracker's source (COTRACKER_SOURCE)")


def sampled(map_hwC: Tensor, x: float, y: float) -> Tensor:
    """One place of a map, bilinear, border values repeated."""
    height, width, _ = map_hwC.shape
    x, y = min(max(x, 0.0), width - 1.0), min(max(y, 0.0), height - 1.0)
    left, top = min(int(x), width - 2), min(int(y), height - 2)
    x, y = x - left, y - top
    above = map_hwC[top, left] * (1 - x) + map_hwC[top, left + 1] * x
    return above * (1 - y) + (map_hwC[top + 1, left] * (1 - x) + map_hwC[top + 1, left + 1] * x) * y


def test_correlations_are_inner_products_of_sampled_features() -> None:
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(3, 8, 10, 16, generator=generator), torch.randn(3, 4, 5, 16, generator=generator)]
    queries = torch.tensor([[4.3, 2.8], [0.1, 7.9]])
    places = torch.rand(2, 3, 2, generator=generator) * torch.tensor([9.0, 7.0])
    places[0, 1], places[1, 2] = torch.tensor([-2.6, 3.4]), torch.tensor([1e7, -1e7])
    supports = [query_features(level[0], queries / 2**i, torch.float32) for i, level in enumerate(levels)]
    found = torch.full((2, 3, 2, PLACES * PADDED), torch.nan)
    correlate(levels, supports, places, found)
    offsets = [(i - RADIUS, j - RADIUS) for i in range(SIDE) for j in range(SIDE)]
    for number, level in enumerate(levels):
        for point, query in enumerate((queries / 2**number).tolist()):
            asked = torch.stack([sampled(level[0], query[0] + dx, query[1] + dy) for dx, dy in offsets])
            for frame in range(3):
                x, y = (places[point, frame] / 2**number).tolist()
                there = torch.stack([sampled(level[frame], x + dx, y + dy) for dx, dy in offsets])
                matrix = found[point, frame, number].view(PLACES, PADDED)
                torch.testing.assert_close(matrix[:, :PLACES], there @ asked.T, rtol=0, atol=1e-4)
                assert not matrix[:, PLACES:].any()


def test_a_patch_embedding_is_a_matrix_product() -> None:
    convolution = nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 4, 4))
    video = torch.randn(2, 3, 5, 13, 8)
    torch.testing.assert_close(PatchProduct(convolution)(video), convolution(video))


@pytest.mark.parametrize("compiled", [False, True])
def test_vjepa2_is_the_same_when_it_is_fast(compiled: bool) -> None:
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "crop_size": 64, "frames_per_clip": 8}
    predictor = {"pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
    video = torch.randint(0, 256, (1, 9, 48, 64, 3), dtype=torch.uint8)
    slow = VJepa2.from_config(VJEPA2Config(**shape, **predictor))
    fast = speed_up(VJepa2.from_config(VJEPA2Config(**shape, **predictor)), compiled=compiled, backend="eager")
    torch.testing.assert_close(fast.encode(video, (3, 3, 4)), slow.encode(video, (3, 3, 4)), rtol=0, atol=1e-5)
    assert list(fast.model.state_dict()) == list(slow.model.state_dict())


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> CoTracker3:
    """The real architecture on small pictures, two iterations, with last layers that move points by some pixels."""
    for module in (cotracker3, fast_cotracker):
        monkeypatch.setattr(module, "ITERATIONS", 2)
    tracker = CoTracker3.with_random_weights(source=SOURCE)
    tracker.network.model_resolution = (64, 96)
    tracker.network.updateformer.flow_head.weight.data *= 15
    tracker.network.updateformer.vis_conf_head.weight.data *= 500
    return tracker


@needs_source
@pytest.mark.parametrize(("dtype", "median", "p95"), [("fp32", 1e-4, 1e-4), ("fp16", 0.05, 0.1), ("bf16", 0.25, 1.0)])
def test_the_fast_tracker_agrees_with_the_network(exact: CoTracker3, dtype: str, median: float, p95: float) -> None:
    generator = torch.Generator().manual_seed(1)
    video = torch.randint(0, 256, (2, 4, 48, 64, 3), generator=generator, dtype=torch.uint8)
    queries = torch.rand(2, 5, 2, generator=generator) * torch.tensor([63.0, 47.0])
    before = copy.deepcopy(exact.network.state_dict())
    fast = FastCoTracker3(exact, dtype=dtype)
    assert isinstance(fast, PointTracker) and fast.info.key != exact.info.key
    slow, found = exact.track(video, queries), fast.track(video, queries)
    apart = (found.points_BTN2 - slow.points_BTN2).norm(dim=-1)
    assert (slow.points_BTN2 - queries[:, None]).norm(dim=-1)[:, 1:].median() > 1
    assert apart.median() <= median and apart.quantile(0.95) <= p95
    assert (found.visible_BTN == slow.visible_BTN).float().mean() >= 0.99
    assert (found.confidence_BTN - slow.confidence_BTN).abs().max() < 0.05
    assert torch.equal(found.points_BTN2[:, 0], queries) and found.visible_BTN[:, 0].all()
    assert all(torch.equal(value, before[name]) for name, value in exact.network.state_dict().items())


@needs_source
def test_the_fast_tracker_compiles_and_takes_long_videos_in_parts(
    exact: CoTracker3, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = torch.randint(0, 256, (1, 4, 48, 64, 3), dtype=torch.uint8)
    queries = torch.tensor([[[20.0, 30.0], [63.0, 0.0]]])
    whole = FastCoTracker3(exact, dtype="fp32").track(video, queries)
    monkeypatch.setattr(fast_cotracker, "FRAMES", 2)
    parts = FastCoTracker3(exact, dtype="fp32", compiled=True, backend="eager").track(video, queries)
    torch.testing.assert_close(parts.points_BTN2, whole.points_BTN2, rtol=0, atol=1e-3)


@needs_source
def test_the_fast_tracker_refuses_what_it_cannot_run(exact: CoTracker3) -> None:
    with pytest.raises(UserError, match="fp16"):
        FastCoTracker3(exact, dtype="int8")
    exact.network.corr_radius = 4
    with pytest.raises(UserError, match="radius"):
        FastCoTracker3(exact)


def test_query_features_repeat_the_border() -> None:
    picture = torch.arange(12.0).view(3, 4, 1)
    found = query_features(picture, torch.tensor([[-9.0, -9.0], [1.0, 1.0]]), torch.float32)
    assert not found[0].any() and not found[:, PLACES:].any()
    assert found[1, PLACES // 2] == nnf.pad(picture, (0, 0))[1, 1]


@needs_source
def test_the_teachers_of_the_cost_benchmark_make_targets(monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    networks, teachers = (importlib.import_module(name) for name in ("cost_networks", "cost_teachers"))
    options = argparse.Namespace(cotracker_source=SOURCE, dtype="float16", tracker="adapter", backend="aot_eager")
    clock, device = teachers.Clock(torch.device("cpu")), torch.device("cpu")
    online = teachers.build_teachers("plain", networks.TINY, device, clock, options)
    video = networks.random_video(networks.TINY, torch.Generator().manual_seed(0))
    clock.mark("")
    targets = online(video, networks.TINY.grid)
    clock.mark("reduction")
    assert targets["teacher_BFhwC"].shape == (1, *networks.TINY.grid, networks.TINY.teacher_dim)
    spans = clock.spans()
    parts = sum(spans[name] for name in ("tracker", "depth", "encoder", "reduction"))
    assert min(spans.values()) > 0 and abs(parts - spans["step"]) < 1e-3 * spans["step"] + 0.1, (
        "every moment is in one part"
    )
