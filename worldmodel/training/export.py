"""The model of a run as a plain world-model folder, whatever the run did to it: sharded weights put together, adapters merged."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..backbones.wan import WanDenoiser, build_denoiser
from ..data.batches import WindowBank
from ..model import save_world_model
from ..physics.forcing import PhysisForcing
from ..storage import latents_fingerprint
from .config import TrainWorldModelConfig
from .lora import merged, save_adapter
from .parallel import whole
from .processes import Processes


def export_world_model(
    folder: Path,
    model: nn.ModuleDict,
    config: TrainWorldModelConfig,
    bank: WindowBank,
    dtype: torch.dtype | None,
    processes: Processes,
) -> None:
    """Write ``denoiser`` and ``forcing`` of ``model`` into ``folder``, with LoRA merged and also as ``adapter/``. ``dtype``: stored
    precision (None: as it is). Every process takes part in putting weights together, and the first writes."""
    live: WanDenoiser = model["denoiser"]  # type: ignore[assignment]
    forcing: PhysisForcing | None = model["forcing"] if "forcing" in model else None  # type: ignore[assignment]
    denoiser = live
    if processes.many or config.lora.rank:
        state = _gathered(live, processes)
        if not processes.first:
            return
        denoiser = _plain(config, live, merged(state, config.lora))
        if config.lora.rank:
            save_adapter(state, config.lora, live.transformer, folder / "adapter", dtype)
    starts = bank.table.start_W.to(bank.proprioception_WKA.device)
    save_world_model(
        folder,
        denoiser,
        forcing,
        sample_shift=config.flow.sample_shift,
        latents_fingerprint=latents_fingerprint(Path(config.codec)),
        home_state=bank.proprioception_WKA[starts == 0, 0].median(0).values.tolist(),
        dtype=dtype,
    )


def _gathered(denoiser: nn.Module, processes: Processes) -> dict[str, Tensor]:
    """The whole state of ``denoiser`` on the CPU of the first process; the others keep nothing."""
    state = {}
    for name, value in denoiser.state_dict().items():
        together = whole(value.detach())
        if processes.first:
            state[name] = together.to("cpu", copy=True)
    return state


def _plain(config: TrainWorldModelConfig, live: WanDenoiser, state: dict[str, Tensor]) -> WanDenoiser:
    """A denoiser like ``live`` with these weights, on the CPU, made without drawing random numbers."""
    with torch.device("meta"):
        made = build_denoiser(config.backbone, config.conditioner)
        if live.actions is not None:
            made.add_actions(live.actions.config)
    made.load_state_dict(state, assign=True)
    return made
