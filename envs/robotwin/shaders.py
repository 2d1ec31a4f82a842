"""SAPIEN's rasteriser without the light of an environment map, which no scene of RoboTwin has.

For that light SAPIEN integrates a table (512 x 512) before the first picture of every process: six seconds of a CPU core with
a software driver, for a term that is then multiplied by black. The shaders are read from the installed SAPIEN, lose the table,
and are kept in the cache; pictures are the same, bit for bit (``tests/sim/test_renderer.py``).
"""

from __future__ import annotations

import functools
import hashlib
import re
import shutil
import tempfile
from pathlib import Path

from physisforcing.core.paths import cache_home

TABLE = "samplerBRDFLUT"
_DECLARED = re.compile(rf"^layout\([^)]*\) uniform sampler2D {TABLE};", re.MULTILINE)
_READ = re.compile(rf"texture\({TABLE}, vec2\([^()]*\)\)\.xy")


def shader_folder() -> str:
    """What ``set_camera_shader_dir`` takes: a folder in the cache, or ``default`` where SAPIEN's shaders read otherwise."""
    shaders = _without_table()
    if shaders is None:
        return "default"
    digest = hashlib.sha256(repr(sorted(shaders.items())).encode()).hexdigest()[:16]
    folder = cache_home() / "shaders" / digest
    if not folder.is_dir():
        _write(folder, shaders)
    return str(folder / "default")


@functools.cache
def _without_table() -> dict[str, str] | None:
    """Place -> text of the default shaders, and what they include, without the table; None where it is not declared and read as expected."""
    import sapien

    root = Path(sapien.__file__).parent / "vulkan_shader"
    files = [path for part in ("default", "common") for path in (root / part).iterdir()]
    plain = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in files}
    shaders = {name: _READ.sub("vec2(0)", _DECLARED.sub("", text)) for name, text in plain.items()}
    gone = not any(TABLE in text for text in shaders.values())
    return shaders if gone and shaders != plain else None


def _write(folder: Path, shaders: dict[str, str]) -> None:
    """Aside, then renamed: processes start together."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent))
    for name, text in shaders.items():
        (aside / name).parent.mkdir(exist_ok=True)
        (aside / name).write_text(text, encoding="utf-8")
    try:
        aside.rename(folder)
    except OSError:
        shutil.rmtree(aside)
        if not folder.is_dir():
            raise
