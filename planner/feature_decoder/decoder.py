"""Joint targets from the features of one partial denoiser pass (``core.protocols.InverseDynamics``).

Nothing is denoised to a video: resampler and diffusion head read what the blocks of the denoiser say about frames that are still
noise. Row 0 of what the head makes is the pose already reached; the chunk is all rows after it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.types import ActionChunk, DecoderNeeds, Rollout

from ..decoder_checks import check_state, check_times, check_trained, present
from ..inverse_dynamics import GRIPPERS, JOINTS
from .action_head import ActionHead, Memory
from .config import FeatureDecoderConfig, check_config
from .goal import TextEncoder, embed_goals
from .resampler import Resampler
from .sampling import ddim, exponential_sigmas

#: Entries computed in one call on a GPU; on a CPU each is computed alone, so that it is bit-equal wherever it stands in a batch.
TOGETHER = 32
#: Normalisation, and what it is where joints are taken as they are.
STATISTICS = {"target_mean_A": 0.0, "target_scale_A": 1.0, "change_scale_A": 1.0}


class FeatureInverseDynamics(nn.Module):
    """Resampler and action head with their normalisation. ``text`` embeds instructions; it is no part of the weights."""

    target_mean_A: Tensor
    target_scale_A: Tensor
    change_scale_A: Tensor

    def __init__(self, config: FeatureDecoderConfig | None = None, text: TextEncoder | None = None) -> None:
        super().__init__()
        self.config = check_config(config or FeatureDecoderConfig())
        self.text = text
        c = self.config
        self.resampler = Resampler(
            c.resampler, taps=len(c.taps), feature_dim=c.feature_dim, frames=c.latent_frames, grid=c.grid
        )
        self.head = ActionHead(
            c.head,
            rows=c.rows,
            action_dim=c.action_dim,
            goal_dim=c.goal_dim,
            goal_tokens=c.goal_tokens,
            latents=c.latent_frames * c.resampler.latents_per_frame,
            sigma_data=c.sampling.sigma_data,
            proprioception=c.proprioception,
        )
        for name, plain in STATISTICS.items():
            value = float("nan") if c.normalise else plain
            self.register_buffer(name, torch.full((c.action_dim,), value))
        self.fingerprint = "untrained"

    def set_statistics(self, mean_A: Tensor, std_A: Tensor, change_A: Tensor) -> None:
        """Mean and deviation of the training targets and the RMS of their change within a chunk; deviation and change become
        ``sigma_data``. Does nothing where ``normalise`` is off."""
        if self.config.normalise:
            self.target_mean_A.copy_(mean_A)
            self.target_scale_A.copy_(std_A / self.config.sampling.sigma_data)
            self.change_scale_A.copy_(change_A / self.config.sampling.sigma_data)

    def normalised(self, rows_BRA: Tensor, state_BA: Tensor) -> Tensor:
        """Targets (radians, gripper opening) as the head sees them: changes from the drive targets now where it reads those."""
        if self.config.proprioception:
            return (rows_BRA - state_BA[:, None]) / self.change_scale_A
        return (rows_BRA - self.target_mean_A) / self.target_scale_A

    def restored(self, rows_BRA: Tensor, state_BA: Tensor) -> Tensor:
        """Inverse of ``normalised``."""
        if self.config.proprioception:
            return state_BA[:, None] + rows_BRA * self.change_scale_A
        return self.target_mean_A + rows_BRA * self.target_scale_A

    @property
    def needs(self) -> DecoderNeeds:
        return self.config.needs

    def loss(
        self,
        features_BKFhwD: Tensor,
        goal: tuple[Tensor, Tensor],
        state_BA: Tensor,
        rows_BRA: Tensor,
        sigma_B: Tensor,
        noise_BRA: Tensor,
    ) -> Tensor:
        """Score matching on target rows [B,R,A] (row 0: the pose now) at given levels and noise, a float32 scalar."""
        memory = self._memory(features_BKFhwD, goal, state_BA)
        return self.head.loss(self.normalised(rows_BRA, state_BA), sigma_B, noise_BRA, memory)

    def rows(
        self, features_BKFhwD: Tensor, goal: tuple[Tensor, Tensor], state_BA: Tensor, noise_BSRA: Tensor
    ) -> Tensor:
        """DDIM samples [B,S,R,A] in radians and gripper openings. ``noise_BSRA``: unit noise of the S draws of each entry."""
        s, (batch, draws) = self.config.sampling, noise_BSRA.shape[:2]
        memory = self._memory(features_BKFhwD, goal, state_BA).repeat(draws)
        noise = noise_BSRA.to(state_BA.device).flatten(0, 1)
        sigmas = exponential_sigmas(s.steps, s.last_sigma, s.sigma_max)
        found = ddim(lambda x, sigma: self.head.denoise(x, sigma, memory), noise, sigmas)
        return self.restored(found, state_BA.repeat_interleave(draws, dim=0)).unflatten(0, (batch, draws))

    def draw_noise(self, seeds_N: Iterable[int]) -> Tensor:
        """Unit noise [N,draws,R,A] of entries with these seeds, each a function of (``sampling.seed``, its own seed) alone.

        A rollout's seed comes from (episode, replan, candidate), so the noise of a decode does too, wherever it stands in a batch.
        """
        c = self.config
        shape, drawn = (c.sampling.draws, c.rows, c.action_dim), []
        for seed in seeds_N:
            digest = hashlib.sha256(f"feature decoder:{c.sampling.seed}:{int(seed)}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            drawn.append(torch.randn(shape, generator=generator))
        return torch.stack(drawn)

    @torch.inference_mode()
    def decode(
        self, rollout: Rollout, state_BA: NDArray[np.float32], instructions: Sequence[str]
    ) -> list[list[ActionChunk]]:
        """See ``core.protocols.InverseDynamics``. Noise follows the rollout's seeds (``draw_noise``; one that has none counts as seed 0,
        as a recording does). Of several draws the one nearest to their mean becomes the chunk; their deviation
        (RMS over joints, radians) is the spread, None for a single draw. Grippers are clipped to [0, 1]."""
        features = self._check(rollout, state_BA, instructions)
        assert self.text is not None
        batch, samples = features.shape[:2]
        device = self.head.row_position.device
        goal = embed_goals(self.text, instructions, self.config.prompt, self.config.goal_tokens)
        if goal[0].shape[2] != self.config.goal_dim:
            fix = "load the decoder with the encoder that it was trained with: load_decoder(folder, text=...)"
            wanted = f"embeddings of {self.config.goal_dim} numbers a token"
            raise UserError("decoder.text", got=f"{goal[0].shape[2]} numbers", wanted=wanted, fix=fix)
        state, seeds = torch.from_numpy(np.array(state_BA, np.float32)), rollout.seeds_BS
        noise = self.draw_noise([0] * (batch * samples) if seeds is None else seeds.ravel().tolist())
        chunks = []
        for part in torch.arange(batch * samples).split(1 if device.type == "cpu" else TOGETHER):
            of = part // samples
            read = torch.from_numpy(features[of.numpy(), (part % samples).numpy()]).float().to(device)
            words = goal[0][of].to(device), goal[1][of].to(device)
            rows = self.rows(read, words, state[of].to(device), noise[part]).cpu().numpy()
            chunks += [chunk_of(draws) for draws in rows]
        return [chunks[b * samples : (b + 1) * samples] for b in range(batch)]

    def _memory(self, features_BKFhwD: Tensor, goal: tuple[Tensor, Tensor], state_BA: Tensor) -> Memory:
        state = (state_BA - self.target_mean_A) / self.target_scale_A if self.config.proprioception else None
        return self.head.encode(self.resampler(features_BKFhwD), *goal, state)

    def _check(self, rollout: Rollout, state_BA: NDArray, instructions: Sequence[str]) -> NDArray:
        c, features = self.config, present(rollout.features_BSKFhwD, "features")
        check_trained(self.target_mean_A, "feature")
        if self.text is None:
            fix = "FeatureInverseDynamics(config, text=...) or load_feature_decoder(folder, text=...)"
            raise UserError("decoder.text", got=None, wanted="an encoder of instructions", fix=fix)
        wanted = (len(c.taps), c.latent_frames, *c.grid, c.feature_dim)
        if features.ndim != 7 or features.shape[2:] != wanted:
            fix = "use the world model, taps and horizon that the decoder was trained with"
            raise MissingCapabilityError("features_BSKFhwD", got=features.shape, wanted=f"[B,S,{wanted}]", fix=fix)
        check_times(rollout, self.needs)
        check_state(state_BA, len(features), c.action_dim)
        seeds = rollout.seeds_BS
        if seeds is not None and seeds.shape != features.shape[:2]:
            wanted_seeds, fix = f"{features.shape[:2]}, one a sample", "give the seeds of the request"
            raise UserError("seeds_BS", got=seeds.shape, wanted=wanted_seeds, fix=fix)
        if len(instructions) != len(features):
            fix = "one instruction a context"
            raise UserError("instructions", got=len(instructions), wanted=f"{len(features)} sentences", fix=fix)
        return features


def chunk_of(draws_SRA: NDArray[np.float32]) -> ActionChunk:
    """The chunk of S draws of all rows: row 0 dropped, the draw nearest to the mean, deviation over draws as spread."""
    draws = draws_SRA[:, 1:].copy()
    draws[..., GRIPPERS] = draws[..., GRIPPERS].clip(0.0, 1.0)
    mean = draws.mean(0)
    nearest = int(np.square(draws - mean)[..., JOINTS].mean((1, 2)).argmin())
    spread = None
    if len(draws) > 1:
        spread = np.sqrt(draws[..., JOINTS].var(0, ddof=1).mean(-1)).astype(np.float32)
    return ActionChunk(actions_PA=draws[nearest].astype(np.float32), spread_P=spread)
