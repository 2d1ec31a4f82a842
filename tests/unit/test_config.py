"""Configs: defaults from the dataclass, YAML selects, typos name the nearest field."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from physisforcing.core import config as config_module
from physisforcing.core.errors import UserError


@dataclasses.dataclass(slots=True, kw_only=True)
class Optimiser:
    learning_rate: float = 1e-3
    betas: list[float] = dataclasses.field(default_factory=lambda: [0.9, 0.99])


@dataclasses.dataclass(slots=True, kw_only=True)
class Command:
    tasks: list[str] = dataclasses.field(default_factory=lambda: ["click_bell"])
    episodes: int = 10
    seed: int | None = None
    output: str = "???"
    optimiser: Optimiser = dataclasses.field(default_factory=Optimiser)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "collect.yaml").write_text("defaults: [_self_]\nepisodes: 20\n")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "pico.yaml").write_text("# @package _global_\noptimiser: {learning_rate: 0.5}\n")
    monkeypatch.setattr(config_module, "config_dir", lambda: tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("override", "told"),
    [("tasks=[a, b", "in quotes of their own"), ("experiment=huge", "experiment")],
)
def test_what_hydra_cannot_compose_says_how_to_write_it(folder: Path, override: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        config_module.compose("collect", ["output=here", override], Command)


def test_order_is_dataclass_then_yaml_then_experiment_then_command_line(folder: Path) -> None:
    made = config_module.compose("collect", ["output=here", "experiment=pico", "tasks=[a,b]", "seed=3"], Command)
    assert (made.episodes, made.tasks, made.seed, made.output) == (20, ["a", "b"], 3, "here")
    assert made.optimiser == Optimiser(learning_rate=0.5)
    assert isinstance(made, Command)


@pytest.mark.parametrize(
    ("override", "field", "offered"),
    [
        ("episode=3", "episode", "episodes"),
        ("+episode=3", "episode", "episodes"),
        ("++optimiser.learning_rat=3", "optimiser.learning_rat", "optimiser.learning_rate"),
        ("experiment=pica", "experiment", "pico"),
        ("experimen=pico", "experimen", "experiment"),
        ("+x=1", "x", "choose from"),
    ],
)
def test_a_typo_names_the_nearest_field(folder: Path, override: str, field: str, offered: str) -> None:
    with pytest.raises(UserError) as caught:
        config_module.compose("collect", ["output=here", override], Command)
    assert caught.value.field == field
    assert offered in caught.value.fix


def test_wrong_type_and_missing_value_name_the_field(folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        config_module.compose("collect", ["output=here", "episodes=many"], Command)
    assert (caught.value.field, caught.value.got) == ("episodes", "many")
    with pytest.raises(UserError, match="output"):
        config_module.compose("collect", [], Command)
    with pytest.raises(UserError, match="key=value"):
        config_module.compose("collect", ["--fast"], Command)


def test_fields_that_were_typed_are_known(folder: Path) -> None:
    """However they were written, and also where they say the default."""
    words = ["experiment=pico", "++output=here", "episodes=10", "tasks=[a,b]", "optimiser={learning_rate: 0.001}"]
    config_module.compose("collect", words, Command)
    found = config_module.typed_fields(words)
    assert found == {"experiment", "output", "episodes", "tasks", "optimiser.learning_rate"}


def test_a_typo_in_the_yaml_is_found(folder: Path) -> None:
    (folder / "collect.yaml").write_text("optimiser: {learning_rte: 1}\n")
    with pytest.raises(UserError, match="learning_rate"):
        config_module.compose("collect", ["output=here"], Command)


def test_unknown_config_and_resolved_yaml(folder: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'collect'"):
        config_module.compose("colect", [], Command)
    text = config_module.resolved_yaml(config_module.compose("collect", ["output=here"], Command))
    assert "episodes: 20" in text and "learning_rate: 0.001" in text


def test_tuples_stay_tuples() -> None:
    """A composed command's decoder equals the default one, so that training can go on from shipped weights (``init=shipped``)."""
    from physisforcing.planner.inverse_dynamics import InverseDynamicsConfig
    from physisforcing.planner.train import TrainIdmCommand

    made = config_module.compose("train_idm", ["data=[x]"], TrainIdmCommand)
    assert made.train.model == InverseDynamicsConfig()
    assert made == TrainIdmCommand(data=["x"])
    taps = config_module.compose("train_idm", ["data=[x]", "feature.model.taps=[2,4]"], TrainIdmCommand)
    assert taps.feature.model.taps == (2, 4)


def test_configs_are_found_inside_the_package() -> None:
    assert (config_module.config_dir() / "__init__.py").is_file()
