"""A checkpoint from anywhere cannot run code while it is converted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from physisforcing.core.errors import UserError
from physisforcing.worldmodel.convert.command import ConvertConfig, run


class Touch:
    """Unpickled freely, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "tar"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, zipped: bool) -> None:
    import pickle

    made, file = tmp_path / "made", tmp_path / "backbone.pth"
    pickle.loads(pickle.dumps(Touch(made)))
    assert made.exists()  # it would
    made.unlink()
    state = {"head.modulation": torch.zeros(1, 2, 4), "blocks": Touch(made)}
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    for source in (file, tmp_path):  # as a file, and as the authors' bundle
        with pytest.raises(UserError, match="a PyTorch state dict"):
            run(ConvertConfig(source=str(source), output=str(tmp_path / "out")))
    assert not made.exists() and not (tmp_path / "out").exists()
