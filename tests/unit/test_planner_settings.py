"""Planner settings of a command: which results they identify, what is refused, and when a server's model is the wrong one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from physisforcing.compare import CompareConfig, ComparisonPlan
from physisforcing.core.errors import UserError
from physisforcing.eval_plan import EvalPlanConfig, PlannerSettings, evaluate
from physisforcing.model_process import ServerAddress, model_server
from physisforcing.planner.success_classifier import SuccessClassifier, SuccessConfig, save_success_classifier
from physisforcing.planners import (
    check_planner,
    open_world_model,
    planner_config,
    planner_verifier,
    require_device,
    result_settings,
)


def settings(**changes: Any) -> PlannerSettings:
    return PlannerSettings(**changes)


@pytest.mark.parametrize("command", [EvalPlanConfig, CompareConfig])
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"max_steps": 0}, r"max_steps: got '?0"),
        ({"control": "toop"}, "did you mean 'topp'"),
        ({"planner": PlannerSettings(device="gpu")}, "device: got 'gpu'"),
        ({"planner": PlannerSettings(device="cuda:1"), "workers": 2}, r"planner\.device: got 'cuda:1'"),
        ({"planner": PlannerSettings(max_resamples=-1)}, r"max_resamples: got '?-1"),
        ({"planner": PlannerSettings(execute_horizon=0)}, r"execute_horizon: got '?0"),
        ({"planner": PlannerSettings(denoising_steps=-2)}, r"denoising_steps: got '?-2"),
        ({"planner": PlannerSettings(prompt_template="no place")}, "prompt_template"),
    ],
)
def test_what_cannot_run_is_refused_before_the_simulator_starts(
    command: Any, changes: Any, told: str, tmp_path: Path
) -> None:
    models: dict[str, Any] = {"models": {"a": "shipped"}} if command is CompareConfig else {}
    changes = {"output": str(tmp_path), **changes}
    with pytest.raises(UserError, match=told):
        command(**models, **changes).check()


def test_a_comparison_takes_no_oracle_and_a_classifier_that_is_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"planner\.oracle.*controls=\[oracle\]"):
        CompareConfig(models={"a": "shipped"}, planner=PlannerSettings(oracle="video")).check()
    with pytest.raises(UserError, match=r"classifier: got .*physis train success"):
        CompareConfig(models={"a": "shipped"}, classifier=str(tmp_path)).check()


def test_results_of_a_gpu_can_be_reported_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    planner = PlannerSettings(device="cuda")
    with pytest.raises(UserError, match="a device torch can use"):
        evaluate(EvalPlanConfig(planner=planner, output=str(tmp_path)))
    with pytest.raises(UserError, match="a device torch can use"):
        ComparisonPlan(CompareConfig(models={"a": "shipped"}, planner=planner, output=str(tmp_path)))
    (tmp_path / "results.jsonl").touch()
    with pytest.raises(UserError, match=r"planner\.device.*a device torch can use"):
        require_device("cuda", str(tmp_path))
    (tmp_path / "results.jsonl").write_text('{"episode": "x"}\n')
    require_device("cuda", str(tmp_path))


def test_what_is_not_used_does_not_change_the_key() -> None:
    """Rows that were written before these settings existed stay valid."""
    plain = result_settings(settings(), None, 2)
    assert plain == {
        "oracle": "none",
        "execute_horizon": 32,
        "min_motion": 0.02,
        "max_resamples": 3,
        "denoising_steps": 0,
        "device": "cpu",
    }
    for unused in ({"verifier": "spread"}, {"server": "auto"}, {"success": "nowhere"}):
        assert result_settings(settings(**unused), None, 2) == plain


def test_what_changes_results_changes_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []
    for number in range(2):
        model = SuccessClassifier(SuccessConfig(tasks=("t",), channels=(8, 8, 8), hidden=4 + number))
        folders.append(str(save_success_classifier(model, tmp_path / str(number))))
    several: list[dict[str, Any]] = [
        {},
        {"rollout_chunks": 2},
        {"candidates": 2, "verifier": "spread"},
        {"candidates": 3, "verifier": "spread"},
        {"candidates": 2, "verifier": "smoothness"},
        *({"candidates": 2, "verifier": "success", "success": folder} for folder in folders),
    ]
    keys = [repr(sorted(result_settings(settings(**changes), None, 2).items())) for changes in several]
    assert len(set(keys)) == len(keys)
    # The same classifier elsewhere is the same.
    (tmp_path / "0").rename(tmp_path / "moved")
    moved = several[-2] | {"success": str(tmp_path / "moved")}
    assert repr(sorted(result_settings(settings(**moved), None, 2).items())) == keys[-2]
    # A GPU's server computes in batches of its own, and so results are others.
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    alone = result_settings(settings(device="cuda"), None, 2)
    assert result_settings(settings(device="cuda", server="auto"), None, 2) == alone | {
        "served": "cuda in batches of 16"
    }


def test_settings_become_the_planner_s() -> None:
    made = planner_config(settings(execute_horizon=48, candidates=4, verifier="2*spread+smoothness", rollout_chunks=2))
    assert (made.execute_horizon, made.candidates, made.rollout_chunks, made.horizon) == (48, 4, 2, 17)
    assert planner_verifier(settings(verifier="spread"), "cpu") is None
    verifier = planner_verifier(settings(candidates=2, verifier="2*spread+smoothness"), "cpu")
    assert verifier is not None and verifier.needs == frozenset({"spread", "action_spec"})


def test_settings_that_cannot_work_are_refused_before_anything_is_loaded() -> None:
    for wrong, match in (
        ({"candidates": 0}, "candidates"),
        ({"rollout_chunks": 0}, "rollout_chunks"),
        ({"candidates": 2}, "choose among"),
        ({"candidates": 2, "verifier": "spred"}, "did you mean 'spread'"),
        ({"candidates": 2, "verifier": "success"}, "physis train success"),
        ({"server": "somewhere"}, "HOST:PORT"),
    ):
        with pytest.raises(UserError, match=match):
            check_planner(settings(**wrong))
        with pytest.raises(UserError, match=match):
            EvalPlanConfig(planner=settings(**wrong)).check()
    check_planner(settings(candidates=2, verifier="success", success="not looked at"))
    with pytest.raises(UserError, match=r"planner\.server"):
        CompareConfig(models={"mine": "shipped"}, planner=settings(server="auto")).check()


def test_a_server_with_another_model_is_refused(tmp_path: Path) -> None:
    import json
    import threading

    import numpy as np

    from physisforcing.core.types import ViewLayout, WorldModelSpec
    from physisforcing.planner.model_server import ModelServer, ModelServerConfig
    from physisforcing.worldmodel.storage import fingerprint

    folders = {"world_model": tmp_path / "w", "codec": tmp_path / "c"}
    for name, folder in folders.items():
        folder.mkdir()
        (folder / "world_model.json").write_text(json.dumps({"denoising_steps": 8, "part": name}))
    spec = WorldModelSpec(
        name="x",
        views=ViewLayout(),
        context_frames=1,
        horizons=(17,),
        frame_dt=0.12,
        conditions=frozenset({"text"}),
        returns=frozenset({"frames"}),
    )
    model = type("Model", (), {"spec": spec, "rollout": lambda self, request: np.zeros(1)})()
    right = {name: fingerprint(folder) for name, folder in folders.items()} | {"denoising_steps": 8}
    about = right | {"device": "cpu", "threads": 2, "state_dim": 14}
    server = ModelServer(model, ModelServerConfig(), about=about)
    address = ServerAddress(address=f"127.0.0.1:{server.open()}")
    threading.Thread(target=server.run, daemon=True).start()
    try:
        opened = open_world_model(settings(), folders, "cpu", address)
        assert opened.spec == spec
        open_world_model(settings(denoising_steps=8), folders, "cpu", address)
        with pytest.raises(UserError, match=r"denoising_steps 8.*wanted denoising_steps 4"):
            open_world_model(settings(denoising_steps=4), folders, "cpu", address)
        with pytest.raises(UserError, match="world_model"):
            open_world_model(settings(), {"world_model": tmp_path / "c", "codec": tmp_path / "c"}, "cpu", address)
        named = settings(server=address.address)
        assert "served" not in result_settings(named, address, 2)
        assert result_settings(named, address, 1)["served"] == "cpu with 2 threads"
        with model_server(EvalPlanConfig(planner=named)) as found:
            assert found is not None and found.address == address.address
        with model_server(EvalPlanConfig()) as found:
            assert found is None
    finally:
        server.stop()
    assert "secret" not in repr(dataclasses.replace(address, token="secret"))
