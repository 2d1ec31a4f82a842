"""Which recorded episodes a collection counts as its own, and that it writes alone."""

import json
import subprocess
import sys

import pytest

from physisforcing.core import files
from physisforcing.core.errors import UserError
from physisforcing.core.files import locked
from physisforcing.envs import collect as collect_module
from physisforcing.envs.collect import PATIENCE, CollectConfig, Collection, _by_policy, collect
from physisforcing.envs.collector import POLICIES, episode_key
from physisforcing.envs.seeds import Job, Outcome


def test_no_policy_counts_the_episodes_of_another():
    known = [*POLICIES, "my_policies:random"]
    keys = {policy: episode_key(Job(task="click_bell", seed=100_000_001), policy) for policy in known}
    assert len(set(keys.values())) == len(known)
    for policy in known:
        assert [other for other in known if _by_policy(keys[other], policy)] == [policy]


def test_an_output_is_collected_into_by_one_process_at_a_time(tmp_path):
    """The other process is killed: its lock ends with it, and does not stand in the way."""
    output = tmp_path / "bell"
    code = f"import time; from pathlib import Path; from physisforcing.core.files import locked\nwith locked(Path({str(output)!r}), 'collection'): print('held', flush=True); time.sleep(60)"
    config = CollectConfig(tasks=["click_bell"], episodes=1, output=str(output), workers=0)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"output: got .*bell, in use'?, wanted one collection at a time\. Fix:"):
            collect(config, progress=False)
        assert not output.exists()
        other.kill()
    with locked(output, "collection"):
        assert list(tmp_path.glob(".*.lock"))
    assert not list(tmp_path.glob(".*.lock"))


def test_one_output_in_two_parts_of_a_collection_is_locked_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "bell")
    monkeypatch.setattr(collect_module, "_collect", lambda configs, progress: {name: {} for name in configs})
    parts = {
        name: CollectConfig(tasks=["click_bell"], episodes=1, output=output)
        for name, output in (("absolute", str(tmp_path / "bell")), ("relative", "bell"), ("linked", "link"))
    }
    assert set(collect_module.collect_together(parts, progress=False)) == set(parts)
    with locked(tmp_path / "link", "collection"), pytest.raises(UserError, match="in use"):
        collect_module.collect_together({"relative": parts["relative"]}, progress=False)


def test_a_lock_whose_file_went_away_is_taken_anew(tmp_path, monkeypatch):
    """The process before ends between this one's opening of the file and its lock: the file that it holds then is no longer that of others."""
    lock, flock = tmp_path / ".bell.lock", files.fcntl.flock
    calls = []

    def late(*arguments):
        if not calls:
            lock.unlink()
        calls.append(arguments)
        flock(*arguments)

    monkeypatch.setattr(files.fcntl, "flock", late)
    with locked(tmp_path / "bell", "collection"):
        assert len(calls) == 2 and lock.exists()
        with pytest.raises(UserError, match="in use"), locked(tmp_path / "bell", "collection"):
            raise AssertionError("unreachable")
        lock.unlink()  # by hand, while it is held
    assert not lock.exists()


def test_where_no_lock_can_be_made_it_is_said(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"output: got .*wanted a lock beside it\. Fix:"),
        locked(tmp_path / "file" / "bell", "collection"),
    ):
        raise AssertionError("unreachable")


def test_a_task_that_always_crashes_ends_the_run_before_the_seeds_do(tmp_path):
    """Others had worked before it: it is not the first episodes of the run that crash."""
    collection = Collection(CollectConfig(tasks=["click_bell", "shake_bottle"], episodes=50, output=str(tmp_path)))

    def note(task, seed, kind):
        collection.note(Outcome(task=task, seed=seed, kind=kind, message="no module named renderer"))

    for seed in range(PATIENCE - 1):
        note("click_bell", seed, "crashed")
    note("click_bell", PATIENCE - 1, "unstable")  # it can begin, then
    for seed in range(PATIENCE - 1):
        note("click_bell", PATIENCE + seed, "crashed")
        note("shake_bottle", seed, "unstable")
    with pytest.raises(
        RuntimeError, match=rf"click_bell: {PATIENCE} episodes in a row crashed; .*no module named renderer"
    ):
        note("click_bell", 2 * PATIENCE, "crashed")
    kept = json.loads((tmp_path / "skipped.json").read_text())
    assert [row["reason"] for row in kept].count("crashed") == 2 * PATIENCE - 1
