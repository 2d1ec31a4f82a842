"""What the first update of weights that were stored in bfloat16 does where their products are computed in 8-bit floats, by the choice of scales.

    python benchmarks/float8_ties.py --json ties.json                             # needs torchao (physisforcing[fp8])
    python benchmarks/float8_ties.py --size 5b --seeds 2 --json ties_5b.json      # TI2V-5B, on a GPU of 141 GB

A Wan transformer of 30 layers with drawn weights, rounded to bfloat16 and kept in float32; one random sample; one step of AdamW at a rate of 2e-8.
``loss_change``: of the same sample, by that step. In `bfloat16` it is what the step is worth. `powers_of_two`: TorchAO's recipe `rowwise` as it is;
`unrounded`: with scales as they are; `ours`: these, and weights off the numbers of bfloat16 (``dither_weights``), as they are in `bfloat16_dithered`.
``loss``: before the step. ``tie_share``: weights that lie just between two 8-bit floats once they are scaled.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import shlex
import sys
from typing import Any

import torch
from paper_pipelines import TRANSFORMERS
from torch import Tensor, nn

from physisforcing.planner.measurements import machine_provenance, measurement, placeless, write_measurements
from physisforcing.worldmodel.training.float8 import dither_weights, use_float8

#: Of the step.
RATE = 2e-8
#: Of `--size` "small" and "5b": the transformer; frames, rows and columns of its latents, whose tokens are of 1x2x2.
SMALL: dict[str, Any] = {
    "num_attention_heads": 4, "attention_head_dim": 64, "num_layers": 30, "ffn_dim": 1024, "in_channels": 48,
    "out_channels": 48, "text_dim": 64, "freq_dim": 256,
}  # fmt: skip
SIZES = {
    "small": (SMALL, (3, 6, 8)),
    "tiny": (SMALL | {"num_layers": 2}, (3, 6, 8)),
    "5b": (TRANSFORMERS["5b"], (5, 30, 40)),
}
UNITS = {"loss": "loss", "loss_change": "loss", "tie_share": "share"}
ARMS = ("bfloat16", "bfloat16_dithered", "powers_of_two", "unrounded", "ours")


def drawn(seed: int, size: str, device: torch.device) -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    with device:
        return WanTransformer3DModel(**SIZES[size][0]).bfloat16().float()


def arm(name: str, model: Any, device: torch.device) -> Any:
    """``model`` with the products of ``name``."""
    made = copy.deepcopy(model)
    if name in ("ours", "bfloat16_dithered"):
        dither_weights(made.blocks, torch.Generator(device).manual_seed(0))
    if name in ("ours", "unrounded"):
        use_float8(made.blocks, device)
    elif name == "powers_of_two":
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        recipe = dataclasses.replace(
            Float8LinearConfig.from_recipe_name("rowwise"), pad_inner_dim=True, emulate=device.type == "cpu"
        )
        for block in made.blocks:
            convert_to_float8_training(block, config=recipe)
    return made


def losses(model: Any, seed: int, size: str, device: torch.device) -> tuple[float, float]:
    """Squared error of one sample before and after one update."""
    config, grid = SIZES[size]
    draw = torch.Generator().manual_seed(seed)
    x, wanted = (torch.randn(1, config["in_channels"], *grid, generator=draw).to(device) for _ in range(2))
    text, time = torch.randn(1, 16, config["text_dim"], generator=draw).to(device), torch.tensor([700.0], device=device)

    def loss() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            found = model(x, time, text, return_dict=False)[0]
        return (found.float() - wanted).square().mean()

    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    before = loss()
    before.backward()
    optimizer.step()
    with torch.no_grad():
        return float(before), float(loss())


def tie_share(model: Any, *, powers_of_two: bool) -> float:
    """Share of the blocks' weights that lie just between two neighbours of ``float8_e4m3`` once their row is scaled to its largest number."""
    ties = count = 0
    for layer in (one for block in model.blocks for one in block.modules() if isinstance(one, nn.Linear)):
        weight = layer.weight.detach().abs()
        largest = weight.double().amax(1, keepdim=True)  # TorchAO rounds the scale from float64
        scale = (torch.finfo(torch.float8_e4m3fn).max / largest).float()
        value = weight * (2.0 ** scale.log2().floor() if powers_of_two else scale)
        # numbers of an exponent lie an eighth of its power of two apart; below 2 ** -6 all lie equally far apart
        apart = 2.0 ** (value.clamp(min=2.0**-6).log2().floor() - 3)
        ties += int(((value / apart) % 1 == 0.5).sum())
        count += value.numel()
    return ties / count


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--size", choices=SIZES, default="small")
    options = parser.parse_args(words)
    size, seeds = options.size, range(options.seeds)
    device = torch.device("cuda" if size == "5b" else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--size 5b needs a GPU")
    command = placeless("python benchmarks/float8_ties.py " + shlex.join(sys.argv[1:] if words is None else words))
    provenance, lines = machine_provenance(), []

    def note(claim: str, values: list[float], unit: str) -> None:
        mean = sum(values) / len(values)
        line = measurement(
            f"training/float8/{'5b/' * (size == '5b')}{claim}", float(f"{mean:.4g}"), unit=unit, low=float(f"{min(values):.4g}"), high=float(f"{max(values):.4g}"),
            n=len(values), seeds=list(seeds), command=command, provenance=provenance,
        )  # fmt: skip
        lines.append(line)
        print(f"{claim:<32}{mean:10.5f} {unit} ({min(values):.5f} to {max(values):.5f})", flush=True)
        if options.json:
            write_measurements(options.json, lines)

    found: dict[str, list[list[float]]] = {name: [] for name in ARMS}
    for seed in seeds:
        model = drawn(seed, size, device)
        for name in ARMS:
            made = arm(name, model, device)
            share = [] if name.startswith("bfloat16") else [tie_share(made, powers_of_two=name == "powers_of_two")]
            before, after = losses(made, seed, size, device)
            found[name].append([before, after - before, *share])
    for name, rows in found.items():
        for (what, unit), *values in zip(list(UNITS.items())[: len(rows[0])], *rows, strict=True):
            note(f"{name}/{what}", values, unit)


if __name__ == "__main__":
    main()
