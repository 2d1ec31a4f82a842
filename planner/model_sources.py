"""Rows of `physis compare` for published world models: what each is, where it comes from, and what it needs to run here.

One YAML file a row in ``configs/compare``. Nothing is downloaded: a row runs when it is given a source (``rows=[wow:http://HOST:PORT]``),
and otherwise says what it lacks. What others measured with these models stands in ``worldarena_published.json``, apart from any result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from physisforcing.core.errors import UserError, unknown_name

#: How a world model can be given to ``physis compare``.
KINDS = ("world_model", "diffusers_pipeline", "service", "factory", "video_folder")
#: ``rows=[table3]``: every row of the paper's Table 3, in its order.
TABLE_3 = (
    "genie_envisioner",
    "tesseract",
    "robomaster",
    "vidar",
    "wow",
    "wan22_ti2v_5b",
    "wan22_ti2v_5b_physisforcing",
)


@dataclass(slots=True, kw_only=True)
class ModelSource:
    """A published world model.

    ``name``: of the row, that of its file. ``title``: as the paper prints it, which is also its name among the published numbers.
    ``kinds``: how it can be given (``KINDS``). ``pipelines``: diffusers classes its folder may name, none where diffusers has none.
    ``weights``: where its public weights are, ``licence`` of those, ``code``: its own inference code. ``needs``: what is lacking as long
    as no ``source`` is given; a clause that completes "needs ...". ``conditions``: what it takes besides a picture and a sentence.
    """

    name: str
    title: str
    kinds: list[str]
    needs: str
    source: str = ""
    pipelines: list[str] = field(default_factory=list)
    weights: str = ""
    licence: str = ""
    code: str = ""
    recipe: str = ""
    conditions: list[str] = field(default_factory=list)
    note: str = ""

    @property
    def missing(self) -> str:
        """What it needs and where that is, or an empty string when it has a source."""
        if self.source:
            return ""
        about = {
            "weights": self.weights,
            "licence": self.licence,
            "code": self.code,
            "also takes": ", ".join(self.conditions),
        }
        found = [f"{word} {value}" for word, value in about.items() if value] + [self.note] * bool(self.note)
        return self.needs + (f" ({'; '.join(found)})" if found else "")


def load_rows(rows: Sequence[str]) -> list[ModelSource]:
    """Rows by name, ``name:SOURCE`` with what to run, or ``table3`` for all rows of the paper's Table 3 that are not named themselves.

    Raises ``UserError`` for an unknown row (nearest name offered), one given twice, a file that does not fit, and a source that cannot
    be what the row names.
    """
    given: dict[str, str] = {}
    for entry in rows:
        name, _, source = entry.partition(":")
        if name in given:
            raise UserError("rows", got=f"{name} twice", wanted="each row once", fix="leave one out")
        given[name] = source
    if given.pop("table3", None) is not None:
        given = dict.fromkeys(TABLE_3, "") | given
    return [_load(name, source) for name, source in given.items()]


def row_names() -> list[str]:
    """Names of all rows."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def _load(name: str, source: str) -> ModelSource:
    import yaml

    from physisforcing.core.config import build

    if name not in row_names():
        raise unknown_name("rows", name, [*row_names(), "table3"], see="configs/compare")
    values: dict[str, Any] = yaml.safe_load((_folder() / f"{name}.yaml").read_text(encoding="utf-8"))
    row = build(ModelSource, {"name": name} | values)
    row.source = source or row.source
    wrong = [kind for kind in row.kinds if kind not in KINDS]
    if row.name != name or wrong or not row.kinds:
        got = f"name {row.name}, kinds {row.kinds}"
        raise UserError(
            f"compare/{name}.yaml", got=got, wanted=f"its own name and kinds of {', '.join(KINDS)}", fix="edit it"
        )
    if row.source:
        _check_source(row)
    return row


def _check_source(row: ModelSource) -> None:
    """``UserError`` for a source of another kind than the row's, a folder that is not there and a pipeline of another class."""
    kind, path = source_kind(row.source), Path(row.source)
    if not kind:
        fix = f"check the path, or leave it out: the row then says what it needs ({row.needs})"
        raise UserError(
            f"rows.{row.name}",
            got=row.source,
            wanted="a world model's folder, an http:// address or module:factory",
            fix=fix,
        )
    fix = "give this model's own weights; models={name:SOURCE} runs any other"
    if kind not in row.kinds:
        wanted = f"{row.title} as {' or '.join(row.kinds)}"
        raise UserError(f"rows.{row.name}", got=f"{row.source}, a {kind}", wanted=wanted, fix=fix)
    if kind == "diffusers_pipeline" and row.pipelines:
        from physisforcing.worldmodel.adapters.diffusers_pipeline import pipeline_folder, read_class

        found = read_class(pipeline_folder(path))
        if found not in row.pipelines:
            wanted = f"a {' or '.join(row.pipelines)} folder"
            raise UserError(f"rows.{row.name}", got=found, wanted=wanted, fix=fix)


def source_kind(source: str) -> str:
    """What a world model called ``source`` is, of ``KINDS``; empty for none of them. Nothing is opened."""
    from physisforcing.worldmodel.adapters.factory import is_factory

    path = Path(source)
    if source.startswith(("http://", "https://")):
        return "service"
    if is_factory(source) and not path.exists():
        return "factory"
    if source == "shipped" or (path / "world_model.json").is_file():
        return "world_model"
    from physisforcing.worldmodel.adapters.diffusers_pipeline import is_pipeline  # here: it brings torch, seconds

    if is_pipeline(path):
        return "diffusers_pipeline"
    return "video_folder" if (path / "manifest.json").is_file() else ""


def _folder() -> Path:
    from physisforcing.core.config import config_dir

    return config_dir() / "compare"
