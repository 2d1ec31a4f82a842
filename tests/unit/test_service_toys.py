"""The toys of the world-model service keep the contract and are the same in every process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from physisforcing.planner.check_worldmodel import check_world_model
from physisforcing.planner.service import toy


@pytest.mark.parametrize("make", [toy.actions, toy.text])
def test_the_toys_of_the_service_keep_the_contract(make):
    results = {r.name: r for r in check_world_model(make)}
    assert [r.line() for r in results.values() if r.status == "fail"] == []
    assert results["text-sensitivity"].measured["mean"] > 1
    assert results["actions-sensitivity"].status == ("pass" if make is toy.actions else "skipped")


def test_a_toy_has_the_same_fingerprint_in_every_process():
    code = "from physisforcing.planner.service import toy; print(toy.actions().spec.fingerprint)"
    told = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in "12"
    }
    assert len(told) == 1 and toy.actions().spec.fingerprint.encode() in told.pop()
