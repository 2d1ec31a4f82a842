"""A world model whose answers are told from its requests, and a server of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from physisforcing.core.types import Rollout, RolloutRequest, ViewLayout, WorldModelSpec
from physisforcing.planner.model_server import ModelServer, ModelServerConfig

H, W, FRAMES = 8, 12, 17


class Double:
    """Pictures are a function of the context and the seed of each sample. A seed of 7 raises, 8 takes seconds."""

    def __init__(self, fingerprint: str = "one", **changes: Any) -> None:
        values = {
            "name": "double", "views": ViewLayout(height=H, width=W), "context_frames": 1, "horizons": (FRAMES,), "frame_dt": 0.12,
            "conditions": frozenset({"text"}), "returns": frozenset({"frames", "features"}), "max_batch": 16, "fingerprint": fingerprint,
        }  # fmt: skip
        self.spec = WorldModelSpec(**(values | changes))
        self.sizes: list[int] = []

    def rollout(self, request: RolloutRequest) -> Rollout:
        self.sizes.append(request.seeds_BS.size)
        if (request.seeds_BS == 7).any():
            raise RuntimeError("the seed is 7")
        if (request.seeds_BS == 8).any():
            time.sleep(3)
        value_BS = request.context_BVTHWC[:, 0, 0, 0, 0, 0][:, None] + request.seeds_BS
        ramp = value_BS[:, :, None, None, None, None, None] + np.arange(17)[None, None, None, :, None, None, None]
        shape = (*value_BS.shape, 1, 17, 8, 12, 3)
        features = None
        if "features" in request.returns:
            taps = np.array(request.features.taps, np.float32)
            features = (
                value_BS[:, :, None, None, None, None, None] * taps[None, None, :, None, None, None, None]
            ) * request.features.sigma
        return Rollout(
            times_T=np.arange(17) * 0.12,
            frames_BSVTHWC=np.broadcast_to(ramp, shape).astype(np.uint8),
            features_BSKFhwD=features,
            cost={"seconds": 0.5},
        )


def make() -> Double:
    return Double()


def a_request(seed: int, *, samples: int = 1, **changes: Any) -> RolloutRequest:
    values: dict[str, Any] = {
        "context_BVTHWC": np.full((1, 1, 1, H, W, 3), seed % 90, np.uint8),
        "instructions": ["press the bell"],
        "seeds_BS": (seed + 10 * np.arange(samples))[None].astype(np.int64),
        "horizon": FRAMES,
    }
    return RolloutRequest(**(values | changes))


@contextmanager
def serving(model: Any = None, **settings: Any) -> Iterator[tuple[str, ModelServer]]:
    server = ModelServer(model or Double(), ModelServerConfig(**settings), about={"device": "cpu"})
    port = server.open()
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{port}", server
    finally:
        server.stop()
        thread.join(10)
        assert not thread.is_alive()
