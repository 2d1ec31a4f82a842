"""``physis train vae`` and ``physis train worldmodel``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from physisforcing.core.errors import unknown_name

KINDS = ("vae", "worldmodel")

HELP = """usage: physis train {vae|worldmodel} [experiment=pico] [key=value ...]

  physis train vae data.roots=[runs/bell] run.out=runs/vae run.steps=3000
  physis train worldmodel experiment=pico codec=runs/vae/codec data.roots=[runs/bell,runs/stack] run.out=runs/worldmodel
  physis train worldmodel experiment=pico run.resume=true ...        continue from the last complete checkpoint
  physis train worldmodel physics=none ...                           flow matching without the physics losses
  physis train worldmodel run.init=runs/worldmodel/export lora.rank=32 ...   adapters on a trained model (needs peft)
  physis train worldmodel experiment=pf_wan_5b model=wan22-5b data.latents=[runs/latents] run.out=runs/5b    a large backbone
  physis train worldmodel experiment=pf_wan_5b model=wan22-5b data.roots=[runs/bell] run.out=runs/5b    the same without a store
  torchrun --nproc_per_node=2 -m physisforcing train worldmodel ...  in two processes; run.batch is that of both together

SIGTERM, or Ctrl-C once, saves after the update under way and ends with exit code 3; run.resume=true continues. A loss or gradient that
is not finite stops the run (exit code 1) or, with run.nonfinite=skip, leaves that update out; the log names step and windows.

model= is the pipeline folder of a large backbone, data.latents what physis data latents made for it; its recipes are experiment=pf_wan_5b,
pf_wan_a14b, pf_cosmos3_nano and lora_24gb (docs/training.md). data.roots in place of data.latents encodes the windows of datasets and
clips while the run trains, as data.live.buckets, stride, fps, camera, ... and teacher= say (the fields of physis data latents).

Fields and defaults: worldmodel/training/config.py. A run folder holds config.yaml, provenance.json, metrics.jsonl, checkpoints
step-000500 and the trained model (codec/ or export/)."""


def main(argv: Sequence[str]) -> int:
    """``argv``: the kind of training, then Hydra overrides. Prints the folder of the trained model."""
    if not argv or argv[0] in ("-h", "--help") or "--help" in argv or "-h" in argv:
        print(HELP)
        return 0
    kind, overrides = argv[0], list(argv[1:])
    if kind not in KINDS:
        raise unknown_name("train", kind, KINDS, see="physis train --help")
    try:
        print(_train(kind, overrides))
    except FloatingPointError as error:
        print(f"physis: {error}", file=sys.stderr)
        return 1
    return 0


def _train(kind: str, overrides: list[str]) -> Path:
    """The folder of the trained model."""
    from physisforcing.core.config import compose

    from .config import TrainVaeConfig, TrainWorldModelConfig

    if kind == "vae":
        from .vae import train_vae

        # Experiments of the two trainings have different fields, so the autoencoder's live in a group of their own.
        named = [
            entry.replace("experiment=", "vae=", 1) if entry.startswith("experiment=") else entry for entry in overrides
        ]
        return train_vae(compose("train_vae", named, TrainVaeConfig))
    from .worldmodel import train_world_model

    return train_world_model(compose("train_worldmodel", overrides, TrainWorldModelConfig))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
