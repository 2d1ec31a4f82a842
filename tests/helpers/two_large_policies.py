"""Policy trainings on a tiny large backbone in two gloo processes, for tests/numerics/test_policy_large_distributed.py: ``python
two_large_policies.py FOLDER``. ``FOLDER`` has the pipeline ``ti2v`` and the latent store ``store``."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import tiny_large_policy
from physisforcing.policy.training import PolicyTrainer, train_policy
from physisforcing.policy.training_config import TrainPolicyConfig
from physisforcing.policy.training_start import adopt, prepare_policy_banks
from physisforcing.worldmodel.training.optim import is_sharded, local
from physisforcing.worldmodel.training.processes import Processes
from ranks import both

STEPS = 2
#: Name of a case -> what its command says beside the recipe.
CASES = {
    "full": ["optim.ema=0", "run.micro=1"],
    "frozen": ["freeze_video=true", "video_weight=0", "run.checkpointing=selective", "run.micro=0"],
    "spread": ["run.steps=1", "freeze_video=true", "video_weight=0", "run.sharding=weights"],
    "drawn": ["run.init=random:MODEL", "policy.initial=random", "run.steps=1"],
}


def settings(folder: Path, case: str, name: str) -> TrainPolicyConfig:
    words = [word.replace("MODEL", str(folder / "ti2v")) for word in CASES[case]]
    made = tiny_large_policy.config(
        folder / "ti2v",
        folder / "store",
        folder / name,
        "run.batch=4",
        "run.resume=true",
        f"run.steps={STEPS}",
        "run.save_every=1",
        *words,
    )
    return made


def train(folder: Path, case: str, name: str, source: str = "") -> None:
    """``source``: the run whose first half this one goes on from."""
    if source and os.environ.get("RANK", "0") == "0":  # the other waits for it where they meet
        shutil.copytree(folder / source / "step-000001", folder / name / "step-000001")
    train_policy(settings(folder, case, name))


def parts(folder: Path, case: str) -> None:
    """Write how much of the weights a process holds."""
    processes = Processes.start("cpu")
    made = settings(folder, case, "parts")
    adopt(made)
    bank = prepare_policy_banks(made, processes.device, quiet=True)[0]
    trainer = PolicyTrainer(made, bank, processes.device, processes)
    found = {name: [local(p).numel(), p.numel(), is_sharded(p)] for name, p in trainer.policy.named_parameters()}
    (folder / f"parts-{case}-{processes.rank}.json").write_text(json.dumps(found))
    processes.close()


def main(folder: Path) -> None:
    train(folder, "drawn", "first")  # imports what is imported late
    for name in ("checkpoint", "fsdp"):
        importlib.import_module(f"torch.distributed.{name}")
    both(
        *(lambda case=case: train(folder, case, f"two-{case}") for case in CASES),  # type: ignore[misc]
        lambda: train(folder, "full", "halves-full", source="two-full"),
        lambda: train(folder, "full", "one-to-two", source="one-full"),
        *(lambda case=case: parts(folder, case) for case in ("full", "frozen", "spread")),  # type: ignore[misc]
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
