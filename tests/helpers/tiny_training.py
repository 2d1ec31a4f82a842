"""A world-model training that takes seconds: random latents, conditions and targets, and a network of two blocks."""

from __future__ import annotations

import os

import torch
from safetensors.torch import save_file

from physisforcing.core.files import replace_text
from physisforcing.worldmodel.backbones.wan import ConditionerConfig, WanConfig
from physisforcing.worldmodel.data.batches import BankTargets, WindowBank
from physisforcing.worldmodel.data.window_targets import WindowTargets
from physisforcing.worldmodel.data.windows import WindowTable
from physisforcing.worldmodel.training.config import TrainWorldModelConfig


def bank(seed: int) -> WindowBank:
    """Four episodes of 40 steps with random latents, conditions and targets."""
    generator = torch.Generator().manual_seed(seed)
    table = WindowTable.build([40] * 4, stride=8)
    count, shape = len(table), (3, 4, 5)
    targets = WindowTargets(
        points_WFN2=torch.rand(count, 3, 6, 2, generator=generator),
        visible_WFN=torch.rand(count, 3, 6, generator=generator) > 0.2,
        select_WN=torch.rand(count, 6, generator=generator) > 0.5,
        mask_WFhw=torch.rand(count, *shape, generator=generator) > 0.5,
        teacher_WF=torch.randint(5, (count, 3), generator=generator),
        body_WFhw=torch.zeros(count, 0, *shape[1:], dtype=torch.int32),
        token_WK=torch.zeros(count, 0, dtype=torch.int16),
        relation_WR=torch.zeros(count, 0, dtype=torch.int8),
        teacher_EhwC=torch.randn(5, 4, 5, 8, generator=generator).half(),
        channels=8,
    )
    return WindowBank(
        table=table,
        latents_WCFhw=torch.randn(count, 4, *shape, generator=generator),
        text_SLD=torch.randn(2, 32, 384, generator=generator),
        sentence_W=torch.randint(2, (count,), generator=generator),
        proprioception_WKA=torch.randn(count, 3, 14, generator=generator),
        targets=BankTargets(row_W=torch.arange(count), targets=targets),
        actions_WPA=torch.randn(count, 16, 14, generator=generator),
    )


def config(tmp_path, name: str, steps: int) -> TrainWorldModelConfig:
    made = TrainWorldModelConfig(codec=str(codec_folder(tmp_path)), heldout_windows=4)
    made.run.out, made.run.steps, made.run.batch, made.run.device = str(tmp_path / name), steps, 3, "cpu"
    made.run.log_every, made.run.save_every, made.run.eval_every = 2, 5, 100
    made.optim.warmup = 3
    made.backbone = WanConfig(latent_channels=4, num_heads=2, head_dim=12, num_layers=2, ffn_dim=32, tap=1)
    made.conditioner = ConditionerConfig(hidden=16)
    made.physics.phi_hidden = made.physics.psi_hidden = made.physics.feature_dim = 16
    return made


def codec_folder(tmp_path, name="codec", settings="{}"):
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    part = folder / f"{os.getpid()}.part"  # two ranks may come here at once, and one of them read already
    save_file({"encode_in.weight": torch.zeros(2)}, part)
    os.replace(part, folder / "weights.safetensors")
    replace_text(folder / "config.json", settings)  # only its fingerprint is read
    return folder
