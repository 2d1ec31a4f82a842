"""Faults of all kinds at once: nothing hangs, no process is left, every fault is accounted for."""

import importlib
import sys
import time

import pytest

from physisforcing.core.results import ResultsFile
from physisforcing.envs.robotwin.tasks import PACK_TASKS


@pytest.fixture
def chaos_module(repository, monkeypatch):
    """The benchmark as a module that spawned processes can import."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    monkeypatch.delitem(sys.modules, "env_chaos", raising=False)
    return importlib.import_module("env_chaos")


#: Every seventh task: all of them are played by benchmarks/env_chaos.py.
TASKS, EPISODES = PACK_TASKS[::7], 16


@pytest.mark.sim
@pytest.mark.slow
def test_random_episodes_with_injected_faults(chaos_module, tmp_path):
    def chaos_of(seed):
        return chaos_module.Chaos(seed=seed, max_steps=20, bad_share=0.1, kill_once=0.1, kill_always=0.05)

    def kills(chaos):
        pairs = [(task, seed) for t, task in enumerate(TASKS) for seed in range(t, EPISODES, len(TASKS))]
        return sorted(chaos_module.faults_of(chaos, task, seed)[0].kills for task, seed in pairs)

    once_and_always = [0] * (EPISODES - 2) + [1, 2]
    chaos = next(chaos for chaos in map(chaos_of, range(99)) if kills(chaos) == once_and_always)
    began = time.monotonic()
    results, jobs = chaos_module.run(chaos, tmp_path, episodes=EPISODES, workers=2, timeout_s=120, tasks=TASKS)
    assert time.monotonic() - began < 600
    assert chaos_module.unaccounted(chaos, tmp_path, results, jobs) == []
    totals = chaos_module.totals_of(results.rows, tmp_path)
    assert len(results) == EPISODES and {row["task"] for row in results.rows} == set(TASKS)
    assert totals["refused"] > 5 and totals["clipped"] > 1 and totals["pictures"] > EPISODES
    assert (totals["kills"], totals["finished_after_a_kill"], totals["crashed"]) == (3, 1, 1)
    assert totals["recorded"] + totals["crashed"] + totals["unstable"] == EPISODES


def test_what_is_not_accounted_for_is_found(chaos_module, tmp_path):
    """The check of the chaos run itself, on results made by hand."""
    chaos = chaos_module.Chaos(kill_once=0, kill_always=0, bad_share=0)
    jobs = [chaos_module.Job(task="click_bell", seed=seed) for seed in range(3)]
    results = ResultsFile(tmp_path / "results.jsonl")
    counts = {"steps": 60, "pictures": 6, "refused": 0, "clipped": 0, "nan": 0, "inf": 0, "oversized": 0}
    whole = {"kind": "recorded", "attempts": 1, "error": "", **counts}
    results.append(chaos_module.key_of(chaos, jobs[0]), "failure", **whole)
    results.append(chaos_module.key_of(chaos, jobs[1]), "failure", **(whole | {"refused": 1, "attempts": 2}))
    wrong = chaos_module.unaccounted(chaos, tmp_path, results, jobs)
    assert len(wrong) == 5 and "2 results of 3" in wrong[0] and "seed 2 has no result" in wrong[-1]
    assert any("0 actions were no numbers, 1 were refused" in sentence for sentence in wrong)
    assert any("killed 0 times" in sentence for sentence in wrong)


KILLED = '''
import os, signal
from physisforcing.envs.rollout import EpisodeResult
from physisforcing.envs.seeds import Outcome


class Runner:
    """Scene 100000 always kills its process in the middle of the episode, 100001 does so once."""

    def __init__(self, config, entries, filmed, environments, server):
        self.output = config.output

    def handle(self, job):
        mark = os.path.join(self.output, f"{job.task.replace('/', '-')}-{job.seed}")
        if job.seed == 100_000 or (job.seed == 100_001 and not os.path.exists(mark)):
            open(mark, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        result = EpisodeResult(task="click_bell", seed=job.seed, status="failure", steps=7)
        return Outcome(task=job.task, seed=job.seed, kind="recorded", details=result.row() | {"status": result.status})

    def close(self):
        pass
'''


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_costs_an_evaluation_one_retry_and_then_the_episode(tmp_path, monkeypatch, workers):
    from physisforcing import eval_plan

    (tmp_path / "killed_runner.py").write_text(KILLED)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(eval_plan, "EpisodeRunner", importlib.import_module("killed_runner").Runner)
    output = tmp_path / "out"
    config = eval_plan.EvalPlanConfig(
        tasks=["click_bell"], episodes=4, manifest="none", baselines=["noop"], output=str(output), workers=workers
    )
    summary = eval_plan.evaluate(config, progress=False)
    assert {name: (entry["n"], entry["errors"]) for name, entry in summary["tasks"]["click_bell"].items()} == {
        "model": (3, 1),
        "noop": (3, 1),
    }, "an episode without an end is in no denominator"
    rows = {(row["policy"], row["seed"]): row for row in ResultsFile(output / "results.jsonl").rows}
    assert len(rows) == 8
    for policy in ("model", "noop"):
        dead, rescued, calm = (rows[policy, seed] for seed in (100_000, 100_001, 100_002))
        assert dead["status"] == "error" and "exit code -9" in dead["error"] and dead["attempts"] == 2
        assert rescued["status"] == "failure" and rescued["attempts"] == 2 and rescued["steps"] == 7
        assert calm["status"] == "failure" and "attempts" not in calm
