"""RoboTwin's own code, imported from the installed runtime or a user's checkout.

RoboTwin imports at its top what our way through it never calls (mplib, open3d, cuRobo, ...). Each such module that
is not installed gets a stand-in while RoboTwin is imported; using a stand-in raises a sentence. The stand-ins leave
``sys.modules`` again, so nobody else meets them.
"""

from __future__ import annotations

import contextlib
import glob
import importlib
import importlib.util
import os
import random
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from physisforcing.core.errors import UserError

#: Modules that RoboTwin imports and we never use. mplib's wheels need numpy < 2, so it gets one even
#: where it is installed.
ALWAYS_STAND_IN = (
    "mplib",
    "mplib.planner",
    "mplib.sapien_utils",
    "curobo",
    "curobo.types",
    "curobo.types.math",
    "curobo.types.robot",
    "curobo.wrap",
    "curobo.wrap.reacher",
    "curobo.wrap.reacher.motion_gen",
    "curobo.util",
    "pytorch3d",
    "pytorch3d.ops",
)
#: Seconds of every simulator process, unless it has them already: RoboTwin seeds torch and computes with it for cuRobo and
#: point clouds alone, toppra has pyplot for plots that nobody asks for. The real ones come when they are used.
LATER = ("torch", "torch.multiprocessing", "matplotlib", "matplotlib.pyplot")
STAND_IN_IF_MISSING = ("open3d", "cv2", "imageio", "huggingface_hub", "trimesh", "h5py")

#: SHA-256 of the wheels that set-up checks -> version.
KNOWN_WHEELS = {"4a266a64ca26e8c835d25dc83f5203ac908ae8ba187035c51b81c6aa493cb703": "0.1.3"}


class _Unusable:
    """What an attribute of a stand-in module is: it can be named, not called."""

    def __init__(self, *_: object, **__: object) -> None:
        raise RuntimeError(
            "this part of RoboTwin needs a package that physisforcing replaces by a stand-in "
            f"({', '.join(m for m in ALWAYS_STAND_IN + STAND_IN_IF_MISSING if '.' not in m)}); "
            "physisforcing's own tasks never use it"
        )


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Unusable


class _Later(types.ModuleType):
    """Imports its module when somebody uses it, once it has left ``sys.modules``."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or sys.modules.get(self.__name__) is self:
            raise AttributeError(name)
        return getattr(importlib.import_module(self.__name__), name)


@dataclass(slots=True, kw_only=True, frozen=True)
class Runtime:
    """The imported RoboTwin modules that the environment touches.

    ``package``: where the task modules are (``robotwin.envs``, or ``envs`` of a checkout). ``checkout``: RoboTwin reads
    its assets relative to the working directory. ``curobo``: the expert plans with cuRobo.
    """

    name: str
    version: str
    package: str
    base_task: types.ModuleType
    robot: types.ModuleType
    create_actor: types.ModuleType
    checkout: bool = False
    curobo: bool = False

    @property
    def label(self) -> str:
        return f"{self.name} {self.version}"

    def task_class(self, task: str) -> type:
        """RoboTwin's class of a task (its module and class carry the task's name)."""
        with _quiet():
            module = importlib.import_module(f"{self.package}.{task}")
        if getattr(module, "glob", None) is glob:
            module.glob = _SORTED_GLOB
        if task == "place_fan" and hasattr(module, "SerialTask"):
            module.Reward = module.SerialTask  # what it means (and never uses): the runtime's Reward takes no arguments
        return getattr(module, task)

    @contextlib.contextmanager
    def asset_folder(self, folder: Path) -> Iterator[None]:
        """While active, RoboTwin finds ``folder/assets``: through variables, and a checkout through the working
        directory.
        """
        with found_assets(folder, relative=self.checkout):
            if self.checkout:
                _read_clutter(sys.modules[f"{self.package}.utils.rand_create_cluttered_actor"], folder)
            yield


@contextlib.contextmanager
def found_assets(folder: Path, *, relative: bool) -> Iterator[None]:
    """While active, the variables that RoboTwin reads say ``folder``; with ``relative``, it is the working directory too."""
    with contextlib.ExitStack() as stack:
        for name in ("ASSETS_PATH", "ROBOTWIN_ASSETS_ROOT"):
            stack.enter_context(environment_variable(name, str(folder)))
        if relative:
            stack.enter_context(contextlib.chdir(folder))
        yield


def _read_clutter(module: Any, folder: Path) -> None:
    """A checkout lists its clutter once, when it is imported: list it again where ``folder`` has other assets."""
    if getattr(module, "listed", None) != folder:
        try:
            with _quiet():
                importlib.reload(module)
        except FileNotFoundError as error:
            raise no_clutter(folder, error) from error
        module.listed = folder


def no_clutter(folder: Path, error: FileNotFoundError) -> UserError:
    """A checkout reads its lists of clutter whether or not a scene has any."""
    return UserError(
        "assets",
        got=f"{folder / 'assets'}, without {Path(str(error.filename)).name}",
        wanted="objects/objaverse/list.json and objects/same.json, which a checkout reads in any case",
        fix="unpack these two files of RoboTwin's objects.zip, too",
    )


#: Some tasks choose among ``glob.glob(...)``, whose order is the file system's: sorted, a seed gives the same object on
#: every machine.
_SORTED_GLOB = types.SimpleNamespace(glob=lambda *args, **kwargs: sorted(glob.glob(*args, **kwargs)))


@contextlib.contextmanager
def _stand_ins(keep: tuple[str, ...] = ()) -> Iterator[None]:
    """Stand-ins for the modules that are not installed or never used, except the packages in ``keep``."""
    later = [name for name in LATER if name.partition(".")[0] not in sys.modules]
    always = [name for name in (*ALWAYS_STAND_IN, *later) if name.partition(".")[0] not in keep]
    wanted = always + [m for m in STAND_IN_IF_MISSING if importlib.util.find_spec(m) is None]
    before = {name: sys.modules.get(name) for name in wanted}
    for name in wanted:
        module = (_Later if name in LATER else _StandIn)(name)
        module.__path__ = []  # lets "import a.b" pass the check that a is a package
        if name == "curobo.util":  # RoboTwin sets up its logger before it defines its planner class
            module.logger = types.SimpleNamespace(setup_logger=_discard)  # type: ignore[attr-defined]
        if name == "torch":
            module.manual_seed = _seed_torch  # type: ignore[attr-defined]
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


def _seed_torch(seed: int) -> None:
    """What RoboTwin does with torch, where a process has it by then."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(seed)


def runtime_installed() -> bool:
    """Whether the RoboTwin runtime can be imported, without importing it."""
    return importlib.util.find_spec("robotwin") is not None


_loaded: Runtime | None = None


def load_runtime() -> Runtime:
    """Import RoboTwin (once a process) and quieten its prints: the user's checkout where ``ROBOTWIN_ROOT`` names one,
    else the installed runtime. ``UserError`` when neither is there.
    """
    global _loaded
    if _loaded is None:
        root = os.environ.get("ROBOTWIN_ROOT")
        if root:
            from .checkout import load_checkout

            _loaded = load_checkout(Path(root))
        else:
            _loaded = _load_installed()
    return _loaded


def _load_installed() -> Runtime:
    if not runtime_installed():
        raise UserError(
            "robotwin",
            got="no module named 'robotwin'",
            wanted="the RoboTwin runtime (rlinf-robotwin-runtime 0.1.3)",
            fix="run `make setup`, or see `physis doctor`",
        )
    modules = import_robotwin("robotwin.envs")
    package = importlib.import_module("robotwin")
    return Runtime(name="rlinf-robotwin-runtime", version=_version(package), package="robotwin.envs", **modules)


def import_robotwin(package: str, keep: tuple[str, ...] = ()) -> dict[str, types.ModuleType]:
    """Import the modules of ``package`` that ``Runtime`` holds, and mend what makes a scene depend on more than its
    seed. ``keep``: packages that get no stand-in.
    """
    with _stand_ins(keep), _quiet():
        base_task = importlib.import_module(f"{package}._base_task")
        robot = importlib.import_module(f"{package}.robot.robot")
        create_actor = importlib.import_module(f"{package}.utils.create_actor")
        transforms = importlib.import_module(f"{package}.utils.transforms")
    transforms.get_align_matrix = _parallel_vectors_align(transforms.get_align_matrix)
    _mend_transforms3d()
    base = base_task.Base_Task
    base.get_cluttered_table = _fresh_limits(base.get_cluttered_table)
    for module in (base_task, robot):
        module.print = _discard  # type: ignore[attr-defined]  # a module-level name shadows the builtin there only
    return {"base_task": base_task, "robot": robot, "create_actor": create_actor}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Neither prints nor the tracebacks that upstream prints when an optional package is missing."""
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield


def _mend_transforms3d() -> None:
    """Its ``mat2euler`` refuses float32 under numpy 2 (``copy=False`` means another thing there)."""
    from transforms3d import euler

    original = euler.mat2euler
    if not getattr(original, "takes_any_float", False):

        def mat2euler(matrix: Any, axes: Any = "sxyz") -> Any:
            return original(np.asarray(matrix, dtype=np.float64), axes)

        mat2euler.takes_any_float = True  # type: ignore[attr-defined]
        euler.mat2euler = mat2euler


def _fresh_limits(original: Any) -> Any:
    """Upstream adds the table's shift to its default lists of limits, so that clutter depends on the scenes before."""

    def get_cluttered_table(self: Any, cluttered_numbers: int = 10) -> None:
        original(self, cluttered_numbers, xlim=[-0.59, 0.59], ylim=[-0.34, 0.34], zlim=[0.741])

    return get_cluttered_table


def _version(package: types.ModuleType) -> str:
    """Set-up unpacks the wheel without its metadata, and notes the digest it checked."""
    note = Path(package.__file__ or "").parent / "PHYSIS_SHA256"
    digest = note.read_text().strip() if note.is_file() else ""
    return KNOWN_WHEELS.get(digest) or f"{package.__version__} (unverified)"


def _parallel_vectors_align(original: Any) -> Any:
    """Upstream takes the arc cosine of a product that rounding can push above 1 for parallel vectors, and NaN poses
    follow.
    """

    def get_align_matrix(v1: Any, v2: Any) -> Any:
        with np.errstate(invalid="ignore"):
            matrix_33 = original(v1, v2)
        parallel = np.dot(np.ravel(v1), np.ravel(v2)) > 0
        return np.eye(3) if parallel and not np.all(np.isfinite(matrix_33)) else matrix_33

    return get_align_matrix


def _discard(*_: object, **__: object) -> None:
    """RoboTwin prints its step counter and missing cameras; results carry both."""


@contextlib.contextmanager
def seeded_globals(seed: int) -> Iterator[None]:
    """Seed numpy's, random's and torch's global generators; give their states back afterwards.

    RoboTwin draws its scenes from these globals. torch is only touched where RoboTwin has loaded it.
    """
    torch = sys.modules.get("torch")
    numpy_state, python_state = np.random.get_state(), random.getstate()
    torch_state = torch.get_rng_state() if torch is not None else None
    cuda_states = torch.cuda.get_rng_state_all() if torch is not None and torch.cuda.is_initialized() else None
    np.random.seed(seed)
    random.seed(seed)
    if torch is not None:
        torch.manual_seed(seed)
    try:
        yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        if torch is not None:
            torch.set_rng_state(torch_state)
            if cuda_states is not None:
                torch.cuda.set_rng_state_all(cuda_states)


@contextlib.contextmanager
def environment_variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for a while; RoboTwin reads its asset folder from one."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
