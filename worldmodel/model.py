"""The shipped world model: codec, denoiser and sampler behind core's ``WorldModel``.

A world-model folder holds ``world_model.json``, ``denoiser.json``, ``transformer/`` (a plain diffusers folder),
``conditioner.safetensors``, of an action model ``actions.safetensors`` and, where it was trained with physics losses,
``physics_heads.safetensors`` (not needed to imagine).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from physisforcing.core.errors import UserError
from physisforcing.core.requests import check_request
from physisforcing.core.results import config_hash
from physisforcing.core.types import DT, Rollout, RolloutRequest, ViewLayout, WorldModelSpec

from .backbones.wan import WanDenoiser, load_denoiser, save_denoiser
from .codec import VideoCodec, load_codec, to_uint8
from .data.windows import FRAME_STRIDE, WINDOW_FRAMES
from .features import check_asked, denoiser_features
from .flow_matching import euler_sample
from .physics.forcing import PhysisForcing
from .storage import as_dtype, fingerprint, latents_fingerprint, read_json, save_tensors
from .text import TextEmbedder

HEADS_NAME = "physics_heads.safetensors"

#: Denoising steps where nothing else is asked for.
DEFAULT_STEPS = 8


def save_world_model(
    folder: Path,
    denoiser: WanDenoiser,
    forcing: PhysisForcing | None,
    *,
    sample_shift: float,
    latents_fingerprint: str,
    home_state: Sequence[float],
    dtype: torch.dtype | None = None,
) -> None:
    """Write a world-model folder; ``dtype`` is the stored precision (None: as it is)."""
    folder.mkdir(parents=True, exist_ok=True)
    save_denoiser(denoiser, folder, dtype)
    if forcing is not None:
        save_heads(forcing, folder, dtype)
    settings = {
        "name": "physis-pico" if denoiser.actions is None else "physis-pico-actions",
        "frames": WINDOW_FRAMES,
        "frame_stride": FRAME_STRIDE,
        "sample_shift": sample_shift,
        "denoising_steps": DEFAULT_STEPS,
        "latents_fingerprint": latents_fingerprint,
        "home_state": list(home_state),
    }
    (folder / "world_model.json").write_text(json.dumps(settings, indent=2) + "\n")


def save_heads(forcing: PhysisForcing, folder: Path, dtype: torch.dtype | None) -> None:
    """Write ``physics_heads.safetensors``, which nothing needs to imagine."""
    save_tensors(as_dtype(forcing.state_dict(), dtype), folder / HEADS_NAME)


def load_heads(forcing: PhysisForcing, folder: Path) -> None:
    """Load ``physics_heads.safetensors`` of a world-model folder. Raises ``UserError`` where it is missing."""
    from safetensors.torch import load_file

    path = folder / HEADS_NAME
    if not path.is_file():
        raise UserError(
            "run.init",
            got=str(folder),
            wanted="a model with physics heads",
            fix="start from a model trained with physics losses",
        )
    # what is measured of gradients belongs to the run that measured it
    found = {name: value.float() for name, value in load_file(path).items() if not name.startswith("meter.")}
    fresh = {name: value for name, value in forcing.state_dict().items() if name.startswith("meter.")}
    place = "temperature_place"
    if forcing.temperature_place is not None and place not in found:
        fresh[place] = forcing.state_dict()[place]  # the fixed temperature is where a learnable one starts
    elif forcing.temperature_place is None and place in found:
        fix = "physics.temperature=learnable, or start from another model"
        raise UserError("physics.temperature", got="fixed", wanted="learnable, as in run.init", fix=fix)
    forcing.load_state_dict(found | fresh)


class FlowWorldModel:
    """Imagines 17 frames (1.92 s) from one picture, an instruction and the joint targets at three lags; an action model also from the
    drive targets of the next 32 control steps.

    ``steps``: denoising steps. The noise of a sample depends on its seed alone, and on a CPU contexts and samples are computed one
    by one, so that a sample is bit-equal wherever it stands in a batch. ``weights_fingerprint`` identifies denoiser and codec; the
    spec's fingerprint adds the steps, because the pictures depend on all three. ``features_fingerprint`` identifies what features depend
    on: the denoiser and the codec's latents (default: ``weights_fingerprint``).
    """

    def __init__(
        self,
        denoiser: WanDenoiser,
        codec: VideoCodec,
        settings: dict,
        *,
        weights_fingerprint: str,
        features_fingerprint: str = "",
        steps: int | None = None,
        text: TextEmbedder | None = None,
    ) -> None:
        self.denoiser = denoiser.eval().requires_grad_(False)
        self.codec, self.settings = codec, settings
        self.steps = int(settings["denoising_steps"]) if steps is None else steps
        if self.steps < 1:
            raise UserError(
                "denoising_steps", got=self.steps, wanted="1 or more", fix=f"denoising_steps={DEFAULT_STEPS}"
            )
        self.device = next(denoiser.parameters()).device
        self.text = text if text is not None else TextEmbedder()
        actions = denoiser.actions
        self._spec = WorldModelSpec(
            name=settings["name"],
            views=ViewLayout(),
            context_frames=1,
            horizons=(settings["frames"],),
            frame_dt=settings["frame_stride"] * DT,
            conditions=frozenset({"text", "proprioception"} | (set() if actions is None else {"actions"})),
            returns=frozenset({"frames", "latents", "features"}),
            proprioception_lags=tuple(denoiser.conditioner.config.lags),
            action_spec=None if actions is None else actions.spec,
            fingerprint=config_hash({"weights": weights_fingerprint, "steps": self.steps}),
            blocks=len(denoiser.transformer.blocks),
            latents_fingerprint=settings.get("latents_fingerprint", ""),
            features_fingerprint=features_fingerprint or weights_fingerprint,
        )

    @property
    def spec(self) -> WorldModelSpec:
        return self._spec

    @property
    def home_state_A(self) -> np.ndarray:
        """The usual joint targets at the start of an episode, float32 [14]."""
        return np.asarray(self.settings["home_state"], dtype=np.float32)

    @torch.inference_mode()
    def rollout(self, request: RolloutRequest) -> Rollout:
        """See core's ``WorldModel``. Raises ``MissingCapabilityError`` for what the spec does not offer."""
        self._check(request)
        begun = time.perf_counter()
        batch, samples = request.seeds_BS.shape
        first, conditions = self._encode(request)
        order = [(b, s) for b in range(batch) for s in range(samples)]
        noise = torch.stack([_noise(int(request.seeds_BS[b, s]), first, self._latents) for b, s in order])
        owner = torch.tensor([b for b, _ in order])
        actions = self._embed_actions(request, owner)
        latents, frames, features, calls = [], [], [], 0.0
        for part in torch.arange(len(order)).split(self._together):
            rows = owner[part].to(self.device)
            action = None if actions is None else actions[part.to(self.device)]
            if request.features is not None:
                made = (first[rows], noise[part].to(self.device), conditions[rows], request.features)
                found = denoiser_features(self.denoiser.transformer, *made, action_BFD=action)
                features.append(found.float().cpu())
                calls += len(part) * request.features.taps[-1] / self._spec.blocks
            if request.returns <= {"features"}:
                continue
            sampled = self._sample(first[rows], conditions[rows], action, noise[part].to(self.device))
            calls += len(part) * self.steps
            latents.append(sampled.cpu())
            if "frames" in request.returns:
                frames.append(to_uint8(self.codec.decode(sampled)).cpu())
        return Rollout(
            times_T=np.arange(request.horizon, dtype=np.float64) * self._spec.frame_dt,
            frames_BSVTHWC=torch.cat(frames).unflatten(0, (batch, samples)).unsqueeze(2).numpy() if frames else None,
            latents_BSCFhw=torch.cat(latents).unflatten(0, (batch, samples)).numpy()
            if "latents" in request.returns
            else None,
            features_BSKFhwD=torch.cat(features).unflatten(0, (batch, samples)).numpy() if features else None,
            cost={"seconds": time.perf_counter() - begun, "denoiser_calls": calls},
        )

    @property
    def _together(self) -> int:
        """Rows computed in one call: a matrix product of another size may round differently."""
        return 1 if self.device.type == "cpu" else self._spec.max_batch

    def _encode(self, request: RolloutRequest) -> tuple[Tensor, Tensor]:
        """-> (latent of each context picture [B,C,1,h,w], conditioning tokens [B,L,D])."""
        context = torch.from_numpy(np.ascontiguousarray(request.context_BVTHWC[:, 0])).to(self.device)
        tokens = self.text.batch(request.instructions)[0].to(self.device)
        state = torch.as_tensor(request.proprioception_BKA, dtype=torch.float32, device=self.device)
        first, conditions = [], []
        for rows in torch.arange(len(context), device=self.device).split(self._together):
            first.append(self.codec.encode(context[rows]))
            conditions.append(self.denoiser.context(tokens[rows], state[rows]))
        return torch.cat(first), torch.cat(conditions)

    def _embed_actions(self, request: RolloutRequest, owner: Tensor) -> Tensor | None:
        """What each sample's actions add to its time embedding [B*S,F,D]; None for a text model."""
        if request.actions_BSPA is None:
            return None
        actions = torch.from_numpy(np.ascontiguousarray(request.actions_BSPA, np.float32)).flatten(0, 1)
        state = torch.as_tensor(request.proprioception_BKA, dtype=torch.float32)[owner]
        rows = torch.arange(len(owner)).split(self._together)
        made = [self.denoiser.action_embedding(actions[r].to(self.device), state[r].to(self.device)) for r in rows]
        return torch.cat([part for part in made if part is not None])

    @property
    def _latents(self) -> int:
        return 1 + (int(self.settings["frames"]) - 1) // 4

    def _sample(
        self, first_BC1hw: Tensor, conditions_BLD: Tensor, action_BFD: Tensor | None, noise_BCFhw: Tensor
    ) -> Tensor:
        def velocity(x: Tensor, timesteps: Tensor) -> Tensor:
            return self.denoiser(x, timesteps, conditions_BLD, action_BFD=action_BFD)[0]

        shift = float(self.settings["sample_shift"])
        return euler_sample(velocity, first_BC1hw, noise_BCFhw, steps=self.steps, shift=shift)

    def _check(self, request: RolloutRequest) -> None:
        check_request(request, self._spec)
        check_asked(request, self._spec.blocks)
        state, dim = request.proprioception_BKA, self.denoiser.conditioner.config.state_dim
        assert state is not None
        if state.shape[-1] != dim:
            fix = "give the drive targets of the robot that the model was trained on"
            raise UserError("proprioception_BKA", got=f"{state.shape[-1]} numbers", wanted=f"{dim}", fix=fix)


def _noise(seed: int, first_BC1hw: Tensor, latents: int) -> Tensor:
    """Noise of one sample, [C,F,h,w] float32 on the CPU: a function of the seed alone."""
    shape = (first_BC1hw.shape[1], latents, *first_BC1hw.shape[3:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def load_world_model(
    path: Path | str,
    device: str | torch.device = "cpu",
    *,
    codec: Path | str | None = None,
    steps: int | None = None,
    text: TextEmbedder | None = None,
) -> FlowWorldModel:
    """Load a world-model folder. ``codec``: its codec's folder; by default ``vae`` beside the folder.

    Raises ``UserError`` when a part is missing or the codec has other latents than the model was trained on.
    """
    folder = Path(path)
    if not (folder / "world_model.json").is_file():
        raise UserError(
            "world_model",
            got=str(folder),
            wanted="a folder with world_model.json",
            fix="physis train worldmodel, or its path",
        )
    settings = read_json(folder / "world_model.json")
    codec_folder = Path(codec) if codec is not None else folder.parent / "vae"
    found = latents_fingerprint(codec_folder)
    if found != settings["latents_fingerprint"]:
        raise UserError(
            "codec",
            got=f"{codec_folder} ({found})",
            wanted=f"a codec with the latents {settings['latents_fingerprint']} it was trained on",
            fix="pass codec=<folder of that codec>",
        )
    weights = fingerprint(folder)
    return FlowWorldModel(
        load_denoiser(folder, device),
        load_codec(codec_folder, device),
        settings,
        weights_fingerprint=f"{weights}-{fingerprint(codec_folder)}",
        features_fingerprint=f"{weights}-{found}",
        steps=steps,
        text=text,
    )
