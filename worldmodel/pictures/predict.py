"""What a world model's features say of a window: where they find the points, eq. (5)-(7), and what they find alike, eq. (11)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from physisforcing.core.episodes import EpisodeSource
from physisforcing.core.errors import UserError
from physisforcing.core.paths import weights_root

from ..backbones.wan import WanDenoiser
from ..data.windows import lagged_states, resize_area, window_actions, window_steps
from ..flow_matching import add_noise, frame_timesteps
from ..model import load_heads, load_world_model
from ..physics.config import PhysicsConfig
from ..physics.forcing import PhysisForcing
from ..physics.relation import gather_tokens, relation_matrix
from ..physics.trajectory import soft_argmax
from .window import Prediction, Relations, Window

#: Seed of the noise: pictures of two models are made with the same.
NOISE_SEED = 0


def check_sigma(sigma: float) -> None:
    """``UserError`` for what is no noise level."""
    if not 0 < sigma <= 1:
        raise UserError("--sigma", got=sigma, wanted="a noise level above 0 and up to 1", fix="use --sigma 0.5")


def predict_window(
    folder: str | Path,
    dataset: EpisodeSource,
    episode: int,
    window: Window,
    batch: Mapping[str, Tensor],
    physics: PhysicsConfig,
    *,
    sigma: float = 0.5,
    codec: str | Path | None = None,
) -> Prediction:
    """What the world model in ``folder`` (``shipped``: the one in this package) says of a window at noise level ``sigma``.

    ``batch``: the window's targets, as ``load_window`` gives them. Raises ``UserError`` for a sigma outside (0, 1], and for a model
    without physics heads or with another token grid.
    """
    check_sigma(sigma)
    path = weights_root() / "worldmodel" if str(folder) == "shipped" else Path(folder)
    model = load_world_model(path, codec=codec)
    forcing = load_forcing(path, physics)
    info, lags = dataset.episode(episode), model.spec.proprioception_lags
    frames = dataset.frames(episode, window_steps(window.start, info.length).tolist())
    if frames.shape[1:3] == (240, 320):
        frames = resize_area(frames)
    states = np.asarray(dataset.columns(episode)["observation.state"], dtype=np.float32)
    with torch.no_grad():
        latents = model.codec.encode(torch.from_numpy(frames)[None])
        grid, wanted = tuple(latents.shape[2:]), tuple(batch["token_mask_BFhw"].shape[1:])
        if grid != wanted:
            fix = "use a dataset recorded at 240x320 or 120x160, and a model of its size"
            raise UserError("--model", got=f"tokens {grid}", wanted=f"the tokens {wanted} of the targets", fix=fix)
        text = model.text.batch([info.instruction])[0]
        state = torch.from_numpy(lagged_states(states, window.start, lags))[None]
        actions = torch.from_numpy(window_actions(states, window.start))[None]
    name = f"{model.spec.name} {model.spec.fingerprint}"
    inputs = latents, text, state, batch, window.relations
    return predict(model.denoiser, forcing, *inputs, sigma=sigma, model=name, actions_1PA=actions)


@torch.no_grad()
def predict(
    denoiser: WanDenoiser,
    forcing: PhysisForcing,
    latents_1CFhw: Tensor,
    text_1LD: Tensor,
    proprioception_1KA: Tensor,
    batch: Mapping[str, Tensor],
    relations: Relations | None,
    *,
    sigma: float,
    model: str,
    actions_1PA: Tensor | None = None,
) -> Prediction:
    """One forward pass at ``sigma`` with fixed noise; everything on the denoiser's device. ``actions_1PA``: read by an action model."""
    device = latents_1CFhw.device
    noise = torch.randn(latents_1CFhw.shape, generator=torch.Generator().manual_seed(NOISE_SEED)).to(device)
    level = torch.full((1,), sigma, device=device)
    _, tapped = denoiser(
        add_noise(latents_1CFhw.float(), noise, level),
        frame_timesteps(level, latents_1CFhw.shape[2]),
        denoiser.context(text_1LD, proprioception_1KA),
        action_BFD=denoiser.action_embedding(actions_1PA, proprioception_1KA),
        need_tap=True,
    )
    assert tapped is not None
    grid = tuple(latents_1CFhw.shape[2:])
    targets = {name: value.to(device) for name, value in batch.items()}
    out = forcing(tapped, grid, targets, sigma_B=level)
    found = forcing.match(forcing.features(tapped.float().unflatten(1, grid)), targets)
    student = torch.zeros(0, 0)
    if relations is not None:
        index = torch.from_numpy(relations.token_K)[None].to(device)
        common = torch.ones_like(index, dtype=torch.bool) if forcing.config.common == "remove" else None
        student = relation_matrix(forcing.psi(gather_tokens(tapped.float(), index)), common)[0]
    terms = {"pix": out.pix, "sem": out.sem, **out.metrics}
    return Prediction(
        model=model,
        sigma=sigma,
        points_FN2=soft_argmax(found.logits_BFNL, found.grid)[0].float().cpu().numpy(),
        target_FN2=found.target_BFN2[0].cpu().numpy(),
        weight_FN=found.weight_BFN[0].cpu().numpy(),
        student_KK=student.float().cpu().numpy(),
        metrics={name: float(value) for name, value in terms.items()},
    )


def load_forcing(folder: Path, physics: PhysicsConfig) -> PhysisForcing:
    """The physics heads of a world-model folder, with their own widths in the config. Raises ``UserError`` where it has none."""
    from safetensors import safe_open

    path = folder / "physics_heads.safetensors"
    if not path.is_file():
        fix = "name a model that was trained with the physics losses, or --model shipped"
        raise UserError("--model", got=str(folder), wanted="a model with physics_heads.safetensors", fix=fix)
    with safe_open(path, framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)
    config = replace(
        physics,
        phi_hidden=shapes["phi.1.weight"][0],
        feature_dim=shapes["phi.5.weight"][0],
        psi_hidden=shapes["psi.1.weight"][0],
        temperature="learnable" if "temperature_place" in shapes else "fixed",
        weights="fixed",
    )
    forcing = PhysisForcing(config, width=shapes["phi.1.weight"][1], teacher_dim=shapes["psi.5.weight"][0])
    load_heads(forcing, folder)
    return forcing.eval().requires_grad_(False)
