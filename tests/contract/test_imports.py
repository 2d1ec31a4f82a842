"""Which room may import which, read from the syntax trees: nothing is imported here."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOMS = ("worldmodel", "planner", "policy", "envs", "configs")
#: room -> rooms that it may import, besides itself and core.
ALLOWED = {
    "worldmodel": set(),
    "planner": {"worldmodel"},
    "policy": {"worldmodel"},
    "envs": set(),
    "configs": set(),
    "core": set(),
}
#: Modules where a command starts, the only ones that may ask for Hydra; they do so through core.config.
HYDRA_HOME = "physisforcing/core/config.py"
SIMULATORS = {"sapien", "robotwin", "toppra", "gymnasium"}
TRAINING = {"torch", "diffusers", "transformers", "peft", "accelerate"}


def _files(repository: Path) -> Iterator[tuple[str, Path]]:
    for room in ROOMS:
        for path in sorted((repository / room).rglob("*.py")):
            yield room, path
    for path in sorted((repository / "physisforcing" / "core").rglob("*.py")):
        yield "core", path


def _module(repository: Path, path: Path) -> str:
    parts = path.relative_to(repository).with_suffix("").parts
    return ".".join(parts if parts[0] == "physisforcing" else ("physisforcing", *parts))


def _imports(repository: Path, path: Path, *, top_only: bool) -> Iterator[tuple[int, str, int]]:
    """Line, absolute module name and level of each import; ``top_only`` leaves out those inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    module = _module(repository, path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    package = package.removesuffix(".__init__")

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[int, str, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                yield from walk(child, True)
                continue
            deeper = inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if not (top_only and inside):
                if isinstance(child, ast.Import):
                    yield from ((child.lineno, alias.name, 0) for alias in child.names)
                elif isinstance(child, ast.ImportFrom):
                    base = child.module or ""
                    if child.level:
                        anchor = package.split(".")[: len(package.split(".")) - child.level + 1]
                        base = ".".join([*anchor, base] if base else anchor)
                    if base in ("physisforcing", ""):
                        yield from ((child.lineno, f"{base}.{alias.name}", child.level) for alias in child.names)
                    else:
                        yield child.lineno, base, child.level
            yield from walk(child, deeper)

    yield from walk(tree, False)


def _room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "physisforcing" and len(parts) > 1 else None


def test_rooms_import_only_what_they_may(repository: Path) -> None:
    wrong = []
    for room, path in _files(repository):
        for line, module, _ in _imports(repository, path, top_only=False):
            other = _room_of(module)
            if other is None or other in (room, "core", "__version__") or other in ALLOWED[room]:
                continue
            wrong.append(f"{path.relative_to(repository)}:{line} ({room}) imports {module}")
    assert not wrong, "\n".join(wrong)


def test_imports_are_relative_inside_a_room_and_absolute_between_rooms(repository: Path) -> None:
    wrong = []
    for room, path in _files(repository):
        for line, module, level in _imports(repository, path, top_only=False):
            other = _room_of(module)
            where = f"{path.relative_to(repository)}:{line} imports {module}"
            if other == room and not level:
                wrong.append(f"{where}: write it relative")
            if level and other != room:
                wrong.append(f"{where}: write it absolute")
    assert not wrong, "\n".join(wrong)


def test_no_room_is_imported_by_its_bare_name(repository: Path) -> None:
    wrong = []
    sources = [path for _, path in _files(repository)] + sorted((repository / "physisforcing").glob("*.py"))
    for path in sources + sorted((repository / "tests").rglob("*.py")):
        for line, module, level in _imports(repository, path, top_only=False):
            if not level and module.split(".")[0] in ROOMS and "contract" not in path.parts:
                wrong.append(f"{path.relative_to(repository)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_core_stands_on_numpy_and_the_standard_library(repository: Path) -> None:
    allowed = set(sys.stdlib_module_names) | {"numpy", "physisforcing"}
    wrong = []
    for room, path in _files(repository):
        if room == "core":
            for line, module, _ in _imports(repository, path, top_only=True):
                if module.split(".")[0] not in allowed:
                    wrong.append(f"{path.relative_to(repository)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_no_torch_in_envs_and_core_and_no_simulator_in_worldmodel(repository: Path) -> None:
    banned = {"envs": TRAINING, "core": TRAINING, "worldmodel": SIMULATORS, "planner": SIMULATORS, "policy": SIMULATORS}
    wrong = []
    for room, path in _files(repository):
        for line, module, _ in _imports(repository, path, top_only=False):
            if module.split(".")[0] in banned.get(room, ()):
                wrong.append(f"{path.relative_to(repository)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_hydra_only_where_commands_start(repository: Path) -> None:
    wrong = []
    for _, path in _files(repository):
        for line, module, _ in _imports(repository, path, top_only=False):
            if module.split(".")[0] in ("hydra", "omegaconf") and str(path.relative_to(repository)) != HYDRA_HOME:
                wrong.append(f"{path.relative_to(repository)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_physics_depends_on_torch_alone(repository: Path) -> None:
    allowed = set(sys.stdlib_module_names) | {"torch"}
    wrong = []
    for path in sorted((repository / "worldmodel" / "physics").rglob("*.py")):
        for line, module, _ in _imports(repository, path, top_only=False):
            inside = module.startswith("physisforcing.worldmodel.physics")
            if module == "physisforcing.core.errors":  # the standard library only
                continue
            if not inside and module.split(".")[0] not in allowed:
                wrong.append(f"{path.relative_to(repository)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_every_third_party_import_is_declared(repository: Path) -> None:
    import tomllib

    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    plugin = (
        repository / "setup" / "lerobot_policy_physis" / "pyproject.toml"
    )  # of policy/lerobot, in LeRobot's environment
    lines += tomllib.loads(plugin.read_text(encoding="utf-8"))["project"]["dependencies"]
    declared = {re.split(r"[^\w.-]", line)[0].lower().replace("-", "_") for line in lines}
    declared |= {"robotwin", "physisforcing"}  # set-up unpacks the runtime
    declared |= {"triton"}  # comes with torch where there is a GPU, and is asked for only there
    distribution = {"PIL": "pillow", "cv2": "opencv_python_headless", "yaml": "pyyaml", "hydra": "hydra_core"}
    wrong = []
    for path in [path for _, path in _files(repository)] + sorted((repository / "physisforcing").glob("*.py")):
        for line, module, _ in _imports(repository, path, top_only=False):
            name = module.split(".")[0]
            if name not in sys.stdlib_module_names and distribution.get(name, name).lower() not in declared:
                wrong.append(f"{path.relative_to(repository)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", ["worldmodel", "planner", "policy", "envs", "envs.robotwin", "configs", "core"])
def test_importing_a_room_is_light(room: str) -> None:
    code = (
        "import os, sys; os.environ['PYGAME_HIDE_SUPPORT_PROMPT'] = 'hide'  # gymnasium sets it\n"
        "before = dict(os.environ)\n"
        f"import physisforcing.{room}\n"
        "heavy = [m for m in ('sapien', 'robotwin', 'diffusers', 'transformers', 'hydra', 'cv2', 'av') if m in sys.modules]\n"
        "print(heavy, dict(os.environ) == before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] True"
