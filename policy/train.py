"""``physis train policy``: the command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

HELP = """usage: physis train policy [experiment=policy_pico] [key=value ...]

  physis train policy run.init=runs/worldmodel/export codec=runs/vae/codec data.roots=[runs/bell] run.out=runs/policy
  physis train policy run.resume=true ...                    continue from the last complete checkpoint
  physis train policy experiment=policy_nano run.init=random:runs/worldmodel/export ...    its architecture with drawn weights
  physis train policy video_weight=0 ...                     the same model without the video's loss
  physis train policy run.init=shipped freeze_video=true video_weight=0 ...    the action expert alone
  physis train policy physics=recommended ...                the physics losses stay on
  physis train policy policy.mode=optional_idm ...           actions that may also see an imagined future
  physis train policy run.init=runs/policy/export ...        a policy is trained further
  physis train policy experiment=policy_robotwin model=wan22-5b data.latents=[runs/windows] run.out=runs/5b    a large backbone
  torchrun --nproc_per_node=8 -m physisforcing train policy ...    in eight processes; run.batch is that of all together

The recipes want a GPU. To see all of it on a CPU: run.steps=20 run.batch=8 (run.micro=8 computes a large batch in parts).

run.init is a world model's export (or shipped), whose transformer becomes the video backbone, or a policy; without it all is drawn, and with
model=, the pipeline folder of a large backbone, the video is that folder's. data.latents are then what physis data latents canvas=... made. Statistics of
states and actions are those of the training episodes and lie beside the weights. Fields and defaults: policy/training_config.py,
policy/config.py (docs/policy.md). A run folder holds config.yaml, provenance.json, metrics.jsonl, checkpoints and the policy (export/)."""


def main(argv: Sequence[str]) -> int:
    """``argv``: Hydra overrides. Prints the folder of the policy; exit code 1 where a loss or gradient was not finite."""
    if any(word in ("-h", "--help") for word in argv):
        print(HELP)
        return 0
    from physisforcing.core.config import compose, typed_fields

    from .training import train_policy
    from .training_config import TrainPolicyConfig

    try:
        config = compose("train_policy", list(argv), TrainPolicyConfig)
        print(train_policy(config, typed=typed_fields(argv)))
    except FloatingPointError as error:
        print(f"physis: {error}", file=sys.stderr)
        return 1
    return 0
