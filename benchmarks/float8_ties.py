"""What the first update of weights that were stored in bfloat16 does where their products are computed in 8-bit floats, by the choice of scales.

    python benchmarks/float8_ties.py --json ties.json          # needs torchao (physisforcing[fp8])

A Wan transformer of 30 layers with drawn weights, rounded to bfloat16 and kept in float32; one random sample; one step of AdamW at a rate of 2e-8.
``loss_change``: of the same sample, by that step. In `bfloat16` it is what the step is worth. `powers_of_two`: TorchAO's recipe `rowwise` as it is;
`ours`: ``use_float8``. ``tie_share``: weights that lie just between two 8-bit floats once they are scaled.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import shlex
import sys
from typing import Any

import torch
from torch import Tensor, nn

from physisforcing.planner.measurements import machine_provenance, measurement, placeless, write_measurements
from physisforcing.worldmodel.training.float8 import use_float8

RATE, CPU = 2e-8, torch.device("cpu")
SIZE: dict[str, Any] = {
    "num_attention_heads": 4, "attention_head_dim": 64, "num_layers": 30, "ffn_dim": 1024, "in_channels": 48,
    "out_channels": 48, "text_dim": 64, "freq_dim": 256,
}  # fmt: skip
#: Frames, rows and columns of the latents; tokens are of 1x2x2.
GRID = (3, 6, 8)


def drawn(seed: int, tiny: bool) -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    model = WanTransformer3DModel(**SIZE | ({"num_layers": 2} if tiny else {}))
    return model.bfloat16().float()


def arm(name: str, model: Any) -> Any:
    """``model`` with the products of ``name``."""
    made = copy.deepcopy(model)
    if name == "ours":
        use_float8(made.blocks, CPU)
    elif name == "powers_of_two":
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        recipe = dataclasses.replace(Float8LinearConfig.from_recipe_name("rowwise"), pad_inner_dim=True, emulate=True)
        for block in made.blocks:
            convert_to_float8_training(block, config=recipe)
    return made


def loss_change(model: Any, seed: int) -> float:
    """Of the squared error of one sample, by one update."""
    draw = torch.Generator().manual_seed(seed)
    x, wanted = (torch.randn(1, SIZE["in_channels"], *GRID, generator=draw) for _ in range(2))
    text, time = torch.randn(1, 16, SIZE["text_dim"], generator=draw), torch.tensor([700.0])

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            found = model(x, time, text, return_dict=False)[0]
        return (found.float() - wanted).square().mean()

    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    before = loss()
    before.backward()
    optimizer.step()
    with torch.no_grad():
        return float(loss() - before)


def tie_share(model: Any, *, powers_of_two: bool) -> float:
    """Share of the blocks' weights that lie just between two neighbours of ``float8_e4m3`` once their row is scaled to its largest number."""
    ties = count = 0
    for layer in (one for block in model.blocks for one in block.modules() if isinstance(one, nn.Linear)):
        weight = layer.weight.detach().abs()
        scale = torch.finfo(torch.float8_e4m3fn).max / weight.amax(1, keepdim=True)
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
    parser.add_argument("--tiny", action="store_true", help="two layers, one seed")
    options = parser.parse_args(words)
    seeds = range(1 if options.tiny else options.seeds)
    command = placeless("python benchmarks/float8_ties.py " + shlex.join(sys.argv[1:] if words is None else words))
    provenance, lines = machine_provenance(), []

    def note(claim: str, values: list[float], unit: str) -> None:
        mean = sum(values) / len(values)
        line = measurement(
            f"training/float8/{claim}", float(f"{mean:.4g}"), unit=unit, low=float(f"{min(values):.4g}"), high=float(f"{max(values):.4g}"),
            n=len(values), seeds=list(seeds), command=command, provenance=provenance,
        )  # fmt: skip
        lines.append(line)
        print(f"{claim:<32}{mean:10.5f} {unit} ({min(values):.5f} to {max(values):.5f})", flush=True)
        if options.json:
            write_measurements(options.json, lines)

    models = [drawn(seed, options.tiny) for seed in seeds]
    for name in ("bfloat16", "powers_of_two", "ours"):
        changes = [loss_change(arm(name, model), seed) for seed, model in zip(seeds, models, strict=True)]
        note(f"{name}/loss_change", changes, "loss")
        if name != "bfloat16":
            note(f"{name}/tie_share", [tie_share(model, powers_of_two=name != "ours") for model in models], "share")


if __name__ == "__main__":
    main()
