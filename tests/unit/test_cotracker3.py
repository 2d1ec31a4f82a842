"""CoTracker3: whose code and weights it takes, what it refuses, and its answers against the public predictor's.

The tests of the real architecture want ``COTRACKER_SOURCE``, a checkout of github.com/facebookresearch/co-tracker, and draw its
weights at random.
"""

from __future__ import annotations

import copy
import hashlib
import os
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from physisforcing.core.errors import UserError
from physisforcing.worldmodel.teachers import cotracker3
from physisforcing.worldmodel.teachers.cotracker3 import CoTracker3
from physisforcing.worldmodel.teachers.protocols import PointTracker
from physisforcing.worldmodel.teachers.registry import (
    DEPTHS,
    ENCODERS,
    TRACKERS,
    TeacherConfig,
    make_depth,
    make_encoder,
    make_tracker,
)

SOURCE = os.environ.get("COTRACKER_SOURCE")
needs_source = pytest.mark.skipif(not SOURCE, reason="needs CoTracker's source (COTRACKER_SOURCE)")


def fake_source(folder: Path, text: str) -> Path:
    """A folder that looks like CoTracker's checkout, with this text as the model's module."""
    module = folder / "cotracker/models/core/cotracker/cotracker3_offline.py"
    module.parent.mkdir(parents=True)
    for package in [*module.parents][:4]:
        (package / "__init__.py").touch()
    module.write_text(text)
    return folder


TINY = """
import torch

torch.manual_seed(0)


class CoTrackerThreeOffline(torch.nn.Linear):
    model_resolution = (384, 512)

    def __init__(self, stride, corr_radius, window_len):
        super().__init__(2, 2)
"""


@pytest.fixture
def clean_modules(monkeypatch: pytest.MonkeyPatch):
    """Whatever a test imports as ``cotracker`` is forgotten afterwards, and nothing may be looked for on the net."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch.hub, "load", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "cotracker"}
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "cotracker"]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.usefixtures("clean_modules")
class TestCoTracker3Refuses:
    def test_a_folder_of_something_else(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="co-tracker") as caught:
            CoTracker3.with_random_weights(source=tmp_path)
        assert caught.value.field == "source"

    def test_a_missing_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cotracker3.importlib.util, "find_spec", lambda _: None)
        with pytest.raises(UserError, match="no package cotracker"):
            CoTracker3.with_random_weights()

    def test_a_package_that_does_not_import(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no_such_module"):
            CoTracker3.with_random_weights(source=fake_source(tmp_path, "import no_such_module\n"))
        assert not any(name.split(".")[0] == "cotracker" for name in sys.modules)

    def test_a_second_copy(self, tmp_path: Path) -> None:
        CoTracker3.with_random_weights(source=fake_source(tmp_path / "a", TINY))
        with pytest.raises(UserError, match="one copy"):
            CoTracker3.with_random_weights(source=fake_source(tmp_path / "b", TINY))

    def test_another_checksum_before_anything_is_unpickled(self, tmp_path: Path) -> None:
        source, checkpoint = fake_source(tmp_path / "source", TINY), tmp_path / "scaled_offline.pth"
        checkpoint.write_bytes(b"not even a pickle")
        with pytest.raises(UserError) as caught:
            CoTracker3(checkpoint, source=source)
        digest = hashlib.sha256(b"not even a pickle").hexdigest()
        assert (caught.value.field, caught.value.got) == ("checksum", digest)
        assert caught.value.wanted == cotracker3.PUBLISHED_SHA256
        with pytest.raises(UserError, match="state dict"):
            CoTracker3(checkpoint, digest, source=source)
        with pytest.raises(UserError, match="64 hexadecimal"):
            CoTracker3(checkpoint, "abc", source=source)
        with pytest.raises(UserError, match="on this disk"):
            CoTracker3(tmp_path / "nothing.pth", source=source)

    def test_a_checkpoint_that_runs_code(self, tmp_path: Path) -> None:
        import pickle

        class Bomb:
            def __reduce__(self) -> tuple:
                return (Path.touch, (tmp_path / "exploded",))

        checkpoint = tmp_path / "scaled_offline.pth"
        checkpoint.write_bytes(pickle.dumps(Bomb()))
        digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
        with pytest.raises(UserError, match="checkpoint"):
            CoTracker3(checkpoint, digest, source=fake_source(tmp_path / "source", TINY))
        assert not (tmp_path / "exploded").exists()

    def test_weights_of_something_else(self, tmp_path: Path) -> None:
        source, checkpoint = fake_source(tmp_path / "source", TINY), tmp_path / "weights.pth"
        torch.save({"model": {"weight": torch.ones(2, 2), "bias": torch.ones(2)}}, checkpoint)
        digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
        tracker = CoTracker3(checkpoint, digest.upper(), source=source)
        assert torch.equal(tracker.network.weight, torch.ones(2, 2)) and not tracker.network.weight.requires_grad
        assert isinstance(tracker, PointTracker) and tracker.info.checksum == digest and not tracker.info.permissive
        torch.save({"weight": torch.ones(3, 2)}, checkpoint)
        with pytest.raises(UserError, match="window 60"):
            CoTracker3(checkpoint, hashlib.sha256(checkpoint.read_bytes()).hexdigest(), source=source)

    def test_nothing_global_changes(self, tmp_path: Path) -> None:
        path, source = list(sys.path), fake_source(tmp_path, TINY)
        torch.manual_seed(11)
        expected = torch.rand(3)
        torch.manual_seed(11)
        CoTracker3.with_random_weights(source=source)
        assert torch.equal(torch.rand(3), expected) and torch.initial_seed() == 11
        assert sys.path == path


@pytest.mark.usefixtures("clean_modules")
class TestRegistry:
    def test_makes_cotracker3_from_the_files_that_it_is_given(self, tmp_path: Path) -> None:
        source, checkpoint = fake_source(tmp_path / "source", TINY), tmp_path / "weights.pth"
        torch.save({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, checkpoint)
        digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
        settings = {"name": "cotracker3", "path": str(checkpoint), "source": str(source)}
        tracker = make_tracker(TeacherConfig(**settings, checksum=digest))
        assert isinstance(tracker, CoTracker3) and tracker.info.checksum == digest
        with pytest.raises(UserError, match=cotracker3.PUBLISHED_SHA256):
            make_tracker(TeacherConfig(**settings))
        with pytest.raises(UserError, match="file of its weights"):
            make_tracker(TeacherConfig(name="cotracker3", source=str(source)))

    def test_refuses_the_licence_before_anything_is_read(self) -> None:
        with pytest.raises(UserError, match=cotracker3.LICENCE) as caught:
            make_tracker(TeacherConfig(name="cotracker3", path="/nowhere", source="/nowhere"), permissive_only=True)
        assert caught.value.fix == "choose classical"

    @pytest.mark.parametrize(
        ("make", "names"),
        [(make_tracker, TRACKERS), (make_depth, DEPTHS), (make_encoder, ENCODERS)],
        ids=["trackers", "depths", "encoders"],
    )
    def test_refuses_a_source_of_every_other_teacher(self, make: Callable, names: Mapping) -> None:
        for name in set(names) - {"cotracker3"}:
            with pytest.raises(UserError, match=rf"{name}\.source"):
                make(TeacherConfig(name=name, source="/somewhere"))


@pytest.fixture(scope="module")
def real() -> CoTracker3:
    return CoTracker3.with_random_weights(source=SOURCE)


@pytest.fixture(scope="module")
def request_() -> tuple[torch.Tensor, torch.Tensor]:
    """Two clips of 3 frames of 120x160 with 12 queries each, some of them between pixels and at the border."""
    import cv2

    noise = np.random.default_rng(0).normal(size=(2, 120, 160, 3)).astype(np.float32)
    scenes = [cv2.GaussianBlur(one, (0, 0), 2.0) for one in noise]
    pictures = np.stack([[np.roll(scene, 2 * t, axis=1) for t in range(3)] for scene in scenes])
    video = np.clip(128 + 300 * pictures, 0, 255).astype(np.uint8)
    generator = torch.Generator().manual_seed(0)
    queries = torch.rand(2, 12, 2, generator=generator) * torch.tensor([159.0, 119.0])
    queries[:, 0], queries[:, 1] = 0.0, torch.tensor([159.0, 119.0])
    return torch.from_numpy(video), queries


@needs_source
@pytest.mark.slow
class TestTheRealArchitecture:
    def test_equals_the_public_predictor(self, real: CoTracker3, request_) -> None:
        import importlib

        video, queries = request_
        tracker = copy.deepcopy(real)
        with torch.no_grad():  # random weights leave every visibility near a half: spread it around the threshold
            tracker.network.updateformer.vis_conf_head.weight[0] *= 100
            tracker.network.updateformer.vis_conf_head.bias[0] = -4.5
        predictor = importlib.import_module("cotracker.predictor").CoTrackerPredictor(None, window_len=60)
        predictor.model.load_state_dict(tracker.network.state_dict())
        timed = torch.cat([torch.zeros(2, 12, 1), queries], -1)
        ours = tracker.track(video, queries)
        assert 0.2 < ours.visible_BTN[:, 1:].float().mean() < 0.8
        for k in range(2):  # the public code takes one clip at a time
            points, visible = predictor(video[k : k + 1].permute(0, 1, 4, 2, 3).float(), queries=timed[k : k + 1])
            assert (points[0, 1:] - queries[k]).abs().max() > 0.01, "random weights that move nothing test nothing"
            assert (ours.points_BTN2[k] - points[0]).abs().max() < 0.01
            assert torch.equal(ours.visible_BTN[k], visible[0])

    def test_shapes_frame_0_and_batches(self, real: CoTracker3, request_) -> None:
        video, queries = request_
        both = real.track(video, queries)
        assert both.points_BTN2.shape == (2, 3, 12, 2) and both.points_BTN2.dtype == torch.float32
        assert both.visible_BTN.shape == both.confidence_BTN.shape == (2, 3, 12)
        assert torch.equal(both.points_BTN2[:, 0], queries) and both.visible_BTN[:, 0].all()
        assert both.points_BTN2.isfinite().all()
        assert both.confidence_BTN.min() >= 0 and both.confidence_BTN.max() <= 1
        assert len(both.confidence_BTN[:, 1:].unique()) > 1
        for k in range(2):
            single = real.track(video[k : k + 1], queries[k : k + 1])
            torch.testing.assert_close(single.points_BTN2[0], both.points_BTN2[k], atol=0.01, rtol=0)
            torch.testing.assert_close(single.confidence_BTN[0], both.confidence_BTN[k], atol=1e-4, rtol=0)
            assert torch.equal(single.visible_BTN[0], both.visible_BTN[k])

    def test_one_frame(self, real: CoTracker3, request_) -> None:
        video, queries = request_
        alone = real.track(video[:1, :1], queries[:1])
        assert torch.equal(alone.points_BTN2[0, 0], queries[0])
