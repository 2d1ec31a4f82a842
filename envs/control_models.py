"""World models that know nothing, or that play recordings: what a planner and decoder make of them is not owed to imagination.

All of them say everything there is to say in their ``spec`` and satisfy ``core.protocols.WorldModel``, so that they run under the same
planner as a trained model. Those that play recordings look up what to play by the request's ``ids``: (task, episode seed, number of the
plan); plan k starts ``k * execute_horizon`` control steps into the recording, where the robot would be if it followed it. A later rollout
of one plan starts its ``plan_steps`` further on.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import DatasetError, UserError
from physisforcing.core.lerobot import LeRobotDataset
from physisforcing.core.pictures import shrink_area
from physisforcing.core.requests import check_request, plan_steps
from physisforcing.core.types import Rollout, RolloutRequest, WorldModelSpec

from .baselines import Retrieval
from .geometry import Geometry

#: Recordings that are kept in memory.
KEPT = 4


class FrozenFrame:
    """Nothing happens: the picture now, repeated."""

    def __init__(self, geometry: Geometry | None = None) -> None:
        self.geometry = geometry or Geometry()
        self.spec: WorldModelSpec = self.geometry.spec("frozen", self.geometry.fingerprint("frozen"))

    def rollout(self, request: RolloutRequest) -> Rollout:
        """See core's ``WorldModel``."""
        check_request(request, self.spec)
        last_BVHWC, samples = request.context_BVTHWC[:, :, -1], request.seeds_BS.shape[1]
        frames = np.broadcast_to(
            last_BVHWC[:, None, :, None],
            (len(last_BVHWC), samples, last_BVHWC.shape[1], request.horizon, *last_BVHWC.shape[2:]),
        )
        return _rollout(self.spec, frames.copy(), 0.0)


class NoiseWorldModel:
    """The picture now, then pictures in which every number is drawn anew, uniformly; equal seeds give equal noise."""

    def __init__(self, geometry: Geometry | None = None) -> None:
        self.geometry = geometry or Geometry()
        self.spec: WorldModelSpec = self.geometry.spec("noise", self.geometry.fingerprint("noise"))

    def rollout(self, request: RolloutRequest) -> Rollout:
        """See core's ``WorldModel``."""
        check_request(request, self.spec)
        shape = (request.context_BVTHWC.shape[1], request.horizon, *request.context_BVTHWC.shape[3:])
        frames = np.empty((*request.seeds_BS.shape, *shape), np.uint8)
        for place, seed in np.ndenumerate(request.seeds_BS):
            frames[place] = np.random.default_rng(int(seed) % 2**64).integers(0, 256, shape, np.uint8)
        frames[..., 0, :, :, :] = request.context_BVTHWC[:, None, :, -1]
        return _rollout(self.spec, frames, 0.0)


class PlayedVideo:
    """Plays recordings. ``find(task, seed)`` gives the one for an episode: uint8 [T,H,W,3] or [V,T,H,W,3], one picture a control step.

    Frame 0 is the recording's, which may show something else than the picture now. Past its end the last picture stays.
    """

    def __init__(
        self,
        name: str,
        find: Callable[[str, int], NDArray[np.uint8]],
        *,
        fingerprint: str,
        execute_horizon: int = 32,
        geometry: Geometry | None = None,
    ) -> None:
        if execute_horizon < 1:
            fix = "the planner's execute_horizon"
            raise UserError("execute_horizon", got=execute_horizon, wanted="1 or more control steps", fix=fix)
        self.geometry, self.execute_horizon, self._find = geometry or Geometry(), execute_horizon, find
        known = self.geometry.fingerprint(name, recordings=fingerprint, execute_horizon=execute_horizon)
        self.spec: WorldModelSpec = self.geometry.spec(name, known)
        self._videos: OrderedDict[tuple[str, int], NDArray[np.uint8]] = OrderedDict()

    def rollout(self, request: RolloutRequest) -> Rollout:
        """See core's ``WorldModel``. ``UserError`` for a request without ids."""
        check_request(request, self.spec)
        return self._play(request)

    def _play(self, request: RolloutRequest) -> Rollout:
        began, samples = time.perf_counter(), request.seeds_BS.shape[1]
        ids, later = needed_ids(request), plan_steps(request)
        rows = [
            self._part(self._video(task, seed), plan * self.execute_horizon + steps, request.horizon)
            for (task, seed, plan), steps in zip(ids, later, strict=True)
        ]
        frames = np.repeat(np.stack(rows)[:, None], samples, axis=1)
        return _rollout(self.spec, frames, time.perf_counter() - began)

    def _part(self, video_VTHWC: NDArray[np.uint8], start: int, horizon: int) -> NDArray[np.uint8]:
        steps = start + self.geometry.stride * np.arange(horizon)
        return video_VTHWC[:, np.minimum(steps, video_VTHWC.shape[1] - 1)]

    def _video(self, task: str, seed: int) -> NDArray[np.uint8]:
        key = (task, seed)
        if key not in self._videos:
            self._videos[key] = fitted(self._find(task, seed), self.geometry)
            while len(self._videos) > KEPT:
                self._videos.popitem(last=False)
        self._videos.move_to_end(key)
        return self._videos[key]


class OtherEpisodeWorldModel(PlayedVideo):
    """Plays another episode of the same task: the successful demonstration with the next seed (after the last one, the first).

    The robot must follow the recording and not its own scene; ``other_seed`` says whose it is.
    """

    def __init__(self, dataset: LeRobotDataset, *, execute_horizon: int = 32, geometry: Geometry | None = None) -> None:
        self.dataset = dataset
        self._places = {(e.task_name, e.seed): e.index for e in dataset.episodes if e.success is not False}
        super().__init__(
            "other",
            self._recording,
            fingerprint=dataset.fingerprint(),
            execute_horizon=execute_horizon,
            geometry=geometry,
        )

    def other_seed(self, task: str, seed: int) -> int:
        """The episode that is played in the scene of ``seed``. ``DatasetError`` where the dataset has none but its own."""
        others = sorted(known for name, known in self._places if name == task and known != seed)
        if not others:
            fix = f"physis data collect tasks=[{task}] with more episodes"
            raise DatasetError("dataset", got=f"no other episode of {task} than {seed}", wanted="one or more", fix=fix)
        return next((known for known in others if known > seed), others[0])

    def _recording(self, task: str, seed: int) -> NDArray[np.uint8]:
        return recording(self.dataset, self._places[task, self.other_seed(task, seed)], self.geometry)


class RetrievalWorldModel(PlayedVideo):
    """Plays the training demonstration of the task whose first picture and joint targets are nearest to the episode's.

    Which one is decided at plan 0 of an episode and kept. ``UserError`` for a later plan of an episode that did not begin here.
    """

    def __init__(self, retrieval: Retrieval, *, execute_horizon: int = 32, geometry: Geometry | None = None) -> None:
        super().__init__(
            "retrieval",
            self._recording,
            fingerprint=retrieval.fingerprint,
            execute_horizon=execute_horizon,
            geometry=geometry,
        )
        self.retrieval, self._nearest = retrieval, dict[tuple[str, int], int]()
        name, fingerprint, needs = self.spec.name, self.spec.fingerprint, frozenset({"proprioception"})
        self.spec = self.geometry.spec(name, fingerprint, conditions=needs, proprioception_lags=(0,))

    def rollout(self, request: RolloutRequest) -> Rollout:
        """See core's ``WorldModel``."""
        check_request(request, self.spec)
        assert request.proprioception_BKA is not None
        later = plan_steps(request)
        for b, (task, seed, plan) in enumerate(needed_ids(request)):
            if plan == 0 and later[b] == 0:
                picture, state = request.context_BVTHWC[b, 0, -1], request.proprioception_BKA[b, 0]
                self._nearest[task, seed] = self.retrieval.nearest(picture, state, task)[0]
                self._videos.pop((task, seed), None)
            elif (task, seed) not in self._nearest:
                got, fix = f"plan {plan} of {task} {seed}", "ask for the plans of an episode in order"
                raise UserError("ids", got=got, wanted="an episode whose plan 0 was asked for here", fix=fix)
        return self._play(request)

    def episode(self, task: str, seed: int) -> int:
        """The demonstration (its number in the dataset) that is played in this episode."""
        return self._nearest[task, seed]

    def _recording(self, task: str, seed: int) -> NDArray[np.uint8]:
        return recording(self.retrieval.dataset, self._nearest[task, seed], self.geometry)


def needed_ids(request: RolloutRequest) -> list[tuple[str, int, int]]:
    """The ids of a request. ``UserError`` where it has none."""
    if request.ids is None:
        fix = "plan with a planner that passes ids (planner.action_planner does)"
        raise UserError("ids", got=None, wanted="(task, seed, plan) of each context", fix=fix)
    return request.ids


def recording(dataset: LeRobotDataset, index: int, geometry: Geometry) -> NDArray[np.uint8]:
    """The pictures of one demonstration: uint8 [V,T,H,W,3] as they are stored."""
    return np.stack([dataset.frames(index, key=f"observation.images.{view}") for view in geometry.views])


def fitted(video: NDArray[np.uint8], geometry: Geometry) -> NDArray[np.uint8]:
    """A recording [T,H,W,3] or [V,T,H,W,3] in the geometry's size, [V,T,height,width,3]. ``UserError`` where it cannot be had."""
    video_VTHWC = video if video.ndim == 5 else video[None]
    height, width = video_VTHWC.shape[2:4]
    factor = height // geometry.height
    fits = (factor * geometry.height, factor * geometry.width) == (height, width) and factor > 0
    if not fits or len(video_VTHWC) != len(geometry.views):
        got, wanted = f"{len(video_VTHWC)} views of {height}x{width}", f"{len(geometry.views)} views"
        wanted += f" of {geometry.height}x{geometry.width} or a whole number of times larger"
        raise UserError("recording", got=got, wanted=wanted, fix="record with these cameras at that size")
    return shrink_area(video_VTHWC, factor)


def _rollout(spec: WorldModelSpec, frames_BSVTHWC: NDArray[np.uint8], seconds: float) -> Rollout:
    times_T = np.arange(frames_BSVTHWC.shape[3], dtype=np.float64) * spec.frame_dt
    return Rollout(times_T=times_T, frames_BSVTHWC=frames_BSVTHWC, cost={"seconds": seconds})
