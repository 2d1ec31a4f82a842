"""What several unit tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def frozen():
    """A frozen toy world model with windows of demonstrations, see ``toy_decoders``."""
    from toy_decoders import frozen_world_model

    return frozen_world_model()


@pytest.fixture(scope="session")
def paper_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pipeline folders ``a14b``, ``ti2v`` and ``cosmos3``, see ``tiny_paper``. Copy one before you change it."""
    import tiny_paper

    root = tmp_path_factory.mktemp("paper")
    return {name: getattr(tiny_paper, name)(root / name) for name in ("a14b", "ti2v", "cosmos3")}


@pytest.fixture(scope="session")
def large_models(
    paper_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path]]:
    """Name as in ``paper_folders`` -> (pipeline folder, latent store for it, see ``tiny_large``). Copy one before you change it."""
    import tiny_large

    root = tmp_path_factory.mktemp("stores")
    return {name: (folder, tiny_large.store(root / name, name)) for name, folder in paper_folders.items()}


@pytest.fixture
def paper_generator(paper_folders: dict[str, Path], tmp_path: Path) -> Callable[..., Any]:
    """``make(name, **settings)``: a ``PaperGenerator`` of the tiny size over one of ``paper_folders``."""
    import tiny_paper
    from physisforcing.worldmodel.paper_generate import PaperConfig, PaperGenerator

    def make(name: str, **settings: Any) -> PaperGenerator:
        config = PaperConfig(
            **tiny_paper.SIZE | {"negative_prompt": tiny_paper.NEGATIVE, "text_cache": tmp_path} | settings
        )
        return PaperGenerator(paper_folders[name], config)

    return make
