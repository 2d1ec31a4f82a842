"""Joint noise of perturbed demonstrations."""

import numpy as np
import pytest

from physisforcing.envs.recording import joint_noise


@pytest.mark.parametrize("length", [20, 68, 250])
def test_joint_noise_is_smooth_early_and_repeatable(length):
    noise = np.stack([joint_noise(length, 14, np.random.default_rng(seed), 0.06) for seed in range(200)])
    end = int(min(0.5 * length, 32))
    assert noise.shape == (200, length, 14)
    assert (noise[:, end:] == 0).all() and (noise[:, :, [6, 13]] == 0).all()
    arms = np.delete(noise, [6, 13], axis=2)
    assert arms[:, :end].std(axis=(0, 2)).max() == pytest.approx(0.06, rel=0.2) if end > 12 else arms.std() > 0
    assert np.abs(np.diff(arms, axis=1)).max() < 0.1, "no jump that the drives cannot follow"
    np.testing.assert_array_equal(noise[3], joint_noise(length, 14, np.random.default_rng(3), 0.06))
