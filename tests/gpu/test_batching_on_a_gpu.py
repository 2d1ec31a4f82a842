"""On a GPU, equal batches give everybody the pictures of a request alone, bit by bit."""

import threading

import numpy as np
import pytest
import torch

from physisforcing.core.paths import weights_root
from physisforcing.core.types import RolloutRequest
from physisforcing.planner.batching import Batcher
from physisforcing.worldmodel.model import load_world_model

pytestmark = pytest.mark.gpu


def test_pictures_do_not_depend_on_the_company():
    torch.use_deterministic_algorithms(True)
    try:
        model = load_world_model(weights_root() / "worldmodel", "cuda", steps=2)
        generator = np.random.default_rng(0)
        requests = [
            RolloutRequest(
                context_BVTHWC=generator.integers(0, 255, (1, 1, 1, 120, 160, 3)).astype(np.uint8),
                instructions=["click the bell"],
                seeds_BS=generator.integers(0, 2**40, (1, samples)),
                horizon=17,
                proprioception_BKA=np.zeros((1, 3, 14), np.float32),
                returns=frozenset({"frames", "latents"}),
            )
            for samples in (1, 4, 1, 3, 2, 16)
        ]
        with Batcher(model, max_batch=16, pad=True, wait_s=0.2) as batcher:
            alone = [batcher.rollout(request) for request in requests]
            together = [None] * len(requests)

            def ask(place):
                together[place] = batcher.rollout(requests[place])

            threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(requests))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(120)
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_array_equal(a.latents_BSCFhw, b.latents_BSCFhw)
            np.testing.assert_array_equal(a.frames_BSVTHWC, b.frames_BSVTHWC)
        assert max(answer.cost["batched"] for answer in together) > max(r.seeds_BS.size for r in requests[:-1])
    finally:
        torch.use_deterministic_algorithms(False)
