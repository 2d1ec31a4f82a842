"""Configuration at the start of a command: YAML from ``physisforcing.configs`` and overrides, checked against a dataclass.

Hydra and OmegaConf are imported inside the functions, so that importing this module costs nothing and rooms stay usable
without a command line. A key that the dataclass does not have is an error that names the nearest field, also when the
override adds it with ``+``.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .errors import UserError, nearest

T = TypeVar("T")


def compose(config_name: str, overrides: Sequence[str], schema: type[T]) -> T:
    """Compose ``configs/<config_name>.yaml`` with Hydra ``overrides`` and return an instance of the dataclass ``schema``.

    Defaults come from the dataclass; YAML only selects and overrides. Raises ``UserError`` for an unknown config, group
    option or field (nearest name offered), a value of the wrong type and a mandatory value that is missing.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf import DictConfig, OmegaConf

    folder = config_dir()
    if not (folder / f"{config_name}.yaml").is_file():
        raise _unknown_config(folder, config_name)
    selected = _selected_groups(folder / f"{config_name}.yaml")
    checked = [check_override(override, folder, schema, selected) for override in overrides]
    try:
        with initialize_config_dir(config_dir=str(folder), version_base="1.3"):
            plain = hydra_compose(config_name=config_name, overrides=checked)
    except HydraException as error:
        fix = _first(error)
        if isinstance(error, OverrideParseException):
            fix = f"put values with spaces, commas or braces in quotes of their own, as in \"field='a, b'\" ({fix})"
        raise UserError("override", got=" ".join(overrides), wanted="valid Hydra overrides", fix=fix) from error
    assert isinstance(plain, DictConfig)
    OmegaConf.set_struct(plain, False)
    return build(schema, OmegaConf.to_container(plain, resolve=True))  # type: ignore[arg-type]


def build(schema: type[T], values: dict[str, Any]) -> T:
    """An instance of the dataclass ``schema`` from nested plain ``values``; raises ``UserError`` as ``compose`` does."""
    from omegaconf import MISSING, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for path in _paths(values):
        _check_path(path, schema)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), values)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise UserError(missing[0], got=MISSING, wanted="a value", fix=f"add {missing[0]}=... to the command")
        made = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or "config")
        got = _lookup(values, key)
        raise UserError(key, got=got, wanted=_type_name(schema, key), fix=_first(error)) from error
    assert isinstance(made, schema)
    _restore_tuples(made)
    return made


def _restore_tuples(made: Any) -> None:
    """OmegaConf makes lists of tuples; a field that is declared a tuple equals its default only as one."""
    hints = typing.get_type_hints(type(made))
    for item in dataclasses.fields(made):
        value = getattr(made, item.name)
        if dataclasses.is_dataclass(value):
            _restore_tuples(value)
        elif isinstance(value, list) and typing.get_origin(hints[item.name]) is tuple:
            object.__setattr__(made, item.name, tuple(value))


def typed_fields(overrides: Sequence[str]) -> set[str]:
    """Dotted names of the fields that ``overrides`` (which ``compose`` has accepted) set themselves: a typed default looks like none in what
    is composed."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return {path for one in parsed for path in _paths({one.key_or_group: one.value()})}


def config_dir() -> Path:
    """Folder of the YAML files inside the installed package."""
    import importlib.util

    found = importlib.util.find_spec("physisforcing.configs")
    assert found is not None and found.submodule_search_locations, "physisforcing.configs is part of the package"
    return Path(next(iter(found.submodule_search_locations))).resolve()


def resolved_yaml(config: Any) -> str:
    """The YAML text of a config dataclass, for the run folder."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def check_override(override: str, folder: Path, schema: type, selected: Iterable[str] = ()) -> str:
    """The override in the form that Hydra accepts.

    Fields that no YAML mentions and groups outside the defaults list (``selected``) need a ``+`` in Hydra; the user need not
    know which they are. Raises ``UserError`` when ``override`` names neither a field of ``schema`` nor a group and option
    below ``folder``.
    """
    match = re.match(r"^(\+\+|\+|~)?([^=]+?)(?:=(.*))?$", override, flags=re.DOTALL)
    if override.startswith("-") or match is None or (match[3] is None and match[1] != "~"):
        raise UserError("override", got=override, wanted="key=value", fix="write overrides as field=value, see --help")
    key, value = match[2].split("@")[0], match[3]
    group = folder / key
    if group.is_dir():
        options = {path.stem for path in group.glob("*.yaml")}
        for name in (value or "").strip("[]").split(","):
            if name and name != "null" and name not in options:
                raise _with_nearest(key, name, options, f"a config of the group '{key}'")
        return override if match[1] or key in selected else f"+{override}"
    if "/" in key:
        groups = {path.name for path in folder.iterdir() if path.is_dir()}
        raise _with_nearest("override", key, groups, "a config group")
    _check_path(
        key, schema, extra=[path.name for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._"]
    )
    return f"++{override.lstrip('+')}" if match[1] != "~" else override


def _selected_groups(config: Path) -> set[str]:
    """Groups in the defaults list of a YAML file."""
    import yaml

    content = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    entries = [entry for entry in content.get("defaults", []) if isinstance(entry, dict)]
    return {str(key).split()[-1].split("@")[0] for entry in entries for key in entry}


def field_types(schema: type) -> dict[str, Any]:
    """Field name -> resolved type of a dataclass."""
    hints = typing.get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


def _check_path(path: str, schema: type, extra: Iterable[str] = ()) -> None:
    here: Any = schema
    done: list[str] = []
    for part in path.split("."):
        name = part.split("[")[0]
        here = _dataclass_in(here)
        if here is None:  # a dict, list or scalar: OmegaConf checks the value itself
            return
        fields = field_types(here)
        if name not in fields:
            known = list(fields) + (list(extra) if not done else [])
            raise _with_nearest(".".join([*done, name]), path, known, f"a field of {here.__name__}", prefix=done)
        here = fields[name]
        done.append(name)


def _dataclass_in(kind: Any) -> Any:
    """``kind`` itself, or the dataclass inside ``Optional[...]``; None when there is none."""
    if dataclasses.is_dataclass(kind):
        return kind
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        inner = [option for option in typing.get_args(kind) if dataclasses.is_dataclass(option)]
        return inner[0] if inner else None
    return None


def _paths(values: dict[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _paths(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _lookup(values: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return values
        values = values[part]
    return values


def _type_name(schema: type, key: str) -> str:
    here: Any = schema
    for part in key.split("."):
        kind = _dataclass_in(here)
        if kind is None or part not in field_types(kind):
            return f"a value that fits {schema.__name__}"
        here = field_types(kind)[part]
    return f"{getattr(here, '__name__', str(here))}"


def _with_nearest(field: str, got: str, known: Iterable[str], wanted: str, prefix: Sequence[str] = ()) -> UserError:
    names = sorted(set(known))
    close = nearest(field.rsplit(".", 1)[-1] if prefix or "." in field else got, names)
    full = ".".join([*prefix, close]) if close else None
    fix = f"did you mean '{full}'?" if full else f"choose from {', '.join(names[:24])}"
    return UserError(field, got=got, wanted=wanted, fix=fix)


def _unknown_config(folder: Path, name: str) -> UserError:
    return _with_nearest("config", name, [path.stem for path in folder.glob("*.yaml")], "a file of the configs folder")


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
