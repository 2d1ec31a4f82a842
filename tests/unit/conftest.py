"""What several unit tests share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def frozen():
    """A frozen toy world model with windows of demonstrations, see ``toy_decoders``."""
    from toy_decoders import frozen_world_model

    return frozen_world_model()
