"""The policies of ``physis eval policy`` while they act: their servers, and the memory that they give back."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from acting_policy import acting_policy
from physisforcing.core.errors import UserError
from physisforcing.core.results import ResultsFile
from physisforcing.core.types import Observation
from physisforcing.deploy import make_policy
from physisforcing.eval_policy import EvalPolicyConfig, evaluate
from physisforcing.model_process import ServerAddress
from physisforcing.policies import (
    PolicySettings,
)
from physisforcing.policy.checkpoint import PolicyInfo, save_policy
from physisforcing.policy_episodes import PolicyRunner
from physisforcing.policy_opening import close_policy, identify_policy, open_policy, policy_server
from tiny_policy import tiny_policy

SWAYING = "toy_policies:swaying"


def settings(**changes: Any) -> EvalPolicyConfig:
    values: dict[str, Any] = {"episodes": 2, "baselines": ["noop"], "threads": 1}
    return EvalPolicyConfig(**(values | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., str]:
    """Writes a tiny policy's folder."""

    def write(mode: str = "first_frame", *, seed: int = 0, canvas: str = "head") -> str:
        place = tmp_path / f"{mode}_{seed}_{canvas}" / "export"
        place.mkdir(parents=True)
        save_policy(place, tiny_policy(mode, seed=seed), PolicyInfo(canvas=canvas, tasks=("click_bell",)))
        return str(place)

    return write


# -------------------------------------------------------------------------------------------------------------- server


def test_servers_are_started_for_open_episodes_alone_and_one_after_the_other(
    folder: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told by what is called; that servers and episodes work is tested elsewhere."""
    policies = {name: {"source": folder(seed=k), "server": "auto"} for k, name in enumerate("ab")} | {"here": SWAYING}
    config = settings(policies=policies, policy=PolicySettings(execute=8), output=str(tmp_path / "run"))
    happened: list[Any] = []

    @contextlib.contextmanager
    def server(own: PolicySettings, **_: Any) -> Iterator[ServerAddress]:
        happened.append(f"begin {Path(own.source).parent.name[-6]}")
        yield ServerAddress(address=own.source)
        happened.append("end")

    def run(jobs: Any, key: Any, results: ResultsFile, make: Any, **_: Any) -> None:
        happened.append([[job.task.split("/")[1] for job in jobs], dict(make.args[5])])
        for job in jobs:
            task, policy = job.task.split("/")
            results.append(key(job), "failure", task=task, policy=policy, seed=job.seed)

    monkeypatch.setattr("physisforcing.policy_turns.policy_server", server)
    monkeypatch.setattr("physisforcing.policy_turns.run_jobs", run)
    summary = evaluate(config, progress=False)
    assert {name: row["n"] for name, row in summary["tasks"]["click_bell"].items()} == dict.fromkeys(
        ("a", "b", "here", "noop"), 2
    )
    of = {name: {name: ServerAddress(address=str(one["source"]))} for name, one in policies.items() if name != "here"}
    assert happened == [
        [["here", "here", "noop", "noop"], {}], "begin 0", [["a", "a"], of["a"]], "end", "begin 1", [["b", "b"], of["b"]], "end",
    ]  # fmt: skip
    lines = (tmp_path / "run" / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "results.jsonl").write_text("".join(lines[:-1]))
    happened.clear()
    evaluate(config, progress=False)
    assert happened == ["begin 1", [["b"], of["b"]], "end"]


def test_a_policy_that_is_dropped_gives_its_memory_back(tmp_path: Path) -> None:
    """At once, not when Python next looks for circles: the next policy is loaded in its place."""
    folder = acting_policy(tmp_path / "mine" / "export")
    runner = PolicyRunner(settings(), {}, {}, {}, {}, {}, {}, {})
    opened: Any = open_policy(PolicySettings(source=str(folder), steps=2))
    model = weakref.ref(opened.source)
    runner._held = ("mine", cast(Any, None), opened)
    del opened
    gc.disable()
    try:
        runner._drop_policy()
        assert model() is None
    finally:
        gc.enable()


def test_the_planners_weights_are_looked_for_where_they_are_read() -> None:
    config = settings()
    config.planner.decoder = "nowhere"
    runner = PolicyRunner(config, {}, {}, {}, {}, {}, {}, {})
    with pytest.raises(UserError, match=r"planner\.decoder: got 'nowhere'"):
        assert runner.folders


def test_a_served_policy_acts_as_one_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit-equal on a CPU, under the same key; another number of steps at that address is refused, also to a runner that is deployed."""
    folder = acting_policy(tmp_path / "mine" / "export")
    own = PolicySettings(source=str(folder), steps=2)
    served = dataclasses.replace(own, server="auto")
    draw = np.random.default_rng(0)
    picture, state = draw.integers(0, 256, (240, 320, 3), dtype=np.uint8), draw.normal(size=14).astype(np.float32)
    seen = Observation(images={"head": picture}, state_A=state, measured_A=state, instruction="", step=0)

    def chunk(policy: Any, seed: int) -> np.ndarray:
        policy.reset(task="click_bell", seed=seed, instruction="press the bell")
        return policy.act(seen)

    here, identity = open_policy(own), identify_policy(served, threads=1)
    with policy_server(served, threads=1, workers=1) as address:
        assert address is not None
        there = open_policy(served, address)
        for seed in (100_000, 100_001):
            assert np.array_equal(chunk(there, seed), chunk(here, seed))
        assert not np.array_equal(chunk(here, 100_000), chunk(here, 100_001)), "noise of the episode"
        assert there.fingerprint.rpartition("-")[2] == here.fingerprint.rpartition("-")[2]
        seeded = [open_policy(dataclasses.replace(own, seed=seed)) for seed in (0, 1)]
        assert seeded[0].fingerprint == here.fingerprint != seeded[1].fingerprint
        assert np.array_equal(chunk(seeded[0], 100_000), chunk(here, 100_000))
        assert not np.array_equal(chunk(seeded[1], 100_000), chunk(here, 100_000)), "noise of the policy's own seed"
        far = open_policy(dataclasses.replace(served, seed=1), address)
        assert np.array_equal(chunk(far, 100_000), chunk(seeded[1], 100_000))
        close_policy(far)
        at = dataclasses.replace(own, server=address.address)
        assert identify_policy(at, address, threads=1) == identify_policy(own, threads=1)
        assert identify_policy(at, address, threads=2) != identify_policy(own, threads=2), "one thread there, two here"
        with pytest.raises(UserError, match=r"policy\.server: got 'plans .*steps and mode"):
            open_policy(dataclasses.replace(at, steps=3), address)
        with monkeypatch.context() as unreadable:
            unreadable.setattr("physisforcing.policy.checkpoint.fingerprint", None)
            close_policy(open_policy(served, address, plans=identity.plans))
            with pytest.raises(UserError, match=r"policy\.server: got 'plans "):
                open_policy(served, address, plans="of other weights")
        close_policy(there)
        assert there.source._connection is None, "nothing is left open"
        monkeypatch.setenv("PHYSIS_TOKEN", address.token)
        for given in ({}, {"source": str(folder), "steps": 2}):
            deployed = make_policy({"physis_policy": "world_action", "policy": {"server": address.address, **given}})
            assert deployed.fingerprint == there.fingerprint
            assert np.array_equal(chunk(deployed, 100_000), chunk(here, 100_000))
        deployed = make_policy({"physis_policy": "world_action", "policy": {"server": address.address, "seed": 1}})
        assert np.array_equal(chunk(deployed, 100_000), chunk(seeded[1], 100_000))
        with pytest.raises(UserError, match=r"policy\.server: got 'plans .*steps and mode"):
            make_policy({"physis_policy": "world_action", "policy": {"server": address.address, "source": str(folder)}})
