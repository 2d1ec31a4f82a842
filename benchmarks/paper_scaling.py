"""Updates of `physis train worldmodel` on one GPU and on several: milliseconds, memory, and what share of linear scaling is reached.

    python benchmarks/paper_scaling.py --model runs/5b/model --latents runs/5b/one --gpus 1,2 --json scaling.json
    python benchmarks/paper_scaling.py ... --rows full,lora --micro 4      # four samples a GPU and update

The recipe's own command is started with torchrun, one sample a GPU at a time, and ended with -9 once enough updates are logged: nothing
is saved. ``full`` trains all weights (float32, spread over the GPUs), ``lora`` rank 32. The optimiser step is inside.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from physisforcing.planner.measurements import machine_provenance, measurement, placeless, write_measurements


def overrides(options: argparse.Namespace, out: Path, gpus: int, *, lora: bool) -> list[str]:
    """Of a training in which nothing but updates happens."""
    words = [f"experiment={options.experiment}", f"model={options.model}", f"data.latents=[{options.latents}]"]
    words += ["data.heldout=0", "large.videos=0", "physics.relations=rigid", f"lora.rank={32 if lora else 0}"]
    words += [
        f"run.out={out}",
        f"run.batch={gpus * options.micro}",
        "run.micro=1",
        "run.log_every=1",
        "run.steps=100000",
    ]
    return [*words, "run.save_every=100000", "run.eval_every=100000", f"run.device={options.device}", *options.more]


def run(row: str, gpus: int, options: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """-> (lines of the updates after the first few; where there are none, why)."""
    out = Path(options.work) / f"scaling-{row}-{gpus}"
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    words = overrides(options, out, gpus, lora=row == "lora")
    command = [sys.executable, "-m", "physisforcing", "train", "worldmodel", *words]
    if gpus > 1:
        command[1:2] = ["-m", "torch.distributed.run", f"--nproc_per_node={gpus}", "-m"]
    told = out.parent / f"{out.name}.log"
    deadline = time.monotonic() + options.seconds
    with told.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            while (
                process.poll() is None
                and len(_lines(out)) < options.updates + options.warmup
                and time.monotonic() < deadline
            ):
                time.sleep(0.2)
            ended = process.poll() is not None
        finally:
            for pid in [*_descendants(process.pid), process.pid]:  # torchrun's workers are no members of its group
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
    made = _lines(out)
    found = [] if ended else made[options.warmup :]
    if found:
        return found, ""
    why = (
        "ended by itself"
        if ended
        else f"{len(made)} updates within {options.seconds:g} s, of which {options.warmup} are left out"
    )
    print(f"{row} on {gpus}: {why}\n{told.read_text()[-1500:]}", flush=True)
    return [], f"{why}; see its log"


def _descendants(pid: int) -> list[int]:
    """Processes that this one has started, and those that they have."""
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []
    return [one for child in children for one in (*_descendants(child), child)]


def _lines(out: Path) -> list[dict[str, Any]]:
    path = out / "metrics.jsonl"
    if not path.is_file():
        return []
    found = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in found if "grad_norm" in line]


def waits(found: list[dict[str, Any]]) -> dict[str, float]:
    """Per cent of an update's time that it waits for its batch: the median and the most, and of all updates together."""
    shares, times = ([line[name] for line in found] for name in ("data_wait_pct", "step_ms"))
    whole = sum(share * time for share, time in zip(shares, times, strict=True)) / sum(times)
    parts = {"": statistics.median(shares), "_whole": whole, "_most": max(shares)}
    return {f"data_wait{part}_pct": round(share, 3) for part, share in parts.items()}


def part_of_claim(override: str) -> str:
    """Claims of runs with other settings are called after these: ``run.gather=update`` is ``full_gather_update_2_gpus_step_ms``."""
    name, _, value = override.partition("=")
    return re.sub(r"[^\w.-]+", "-", f"_{name.rpartition('.')[2]}_{value}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--latents", required=True)
    parser.add_argument("--work", default="runs")
    parser.add_argument("--experiment", default="pf_wan_5b")
    parser.add_argument("--rows", default="lora,full", type=lambda text: text.split(","))
    parser.add_argument("--gpus", default="1,2", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--micro", type=int, default=1, help="samples of a GPU in an update")
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--more", nargs="*", default=[], help="further overrides")
    parser.add_argument(
        "--beside", help="the JSON of an earlier part on the same machine, whose rows on one GPU are compared with"
    )
    parser.add_argument("--json")
    options = parser.parse_args()
    provenance, lines = machine_provenance(), []
    changed = "".join(map(part_of_claim, options.more))
    before = {line["claim"]: line for line in json.loads(Path(options.beside).read_text())} if options.beside else {}
    for row in options.rows:
        # of an earlier part: the same settings on one GPU, or the usual ones
        claims = (f"training/{options.experiment}/{row}{name}_1_gpus_step_ms" for name in (changed, ""))
        beside = next((claim for claim in claims if claim in before), None)
        alone = before[beside]["value"] if beside else None
        for gpus in options.gpus:
            found, why = run(row, gpus, options)
            times = [line["step_ms"] for line in found]
            value = statistics.median(times) if times else None
            more: dict[str, Any] = {"gpus": gpus, "samples": gpus * options.micro}
            if found:
                more |= {
                    "memory_gib": round(found[-1]["memory_gib"], 2),
                    "mfu_pct": round(statistics.median(line.get("mfu_pct", 0.0) for line in found), 2),
                }
                more |= waits(found)
                more["losses"] = [line["loss"] for line in found]  # whether another setting computes the same thing
                if gpus == 1:
                    if alone and changed and value:
                        more |= {"ratio": round(value / alone, 4), "ratio_to": beside}
                    alone, beside = value, "this run's row on one GPU"
                elif alone and value:
                    more |= {"scaling_efficiency": round(alone / value, 4), "against_one": beside}
            else:
                more["failed"] = why
            lines.append(
                measurement(
                    f"training/{options.experiment}/{row}{changed}_{gpus}_gpus_step_ms", round(value, 2) if value else None,  # type: ignore[arg-type]
                    unit="ms", low=min(times, default=None), high=max(times, default=None), n=len(times), seeds="0", against=more,
                    command=placeless("python benchmarks/paper_scaling.py " + shlex.join(sys.argv[1:])), provenance=provenance,
                )
            )  # fmt: skip
            print(f"{row} on {gpus}: {value} ms {more}", flush=True)
            if options.json:
                write_measurements(options.json, lines)


if __name__ == "__main__":
    main()
