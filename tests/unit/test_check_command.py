"""``physis check worldmodel``: models by name, hangs and crashes, and mistakes told in one message."""

from __future__ import annotations

import json
import textwrap

import pytest

from physisforcing import cli
from physisforcing.check import CheckCommand, check
from physisforcing.planner.check_worldmodel import CHECKS

MODULE = """
import os, sys, time
import numpy as np
from physisforcing.core.requests import check_request
from physisforcing.core.types import Rollout, ViewLayout, WorldModelSpec

class Still:
    def __init__(self, fault=""):
        self.fault, self.calls = fault, 0
        print("loading", fault)
        self.spec = WorldModelSpec(name="still", views=ViewLayout(height=8, width=12), context_frames=1, horizons=(5,),
            frame_dt=0.12, conditions=frozenset(), returns=frozenset({"frames"}), max_batch=2, fingerprint="s1")
    def rollout(self, request):
        check_request(request, self.spec)
        self.calls += 1
        if self.fault == "hangs" and request.seeds_BS.size > 1:
            time.sleep(600)
        if self.fault == "dies" and self.calls == 1:
            os.kill(os.getpid(), 11)
        frames = np.repeat(request.context_BVTHWC[:, None], request.seeds_BS.shape[1], 1).repeat(5, 3)
        return Rollout(times_T=np.arange(5) * 0.12, frames_BSVTHWC=frames)

def load(): return Still()
def hangs(): return Still("hangs")
def dies(): return Still("dies")
def breaks(): raise RuntimeError("weights are gone")
def slow(): time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "still_model.py").write_text(textwrap.dedent(MODULE))
    (tmp_path / "broken_model.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def statuses(report):
    return {entry["name"]: entry["status"] for entry in report["checks"]}


def test_the_command_finds_a_module_in_the_current_folder(folder, capfd):
    assert cli.main(["check", "worldmodel", "still_model:load", "max_samples=3", "--json"]) == 0
    out, err = capfd.readouterr()
    report = json.loads(out)  # what the model prints is not in it
    assert "loading" in err and report["model"] == "still" and report["fingerprint"] == "s1"
    assert report["counts"]["fail"] == 0 and len(report["checks"]) == len(CHECKS) + 1
    seeds = next(entry for entry in report["checks"] if entry["name"] == "seeds")
    assert seeds["detail"].startswith("not stochastic") and seeds["measured"]["greatest"] == 0


def test_a_hang_and_a_crash_fail_their_checks_and_the_rest_goes_on(folder, capfd):
    report = check(CheckCommand(world_model="still_model:hangs", timeout=2.5, max_samples=3))
    found = statuses(report)
    assert found["batch-invariance"] == found["max-batch"] == "fail"
    assert found["determinism"] == found["fingerprint"] == found["refuses-horizon"] == "pass"
    detail = next(entry["detail"] for entry in report["checks"] if entry["name"] == "batch-invariance")
    assert detail == "no answer within 2.5 s"
    assert cli.main(["check", "worldmodel", "still_model:dies", "timeout=20", "only=[shapes,times,seeds,returns]"]) == 1
    out = capfd.readouterr().out
    assert out.count("the process ended by SIGSEGV") == 3 and "skipped: needs a model that answers in time" in out


def test_loading_that_fails_or_hangs_is_a_failed_check(folder, capfd):
    assert cli.main(["check", "worldmodel", "still_model:breaks", "only=[spec]"]) == 1
    assert "weights are gone" in capfd.readouterr().out
    report = check(CheckCommand(world_model="still_model:slow", timeout=2.0, only=["spec"]))
    assert statuses(report) == {"load": "fail", "spec": "skipped"}
    assert cli.main(["check", "worldmodel", "broken_model:load", "only=[spec]"]) == 1
    assert "a_package_that_is_not_there" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["not_a_module:load"], "not_a_module"),
        (["still_model:laod"], "'load'"),
        (["still_model:np"], "something to call"),
        (["no/such/folder"], "no such file or folder"),
        (["still_model:load", "only=[determinsm]"], "determinism"),
        (["still_model:load", "timout=3"], "timeout"),
        (["still_model:load", "images=[nothing.png]"], "nothing.png"),
        (["still_model:load", "instructions=[same,same]"], "two different sentences"),
    ],
)
def test_mistakes_are_one_message_with_exit_code_2(folder, capfd, words, said):
    assert cli.main(["check", "worldmodel", *words]) == 2
    err = capfd.readouterr().err
    assert said in err and "Traceback" not in err


def test_help_says_that_naming_a_module_runs_it(capsys):
    assert cli.main(["check", "worldmodel", "--help"]) == 0
    text = capsys.readouterr().out
    assert "runs\nits code" in text and "shipped" in text and "module:function" in text
