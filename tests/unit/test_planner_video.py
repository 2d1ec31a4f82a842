"""Decoding whole recorded videos: the oracle's controls, the retrieval baseline's video, the pictures of a report."""

from types import SimpleNamespace

import numpy as np
import pytest

from physisforcing.core.errors import DatasetError, UserError
from physisforcing.core.types import ActionChunk, Observation
from physisforcing.planner.oracle import (
    Demonstration,
    HeldOutDemonstrations,
    oracle_targets,
    other_errors,
    target_errors,
)
from physisforcing.planner.video_decoding import RetrievedVideo
from physisforcing.planner.videos import ImaginationRecorder, side_by_side, write_labelled

H, W = 120, 160


class PixelReader:
    """Test double: joint 0 in degrees is the brightness of the later picture; black pictures leave the robot where it is."""

    fingerprint = "reader"

    def decode(self, rollout, state_BA, instructions):
        frames_BTHWC = rollout.frames_BSVTHWC[:, 0, 0]
        rows = np.repeat(state_BA, 32, 0).astype(np.float32)
        seen = np.repeat(np.radians(frames_BTHWC[0, 1:, 0, 0, 0].astype(np.float32)), 2)
        rows[:, 0] = np.where(seen > 0, seen, rows[:, 0])
        return [[ActionChunk(actions_PA=rows)]]


def demonstration(speed: int, seed: int, length: int = 41) -> Demonstration:
    """Joint 0 turns by ``speed`` degrees a control step; the picture's brightness says where it is."""
    degrees = speed * np.arange(length)
    states = np.zeros((length, 14), np.float32)
    states[:, 0] = np.radians(degrees)
    return Demonstration(
        task="click_bell",
        seed=seed,
        instruction="press",
        scene_hash="",
        frames_THWC=np.broadcast_to(degrees[:, None, None, None], (length, H, W, 3)).astype(np.uint8),
        states_TA=states,
        actions_TA=np.concatenate([states[1:], states[-1:]]),
        tools_T23=np.zeros((length, 2, 3)),
    )


def test_oracle_controls():
    demo, other = demonstration(2, 100_000), demonstration(4, 100_001)
    decoder = PixelReader()
    recorded = oracle_targets("recorded", demo, other, decoder)
    np.testing.assert_array_equal(recorded, demo.states_TA[1:])
    seen = oracle_targets("oracle", demo, other, decoder)
    # the reader sees every second picture, so every first of two targets is one step (2 degrees) ahead
    assert target_errors(seen, demo)["joint_deg"] == pytest.approx(2 * np.sqrt(0.5 / 12), rel=1e-4)
    black = oracle_targets("black", demo, other, decoder)
    assert np.abs(black).max() == 0 and target_errors(black, demo)["joint_deg"] > 10
    followed = oracle_targets("other", demo, other, decoder)
    errors = other_errors(followed, demo, other)
    assert errors["joint_deg_to_other"] < 1.0 < 10 < target_errors(followed, demo)["joint_deg"]
    assert errors["joint_deg_other_to_scene"] > 10 and errors["other_seed"] == 100_001
    halves = []
    passed = oracle_targets("oracle_roundtrip", demo, other, decoder, lambda window: halves.append(window) or window)
    np.testing.assert_array_equal(passed, seen)
    assert [half.shape for half in halves] == [(17, H, W, 3)] * 2


def test_held_out_demonstrations_refuse_training_seeds_and_too_few(tmp_path, monkeypatch):
    import physisforcing.core.lerobot as lerobot

    def dataset(seeds, success=True):
        rows = [SimpleNamespace(seed=s, task_name="click_bell", index=i, success=success) for i, s in enumerate(seeds)]
        return lambda root: SimpleNamespace(root=root, episodes=rows)

    monkeypatch.setattr(lerobot, "LeRobotDataset", dataset([100_000, 12]))
    with pytest.raises(UserError, match="seed 12"):
        HeldOutDemonstrations(tmp_path)
    monkeypatch.setattr(lerobot, "LeRobotDataset", dataset([100_002, 100_000, 100_001]))
    demos = HeldOutDemonstrations(tmp_path)
    assert demos.seeds("click_bell", 2) == [100_000, 100_001]
    with pytest.raises(DatasetError, match="3 successful"):
        demos.seeds("click_bell", 4)
    monkeypatch.setattr(lerobot, "LeRobotDataset", dataset([100_000, 100_001], success=False))
    with pytest.raises(DatasetError, match="0 successful"):
        HeldOutDemonstrations(tmp_path).seeds("click_bell", 2)


def test_retrieved_video_is_decoded_and_then_held():
    demo = demonstration(2, 3)
    calls = []
    retrieval = SimpleNamespace(
        fingerprint="retrieval-x",
        nearest=lambda picture, state, task: calls.append(task) or (7, 0.25),
        dataset=SimpleNamespace(frames=lambda index: demo.frames_THWC if index == 7 else None),
    )
    policy = RetrievedVideo(retrieval, PixelReader())
    policy.reset(task="click_bell", seed=1, instruction="press")
    state = np.zeros(14, np.float32)
    now = Observation(
        images={"head": demo.frames_THWC[0]}, state_A=state, measured_A=state, instruction="press", step=0
    )
    first, second = policy.act(now), policy.act(now)
    assert first.shape == (40, 14) and np.degrees(first[-1, 0]) == pytest.approx(80)
    assert (second == first[-1]).all() and calls == ["click_bell"]
    assert policy.telemetry() == {"retrieved_episode": 7.0, "retrieved_distance": 0.25}
    assert policy.fingerprint == "retrieval-x-video-reader"


def test_imagined_stands_beside_executed(tmp_path):
    from physisforcing.core.video import probe_mp4

    recorder = ImaginationRecorder()
    for start, base in ((0, 10), (8, 110)):
        frames = (base + np.arange(17))[:, None, None, None] * np.ones((1, H, W, 3))
        recorder.imagined(start, frames.astype(np.uint8))
    executed = {step: np.full((2 * H, 2 * W, 3), step, np.uint8) for step in range(13)}
    rows = side_by_side(recorder.videos, executed)
    assert rows.shape == (7, H, 2 * W, 3)
    assert rows[:, 0, 0, 0].tolist() == [10, 11, 12, 13, 110, 111, 112]  # the second plan from step 8
    assert rows[:, 0, -1, 0].tolist() == [0, 2, 4, 6, 8, 10, 12]
    path = write_labelled(tmp_path / "a/b.mp4", rows, label="left: generated by x, seed 3")
    about = probe_mp4(path)
    assert about.frames == 7 and about.metadata["comment"] == "left: generated by x, seed 3"
    assert about.fps == pytest.approx(50 / 6) and (about.height, about.width) == (2 * H, 4 * W)
