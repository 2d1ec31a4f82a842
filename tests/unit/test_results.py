"""The results file: resume, torn lines, statuses."""

import multiprocessing
from dataclasses import dataclass

import numpy as np
import pytest

from physisforcing.core.errors import DatasetError
from physisforcing.core.results import ResultKey, ResultsFile, config_hash, count


def key(episode, **kwargs):
    parts = {"manifest": "test_click_bell", "episode": f"click_bell/{episode}", "fingerprint": "f", "config": "c"}
    return ResultKey(**(parts | kwargs))


def test_resume_skips_done_keys(tmp_path):
    path = tmp_path / "runs" / "results.jsonl"
    first = ResultsFile(path)
    first.append(key(1), "success", steps=np.int64(30), seconds=np.float32(1.5), targets=np.zeros(2))
    first.append(key(2), "error", traceback="boom")
    again = ResultsFile(path)
    assert again.done(key(1)) and not again.done(key(3))
    assert not again.done(key(1, fingerprint="other")) and not again.done(key(1, config="other"))
    assert again.done(key(2)) and not again.done(key(2), retry_errors=True)
    assert again.get(key(1))["steps"] == 30 and again.get(key(1))["targets"] == [0.0, 0.0]
    assert count(again.rows) == {"success": 1, "failure": 0, "error": 1, "n": 1}


def test_append_only_and_last_line_wins(tmp_path):
    path = tmp_path / "r.jsonl"
    results = ResultsFile(path)
    results.append(key(1), "error")
    before = path.read_bytes()
    results.append(key(1), "success")
    assert path.read_bytes().startswith(before)
    assert len(ResultsFile(path)) == 1 and ResultsFile(path).get(key(1))["status"] == "success"


@pytest.mark.parametrize("cut", [1, 2, 20, 60])
def test_torn_last_line_is_reported_and_closed(tmp_path, cut):
    path = tmp_path / "r.jsonl"
    results = ResultsFile(path)
    for episode in (1, 2, 3):
        results.append(key(episode), "success")
    path.write_bytes(path.read_bytes()[:-cut])
    resumed = ResultsFile(path)
    whole = cut == 1  # only the newline is lost: the line itself is complete
    assert resumed.done(key(3)) == whole and (resumed.torn == []) == whole
    assert (resumed.report_torn() is None) == whole
    resumed.append(key(3), "failure")
    final = ResultsFile(path)
    assert [final.get(key(e))["status"] for e in (1, 2, 3)] == ["success", "success", "failure"]
    assert final.torn == ([] if whole else [3])


def test_refusals(tmp_path):
    results = ResultsFile(tmp_path / "r.jsonl")
    with pytest.raises(ValueError, match="crashed"):
        results.append(key(1), "crashed")
    with pytest.raises(ValueError):
        results.append(key(1), "success", value=float("nan"))
    with pytest.raises(ValueError, match="key"):
        results.append(key(1), "success", episode="2")
    assert not (tmp_path / "r.jsonl").exists()
    (tmp_path / "other.jsonl").write_text('{"loss": 1.0}\n')
    with pytest.raises(DatasetError, match=r"other\.jsonl line 1"):
        ResultsFile(tmp_path / "other.jsonl")


def _append(path, start):
    results = ResultsFile(path)
    for episode in range(start, start + 50):
        results.append(key(episode), "success", text="x" * 300)


def test_processes_share_a_file(tmp_path):
    path = tmp_path / "r.jsonl"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_append, args=(path, 50 * i), daemon=True) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len(ResultsFile(path)) == 150 and ResultsFile(path).torn == []


def test_config_hash():
    @dataclass
    class Config:
        steps: int = 4
        name: str = "a"

    assert config_hash(Config()) == config_hash({"name": "a", "steps": 4})
    assert config_hash(Config(steps=5)) != config_hash(Config())
    assert len(config_hash({})) == 16
