"""Rows of published models: complete, strict, skipped with what they need, and never mixed with measured numbers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from physisforcing.core.errors import UserError
from physisforcing.planner import model_sources
from physisforcing.planner.model_sources import TABLE_3, ModelSource, load_rows, row_names
from physisforcing.planner.worldarena import published


def test_every_row_of_table_3_has_a_config_and_is_published() -> None:
    rows = load_rows(["table3"])
    assert [row.name for row in rows] == list(TABLE_3) and set(TABLE_3) <= set(row_names())
    printed = {row["planner"]: (row["adjust_bottle"], row["click_bell"], row["mean"]) for row in published()["rows"]}
    paper = {
        "Genie Envisioner": (10, 20, 15.0), "TesserAct": (1, 35, 18.0), "RoboMaster": (8, 20, 14.0), "Vidar": (2, 19, 10.5),
        "WoW": (20, 21, 20.5), "Wan2.2-TI2V-5B": (12, 20, 16.0), "Wan2.2-TI2V-5B + PhysisForcing": (22, 26, 24.0),
    }  # fmt: skip
    assert {row.title: printed[row.title] for row in rows} == paper
    assert not {field.name for field in dataclasses.fields(ModelSource)} & {"success", "mean", "task_1", "rate"}


def test_without_a_source_a_row_says_what_it_needs() -> None:
    for row in load_rows(["table3"]):
        assert (
            row.source == ""
            and row.missing.startswith(row.needs)
            and row.weights in row.missing
            and row.code in row.missing
        )
        assert len(row.needs) > 20 and not row.needs.endswith(".")
    with_source = load_rows(["wow:http://localhost:8000"])[0]
    assert with_source.missing == "" and with_source.source == "http://localhost:8000"
    assert load_rows(["vidar:my_models:vidar"])[0].source == "my_models:vidar"  # a Python factory
    mixed = load_rows(["table3", "wow:http://localhost:8000"])
    assert len(mixed) == 7 and [row.name for row in mixed if not row.missing] == ["wow"]


def test_what_cannot_be_the_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"did you mean 'wan22_ti2v_5b'"):
        load_rows(["wan22_ti2v5b"])
    with pytest.raises(UserError, match="twice"):
        load_rows(["wow", "wow:http://localhost:1"])
    with pytest.raises(UserError, match="no_such_folder"):
        load_rows(["wan22_ti2v_5b:no_such_folder"])
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({"_class_name": "LTXImageToVideoPipeline"}), encoding="utf-8")
    with pytest.raises(UserError, match="WanImageToVideoPipeline"):
        load_rows([f"wan22_ti2v_5b:{tmp_path}"])
    index.write_text(json.dumps({"_class_name": "WanImageToVideoPipeline"}), encoding="utf-8")
    assert load_rows([f"wan22_ti2v_5b:{tmp_path}"])[0].source == str(tmp_path)


def test_another_model_does_not_run_under_a_rows_name(tmp_path: Path) -> None:
    """A source of another kind than a model can be given as: ours, or a pipeline of a model that is none."""
    ours, videos, empty = (tmp_path / name for name in ("ours", "videos", "empty"))
    empty.mkdir()
    for folder, name in ((ours, "world_model.json"), (videos, "manifest.json")):
        folder.mkdir()
        (folder / name).write_text("{}", encoding="utf-8")
    for row, source in (("tesseract", "shipped"), ("wow", ours)):
        with pytest.raises(UserError, match=rf"rows\.{row}: got '?{source}.*models={{name:SOURCE}} runs any other"):
            load_rows([f"{row}:{source}"])
    assert load_rows([f"wow:{videos}"])[0].source == str(videos)
    with pytest.raises(UserError, match="wanted a world model's folder"):
        load_rows([f"wan22_ti2v_5b:{empty}"])
    # A pipeline of any class is no folder of recorded videos, whatever else lies in it; and a settings file leads to its pipeline.
    pipeline, settings = tmp_path / "pipeline", tmp_path / "settings.json"
    pipeline.mkdir()
    (pipeline / "manifest.json").write_text("{}", encoding="utf-8")
    (pipeline / "model_index.json").write_text(json.dumps({"_class_name": "LTXImageToVideoPipeline"}), encoding="utf-8")
    with pytest.raises(UserError, match="a diffusers_pipeline"):
        load_rows([f"wow:{pipeline}"])
    settings.write_text(json.dumps({"pipeline": "pipeline"}), encoding="utf-8")
    with pytest.raises(UserError, match=r"LTXImageToVideoPipeline.*WanImageToVideoPipeline"):
        load_rows([f"wan22_ti2v_5b:{settings}"])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("title: X\nkinds: [service]\nneeds: w\nweigths: y\n", "weights"),
        ("title: X\nkinds: [service]\n", "needs"),
        ("title: X\nkinds: [telepathy]\nneeds: w\n", "telepathy"),
        ("title: X\nkinds: []\nneeds: w\n", "kinds"),
        ("name: other\ntitle: X\nkinds: [service]\nneeds: w\n", "other"),
    ],
)
def test_files_are_strict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, match: str) -> None:
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(model_sources, "_folder", lambda: tmp_path)
    with pytest.raises(UserError, match=match):
        load_rows(["mine"])
