"""How often the CPU expert succeeds with other robots, other assets and under randomisation.

    python benchmarks/expert_variants.py [--episodes 20] [--json docs/results/expert_variants.json]

On the self-made pack: the second embodiment (``franka-like``) and ``demo_randomized``. With ROBOTWIN_ASSETS also: aloha-agilex
and a pair of franka-panda on RoboTwin's own pieces. Seeds count from 0; a scene that does not come to rest is replaced by the
next seed and listed.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from expert_success import run_tasks

from physisforcing.core.stats import wilson
from physisforcing.envs.robotwin.assets import ensure_pack
from physisforcing.envs.robotwin.tasks import PACK_TASKS
from physisforcing.planner.measurements import machine_provenance, measurement, write_measurements

PACK: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "franka-like": ({"embodiment": "franka-like"}, ("click_bell", "stack_blocks_two")),
    "demo_randomized": ({"randomization": "demo_randomized"}, ("click_bell", "stack_blocks_two", "adjust_bottle")),
}
OFFICIAL: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "official": ({}, ("click_bell", "press_stapler", "stack_blocks_two", "handover_block")),
    "official franka-panda": ({"embodiment": "franka-panda"}, ("click_bell", "stack_blocks_two")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--variants", nargs="+", default=[*PACK, *OFFICIAL], choices=[*PACK, *OFFICIAL])
    parser.add_argument(
        "--tasks", nargs="+", default=[], help="instead of each variant's own; all: every task of the pack"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes (0: this one)")
    parser.add_argument("--json", type=Path, help="merge measurements into this file")
    options = parser.parse_args()
    official, provenance = os.environ.get("ROBOTWIN_ASSETS"), machine_provenance()
    if not official:
        print("skipped: RoboTwin's own pieces need ROBOTWIN_ASSETS")
    variants = [(name, str(ensure_pack()), *of) for name, of in PACK.items()]
    variants += [(name, official, *of) for name, of in OFFICIAL.items()] if official else []
    for name, assets, settings, tasks in [v for v in variants if v[0] in options.variants]:
        chosen = list(PACK_TASKS) if options.tasks == ["all"] else options.tasks or list(tasks)
        results = run_tasks(chosen, options.episodes, 0, workers=options.workers, assets=assets, **settings)
        for task, result in results.items():
            n, k = options.episodes, result["successes"]
            low, high = wilson(k, n)
            print(
                f"{name:22} {task:18} {k}/{n} [{low:.2f}, {high:.2f}]  {dict(result['failures'])}  "
                f"unstable {result['unstable']}",
                flush=True,
            )
            line = measurement(
                f"expert/{name.replace(' ', '-')}/{task}/success",
                k / n,
                unit="rate",
                low=low,
                high=high,
                n=n,
                seeds=result["seeds"],
                against={
                    "variant": name,
                    "assets": "RoboTwin's own" if assets == official else "self-made pack",
                    "failures": dict(result["failures"]),
                },
                command=f"python benchmarks/expert_variants.py --episodes {n} --variants '{name}' --tasks {task}",
                provenance=provenance,
            )
            if options.json:
                write_measurements(options.json, [line])


if __name__ == "__main__":
    main()
