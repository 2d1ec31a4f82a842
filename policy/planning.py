"""A policy's folder as one function: pictures, sentences, states and noise seeds in, action chunks out."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from physisforcing.core.errors import UserError, unknown_name
from physisforcing.core.results import config_hash
from physisforcing.worldmodel.data.canvas import canvas_layout, compose
from physisforcing.worldmodel.data.canvas_device import compose_on

from .checkpoint import PolicyInfo, load_policy, policy_fingerprint, policy_name
from .encoding import FirstFrame, Sentences, autoencoder_folder, open_first_frame
from .fused import FusedSampler
from .graphs import KINDS, Eager, Graphs, compile_blocks
from .model import WorldActionModel, precision, to_inference
from .normalization import ActionStatistics
from .requests import PlanAnswer, PlanRequest, PolicySpec, check_plan, rows_of
from .sampling import WAYS, Sampler, SamplingConfig, draw_noise


@dataclass(slots=True, kw_only=True)
class PlanningConfig:
    """``device``: ``cpu`` or ``cuda``. ``compute``: ``eager``, ``graph`` (CUDA graphs) ``compile`` (compiled blocks, in CUDA graphs on a GPU)
    or ``fused`` (the same with fewer kernels: ``fused.py``, ``worldmodel/first_frame.py``); ``auto`` is ``fused`` on a GPU and ``eager`` elsewhere. ``batch``: plans computed together, always exactly so many: with equal sizes a plan
    does not depend on its company; 1 on a CPU makes it bit-equal everywhere. ``autoencoder``: its folder, or the pipeline folder that it is in
    (empty: the one beside the weights, or the package's). ``steps``, ``video_steps``, ``mode``: ``sampling.SamplingConfig``."""

    device: str = "cpu"
    compute: str = "auto"
    batch: int = 1
    autoencoder: str = ""
    autoencoder_half: bool = False
    steps: int = 10
    video_steps: int = 10
    mode: str = ""

    def __post_init__(self) -> None:
        if self.compute not in ("auto", *KINDS):
            raise unknown_name("policy.compute", self.compute, ("auto", *KINDS), see="docs/bring_your_policy.md")
        if self.batch < 1:
            raise UserError("policy.batch", got=self.batch, wanted="at least 1", fix="policy.batch=1")
        if self.compute == "graph" and not self.device.startswith("cuda"):
            fix = "policy.compute=eager, or policy.device=cuda"
            raise UserError("policy.compute", got="graph", wanted="eager, compile or fused on a CPU", fix=fix)
        self.sampling()

    @property
    def kind(self) -> str:
        """What ``auto`` is on this device, or what else ``compute`` says."""
        if self.compute != "auto":
            return self.compute
        return "fused" if torch.device(self.device).type == "cuda" else "eager"

    def sampling(self) -> SamplingConfig:
        return SamplingConfig(steps=self.steps, video_steps=self.video_steps, mode=self.mode)


def plans_fingerprint(trained: str, sampling: SamplingConfig, weights: str, *, half: bool = False) -> str:
    """What plans depend on: weights and how they are sampled, without what is not used. ``trained``: the mode of the policy's training.
    ``half``: whether the autoencoder's precision is another one than in training."""
    way = sampling.mode or WAYS[trained][0]
    said = dataclasses.asdict(sampling) | {"way": way, "weights": weights}
    if half:
        said["autoencoder"] = "bfloat16"
    if way in ("first_frame", "joint"):
        del said["video_steps"]  # they are not made
    del said["mode"]
    return config_hash(said)


class ChunkModel:
    """Plans of one policy on one device; safe in several threads, one call at a time.

    ``name``: of the policy in results; ``fingerprint``: of its folder. ``backend``: what compiles. ``first_frame``: computes
    as ``config`` says.
    """

    def __init__(
        self,
        model: WorldActionModel,
        info: PolicyInfo,
        statistics: ActionStatistics,
        first_frame: FirstFrame,
        sentences: Any,
        config: PlanningConfig | None = None,
        *,
        name: str = "policy",
        fingerprint: str = "",
        backend: Any = "inductor",
    ) -> None:
        self.config = config or PlanningConfig()
        self.device = torch.device(self.config.device)
        self.model = to_inference(model, self.device)
        layout = canvas_layout(info.canvas)
        if info.size != (layout.height, layout.width):
            wanted = f"{layout.height}x{layout.width}, as canvas={info.canvas} has"
            raise UserError("policy.json: size", got=info.size, wanted=wanted, fix="export the policy again")
        self.info, self.statistics, self._first_frame, self._sentences = info, statistics, first_frame, sentences
        self.sampler = self._sampler(backend)
        own, conditioner = model.config, getattr(model.proprioception, "config", None)
        plans = plans_fingerprint(own.mode, self.config.sampling(), fingerprint, half=self.config.autoencoder_half)
        lags = () if conditioner is None else conditioner.lags
        self._spec = PolicySpec.of(own, info, lags, name=name, fingerprint=plans)
        self._future = self._future_shape() if self.sampler.imagines else None
        self._lock = threading.Lock()
        self.stages = self._stages(backend)

    @property
    def spec(self) -> PolicySpec:
        return self._spec

    def compose(self, pictures: Mapping[str, NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """``canvas.compose`` of the policy's canvas; ``compute=fused`` resizes on a GPU."""
        if self.config.kind != "fused" or self.device.type != "cuda":
            return compose(self.info.canvas, pictures)
        with self._lock:  # nobody captures meanwhile
            return compose_on(self.device, self.info.canvas, pictures)

    def prepare(self, request: PlanRequest) -> None:
        """Embed the request's sentences: what may take long and needs nobody else to wait."""
        self._sentences.prepare(request.instructions)

    def plan(self, request: PlanRequest) -> PlanAnswer:
        """Chunks in the robot's units, with seconds of ``encode``, ``prefill`` and ``steps``. ``UserError``: see ``check_plan``."""
        check_plan(request, self._spec)
        self.prepare(request)
        total, size = len(request.seeds_B), self.config.batch
        chunks, seconds = [], dict[str, float]()
        with self._lock:
            for begin in range(0, total, size):
                # the last row fills the batch up: what it gives again is dropped
                rows = np.minimum(np.arange(begin, begin + size), total - 1)
                made, spent = self._plan(rows_of(request, rows))
                chunks.append(made[: total - begin])
                seconds = {name: seconds.get(name, 0.0) + value for name, value in spent.items()}
        actions = self.statistics.action.denormalise(torch.cat(chunks)).numpy()
        return PlanAnswer(actions_BPA=actions, seconds=seconds)

    def normalised(self, request: PlanRequest) -> tuple[Tensor, dict[str, float]]:
        """Actions as the flow ends, float32 [B,P,A] on the CPU, of a request of ``batch`` plans."""
        self.prepare(request)
        with self._lock:
            return self._plan(request)

    def _plan(self, request: PlanRequest) -> tuple[Tensor, dict[str, float]]:
        state = torch.from_numpy(request.state_BKA)
        if self.model.config.proprioception == "linear":
            state = self.statistics.state.normalise(state[:, 0])
        own = self.model.config
        noise, future = draw_noise(request.seeds_B.tolist(), (own.chunk, own.action_dim), self._future)
        inputs = {
            "canvas_BHWC": torch.from_numpy(np.ascontiguousarray(request.canvas_BHWC)),
            "state": state,
            "noise_BPA": noise,
        }
        if future is not None:
            inputs["noise_BCFhw"] = future
        inputs = {name: value.to(self.device, non_blocking=True) for name, value in inputs.items()}
        inputs["text_BLD"] = self._sentences.batch(request.instructions)
        actions, seconds = self.stages(inputs)
        return actions.cpu(), seconds

    def _sampler(self, backend: Any) -> Sampler:
        sampling, frames = self.config.sampling(), 1 + (self.info.frames - 1) // 4
        made = Sampler(self.model, sampling, frames=frames)
        if self.config.kind != "fused" or made.way == "joint":
            return made
        return FusedSampler(self.model, sampling, frames=frames, backend=backend)

    def _stages(self, backend: Any) -> Eager:
        gpu, kind = self.device.type == "cuda", self.config.kind
        if kind == "compile":
            compile_blocks(self.model, backend=backend)
        elif kind == "fused":  # what the sampler does not fuse: a future that is imagined
            compile_blocks(self.model, backend=backend, names=("forward",))

        def encode(at: Mapping[str, Any]) -> Tensor:
            return self._first_frame(at["canvas_BHWC"])

        def prefill(at: Mapping[str, Any]) -> Any:
            with precision(self.device):
                return self.sampler.begin(at["encode"], at["text_BLD"], at["state"], at.get("noise_BCFhw"))

        def steps(at: Mapping[str, Any]) -> Tensor:
            with precision(self.device):
                return self.sampler.steps(at["prefill"], at["noise_BPA"])

        stages = {"encode": encode, "prefill": prefill, "steps": steps}
        return Graphs(stages, self.device) if gpu and kind != "eager" else Eager(stages, self.device)

    def _future_shape(self) -> tuple[int, ...]:
        """(C, F, h, w) of an imagined video."""
        black = torch.zeros(1, *self.info.size, 3, dtype=torch.uint8, device=self.device)
        with torch.no_grad():
            channels, _, rows, columns = self._first_frame(black).shape[1:]
        return channels, self.sampler.frames, rows, columns


def load_chunk_model(
    folder: Path | str,
    config: PlanningConfig | None = None,
    *,
    store_sentences: bool = True,
) -> ChunkModel:
    """The policy in ``folder``. ``UserError`` for a folder that is none or incomplete, another autoencoder, a mode that it was not trained for."""
    folder, config = Path(folder), config or PlanningConfig()
    model, info = load_policy(folder)
    own = model.config
    statistics = ActionStatistics.load(folder, action_dim=own.action_dim, state_dim=own.state_dim)
    device = torch.device(config.device)
    autoencoder, width = autoencoder_folder(info, config.autoencoder, folder), int(model.transformer.config.text_dim)
    sentences = Sentences(info, config.autoencoder, width, device, store=store_sentences)
    first_frame = open_first_frame(
        autoencoder, device, small=sentences.small, stored=sentences.stored,
        fast=config.kind == "fused", half=config.autoencoder_half,
    )  # fmt: skip
    return ChunkModel(
        model, info, statistics, first_frame, sentences, config,
        name=policy_name(folder), fingerprint=policy_fingerprint(folder),
    )  # fmt: skip
