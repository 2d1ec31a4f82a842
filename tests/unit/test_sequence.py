"""What sequence parallelism refuses, and its exchanges in one process; two processes are in tests/numerics/test_large_distributed.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tiny_large
from physisforcing.core.errors import UserError
from physisforcing.worldmodel.backbones.folder import describe_backbone
from physisforcing.worldmodel.backbones.sequence import SequenceSplit, _rotate
from physisforcing.worldmodel.training.large import check_sequence
from physisforcing.worldmodel.training.modules import check_run
from physisforcing.worldmodel.training.processes import Processes


def test_each_process_has_its_part_of_every_frame() -> None:
    tokens = torch.arange(24).view(1, 24, 1)  # 3 frames of 8
    parts = [SequenceSplit(group=None, place=place, count=4).share(tokens, 3).flatten().tolist() for place in range(4)]
    assert parts[1] == [2, 3, 10, 11, 18, 19]
    assert sorted(token for part in parts for token in part) == list(range(24))


def test_positions_are_turned_as_the_stock_processor_turns_them() -> None:
    """Against complex numbers."""
    x, angle = torch.randn(2, 5, 3, 8), torch.randn(1, 5, 1, 4)
    found = _rotate(x, *(part.repeat_interleave(2, -1) for part in (angle.cos(), angle.sin())))
    wanted = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones(()), angle))
    torch.testing.assert_close(found, wanted.flatten(-2))


def test_batches_are_shared_by_groups() -> None:
    shares = [Processes(world=4, rank=rank, sequence=2).share(6) for rank in range(4)]
    assert shares == [slice(0, 3), slice(0, 3), slice(3, 6), slice(3, 6)]
    with pytest.raises(UserError, match=r"run\.batch.*multiple of the 2 groups of processes"):
        Processes(world=4, sequence=2).share(5)


def test_a_pass_in_two_processes_is_timed_beside_one(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import sequence_split

    monkeypatch.setattr(
        "sys.argv", ["sequence_split.py", "--tiny", "--passes", "2", "--json", str(tmp_path / "split.json")]
    )
    sequence_split.main()
    one, two = json.loads((tmp_path / "split.json").read_text())
    assert (one["n"], two["n"]) == (2, 2)
    assert two["against"]["difference"] < 1e-5
    assert two["against"]["ratio"] == pytest.approx(two["value"] / one["value"], rel=0.02)


def test_where_it_cannot_be_it_is_refused(
    large_models: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {name: describe_backbone(str(large_models[name][0])) for name in ("ti2v", "cosmos3")}
    for name, count, words in (
        ("cosmos3", 2, "1 with Cosmos3"), ("ti2v", 3, "3, and 2 heads"), ("ti2v", 2, "2, and 9 tokens a latent frame of .6, 6."),
    ):  # fmt: skip
        with pytest.raises(UserError, match=rf"run\.sequence.*{words}"):
            check_sequence(count, found[name], [(8, 3, 4, 6), (8, 3, 6, 6)])
    monkeypatch.setenv("WORLD_SIZE", "4")
    for sequence in (0, 3):
        with pytest.raises(UserError, match=r"run\.sequence.*divides the 4 processes"):
            Processes.start("cpu", sequence)
    model, store = large_models["ti2v"]
    made = tiny_large.config(model, [store], tmp_path)
    made.run.sequence, made.physics.weights = 2, "gradient"
    with pytest.raises(UserError, match=r"physics\.weights.*run\.sequence"):
        check_run(made, Processes(world=2, sequence=2))
