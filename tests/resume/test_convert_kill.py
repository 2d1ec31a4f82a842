"""Conversions that are killed, and how much of a checkpoint is in memory."""

from __future__ import annotations

import os
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from physisforcing.core.errors import UserError
from physisforcing.worldmodel.convert import writing
from physisforcing.worldmodel.convert.command import ConvertConfig, run
from ranks import fork
from tiny_releases import tree


def test_only_one_tensor_is_alive_at_a_time(wan_release: Path, wan_settings: Path, tmp_path: Path) -> None:
    from physisforcing.worldmodel.convert import find

    found = find.find(wan_release, "wan", find.asked(str(wan_settings), {}, torch.bfloat16))
    alive: list[weakref.ref] = []
    most = 0
    for part in found.parts:
        read = part.source.read

        def counted(name: str, read: Any = read) -> torch.Tensor:
            nonlocal most
            value = read(name).clone()
            alive.append(weakref.ref(value))
            most = max(most, sum(one() is not None for one in alive))
            return value

        part.source.read = counted
        writing.write_part(part, writing.plan_shards(part, 10**9), tmp_path / part.name, lambda size: None)
    assert most == 1 and len(alive) == sum(len(part.shapes) for part in found.parts)


def killed_at(step: int, config: ConvertConfig) -> int:
    """Convert in a copy of this process that kills itself (SIGKILL) at its ``step``-th rename. Returns the signal that ended it."""

    def dies() -> None:
        replace, count = os.replace, 0

        def counted(*places: Any) -> None:
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*places)

        os.replace = counted
        run(config, shard_bytes=20_000)

    return os.waitstatus_to_exitcode(os.waitpid(fork(dies, "the copy"), 0)[1])


def test_a_killed_conversion_leaves_nothing_and_is_continued(
    wan_release: Path, wan_settings: Path, converted_wan: Path, tmp_path: Path
) -> None:
    output = tmp_path / "wan"
    config = ConvertConfig(source=str(wan_release), output=str(output), dtype="keep", config=str(wan_settings))
    hidden, kept = tmp_path / ".wan.converting", {}
    for step in (1, 4, 9, 14):
        assert killed_at(step, config) == -signal.SIGKILL and not output.exists()
        now = {path: path.stat().st_mtime_ns for path in hidden.rglob("*.safetensors")}
        assert kept.items() <= now.items()  # complete files are not written again
        kept = now
    assert len(kept) > 3
    (next(iter(kept))).write_bytes(b"cut")  # a file of another size is not taken for a complete one
    run(config, shard_bytes=20_000)
    assert tree(output) == tree(converted_wan) and not hidden.exists() and not list(tmp_path.glob(".*"))


def test_other_settings_do_not_continue_a_killed_conversion(
    wan_release: Path, wan_settings: Path, converted_wan: Path, tmp_path: Path
) -> None:
    output = tmp_path / "wan"
    config = ConvertConfig(source=str(wan_release), output=str(output), dtype="bf16", config=str(wan_settings))
    assert killed_at(14, config) == -signal.SIGKILL
    config.dtype = "keep"
    run(config, shard_bytes=20_000)
    assert tree(output) == tree(converted_wan)
    with pytest.raises(UserError, match="not taken"):
        run(config)
