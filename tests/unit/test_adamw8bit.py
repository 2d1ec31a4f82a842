"""AdamW with 8-bit moments: near AdamW in a quarter of its memory, kept to the bit in checkpoints of one process and of two."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from physisforcing.core.errors import UserError
from physisforcing.worldmodel.training.checkpoint import load_training, optimizer_tensors
from physisforcing.worldmodel.training.optim import OptimConfig, _eight_bit_adamw, build_optimizer, in_eight_bits
from ranks import run_script
from two_eight_bits import Net


@pytest.fixture(scope="module")
def torchao() -> None:
    pytest.importorskip(
        "torchao", reason="needs the extra fp8 (torchao), which diffusers would import in every process"
    )


@pytest.mark.usefixtures("torchao")
def test_it_is_near_adamw_and_small() -> None:
    nets = [Net(kind=kind) for kind in ("adamw", "adamw8bit")]
    began = nets[0].module.first.weight.detach().clone()
    for number in range(20):
        for net in nets:
            with torch.compiler.set_stance("force_eager"):
                net.step(number)
    moved = nets[0].module.first.weight - began
    gap = (nets[1].module.first.weight - nets[0].module.first.weight).norm() / moved.norm()
    assert 1e-4 < gap < 0.1
    sizes = []
    for net in nets:
        found = optimizer_tensors(net.optimizer, dict(net.module.named_parameters()))
        sizes.append(
            {name: (value.dtype, value.nbytes) for name, value in found.items() if name.startswith("first.weight/exp")}
        )
    assert sizes[0] == {f"first.weight/{name}": (torch.float32, 4 * 16384) for name in ("exp_avg", "exp_avg_sq")}
    assert sizes[1]["first.weight/exp_avg.codes"] == (torch.uint8, 16384)
    assert sum(size for _, size in sizes[1].values()) < 0.27 * sum(size for _, size in sizes[0].values())


@pytest.fixture(scope="module")
def runs(torchao: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eight")
    run_script("two_eight_bits.py", folder, timeout=200)
    return folder


def tensors(runs: Path, name: str, step: int = 6) -> dict[str, torch.Tensor]:
    found = load_training(runs / name / f"step-{step:06d}")[0]
    return {
        f"{group}/{key}": value for group, values in found.items() for key, value in values.items() if group != "rng"
    }


def test_two_processes_learn_what_one_learns(runs: Path) -> None:
    one, two = tensors(runs, "one"), tensors(runs, "two")
    assert one.keys() == two.keys() and "optimizer/first.weight/exp_avg.codes" in one
    for name in ("weights/first.weight", "average/first.weight", "optimizer/first.weight/exp_avg.scale"):
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)


def test_a_continued_run_has_equal_bits(runs: Path) -> None:
    first, second = tensors(runs, "two"), tensors(runs, "halves")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("name", "whole"), [("one_to_two", "one"), ("two_to_one", "two")])
def test_another_number_of_processes_goes_on(runs: Path, name: str, whole: str) -> None:
    found, wanted = tensors(runs, name), tensors(runs, whole)
    assert found.keys() == wanted.keys()
    for key in ("weights/first.weight", "optimizer/first.weight/exp_avg_sq.scale"):
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-3, atol=1e-4)


def test_what_is_in_eight_bits_does_not_depend_on_the_processes() -> None:
    """Sizes of the 5B: matrices are, biases and tables are not, whatever part of them lies in a process."""
    sides = {
        (3072, 3072): True,
        (14336, 3072): True,
        (3072, 48, 1, 2, 2): True,
        (14336,): False,
        (1, 6, 3072): False,
        (96, 256): False,
    }
    assert {side: in_eight_bits(torch.empty(side, device="meta")) for side in sides} == sides


def test_what_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"optim\.kind.*adamw, adamw8bit"):
        OptimConfig(kind="lion")
    _eight_bit_adamw.cache_clear()
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r"optim\.kind.*physisforcing\[fp8\]"):
        build_optimizer([torch.nn.Parameter(torch.zeros(2, 2))], OptimConfig(kind="adamw8bit"))
