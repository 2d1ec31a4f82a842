"""The success classifier learns a drawn task, says calibrated probabilities, and never sees a test scene."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from physisforcing.core.errors import DatasetError, MissingCapabilityError, UserError
from physisforcing.core.lerobot import HEAD, LeRobotWriter, robot_features
from physisforcing.planner.calibration import (
    balanced_accuracy,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
)
from physisforcing.planner.success_classifier import (
    SuccessClassifier,
    SuccessConfig,
    load_success_classifier,
    save_success_classifier,
)
from physisforcing.planner.success_data import SuccessStore, done_row, draw, load_success_store
from physisforcing.planner.success_training import SuccessTrainConfig, train_success_classifier
from physisforcing.planner.verifiers import Success, VerifierInput, make_verifier

H, W, LENGTH = 32, 48, 24


def episode(task: str, done: int, generator: np.random.Generator) -> NDArray[np.uint8]:
    """A red and a blue block on a table, [T,H,W,3]. ``touch``: the red one meets the blue one at row ``done``; ``part``: it leaves it.
    Where and when it happens differs, and so does the brightness. ``done`` -1: it goes elsewhere."""
    x, y = int(generator.integers(14, 34)), int(generator.integers(6, 20))
    away = np.array([int(generator.choice([-12, 10])), int(generator.integers(-3, 4))])
    table = generator.integers(100, 180)
    video = np.full((LENGTH, H, W, 3), table, np.uint8)
    for t in range(LENGTH):
        share = min(1.0, t / max(done, 1)) if done >= 0 else min(0.6, t / LENGTH)
        near = share if task == "touch" else 1.0 - share
        if task == "part" and done < 0:
            near = 1.0
        dx, dy = np.round(away * (1 - near)).astype(int)
        video[t, y : y + 6, x : x + 6] = (30, 60, 220)
        left, top = max(0, x - 5 + dx), max(0, y + dy)
        video[t, top : top + 6, left : left + 5] = (220, 40, 40)
    return video


def store(episodes: int = 60, seed: int = 0) -> SuccessStore:
    generator = np.random.default_rng(seed)
    frames, done, tasks = [], [], []
    for number in range(episodes):
        task = number % 2
        row = -1 if number % 5 == 4 else int(generator.integers(8, 20))
        frames.append(episode(("part", "touch")[task], row, generator))
        done.append(row)
        tasks.append(task)
    return SuccessStore(
        frames_NHWC=torch.from_numpy(np.concatenate(frames)),
        first_E=np.arange(episodes) * LENGTH,
        length_E=np.full(episodes, LENGTH),
        done_E=np.array(done),
        seeds_E=np.arange(episodes) // 2,
        task_E=np.array(tasks),
        tasks=("part", "touch"),
        stride=2,
    )


@pytest.fixture(scope="module")
def trained() -> tuple[SuccessClassifier, dict[str, Any], SuccessStore]:
    config = SuccessTrainConfig(
        model=SuccessConfig(height=H, width=W, channels=(16, 32, 32), hidden=32), spans=(32,), steps=220, shift=2
    )
    data = store()
    model, metrics = train_success_classifier(config, data, log=lambda row: None)
    return model, metrics, data


def test_it_learns_a_drawn_task_on_scenes_it_has_not_seen(
    trained: tuple[SuccessClassifier, dict[str, Any], SuccessStore],
) -> None:
    model, metrics, _ = trained
    found = metrics["held_out"]
    assert set(found) == {"all", "part", "touch"}
    assert found["all"]["balanced_accuracy"] > 0.85, found
    low, high = found["all"]["balanced_accuracy_interval"]
    assert low <= found["all"]["balanced_accuracy"] <= high and high - low < 0.3
    assert found["all"]["ece"] < 0.12 and metrics["temperature"] == pytest.approx(float(model.temperature))
    # By hand, through the public way in: ends of new episodes, and the middle of the way there.
    generator = np.random.default_rng(99)
    right = 0
    for number in range(40):
        task = ("part", "touch")[number % 2]
        video = episode(task, 12, generator)
        padded = np.stack([video[:17], video[np.minimum(np.arange(17), 7)]])
        probability = model.probability(padded, [task, task])
        right += int(probability[0] > probability[1])
    assert right >= 36


def test_it_ranks_candidates_as_a_verifier(trained: tuple[SuccessClassifier, dict[str, Any], SuccessStore]) -> None:
    model, _, _ = trained
    generator = np.random.default_rng(3)
    videos = np.stack([episode("touch", row, generator)[:17] for row in (-1, 12, -1)])
    given = VerifierInput(
        actions_SPA=np.zeros((3, 32, 14), np.float32),
        decoded_SPA=np.zeros((3, 32, 14), np.float32),
        state_A=np.zeros(14, np.float32),
        execute=32,
        seeds_S=np.arange(3),
        task="touch",
        frames_STHWC=videos,
    )
    scores = Success(model).score(given)
    assert scores.argmax() == 1 and scores.min() >= 0 and scores.max() <= 1
    assert make_verifier("success", classifier=model).fingerprint == f"success-{model.fingerprint}"
    # Larger pictures are averaged down to the ones it knows.
    given.frames_STHWC = videos.repeat(3, axis=2).repeat(3, axis=3)
    np.testing.assert_allclose(Success(model).score(given), scores, atol=1e-6)
    given.task = "fold_towel"
    with pytest.raises(MissingCapabilityError, match=r"fold_towel.*part, touch"):
        Success(model).score(given)
    with pytest.raises(UserError, match="uint8"):
        model.probability(videos.astype(np.float32), ["touch"] * 3)


def test_weights_come_back_and_damaged_folders_are_refused(
    trained: tuple[SuccessClassifier, dict[str, Any], SuccessStore], tmp_path: Path
) -> None:
    model, _, data = trained
    folder = save_success_classifier(model, tmp_path / "model", card="# card\n")
    again = load_success_classifier(folder)
    assert again.config == model.config and again.fingerprint != "untrained"
    assert float(again.temperature) == float(model.temperature)
    videos = data.frames_NHWC[:34].numpy().reshape(2, 17, H, W, 3)
    np.testing.assert_allclose(
        again.probability(videos, ["touch"] * 2), model.probability(videos, ["touch"] * 2), atol=0.01
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"more": 1}))
    with pytest.raises(UserError, match="more"):
        load_success_classifier(folder)
    (folder / "config.json").write_text(json.dumps(config | {"hidden": 16}))
    with pytest.raises(RuntimeError):
        load_success_classifier(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="physis train success"):
        load_success_classifier(folder)


def test_windows_are_drawn_as_they_are_labelled() -> None:
    data = store(30)
    number = torch.zeros_like(data.frames_NHWC)
    number[..., 0] = (torch.arange(len(number)) % LENGTH)[:, None, None]
    number[..., 1] = (torch.arange(len(number)) // LENGTH)[:, None, None]
    data.frames_NHWC = number  # pictures that say their row and episode
    pictures, tasks, labels = draw(data, np.arange(20), 600, spans=(8, 16), generator=np.random.default_rng(0))
    rows, episodes = pictures[:, :, 0, 0, 0].numpy().astype(int), pictures[:, 0, 0, 0, 1].numpy().astype(int)
    assert episodes.max() < 20 and (data.task_E[episodes] == tasks).all()
    start, middle, end = rows.T
    done = data.done_E[episodes]
    assert (middle == (start + end + 1) // 2).all() and (start < end).all()
    assert np.isin(end - start, (8, 16)).mean() > 0.5 and (end - start).max() <= 16
    assert (labels == ((done >= 0) & (end >= done))).all(), "positive exactly where the end shows the success"
    assert (start[labels] < done[labels]).all(), "a positive window shows the success coming"
    assert abs(labels.mean() - 0.5) < 0.01 and abs((tasks == 0).mean() - 0.5) < 0.06


def test_parts_share_no_scene_and_do_not_depend_on_the_order() -> None:
    data = store(60)
    parts = data.parts()
    seeds = {name: set(data.seeds_E[episodes]) for name, episodes in parts.items()}
    assert sum(map(len, parts.values())) == 60 and all(map(len, parts.values()))
    assert not seeds["train"] & seeds["test"] and not seeds["train"] & seeds["calibration"]
    assert not seeds["calibration"] & seeds["test"]
    data.seeds_E = data.seeds_E[::-1].copy()
    assert {name: set(data.seeds_E[e]) for name, e in data.parts().items()} == seeds


def test_the_row_that_shows_a_success() -> None:
    """``next.success[t]`` is what the check says after step t, which picture t + 1 shows."""
    for first, stride, wanted in ((5, 1, 6), (5, 2, 3), (6, 2, 4), (0, 4, 1), (9, 1, -1), (8, 1, 9)):
        success = np.arange(10) >= first
        assert done_row(success, stride, -(-10 // stride)) == wanted, (first, stride)
    assert done_row(np.zeros(10, bool), 1, 10) == -1


@pytest.fixture
def dataset(tmp_path: Path) -> Any:
    def write(name: str, seeds: list[int], success: bool = True) -> Path:
        features = robot_features([f"joint{k}" for k in range(14)], height=H, width=W)
        writer = LeRobotWriter(tmp_path / name, features)
        joints = np.zeros((LENGTH, 14), np.float32)
        columns: dict[str, Any] = dict.fromkeys(("observation.state", "observation.state_measured", "action"), joints)
        for seed in seeds:
            done = 12 if success else -1
            columns["next.success"] = np.arange(LENGTH) >= done if success else np.zeros(LENGTH, bool)
            writer.add_episode(
                columns=columns,
                frames={HEAD: episode("touch", 12 if success else -1, np.random.default_rng(seed))},
                instruction="touch it",
                task_name="touch",
                seed=seed,
                success=success,
                scene_hash=f"{seed}",
                policy="expert",
                embodiment="robot",
                assets_version="1",
            )
        return Path(writer.finalize())

    return write


def test_datasets_are_read_and_those_that_cannot_be_used_refused(dataset: Any, tmp_path: Path) -> None:
    good, failed = dataset("good", [1, 2]), dataset("failed", [3], success=False)
    data = load_success_store([good, failed], height=H // 2, width=W // 2, stride=2)
    assert data.frames_NHWC.shape == (3 * LENGTH // 2, H // 2, W // 2, 3) and data.tasks == ("touch",)
    assert data.done_E.tolist() == [7, 7, -1] and data.seeds_E.tolist() == [1, 2, 3]
    with pytest.raises(UserError, match="seed 100000"):
        load_success_store([dataset("test", [100_000])], height=H, width=W)
    with pytest.raises(UserError, match="no success"):
        load_success_store([failed], height=H, width=W)
    with pytest.raises(UserError, match="at least one success of every task in each part"):
        train_success_classifier(
            SuccessTrainConfig(model=SuccessConfig(height=H // 2, width=W // 2)), data, log=lambda row: None
        )
    with pytest.raises(DatasetError):
        load_success_store([tmp_path / "nothing"], height=H, width=W)


def test_the_command_trains_and_writes_what_the_planner_loads(dataset: Any, tmp_path: Path) -> None:
    from physisforcing.planner.train_success import main

    folders = [dataset("good", list(range(12))), dataset("bad", list(range(12)), success=False)]
    size = [f"train.model.{name}={value}" for name, value in (("height", H), ("width", W), ("hidden", 16))]
    words = [
        f"data=[{folders[0]},{folders[1]}]",
        f"output={tmp_path / 'run'}",
        "device=cpu",
        "train.steps=4",
        "train.spans=[16]",
    ]
    assert main([*words, *size, "train.model.channels=[8,8,8]", "train.batch=4"]) == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["steps"] == 4 and metrics["held_out"]["touch"]["windows"] > 100 and metrics["successes"] == 12
    card = (tmp_path / "run/model/README.md").read_text()
    assert f"{100 * metrics['held_out']['touch']['balanced_accuracy']:.1f} %" in card
    assert load_success_classifier(tmp_path / "run/model").config.tasks == ("touch",)


# ---------------------------------------------------------------------- calibration


def test_temperature_finds_the_one_that_made_the_labels() -> None:
    generator = np.random.default_rng(0)
    logit = generator.normal(0, 2, 40_000)
    truth = generator.random(40_000) < 1 / (1 + np.exp(-logit))
    assert fit_temperature(logit, truth) == pytest.approx(1.0, abs=0.04)
    assert fit_temperature(3 * logit, truth) == pytest.approx(3.0, rel=0.04)
    assert fit_temperature(0.25 * logit, truth) == pytest.approx(0.25, rel=0.04)
    best = fit_temperature(3 * logit, truth)
    least = negative_log_likelihood(3 * logit / best, truth)
    for other in (0.98 * best, 1.02 * best):
        assert negative_log_likelihood(3 * logit / other, truth) > least
    calibrated = 1 / (1 + np.exp(-3 * logit / best))
    assert expected_calibration_error(calibrated, truth) < 0.01
    assert expected_calibration_error(1 / (1 + np.exp(-3 * logit)), truth) > 0.05
    assert fit_temperature([1.0, 2.0], [True, True]) == 1.0
    assert negative_log_likelihood(np.array([-1e4, 0.0]), np.array([False, True])) == pytest.approx(np.log(2) / 2)


def test_accuracy_and_calibration_error_by_hand() -> None:
    probability = np.array([0.9, 0.8, 0.3, 0.2, 0.1, 0.6])
    truth = np.array([True, True, True, False, False, False])
    assert balanced_accuracy(probability, truth) == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert np.isnan(balanced_accuracy([0.1], [True]))
    # bins: .9 and .8 right, .3 should have been 1, .2 and .1 fine by their own bins, .6 should have been 0
    wanted = (0.1 + 0.2 + 0.7 + 0.2 + 0.1 + 0.6) / 6
    assert expected_calibration_error(probability, truth) == pytest.approx(wanted)
    assert expected_calibration_error([0.5, 0.5], [True, False]) == pytest.approx(0.0)
    assert expected_calibration_error([1.0], [True]) == 0.0 and np.isnan(expected_calibration_error([], []))
