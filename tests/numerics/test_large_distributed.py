"""Large backbones in two gloo processes against one: losses, exports, exact continuation, and that no process holds the whole."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from physisforcing.worldmodel.training.checkpoint import load_training
from physisforcing.worldmodel.training.worldmodel import train_world_model
from ranks import run_script, update_lines
from two_large import CASES, prepare, settings

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    prepare(folder)
    for case in CASES:
        train_world_model(settings(folder, case, f"one-{case}"))
    run_script("two_large.py", folder, timeout=600)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_learns(runs, case):
    one, two = update_lines(runs / f"one-{case}"), update_lines(runs / f"two-{case}")
    assert len(one) == len(two) == 6
    terms = ("loss", "fm", "pix", "sem", "grad_norm", "pairs", "related")
    near = 1e-4 if case.startswith("split") else 2e-3
    for first, second in zip(one, two, strict=True):
        for term in terms:
            assert second[term] == pytest.approx(first[term], rel=near, abs=1e-6), (term, first["step"])
    assert any(line["pix"] > 0 for line in one) and any(line["related"] < 4 for line in one)
    assert one[0]["fm"] != one[-1]["fm"]
    held = [json.loads((runs / f"{name}-{case}" / "heldout.json").read_text()) for name in ("one", "two")]
    for place in ("before", "after"):
        assert held[1][place] == pytest.approx(held[0][place], rel=near, abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_continued_run_of_two_has_equal_bits(runs, case):
    first, second = (load_training(runs / f"{name}-{case}" / "last")[0] for name in ("two", "halves"))
    assert {group: set(values) for group, values in first.items()} == {g: set(v) for g, v in second.items()}
    assert all(torch.equal(value, second[group][key]) for group in first for key, value in first[group].items())
    exports = [runs / f"{name}-{case}" / "export" / "transformer" for name in ("two", "halves")]
    first, second = (load_file(path / "diffusion_pytorch_model.safetensors") for path in exports)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("case", CASES)
def test_the_export_of_two_processes_is_that_of_one(runs, case):
    exports = [runs / f"{name}-{case}" / "export" for name in ("one", "two")]
    files = [sorted(str(path.relative_to(export)) for path in export.rglob("*")) for export in exports]
    assert files[0] == files[1]
    first, second = (load_file(e / "transformer" / "diffusion_pytorch_model.safetensors") for e in exports)
    for name, value in first.items():
        torch.testing.assert_close(value.float(), second[name].float(), rtol=1e-2, atol=5e-3, msg=name)
        assert (value.float() - second[name].float()).norm() <= 0.02 * value.float().norm(), name


def test_no_process_holds_the_whole_and_both_begin_alike(runs):
    found = [json.loads((runs / f"parts{rank}.json").read_text()) for rank in (0, 1)]
    for name, (mine, whole, sharded) in found[0].items():
        assert sharded == (not name.startswith("forcing.")), name
        assert mine + found[1][name][0] == (whole if sharded else 2 * whole), name
    held = sum(mine for name, (mine, _, _) in found[0].items() if name.startswith("denoiser."))
    whole = sum(count for name, (_, count, _) in found[0].items() if name.startswith("denoiser."))
    assert held < 0.6 * whole


def test_measuring_averaged_weights_changes_no_update(runs):
    plain, measured = json.loads((runs / "measured.json").read_text())
    assert plain == measured and len(set(plain)) == 3
