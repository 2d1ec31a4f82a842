"""docs/bring_your_policy.md: its blocks run, in order, with a freshly drawn policy of the small models' size."""

from __future__ import annotations

import ast
import re
import shlex
import sys
import threading
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from physisforcing import deploy
from physisforcing.core.config import compose
from physisforcing.core.protocols import Policy
from physisforcing.core.types import Observation
from physisforcing.eval_policy import EvalPolicyConfig, spelled_out
from physisforcing.policy.lerobot.loop import camera_features, check_loop_rate, folder_spec
from physisforcing.serve_policy import ServePolicyConfig, make_server
from tests.helpers.pico_policy import write_pico_policy

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "bring_your_policy.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a policy in runs/policy/export."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "runs" / "policy").mkdir(parents=True)
    write_pico_policy(tmp_path / "runs" / "policy" / "export")
    return tmp_path


def test_the_page_runs_as_written(place, capsys):
    acts, asynchronous, remote, mine = blocks("python")
    serve, _, _, evaluate = blocks("sh")
    names: dict[str, Any] = {}
    exec(compile(acts, "acts", "exec"), names)
    assert names["rows"].shape == (12, 14) and "'plans': 1.0" in capsys.readouterr().out
    exec(compile(asynchronous, "asynchronous", "exec"), names)

    words = shlex.split(serve.strip())
    assert words[:3] == ["physis", "serve", "policy"]
    config = compose("serve_policy", words[3:], ServePolicyConfig)
    assert config.port == 7100
    config.port = 0
    server = make_server(config)
    address = f"127.0.0.1:{server.open()}"
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        exec(compile(remote.replace("127.0.0.1:7100", address), "remote", "exec"), names)
        assert "(12, 14)" in capsys.readouterr().out
        assert torch.get_deterministic_debug_mode() == 2, "a server computes as an evaluation's own process does"
    finally:
        server.stop()
        thread.join(20)
        torch.set_deterministic_debug_mode("default")

    settings = yaml.safe_load(blocks("yaml")[0])
    assert settings["policy_name"] == "physisforcing.deploy"
    ours = deploy.make_policy(settings)
    assert isinstance(ours, Policy) and ours.fingerprint == names["policy"].fingerprint

    (place / "my_policy.py").write_text(mine)
    words = shlex.split(evaluate.strip())
    assert words[:3] == ["physis", "eval", "policy"]
    evaluation = compose("eval_policy", spelled_out(words[3:]), EvalPolicyConfig)
    assert evaluation.tasks == ["click_bell"] and evaluation.episodes == 20
    ((_, acting),) = evaluation.check().items()
    source = acting.settings.source
    yours = deploy.make_policy({"physis_policy": source})
    yours.reset(task="click_bell", seed=0, instruction="")
    state = np.linspace(0, 1, 14, dtype=np.float32)
    rows = yours.act(Observation(images={}, state_A=state, measured_A=state, instruction="", step=0))
    np.testing.assert_allclose(rows[:, 1] - state[1], 0.01 * np.arange(1, 13), atol=1e-6)
    assert (rows[:, 0] == state[0]).all()


def test_the_lerobot_commands_have_settings_that_exist(place, repository):
    """The commands themselves run where LeRobot is installed: tests/contract/test_lerobot_plugin.py."""
    install, run = blocks("sh")[1:3]
    plugin = repository / shlex.split(install.splitlines()[1])[-1]
    project = tomllib.loads((plugin / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["name"] == "lerobot_policy_physis" and (plugin / "lerobot_policy_physis.py").is_file()
    module = ast.parse((repository / "policy" / "lerobot" / "configuration_physis.py").read_text(encoding="utf-8"))
    (config,) = (node for node in module.body if isinstance(node, ast.ClassDef))
    fields = {node.target.id for node in config.body if isinstance(node, ast.AnnAssign)}
    table = PAGE[PAGE.index("| `policy.folder`") :].split("\n\n")[0]
    named = {
        name.removeprefix("policy.")
        for line in table.splitlines()
        for name in re.findall(r"`([\w.]+)`", line.split("|")[1])
    }
    assert named == fields | {"device"}
    for line in run.strip().splitlines():
        given = dict(word.removeprefix("--").split("=", 1) for word in shlex.split(line)[1:])
        own = {name.removeprefix("policy."): value for name, value in given.items() if name.startswith("policy.")}
        assert own.pop("type") == "physis" and set(own) <= fields
        spec = folder_spec(own["folder"])
        check_loop_rate(spec, float(own["fps"]))
        assert "fps" not in given or given["fps"] == own["fps"]
        camera_features(spec.canvas, yaml.safe_load(own["cameras"]))
