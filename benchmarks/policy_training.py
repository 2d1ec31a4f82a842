"""Updates of `physis train policy` at full size, with the trainer itself, against an unoptimised version in the same run.

    python benchmarks/policy_training.py --json policy_training.json                       # on one GPU of 139 GB
    python benchmarks/policy_training.py --gpus 2 --json policy_training.json              # spread over two GPUs of 80 GB
    python benchmarks/policy_training.py --arms frozen_plain,frozen --json policy_training.json      # fits one of 80 GB
    python benchmarks/policy_training.py --tiny                                            # rehearsed on a CPU, in seconds

Wan2.2-TI2V-5B's transformer with the 1.02 B action expert (6.02 B parameters, drawn), windows as policy_robotwin trains on them: 9 pictures
of 33 steps on a canvas of 384x320, which are 3 latent frames of 120 tokens, 32 actions, 128 text tokens. Latents, sentences and actions are
drawn; they lie in a store as `physis data latents` writes one. An update is the trainer's: read, forward, backward, clip, AdamW in float32.
No average is kept (optim.ema=0), nothing is saved. Arms:

plain          eager, every block computed again, one attention call with a dense mask, modulations expanded to one row a token: the
               published way of computing the same numbers
ours           compiled blocks, a call for each run of queries that see the same keys, a row a latent frame, a share of the activations kept
ours_full      the same, every block computed again          ours_none      all activations kept
frozen_plain   as plain, the action expert alone is trained (freeze_video, no video loss)        frozen      as ours, so

All train the same weights on the same windows with the same noise: ``first_loss`` of an arm and of the first one differ by rounding. Each arm
is a process of its own (with --tiny one after the other in this one), and its lines are written before the next begins. ``step_ms`` is the
median over the updates behind the warm-up, with the 5th and 95th percentile; MFU counts what `policy/flops.py` does, no recomputation.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import paper_pipelines
import torch

from physisforcing.planner.measurements import machine_provenance, measurement, placeless, write_measurements
from physisforcing.policy import mixture
from physisforcing.policy.config import PolicyModelConfig
from physisforcing.policy.model import WorldActionModel
from physisforcing.policy.training import PolicyTrainer
from physisforcing.policy.training_config import TrainPolicyConfig
from physisforcing.policy.training_start import adopt, prepare_policy_banks
from physisforcing.worldmodel.training.flops import peak_flops
from physisforcing.worldmodel.training.processes import Processes
from physisforcing.worldmodel.training.runtime import choose_kernels

HELPERS = Path(__file__).resolve().parents[1] / "tests" / "helpers"
#: Name -> computed the published way, what is computed again, compiled, whether the video is frozen.
ARMS: dict[str, tuple[bool, str, str, bool]] = {
    "plain": (True, "full", "none", False),
    "ours": (False, "selective", "blocks", False),
    "ours_full": (False, "full", "blocks", False),
    "ours_none": (False, "none", "blocks", False),
    "frozen_plain": (True, "full", "none", True),
    "frozen": (False, "selective", "blocks", True),
}
TINY = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "ffn_dim": 64,
    "text_dim": 16,
    "freq_dim": 32,
}


def write_inputs(work: Path, tiny: bool) -> None:
    """``model/transformer/config.json``, an architecture without weights, and ``store``, drawn windows."""
    shape = paper_pipelines.TRANSFORMERS["5b"] | (TINY if tiny else {})
    folder = work / "model" / "transformer"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel", **shape}))
    sys.path.insert(0, str(HELPERS))
    import tiny_large_policy

    size = {"channels": int(shape["in_channels"]), "text": int(shape["text_dim"])}
    tiny_large_policy.store(work / "store", episodes=4 if tiny else 16, windows=2, **size)


def recipe(work: Path, arm: str, options: argparse.Namespace) -> TrainPolicyConfig:
    """experiment=policy_robotwin with drawn weights, as ``arm`` computes it."""
    _, checkpointing, compiled, frozen = ARMS[arm]
    sizes = {"width": 32, "ffn_dim": 48} if options.tiny else {"width": 1024, "ffn_dim": 4096}
    made = TrainPolicyConfig(model=str(work / "model"), freeze_video=frozen, video_weight=0.0 if frozen else 1.0)
    made.policy = PolicyModelConfig(steps_per_latent=16.0, proprioception="linear", video_shift=5.0, **sizes)
    made.data.latents, made.data.heldout = [str(work / "store")], 0
    made.run.init, made.run.device = f"random:{work / 'model'}", "cpu" if options.tiny else "cuda"
    made.run.steps, made.run.batch = options.warmup + options.updates, options.gpus * options.batch
    made.run.micro, made.run.checkpointing = options.micro, checkpointing
    made.run.compile = "none" if options.tiny else compiled
    made.optim.lr, made.optim.warmup, made.optim.final_lr, made.optim.ema = 1e-4, 5, 0.01, 0.0
    return made


@contextlib.contextmanager
def published_way() -> Iterator[None]:
    """Inside, a joint sequence is one attention call with a dense mask, and every token has a modulation row of its own."""
    attend, video = mixture.attend, WorldActionModel._video

    def dense(query: Any, key: Any, value: Any, groups: Any, visible_BL: Any = None) -> Any:
        assert visible_BL is None, "first_frame alone"
        seen = torch.zeros(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        for (begin, end), runs in groups:
            for first, last in runs:
                seen[begin:end, first:last] = True
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)

    def expanded(self: Any, *inputs: Any) -> Any:
        stream, temb, tokens = video(self, *inputs)
        rows = stream.modulation_BF6D.repeat_interleave(tokens, 1)
        return stream._replace(modulation_BF6D=rows), temb, tokens

    mixture.attend, WorldActionModel._video = dense, expanded  # type: ignore[method-assign]
    try:
        yield
    finally:
        mixture.attend, WorldActionModel._video = attend, video  # type: ignore[method-assign]


def train(work: Path, arm: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """The updates of an arm in this process, or its part of them; what the first process measured."""
    config = recipe(work, arm, options)
    processes = Processes.start(config.run.device)
    try:
        adopt(config)
        choose_kernels(processes.device, False)
        begun = time.perf_counter()
        bank, _ = prepare_policy_banks(config, processes.device, quiet=True)
        with published_way() if ARMS[arm][0] else contextlib.nullcontext():
            trainer = PolicyTrainer(config, bank, processes.device, processes)
            _wait(processes.device)
            built = time.perf_counter() - begun
            found = updates(trainer, options) | {"built_s": round(built, 1)}
        bank.close()
        return found if processes.first else None
    finally:
        processes.close()


def updates(trainer: PolicyTrainer, options: argparse.Namespace) -> dict[str, Any]:
    times, losses, waits = [], [], []
    device = trainer.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for step in range(options.warmup + options.updates):
        begun = time.perf_counter()
        terms = trainer.step(step)
        _wait(device)
        times.append(1e3 * (time.perf_counter() - begun))
        losses.append({name: float(terms[name]) for name in ("loss", "action", "video", "grad_norm") if name in terms})
        waits.append(trainer.wait_s)
        trainer.guard.check()
        if trainer.processes.first:
            print(f"  update {step + 1}: {times[-1]:.1f} ms, loss {losses[-1]['loss']:.4f}", flush=True)
    experts = sum(p.numel() for _, p in trainer.policy.action_parameters())
    found: dict[str, Any] = {
        "times": times, "losses": losses, "operations": trainer.operations, "peak": peak_flops(device),
        "data_wait_ms": round(1e3 * float(np.median(waits)), 3), "expert_parameters": experts,
        "video_parameters": sum(p.numel() for p in trainer.policy.parameters()) - experts,
        "trained_parameters": sum(p.numel() for p in trainer.trained), "spread": trainer._spread,
    }  # fmt: skip
    if device.type == "cuda":
        found["memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        found["reserved_gib"] = round(torch.cuda.max_memory_reserved(device) / 2**30, 2)
        found["card"] = torch.cuda.get_device_name(device)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(work: Path, arm: str, options: argparse.Namespace) -> dict[str, Any]:
    """An arm to its end, in processes of its own where it is not tiny; ``{"failed": why}`` where it has none."""
    if options.tiny and options.gpus == 1:
        found = train(work, arm, options)
        assert found is not None
        return found
    out = work / f"{arm}.json"
    out.unlink(missing_ok=True)
    words = ["--worker", str(work), "--arms", arm, "--gpus", str(options.gpus), "--batch", str(options.batch)]
    words += ["--micro", str(options.micro), "--updates", str(options.updates), "--warmup", str(options.warmup)]
    command = [sys.executable, __file__, *words, *(["--tiny"] if options.tiny else [])]
    if options.gpus > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.gpus}"]
    with (work / f"{arm}.log").open("w") as log:
        try:
            process = subprocess.run(command, stdout=sys.stdout, stderr=log, timeout=options.seconds)
            code: Any = process.returncode
        except subprocess.TimeoutExpired:
            code = f"longer than {options.seconds:g} s"
    if not out.is_file():
        told = (work / f"{arm}.log").read_text()
        print(told[-3000:], file=sys.stderr, flush=True)
        reason = "out of memory" if "OutOfMemoryError" in told else f"ended with {code}"
        return {"failed": reason}
    return json.loads(out.read_text())


def lines(arm: str, found: dict[str, Any], first: dict[str, Any] | None, options: argparse.Namespace) -> list[Any]:
    """Measurements of an arm; ``first``: what the arm before all others gave, None where this is it or it gave nothing."""
    size = "tiny" if options.tiny else "full"
    claim = f"policy/training/{size}/{arm}_{options.gpus}_gpus"
    shared: dict[str, Any] = {"seeds": "0", "command": options.command, "provenance": options.provenance}
    if "failed" in found:
        about = {"failed": found["failed"], "batch": options.batch}
        return [measurement(f"{claim}/step_ms", None, unit="ms", n=0, against=about, **shared)]  # type: ignore[arg-type]
    times = found["times"][options.warmup :]
    low, middle, high = (float(value) for value in np.percentile(times, [5, 50, 95]))
    samples = options.gpus * options.batch
    kept = ("video_parameters", "expert_parameters", "trained_parameters", "spread", "built_s", "data_wait_ms")
    about = {name: found[name] for name in kept} | {"samples": samples, "micro": options.micro or options.batch}
    about |= {"first_update_ms": round(found["times"][0], 1)}
    losses = [update["loss"] for update in found["losses"]]
    about |= {
        "mean_of_first_5_losses": round(fmean(losses[:5]), 4),
        "mean_of_last_5_losses": round(fmean(losses[-5:]), 4),
    }
    about |= {name: found[name] for name in ("card", "reserved_gib") if name in found}
    if first is not None:
        before = float(np.percentile(first["times"][options.warmup :], 50))
        gap = abs(found["losses"][0]["loss"] / first["losses"][0]["loss"] - 1)
        about |= {
            "against": options.arms[0],
            "ratio": round(before / middle, 3),
            "first_loss_differs_by": round(gap, 6),
        }
    shared |= {"against": about}
    count = len(times)
    made = [
        measurement(f"{claim}/step_ms", round(middle, 2), unit="ms", low=round(low, 2), high=round(high, 2), n=count, **shared),
        measurement(f"{claim}/samples_per_s", round(1e3 * samples / middle, 3), unit="1/s", n=count, **shared),
        measurement(f"{claim}/first_loss", round(found["losses"][0]["loss"], 5), unit="loss", n=1, **shared),
        measurement(f"{claim}/last_loss", round(found["losses"][-1]["loss"], 5), unit="loss", n=1, **shared),
    ]  # fmt: skip
    if "memory_gib" in found:
        made.append(measurement(f"{claim}/memory_gib", round(found["memory_gib"], 2), unit="GiB", n=1, **shared))
    if found["peak"]:
        share = 100 * found["operations"] / (1e-3 * middle) / found["peak"]
        made.append(measurement(f"{claim}/mfu_pct", round(share, 2), unit="%", n=count, **shared))
    assert all(math.isfinite(loss) for update in found["losses"] for loss in update.values())
    return made


def run(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """All arms; lines are written as they come."""
    write_inputs(work, options.tiny)
    made: list[dict[str, Any]] = []
    first = None
    for number, arm in enumerate(options.arms):
        print(f"{arm}:", flush=True)
        found = measure(work, arm, options)
        new = lines(arm, found, first, options)
        made += new
        if number == 0 and "failed" not in found:
            first = found
        for line in new:
            print(f"{line['claim']}: {line['value']} {line['unit']}", flush=True)
        if options.json:
            write_measurements(options.json, made)
    return made


def read_options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arms", type=lambda text: text.split(","), default=["plain", "ours"], help="compared with the first"
    )
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8, help="samples of a GPU in an update")
    parser.add_argument("--micro", type=int, default=0, help="of these computed at once; 0: all")
    parser.add_argument("--updates", type=int, default=20, help="that are timed")
    parser.add_argument("--warmup", type=int, default=5, help="updates before those")
    parser.add_argument("--seconds", type=float, default=540, help="that an arm may take")
    parser.add_argument("--work", help="folder for inputs and logs, a few megabytes; else a temporary one")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on a CPU")
    parser.add_argument("--json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    for name in options.arms:
        if name not in ARMS:
            parser.error(f"--arms {name}: one of {', '.join(ARMS)}")
    if min(options.gpus, options.batch, options.updates, options.warmup + 1) < 1:
        parser.error("--gpus, --batch and --updates: 1 or more, --warmup: 0 or more")
    options.command = placeless(
        "python benchmarks/policy_training.py " + shlex.join(sys.argv[1:] if words is None else words)
    )
    return options


def main(words: Sequence[str] | None = None) -> int:
    options = read_options(words)
    if options.worker:
        found = train(Path(options.worker), options.arms[0], options)
        if found is not None:
            (Path(options.worker) / f"{options.arms[0]}.json").write_text(json.dumps(found))
        return 0
    options.provenance = machine_provenance()
    with tempfile.TemporaryDirectory() as place:
        work = Path(options.work or place)
        work.mkdir(parents=True, exist_ok=True)
        made = run(options, work)
    return int(any("failed" in line["against"] for line in made))


if __name__ == "__main__":
    sys.exit(main())
