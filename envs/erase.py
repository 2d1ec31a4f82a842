"""The control ``objects_erased``: what really happened, drawn again without the task's objects.

The robot moves as it did, the objects are there for the physics and not for the camera. A decoder that reads joint targets out of such a
video as well as out of the whole one has not looked at the objects: success on the task then says nothing about imagined objects.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import DatasetError
from physisforcing.core.executed import ExecutedChunk
from physisforcing.core.lerobot import LeRobotDataset

from .geometry import shrinking
from .twin_client import TwinClient


class ObjectEraser:
    """Draws episodes again. ``twin``: for environments of their task, with the options that they were recorded with. ``height`` x ``width`` as
    in ``Geometry``; ``hide_objects=False`` draws everything (the recorded pictures, before they became a video)."""

    def __init__(self, twin: TwinClient, *, height: int = 120, width: int = 160, hide_objects: bool = True) -> None:
        self.twin, self._shrink, self._hide = twin, shrinking(height, width), hide_objects

    def episode(self, dataset: LeRobotDataset, index: int) -> NDArray[np.uint8]:
        """A recorded episode: uint8 [V,T,H,W,3], one picture a control step. ``DatasetError`` where its poses were not recorded."""
        from physisforcing.core.ground_truth import load

        info, path = dataset.episode(index), dataset.ground_truth_path(index)
        if path is None or not path.is_file():
            fix = "collect with ground_truth=poses, sparse or full"
            raise DatasetError("dataset", got=f"no ground truth for episode {index}", wanted="poses", fix=fix)
        truth = load(path)
        return self.poses(info.seed, info.scene_hash, truth.body_ids_K, truth.body_poses_TK7)

    def chunk(self, seed: int, scene_hash: str, chunk: ExecutedChunk) -> NDArray[np.uint8]:
        """An executed chunk of the episode of ``seed``: uint8 [V,T,H,W,3]."""
        return self.poses(seed, scene_hash, chunk.body_ids_K, chunk.poses_TK7)

    def poses(
        self, seed: int, scene_hash: str, ids_K: NDArray[np.uint16], poses_TK7: NDArray[np.float32]
    ) -> NDArray[np.uint8]:
        """Any poses (xyz metres, wxyz) of the bodies of the scene of ``seed``: uint8 [V,T,H,W,3].

        ``UserError`` where the scene is not the one of ``scene_hash``, or its bodies are others.
        """
        return self.twin.redraw(seed, scene_hash, ids_K, poses_TK7, hide_objects=self._hide, shrink=self._shrink)
