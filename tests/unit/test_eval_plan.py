"""``physis eval plan`` before any simulator: which scenes, under which keys, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from physisforcing.core.errors import UserError
from physisforcing.envs.seeds import FixedJobs, Job, Outcome, run_seeds
from physisforcing.eval_plan import EvalPlanConfig, PlannerSettings, _Plan, _write_summary, evaluate, main
from physisforcing.plan_episodes import EpisodeRunner
from physisforcing.plan_scenes import Scenes
from physisforcing.planner.oracle import HeldOutDemonstrations


def test_a_first_seed_beside_a_manifest_is_refused(tmp_path: Path) -> None:
    """The manifest says which scenes there are; another first seed would change nothing."""
    both = EvalPlanConfig(first_seed=100_500, output=str(tmp_path))
    with pytest.raises(UserError, match=r"first_seed: got 100500.*test_click_bell.*manifest=none"):
        evaluate(both, progress=False)
    with pytest.raises(UserError, match=r"first_seed: got 5.*start at 100000"):
        evaluate(EvalPlanConfig(first_seed=5, manifest="none"), progress=False)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def dataset(tmp_path: Path, write_black_episodes: Callable[..., Path]) -> Callable[..., Path]:
    """Writes a dataset of short black episodes with the given seeds."""
    return lambda *seeds: write_black_episodes(tmp_path / f"data-{len(seeds)}-{seeds[0]}", seeds)


def test_retrieval_must_not_remember_the_test_scenes(dataset: Callable[..., Path], tmp_path: Path) -> None:
    config = EvalPlanConfig(train_demos=str(dataset(9_999, 100_000)), output=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"train_demos: got 'seed 100000 in .*start_seed=0"):
        evaluate(config, progress=False)
    config.train_demos = str(dataset(9_998, 9_999))
    assert _Plan(config).policies == ["model", "noop", "random", "retrieval", "retrieval_video", "perfect"]


def test_the_partner_of_an_oracle_scene_does_not_depend_on_how_many_are_evaluated(
    dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    demos = HeldOutDemonstrations(dataset(100_000, 100_001, 100_002, 100_003))

    def partner(episodes: int) -> int:
        runner = object.__new__(EpisodeRunner)
        runner.config = EvalPlanConfig(episodes=episodes)
        runner._parts = {"demos": demos}
        monkeypatch.setattr(runner, "_environment", lambda task: None)
        loaded: list[int] = []
        monkeypatch.setattr(demos, "load", lambda task, seed: loaded.append(seed) or 1 / (2 - len(loaded)))
        with pytest.raises(ZeroDivisionError):  # the second one is what is asked for here
            runner._oracle_episode("click_bell", "other", 100_001)
        assert loaded[0] == 100_001
        return loaded[1]

    assert [partner(episodes) for episodes in (2, 3, 4)] == [100_002] * 3


def test_after_a_crash_the_next_episode_is_deterministic_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    runner = object.__new__(EpisodeRunner)
    runner.config, runner._env, runner._parts = EvalPlanConfig(), None, {}
    seen: list[bool] = []

    def episode(task: str, policy: str, seed: int) -> dict[str, str]:
        seen.append(torch.are_deterministic_algorithms_enabled())
        if seed == 100_000:
            raise RuntimeError("the simulator went away")
        return {"status": "failure"}

    monkeypatch.setattr(runner, "_episode", episode)
    jobs = [Job(task="click_bell/noop", seed=seed) for seed in (100_000, 100_001)]
    outcomes: list[Outcome] = []
    run_seeds(FixedJobs(jobs), lambda: runner, workers=0, on_outcome=outcomes.append)
    assert [outcome.kind for outcome in outcomes] == ["crashed", "recorded"]
    assert seen == [True, True]
    assert not torch.are_deterministic_algorithms_enabled(), "given back at the end"


def test_an_output_under_another_name_is_a_typo() -> None:
    with pytest.raises(UserError, match=r"out: .*did you mean .*output"):
        main(["out=runs/plan"])


def test_a_killed_writer_leaves_the_summary_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = SimpleNamespace(scenes=Scenes(manifests={"click_bell": "m"}), skipped=[])
    row = {"task": "click_bell", "policy": "noop", "seed": 100_000, "status": "failure"}

    def write(episodes: int) -> None:
        rows = [row | {"seed": 100_000 + k} for k in range(episodes)]
        _write_summary(EvalPlanConfig(), plan, rows, "physis eval plan", tmp_path)  # type: ignore[arg-type]

    write(1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"summary.json", "summary.md", "provenance.json", "measurements.json"}
    assert json.loads(before["summary.json"])["tasks"]["click_bell"]["noop"]["n"] == 1
    whole = Path.write_text

    def killed(path: Path, text: str, **options: object) -> int:
        half = victim in path.name
        whole(path, text[: len(text) // 2] if half else text, **options)  # type: ignore[arg-type]
        if half:
            raise KeyboardInterrupt
        return len(text)

    monkeypatch.setattr(Path, "write_text", killed)
    for victim in before:
        content = (tmp_path / victim).read_bytes()
        with pytest.raises(KeyboardInterrupt):
            write(2)
        assert (tmp_path / victim).read_bytes() == content


def test_a_set_of_frozen_scenes_brings_its_environment() -> None:
    plan = _Plan(EvalPlanConfig(tasks=["click_bell"], manifest="test_ood", episodes=2, baselines=["noop"]))
    assert plan.scenes.manifests["click_bell"].startswith("test_ood_click_bell@")
    assert plan.scenes.environments["click_bell"] == {
        "embodiment": "aloha-agilex",
        "randomization": "test_ood",
        "instruction": "template_unseen",
        "scene_of": None,
    }
    assert {job.seed for job in plan.jobs} == {seed for _, seed in plan.scenes.entries} and len(
        plan.scenes.entries
    ) == 2
    assert plan.config.claims == "interpolated-test_ood" and EvalPlanConfig(manifest="test").claims == "interpolated"
    with pytest.raises(UserError, match="without click_bell"):
        _Plan(EvalPlanConfig(tasks=["click_bell"], manifest="test_stack_blocks_two", episodes=2))
    with pytest.raises(UserError, match=r"planner\.device"):
        EvalPlanConfig(workers=2, planner=PlannerSettings(device="cuda:1")).check()
    with pytest.raises(UserError, match="nobody trained on"):
        _Plan(EvalPlanConfig(tasks=["stack_blocks_two"], manifest="train", episodes=2))
    with pytest.raises(UserError, match="did you mean 'swapped_instruction_place_a2b_left'"):
        _Plan(EvalPlanConfig(tasks=["click_bell"], manifest="swapped_instruction_place_a2b_lef", episodes=2))
