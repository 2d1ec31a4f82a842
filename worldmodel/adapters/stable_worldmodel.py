"""An action-conditioned ``WorldModel`` as stable-worldmodel's ``Dynamics`` and ``Costable``, so that its solvers (CEM, iCEM, MPPI) plan with it.

stable-worldmodel is not needed: its protocols are structural. Solvers draw candidates round 0 with spread 1; here candidate c means the
drive target ``action_mean + action_scale * c``, clipped to the limits. Gradients do not pass, so its gradient solvers do not work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.protocols import WorldModel
from physisforcing.core.requests import rollout_in_parts
from physisforcing.core.types import RolloutRequest

Embed = Callable[[NDArray[np.uint8]], Tensor]


def pooled_pixels(cells: int = 12) -> Embed:
    """Pictures uint8 [N,H,W,3] -> float32 [N, 3*cells*cells]: means over a grid, in 0..1. The simplest distance between pictures."""

    def embed(pictures_NHWC: NDArray[np.uint8]) -> Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(pictures_NHWC)).permute(0, 3, 1, 2).float() / 255
        return torch.nn.functional.adaptive_avg_pool2d(pixels, cells).flatten(1)

    return embed


class StableWorldModel:
    """``encode``, ``rollout`` (``Dynamics``), ``criterion`` and ``get_cost`` (``Costable``) over a world model with actions.

    Keys of ``info``, as the solvers pass them: ``pixels`` and ``goal`` [B,S,T,C,H,W] (uint8, or floats in 0..1; the model's view size),
    ``proprio`` [B,S,T,A] where the model wants joint targets (one row for all lags, at rest, or one row a lag, oldest first), ``instruction``
    (B sentences) where it differs from ``instruction`` here. An action block of n puts n control steps in one planning step:
    ``action_candidates`` [B,S,T,n*A]. ``horizon``: frames to imagine, the shortest by default. ``seed``: the same noise for all candidates, so
    that they differ by their actions alone. Raises ``MissingCapabilityError`` for a model without actions or without frames.
    """

    def __init__(
        self,
        world_model: WorldModel,
        *,
        embed: Embed | None = None,
        instruction: str = "",
        horizon: int | None = None,
        seed: int = 0,
        action_mean: NDArray[np.floating[Any]] | None = None,
        action_scale: NDArray[np.floating[Any]] | None = None,
    ) -> None:
        spec = world_model.spec
        actions = spec.action_spec
        if "actions" not in spec.conditions or actions is None or "frames" not in spec.returns:
            got = f"conditions {sorted(spec.conditions)}, returns {sorted(spec.returns)}"
            fix = "a model trained with actions: solvers search over them"
            raise MissingCapabilityError("world_model", got=got, wanted="actions and frames", fix=fix)
        self.world_model, self.instruction, self.seed = world_model, instruction, seed
        self.embed = embed or pooled_pixels()
        self.horizon = min(spec.horizons) if horizon is None else horizon
        self.rows = round((self.horizon - 1) * spec.frame_dt / actions.dt)
        self.low, self.high = np.asarray(actions.low, np.float32), np.asarray(actions.high, np.float32)
        self.action_mean = np.asarray((self.low + self.high) / 2 if action_mean is None else action_mean, np.float32)
        self.action_scale = np.asarray((self.high - self.low) / 2 if action_scale is None else action_scale, np.float32)
        for name, values in (("action_mean", self.action_mean), ("action_scale", self.action_scale)):
            if values.shape != self.low.shape or not np.isfinite(values).all():
                fix = f"give {name}: means and spreads of your actions"
                raise UserError(name, got=list(values.shape), wanted=f"{len(self.low)} finite numbers", fix=fix)

    def targets(self, action_candidates: Tensor) -> NDArray[np.float32]:
        """Candidates [...,T,n*A] -> drive targets float32 [...,T*n,A], in the limits: what a plan means for the robot."""
        dim = len(self.low)
        if action_candidates.shape[-1] % dim:
            got = action_candidates.shape[-1]
            raise UserError(
                "action_candidates", got=got, wanted=f"a multiple of {dim}", fix="see PlanConfig.action_block"
            )
        flat = action_candidates.detach().float().cpu().numpy()
        rows = flat.reshape(*flat.shape[:-2], -1, dim)
        return (self.action_mean + self.action_scale * rows).clip(self.low, self.high).astype(np.float32)

    def encode(self, x: dict[str, Any]) -> dict[str, Any]:
        """``x["pixels"]`` [B,T,C,H,W] -> ``x["emb"]`` [B,T,D], added to ``x``."""
        pictures = as_pictures(x["pixels"], "pixels")
        batch, frames = pictures.shape[:2]
        x["emb"] = self.embed(pictures.reshape(batch * frames, *pictures.shape[2:])).unflatten(0, (batch, frames))
        return x

    def rollout(self, info_dict: dict[str, Any], action_candidates: Tensor) -> dict[str, Any]:
        """Adds ``predicted_emb`` [B,S,T,D]: the imagined frames of every candidate [B,S,T,n*A], the present one included."""
        actions_BSPA = self.targets(action_candidates)
        batch, samples, rows = actions_BSPA.shape[:3]
        if rows != self.rows:
            wanted = f"{self.rows} control steps, which {self.horizon} frames last"
            raise UserError("action_candidates", got=rows, wanted=wanted, fix="PlanConfig: horizon * action_block")
        together = max(1, self.world_model.spec.max_batch // batch)
        parts = [self._embedded(info_dict, actions_BSPA[:, i : i + together]) for i in range(0, samples, together)]
        info_dict["predicted_emb"] = torch.cat(parts, dim=1).to(action_candidates.device)
        return info_dict

    def criterion(self, info_dict: dict[str, Any], action_candidates: Tensor | None = None) -> Tensor:
        """Squared distance between the last imagined frame and the goal: [B,S]. Needs ``predicted_emb`` and ``goal_emb`` [B,T,D]."""
        last, goal = info_dict["predicted_emb"][:, :, -1], info_dict["goal_emb"][:, None, -1].detach()
        return (last - goal.to(last.device)).square().sum(-1)

    def get_cost(self, info_dict: dict[str, Any], action_candidates: Tensor) -> Tensor:
        """Costs [B,S] of candidates [B,S,T,n*A]: encodes the goal where ``goal_emb`` is missing, rolls out, compares."""
        if "goal_emb" not in info_dict:
            if "goal" not in info_dict:
                raise UserError(
                    "info", got=sorted(info_dict), wanted="a goal picture", fix="info['goal'] [B,S,T,C,H,W]"
                )
            info_dict["goal_emb"] = self.encode({"pixels": info_dict["goal"][:, 0]})["emb"]
        return self.criterion(self.rollout(info_dict, action_candidates), action_candidates)

    def _embedded(self, info: dict[str, Any], actions_BSPA: NDArray[np.float32]) -> Tensor:
        spec = self.world_model.spec
        batch, samples = actions_BSPA.shape[:2]
        context = as_pictures(info["pixels"][:, 0, -spec.context_frames :], "pixels")
        request = RolloutRequest(
            context_BVTHWC=context[:, None],
            instructions=[
                str(text)
                for text in np.asarray(info.get("instruction", [self.instruction] * batch)).reshape(batch, -1)[:, 0]
            ],
            seeds_BS=np.full((batch, samples), self.seed, np.int64),
            horizon=self.horizon,
            proprioception_BKA=self._proprioception(info) if spec.proprioception_lags else None,
            actions_BSPA=actions_BSPA,
        )
        frames = rollout_in_parts(self.world_model, request, spec.max_batch).frames_BSVTHWC
        assert frames is not None
        pictures = frames[:, :, 0]  # the first view, as in ``pixels``
        flat = self.embed(pictures.reshape(-1, *pictures.shape[3:]))
        return flat.unflatten(0, pictures.shape[:3])

    def _proprioception(self, info: dict[str, Any]) -> NDArray[np.float32]:
        lags = len(self.world_model.spec.proprioception_lags)
        if "proprio" not in info:
            fix = f"info['proprio'] [B,S,1 or {lags},A]"
            raise UserError("info", got=sorted(info), wanted="proprio, the joint targets now", fix=fix)
        rows_BTA = np.asarray(info["proprio"], np.float32)[:, 0]
        if rows_BTA.shape[1] not in (1, lags):
            fix = "the row of now alone, or one row a lag"
            raise UserError("info['proprio']", got=f"{rows_BTA.shape[1]} rows", wanted=f"1 or {lags} rows", fix=fix)
        return np.broadcast_to(rows_BTA[:, ::-1], (len(rows_BTA), lags, rows_BTA.shape[2])).copy()


def as_pictures(pixels: Any, name: str) -> NDArray[np.uint8]:
    """Channels-first pictures [...,3,H,W], uint8 or floats in 0..1 -> uint8 [...,H,W,3]. Raises ``UserError`` for normalised ones."""
    array = pixels.detach().cpu().numpy() if torch.is_tensor(pixels) else np.asarray(pixels)
    if array.ndim < 3 or array.shape[-3] != 3:
        raise UserError(name, got=list(array.shape), wanted="[...,3,H,W]", fix="channels first, three of them")
    if array.dtype != np.uint8:
        if not np.isfinite(array).all() or array.min() < -1e-3 or array.max() > 1 + 1e-3:
            got, fix = f"{array.min():.3g} to {array.max():.3g}", "leave out mean and std of the picture transform"
            raise UserError(name, got=got, wanted="uint8, or floats in 0..1", fix=fix)
        array = (array.clip(0, 1) * 255).round().astype(np.uint8)
    return np.ascontiguousarray(np.moveaxis(array, -3, -1))
