"""docs/physics_library.md: its loops run, and the losses stand on torch alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "physics_library.md"
SIZE, GRID, FRAMES = (64, 80), (4, 5), 9


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def clip(make_targets, batch: int) -> tuple[torch.Tensor, dict]:
    """Latents and targets: points that move right by a token, features that follow them."""
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(batch, 1, 20, 2, generator=generator) * torch.tensor([40.0, 63.0])
    tracks = start + torch.linspace(0, 24, FRAMES)[None, :, None, None] * torch.tensor([1.0, 0.0])
    visible = torch.ones(batch, FRAMES, 20, dtype=torch.bool)
    features = torch.randn(batch, 3, *GRID, 8, generator=generator)
    targets = make_targets(tracks, visible, torch.ones(batch, 20), features, SIZE, GRID)
    assert targets["select_BN"].any() and targets["token_mask_BFhw"].any()
    return torch.randn(batch, 4, 3, 8, 10, generator=generator), targets


@pytest.mark.parametrize(("block", "batch"), [(1, 2), (2, 1)], ids=["wan", "cosmos3"])
def test_the_loop_of_the_page_learns_from_both_losses(block: int, batch: int) -> None:
    names: dict = {}
    exec(compile(blocks()[0], str(PAGE), "exec"), names)
    latents, targets = clip(names["make_targets"], batch)
    text = torch.randn(batch, 5, 16) if block == 1 else torch.arange(6)
    added = [line for line in blocks()[block].splitlines() if line.endswith("# +")]
    assert 6 <= len(added) <= 15
    names["batches"] = [(latents, text, targets)] * 80
    exec(compile(blocks()[block], str(PAGE), "exec"), names)
    # every step has other noise, so the first and last eight are compared: pix, sem, end-point error
    first, last = torch.tensor(names["losses"][:8]).mean(0), torch.tensor(names["losses"][-8:]).mean(0)
    assert (last[1:] < 0.85 * first[1:]).all(), (first, last)


def test_without_the_marked_lines_the_loops_are_plain() -> None:
    for block in blocks()[1:]:
        kept = "\n".join(line for line in block.splitlines() if not line.endswith("# +"))
        left = kept.replace(", *forcing.parameters()", "").split("    losses.append")[0]
        assert "forcing" not in left and "physics" not in left and "tapped" not in left
        compile(left, "plain", "exec")


def test_the_losses_import_torch_alone() -> None:
    script = """
import importlib.abc, sys
import torch
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"diffusers", "transformers", "peft", "sapien", "hydra", "omegaconf", "scipy", "cv2", "einops", "av", "pyarrow"}:
            raise ImportError("the physics losses must not import " + name)
sys.meta_path.insert(0, Refuse())
from physisforcing.worldmodel.physics import config, forcing, gradients, regions, relation, trajectory, views
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-1500:]
