"""Pictures of one held-out window at every evaluation, in TensorBoard where it is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from physisforcing.core.errors import UserError

from ..codec import load_codec, to_uint8
from ..data.batches import WindowBank
from ..pictures.files import draw
from ..pictures.predict import predict
from ..pictures.window import Window, relations, shown_pictures
from .steplog import StepLog

if TYPE_CHECKING:
    from .worldmodel import Trainer

#: Held-out windows among which the one with the most selected points is shown.
CANDIDATES = 16
#: Noise level at which the model is looked at.
SIGMA = 0.5


@torch.no_grad()
def heldout_pictures(trainer: Trainer, bank: WindowBank, step: int, log: StepLog) -> None:
    """Show the mask, relations and predicted tracks of a held-out window as ``heldout/<panel>``: every time the same window, with the
    same noise, by the averaged weights. Does nothing without TensorBoard or without physics losses; a codec that cannot be loaded
    costs the pictures, not the run, and is told in the log.
    """
    forcing = trainer.forcing
    if not log.takes_pictures or forcing is None or bank.targets is None:
        return
    try:
        codec = load_codec(trainer.config.codec, trainer.device)
    except UserError as error:
        log.event({"step": step, "pictures": f"not drawn: {error}"})
        return
    if trainer.shown is None:
        candidates = bank.physics_rows()
        rows = candidates[torch.linspace(0, len(candidates) - 1, min(CANDIDATES, len(candidates))).long()]
        selected = bank.targets.batch(rows.to(trainer.device))["select_BN"].sum(1).cpu()
        trainer.shown = rows[[int(selected.argmax())]]
    row = trainer.shown
    batch = bank.batch(row.to(trainer.device))
    targets, latents, physics = batch["targets"], batch["latents_BCFhw"], forcing.config
    frames = to_uint8(codec.decode(latents))[0].cpu().numpy()
    start = int(bank.table.start_W[row])
    window = Window(
        title=f"held-out window {int(row)}, from control step {start} of its episode; pictures decoded from latents",
        name=f"heldout_{int(row):06d}",
        start=start,
        pictures_FHWC=frames[shown_pictures(len(frames), physics)],
        mask_Fhw=targets["token_mask_BFhw"][0].cpu().numpy(),
        relations=relations(targets, physics, trainer.config.teacher.encoder.name),
    )
    conditions = batch["text_BLD"], batch["proprioception_BKA"]
    with trainer.averaged():
        window.prediction = predict(
            trainer.denoiser,
            forcing,
            latents,
            *conditions,
            targets,
            window.relations,
            sigma=SIGMA,
            model=f"the model after {step} steps",
            actions_1PA=batch["actions_BPA"],
        )
    for name, image in draw(window).items():
        log.picture(f"heldout/{name}", image, step)
