"""Statistics of states and actions: numpy's over all steps, the exact way back, and files that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from physisforcing.core.errors import UserError
from physisforcing.policy.normalization import ActionStatistics, pooled


def episodes(seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    # far from zero beside what varies, as absolute joints are
    return [1000.0 + generator.normal(size=(length, 3)) * [1.0, 0.01, 5.0] for length in (7, 120, 33)]


def test_pooled_statistics_are_those_of_all_steps_however_they_are_divided() -> None:
    parts = episodes()
    whole = np.concatenate(parts)
    for some in (parts, [whole], list(whole[:, None])):
        found = pooled(some, "action")
        np.testing.assert_allclose(found.mean_D, whole.mean(0), rtol=1e-12)
        np.testing.assert_allclose(np.sqrt(found.square_D / found.count), whole.std(0), rtol=1e-9)
        assert (
            found.count == 160
            and np.array_equal(found.low_D, whole.min(0))
            and np.array_equal(found.high_D, whole.max(0))
        )


@pytest.mark.parametrize("kind", ["zscore", "minmax"])
def test_there_and_back(kind: str, tmp_path: Path) -> None:
    parts = episodes()
    statistics = ActionStatistics.of(parts, parts, kind, episodes=3)
    values = torch.from_numpy(np.concatenate(parts)).float()
    normal = statistics.action.normalise(values)
    torch.testing.assert_close(statistics.action.denormalise(normal), values, rtol=1e-6, atol=0)
    if kind == "zscore":
        torch.testing.assert_close(normal.mean(0), torch.zeros(3), rtol=0, atol=2e-3)
        torch.testing.assert_close(normal.std(0, correction=0), torch.ones(3), rtol=2e-3, atol=0)
    else:
        torch.testing.assert_close(normal.amax(0), torch.ones(3), rtol=1e-3, atol=0)
        torch.testing.assert_close(normal.amin(0), -torch.ones(3), rtol=1e-3, atol=0)
    statistics.save(tmp_path)
    loaded = ActionStatistics.load(tmp_path, action_dim=3, state_dim=3)
    assert torch.equal(loaded.state.normalise(values), normal)
    assert (loaded.kind, loaded.steps, loaded.episodes) == (kind, 160, 3)


def test_what_lies_far_out_is_clamped_and_counted_and_comes_back_unclamped() -> None:
    statistics = ActionStatistics.of([np.array([[0.0], [2.0]])], [np.array([[0.0], [2.0]])])
    values = torch.tensor([[1.0], [6.5], [-4.5], [5.0]])
    assert statistics.action.normalise(values).flatten().tolist() == [0.0, 5.0, -5.0, 4.0]
    assert statistics.action.saturated(values) == 0.5
    assert statistics.action.denormalise(torch.tensor([[7.0]])).item() == 8.0


@pytest.mark.parametrize("kind", ["zscore", "minmax"])
def test_a_joint_that_never_moves_keeps_its_value(kind: str) -> None:
    still = np.full((5, 1), 0.3)
    scale = ActionStatistics.of([still], [still], kind).action
    assert scale.normalise(torch.tensor([[0.3]])).item() == pytest.approx(0.0, abs=1e-4)
    assert scale.denormalise(torch.tensor([[0.1]])).item() == pytest.approx(0.3, abs=0.11)


def test_episodes_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(UserError, match=r"action.*7 numbers.*3"):
        pooled([np.zeros((2, 3)), np.zeros((2, 7))], "action")
    with pytest.raises(UserError, match="not finite"):
        pooled([np.array([[np.nan]])], "action")
    with pytest.raises(UserError, match="no episodes"):
        pooled([], "action")
    with pytest.raises(UserError, match="normalization"):
        ActionStatistics.of([np.zeros((2, 3))], [np.zeros((2, 3))], "quantile")


DAMAGES = ["gone", "width", "missing", "nan", "zero", "kind", "list", "vectors", "text", "word", "number", "nested"]


@pytest.mark.parametrize("damage", [*DAMAGES, "counts", "source"])
def test_a_file_that_does_not_fit_is_named(damage: str, tmp_path: Path) -> None:
    ActionStatistics.of(episodes(), episodes()).save(tmp_path)
    path = tmp_path / "statistics.json"
    values = json.loads(path.read_text())
    if damage == "gone":
        path.unlink()
    elif damage == "missing":
        values["state"].pop("scale")
    elif damage == "nan":
        values["action"]["offset"][1] = float("nan")
    elif damage == "zero":
        values["state"]["scale"][0] = 0.0
    elif damage == "kind":
        values["kind"] = "quantile"
    elif damage == "list":
        values = [values]
    elif damage == "vectors":
        values["action"] = [1.0, 2.0, 3.0]
    elif damage == "text":
        values["action"]["offset"][1] = "much"
    elif damage == "word":
        values["state"]["scale"] = "one"
    elif damage == "number":
        values["state"]["scale"] = 1.0
    elif damage == "nested":
        values["state"]["offset"][2] = [0.0]
    elif damage == "counts":
        values["episodes"] = "two"
    elif damage == "source":
        values["source"] = ["here"]
    if damage != "gone":
        path.write_text(json.dumps(values))
    words = {
        "gone": "wrong units",
        "width": "action.offset.*4 numbers",
        "missing": "state.scale",
        "nan": "action.offset",
        "zero": "state.scale",
        "kind": "kind",
        "list": "no object with names",
        "vectors": r"json: action: got 'list', wanted offset and scale",
        "text": r"action\.offset: got 'something that is no number', wanted 3 numbers",
        "word": r"state\.scale: got 'one', wanted 3 numbers",
        "number": r"state\.scale: got 1\.0, wanted 3 numbers",
        "nested": r"state\.offset: got 'something that is no number'",
        "counts": "episodes: got 'two', wanted int",
        "source": "source: .*wanted dict",
    }
    with pytest.raises(UserError, match=words[damage]):
        ActionStatistics.load(tmp_path, action_dim=4 if damage == "width" else 3, state_dim=3)
