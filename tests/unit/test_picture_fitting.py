"""Pictures in the size that a pipeline wants, and back."""

import numpy as np
import pytest

from physisforcing.core.errors import UserError
from physisforcing.planner.contract_probe import scene
from physisforcing.worldmodel.adapters.fitting import inner_box, place, take_back


def test_letterbox_keeps_the_shape_and_comes_back():
    picture = scene(0, 48, 64)
    assert inner_box((48, 64), (64, 96), "letterbox") == (0, 5, 64, 85)
    framed = place(picture, 64, 96, "letterbox")
    assert framed.shape == (64, 96, 3) and not framed[:, :5].any() and not framed[:, 90:].any()
    back = take_back(np.stack([framed, framed]), 48, 64, "letterbox")
    assert back.shape == (2, 48, 64, 3) and np.abs(back[0].astype(int) - picture).mean() < 4
    stretched = place(picture, 64, 96, "stretch")
    assert (
        stretched[:, :3].any()
        and np.abs(take_back(stretched[None], 48, 64, "stretch")[0].astype(int) - picture).mean() < 4
    )


def test_pictures_are_halved_by_area_and_equal_sizes_pass_unchanged():
    picture = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    halved = place(picture, 24, 32, "stretch")
    assert np.abs(halved - picture.reshape(24, 2, 32, 2, 3).mean((1, 3))).max() <= 1  # rounded twice
    assert place(picture, 48, 64, "letterbox") is picture
    with pytest.raises(UserError, match="letterbox"):
        place(picture, 24, 32, "leterbox")
