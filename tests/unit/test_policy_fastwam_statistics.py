"""``dataset_stats.json`` of policies that were trained here: the same numbers when it is read again, to the last bit, and what is not in it is named."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from physisforcing import cli
from physisforcing.core.errors import UserError
from physisforcing.policy.checkpoint import PolicyInfo, save_policy
from physisforcing.policy.config import fastwam_compat
from physisforcing.policy.convert import LAYOUTS, ConvertPolicyConfig, run
from physisforcing.policy.fastwam_statistics import find_statistics, read_released, write_released
from physisforcing.policy.model import WorldActionModel
from physisforcing.policy.normalization import ActionStatistics, Scale
from released_fastwam import GIVEN, statistics
from tests.helpers.ranks import fork
from tests.helpers.tiny_policy import tiny_transformer

LACKING = {"zscore": ["global_min", "global_max"], "minmax": ["global_mean", "global_std"]}


def episodes(width: int, seed: int) -> list[NDArray[Any]]:
    """Of two episodes [T,D]: joints on all scales, one that hardly moves, one that does not, and a gripper from -1 to 1."""
    drawn = np.random.default_rng(seed)
    rows = [
        drawn.normal(size=(steps, width)) * 10.0 ** drawn.uniform(-3, 2, width) + drawn.normal() for steps in (30, 41)
    ]
    for row in rows:
        row[:, 0], row[:, 1], row[:, 2] = 0.1, np.linspace(0.3, 0.30004, len(row)), np.sign(np.arange(len(row)) - 3.0)
    return rows


def made(kind: str, action_dim: int, state_dim: int, seed: int = 0) -> ActionStatistics:
    return ActionStatistics.of(episodes(action_dim, seed), episodes(state_dim, seed + 1), kind, episodes=2)


def policy(folder: Path, stored: ActionStatistics | None) -> Path:
    """A tiny policy of the published design, with these statistics."""
    widths = (14, 14) if stored is None else (stored.action.width, stored.state.width)
    config = fastwam_compat(action_dim=widths[0], state_dim=widths[1], width=16, ffn_dim=24, chunk=8)
    save_policy(folder, WorldActionModel(tiny_transformer(), config), PolicyInfo())
    if stored is not None:
        stored.save(folder)
    return folder


def back(folder: Path, output: Path) -> dict[str, Any]:
    return run(ConvertPolicyConfig(source=str(folder), output=str(output), kind="to_fastwam"))


def again(released: Path, output: Path, **more: Any) -> dict[str, Any]:
    (released.parent / "sizes.json").write_text(json.dumps(GIVEN))
    sizes = {"config": str(released.parent / "sizes.json"), "chunk": 8}
    return run(ConvertPolicyConfig(source=str(released / "model.safetensors"), output=str(output), **(sizes | more)))


@pytest.mark.parametrize("kind", ["zscore", "minmax"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_come_back_to_the_last_bit(kind: str, dtype: Any, tmp_path: Path) -> None:
    for seed in range(20):
        data = [[rows.astype(dtype) for rows in episodes(width, seed + k)] for k, width in enumerate((14, 15))]
        stored = ActionStatistics.of(*data, kind, episodes=2)
        values, missing = write_released(stored)
        (tmp_path / "dataset_stats.json").write_text(json.dumps(values))
        found = read_released(tmp_path / "dataset_stats.json", kind, action_dim=14, state_dim=15)
        assert found.difference(stored) is None and (found.steps, found.episodes) == (71, 2)
        assert set(LACKING[kind]) < set(missing) and not {"num_episodes", "num_transition"} & set(missing)
        together = np.concatenate(data[0]).astype(np.float64)
        row = values["action"]["default"]
        if kind == "zscore":
            np.testing.assert_allclose(row["global_mean"], together.mean(0), rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(row["global_std"][2:], together.std(0)[2:], rtol=1e-5)
            np.testing.assert_allclose(row["global_std"][:2], 1e-3, rtol=1e-4)
        else:  # of those that move: what was measured, which sums and differences of it had been rounded from
            np.testing.assert_allclose(row["global_min"][2:], together.min(0)[2:], rtol=1e-12, atol=1e-13)
            np.testing.assert_allclose(row["global_max"][2:], together.max(0)[2:], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", ["zscore", "minmax"])
def test_the_published_formula_normalises_alike(kind: str) -> None:
    """Reference section 2.6 in float32, the type in which Fast-WAM reads its file."""
    stored = made(kind, 14, 15)
    row = {name: np.array(value, np.float32) for name, value in write_released(stored)[0]["state"]["default"].items()}
    if kind == "zscore":
        divisor = row["global_std"] + np.float32(1e-8)
        slope, shift = 1 / divisor, -row["global_mean"] / divisor
    else:
        span = row["global_max"] - row["global_min"]
        still = span < 1e-4
        slope = 2 / np.where(still, np.float32(2), span)
        shift = np.where(still, -row["global_min"], -1 - slope * row["global_min"])
    x = np.concatenate(episodes(15, 1)).astype(np.float32)
    wanted = np.clip(x * slope + shift, -5, 5)
    found = stored.state.normalise(torch.from_numpy(x)).numpy()
    assert np.abs(found).max() > 0.9
    np.testing.assert_allclose(
        found, wanted, atol=2e-3 if kind == "zscore" else 2e-4
    )  # offsets of up to 1e3 deviations


@pytest.mark.parametrize(
    "kind, widths, more",
    [
        ("zscore", (14, 14), {}),
        ("minmax", (7, 8), {}),
        ("minmax", (14, 14), {"normalization": "minmax"}),
        ("zscore", (7, 8), {"normalization": "zscore"}),
    ],
)
def test_a_policy_there_and_back(kind: str, widths: tuple[int, int], more: dict[str, str], tmp_path: Path) -> None:
    stored = made(kind, *widths)
    report = back(policy(tmp_path / "policy", stored), tmp_path / "back")
    assert report["statistics"] == "dataset_stats.json" and f"normalization={kind}" in report["notes"][0]
    lacking = [*LACKING[kind], "global_q01", "global_q99", *(f"stepwise_{name}" for name in ("min", "std"))]
    assert all(name in report["notes"][1] for name in lacking)
    assert find_statistics(tmp_path / "back" / "model.safetensors") == tmp_path / "back" / "dataset_stats.json"
    if more:  # the layout's policies have the other kind, and its statistics are not there
        with pytest.raises(UserError, match=r"action\.default\.global_(mean|min)"):
            again(tmp_path / "back", tmp_path / "other")
        assert not (tmp_path / "other").exists()
    told = again(tmp_path / "back", tmp_path / "again", **more)
    assert told["statistics"] == "dataset_stats.json"
    found = ActionStatistics.load(tmp_path / "again", action_dim=widths[0], state_dim=widths[1])
    assert found.difference(stored) is None
    assert (found.kind, found.steps, found.episodes) == (kind, stored.steps, stored.episodes)
    back(tmp_path / "again", tmp_path / "third")  # and from there the file itself
    one, two = ((tmp_path / name / "dataset_stats.json").read_bytes() for name in ("back", "third"))
    assert one == two and json.loads(one)["num_transition"] == 71


def test_counts_that_nobody_kept_are_left_out_and_said(tmp_path: Path) -> None:
    one = Scale(offset_D=np.zeros(14), scale_D=np.ones(14))
    report = back(policy(tmp_path / "policy", ActionStatistics(action=one, state=one)), tmp_path / "back")
    assert set(json.loads((tmp_path / "back" / "dataset_stats.json").read_text())) == {"state", "action"}
    assert report["notes"][1].endswith("stepwise_std, num_episodes, num_transition")


@pytest.mark.parametrize(
    "kind, offset, scale",
    [("zscore", 0.0, 9e-9), ("minmax", 0.0, 4e-5), ("minmax", 1000.0, 0.1)],
)
def test_a_scale_that_the_layout_cannot_hold(kind: str, offset: float, scale: float, tmp_path: Path) -> None:
    """A deviation below the number that is added to it, a range that counts as none, and one that no two numbers so far from zero have."""
    plain = Scale(offset_D=np.zeros(14), scale_D=np.ones(14))
    other = Scale(offset_D=np.where(np.arange(14) == 3, offset, 0.5), scale_D=np.where(np.arange(14) == 3, scale, 0.5))
    folder = policy(tmp_path / "policy", ActionStatistics(action=other, state=plain, kind=kind))
    with pytest.raises(UserError, match=r"action\[3\].*dataset_stats"):
        back(folder, tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_what_is_missing_or_says_something_else(tmp_path: Path) -> None:
    bare = policy(tmp_path / "bare", None)
    report = back(bare, tmp_path / "one")
    assert report["statistics"] == "none" and "no statistics.json" in report["notes"][0]
    assert not (tmp_path / "one" / "dataset_stats.json").exists()
    (bare / "dataset_stats.json").write_text(json.dumps(statistics(14, 14)))
    with pytest.raises(UserError, match=r"statistics\.json: got 'nothing"):
        back(bare, tmp_path / "two")
    made("zscore", 14, 14).save(bare)
    with pytest.raises(UserError, match=r"another offset of action"):
        back(bare, tmp_path / "two")
    (bare / "dataset_stats.json").unlink()
    (bare / "statistics.json").write_text("{}")
    with pytest.raises(UserError, match=r"statistics\.json: kind"):
        back(bare, tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_killed_between_the_files_nothing_has_its_name(tmp_path: Path) -> None:
    folder, output = policy(tmp_path / "policy", made("zscore", 14, 14)), tmp_path / "back"
    child = fork(lambda: dies_at(folder, output, "dataset_stats.json"), "killed")
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not output.exists()
    hidden = tmp_path / ".back.converting"
    left = {path.name for path in hidden.iterdir()}
    assert {"model.safetensors", "config.json"} <= left and "dataset_stats.json" not in left
    assert any(name.startswith(".dataset_stats.json") for name in left)  # written aside, not renamed
    weights = (hidden / "model.safetensors").stat().st_ino
    back(folder, output)
    assert (output / "model.safetensors").stat().st_ino == weights  # kept
    back(folder, tmp_path / "whole")
    one, two = ({path.name: path.read_bytes() for path in done.iterdir()} for done in (output, tmp_path / "whole"))
    assert one == two and set(one) == {"config.json", "model.safetensors", "dataset_stats.json", "conversion.json"}


def dies_at(folder: Path, output: Path, name: str) -> None:
    """Convert in a process that dies when a file is to get this name."""
    replace = os.replace

    def dies(old: Any, new: Any) -> None:
        if Path(new).name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(old, new)

    os.replace = dies  # type: ignore[assignment]
    back(folder, output)


def test_the_command_says_how_the_file_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = policy(tmp_path / "policy", made(LAYOUTS["libero"].normalization, 7, 8))
    assert cli.main(["convert", "kind=to_fastwam", f"source={folder}", f"output={tmp_path / 'back'}"]) == 0
    told = capsys.readouterr().out
    assert "statistics: dataset_stats.json" in told and "norm_default_mode=min/max" in told
    assert cli.main(["convert", "kind=fastwam", "source=x", "output=y", "normalization=z-score"]) == 2
    assert "zscore" in capsys.readouterr().err
