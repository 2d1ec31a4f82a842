"""Encode and decode times of the light autoencoder and of AutoencoderKLWan on one window, in one run on one machine.

    python benchmarks/codec.py [--threads 2] [--repeats 3] [--out docs/results/codec.json]

Both codecs have random weights here: times do not depend on them. The Wan row is the smallest configuration that diffusers' tests
use for this stride (base_dim 8) and a middle one (base_dim 24, closer to the light codec's capacity).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from physisforcing.worldmodel.autoencoder import CausalVideoAutoencoder
from physisforcing.worldmodel.codec import WanVaeCodec


def codecs() -> dict[str, tuple[object, int]]:
    """Name -> (codec, parameters)."""
    light = CausalVideoAutoencoder().eval()
    light.set_statistics(torch.zeros(16), torch.ones(16))
    found: dict[str, tuple[object, int]] = {"light": (light, count(light))}
    for base, blocks in ((8, 1), (24, 2)):
        vae = AutoencoderKLWan(
            base_dim=base,
            z_dim=16,
            dim_mult=[1, 1, 2, 2],
            num_res_blocks=blocks,
            latents_mean=[0.0] * 16,
            latents_std=[1.0] * 16,
        )
        found[f"wan_base{base}"] = (WanVaeCodec(vae), count(vae))
    return found


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def measure(codec, frames: torch.Tensor, repeats: int) -> tuple[list[float], list[float]]:
    encode, decode = [], []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        latents = codec.encode(frames)
        middle = time.perf_counter()
        codec.decode(latents)
        encode.append(middle - begun)
        decode.append(time.perf_counter() - middle)
    return encode[1:], decode[1:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (1, 17, 120, 160, 3), dtype=torch.uint8)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    lines = []
    for name, (codec, parameters) in codecs().items():
        encode, decode = measure(codec, frames, options.repeats)
        for stage, times in (("encode", encode), ("decode", decode)):
            lines.append(
                {
                    "claim": f"codec/{name}/{stage}_s",
                    "value": statistics.median(times),
                    "unit": "s per window of 17 frames 120x160",
                    "low": min(times),
                    "high": max(times),
                    "n": len(times),
                    "seeds": [0],
                    "against": "light" if name != "light" else None,
                    "command": " ".join([Path(sys.executable).name, *sys.argv]),
                    "commit": commit or None,
                    "hardware": f"{platform.machine()}, {options.threads} threads",
                    "versions": {"torch": torch.__version__},
                    "date": datetime.now(UTC).date().isoformat(),
                }
            )
        print(
            f"{name:12s} {parameters / 1e6:5.2f} M  encode {statistics.median(encode):6.2f} s  decode {statistics.median(decode):6.2f} s"
        )
    if options.out:
        Path(options.out).write_text(json.dumps(lines, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
