"""How long ``physis data prepare`` takes to find the clips that look most alike, on random signatures, and whether they are those that a
sort of all likenesses finds.

    python benchmarks/clip_neighbours.py [--clips 2000 20000] [--json FILE]

Beside it in the same run: selection among all likenesses of a row (``numpy.partition``), and the matrix product alone that makes them.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.planner.measurements import machine_provenance, measurement, placeless, write_measurements
from physisforcing.worldmodel.data.clips.alignment import centre, nearest

#: Numbers of a signature (``Measured.appearance``), and clips that are looked for of each.
WIDTH, NEIGHBOURS = 672, 4
#: Rows of a block of likenesses, and rows that are sorted whole.
BLOCK, SORTED = 1024, 64


def partitioned(seen_ND: NDArray[np.float32], count: int) -> list[list[int]]:
    """``nearest``, selecting among all likenesses of each row."""
    centred, found = centre(seen_ND), []
    for start in range(0, len(seen_ND), BLOCK):
        for offset, row in enumerate(centred[start : start + BLOCK] @ centred.T):
            row[start + offset] = -np.inf
            near = np.nonzero(row >= np.partition(row, -count)[-count])[0]
            found.append(near[np.argsort(-row[near], kind="stable")][:count].tolist())
    return found


def products(seen_ND: NDArray[np.float32]) -> None:
    centred = centre(seen_ND)
    for start in range(0, len(seen_ND), BLOCK):
        _ = centred[start : start + BLOCK] @ centred.T


def seconds(call: Callable[[], Any], repetitions: int) -> list[float]:
    found = []
    for _ in range(repetitions):
        begun = time.perf_counter()
        call()
        found.append(time.perf_counter() - begun)
    return sorted(found)


def agree(seen_ND: NDArray[np.float32], found: list[list[int]]) -> int:
    """Of ``SORTED`` rows those whose neighbours are those that a stable sort of all likenesses finds."""
    centred = centre(seen_ND)
    rows = np.linspace(0, len(seen_ND) - 1, min(SORTED, len(seen_ND))).astype(int)
    likeness = centred[rows] @ centred.T
    likeness[np.arange(len(rows)), rows] = -np.inf
    order = np.argsort(-likeness, axis=1, kind="stable")[:, :NEIGHBOURS]
    return sum(found[row] == wanted for row, wanted in zip(rows, order.tolist(), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, nargs="+", default=[2000, 20000])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", help="write measurements here")
    options = parser.parse_args()
    command = placeless(shlex.join(["python", "benchmarks/clip_neighbours.py", *sys.argv[1:]]))
    lines = []
    for clips in options.clips:
        seen = np.random.default_rng(0).standard_normal((clips, WIDTH)).astype(np.float32)
        now, before, product = (
            seconds(call, options.repetitions)
            for call in (
                lambda seen=seen: nearest(seen, NEIGHBOURS),
                lambda seen=seen: partitioned(seen, NEIGHBOURS),
                lambda seen=seen: products(seen),
            )
        )
        middle = options.repetitions // 2
        found = nearest(seen, NEIGHBOURS)
        same = found == partitioned(seen, NEIGHBOURS)
        against = {
            "seconds": round(now[middle], 3), "before_s": round(before[middle], 3), "product_s": round(product[middle], 3),
            "ratio": round(before[middle] / now[middle], 2), "same_as_before": same, "same_as_sorted": agree(seen, found),
            "sorted": min(SORTED, clips),
        }  # fmt: skip
        rate = [clips / now[place] for place in (middle, -1, 0)]
        print(f"{clips} clips: {rate[0]:.0f} a second  {against}", flush=True)
        lines.append(
            measurement(
                f"data/prepare/neighbours/{clips}_clips/per_second", rate[0], unit="clips/s", low=rate[1], high=rate[2],
                n=options.repetitions, seeds="0", against=against, command=command, provenance=machine_provenance(),
            )
        )  # fmt: skip
    if options.json:
        write_measurements(options.json, lines)
    return 0 if all(line["against"]["same_as_before"] for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
