"""How well tokens of each block of the pico transformer find moving points again, before and after training; 8 clips learned by heart.

    python benchmarks/probe.py --windows FILE [--model FOLDER] [--codec FOLDER] --json docs/results/probe.json
    python benchmarks/probe.py --windows FILE --overfit --json docs/results/probe.json
    python benchmarks/probe.py --plot --json docs/results/probe.json

``FILE``: from ``physics_choices.py --prepare``. End-point error, in cells, of the points that the default regions select, over held-out
windows with simulator truth, at fixed noise levels with the same noise for all networks. Read-outs: ``raw``, cosines of block outputs
(LayerNorm without parameters) under a softmax whose temperature is the best of a few on training windows; ``probe``, a fresh phi of the
same size trained on the frozen block with all noise levels; ``head``, the phi that the model was trained with. ``untrained``: the
same architecture freshly initialised. ``--overfit``: a fresh network and phi see 8 training clips with the trajectory loss alone.
``--plot`` draws docs/images/probe*.png and fills the tables of docs/results/probe.md. Intervals: bootstrap over episodes; over-fit: range of the seeds.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import probe_data
import torch
from readouts import SIGMAS, Measured, ReadOut, measure, train_probes
from torch import Tensor, nn

from physisforcing.core.paths import weights_root
from physisforcing.planner.measurements import machine_provenance, measurement, write_measurements
from physisforcing.worldmodel.backbones.wan import WanDenoiser
from physisforcing.worldmodel.data.batches import WindowBank, step_generator
from physisforcing.worldmodel.flow_matching import FlowMatchingConfig, add_noise, frame_timesteps
from physisforcing.worldmodel.physics.config import PhysicsConfig
from physisforcing.worldmodel.physics.forcing import REPORT_SIZE
from physisforcing.worldmodel.training.config import TrainWorldModelConfig
from physisforcing.worldmodel.training.initial import adopt_world_model
from physisforcing.worldmodel.training.objective import draw_noise
from physisforcing.worldmodel.training.optim import learning_rate, set_learning_rate
from physisforcing.worldmodel.training.runtime import autocast, choose_kernels, pick_device
from physisforcing.worldmodel.training.worldmodel import Trainer, build_modules

ROOT = Path(__file__).resolve().parents[1]
#: Temperatures of raw cosines that are tried on this many training windows.
RAW_TEMPERATURES = (0.005, 0.01, 0.02, 0.05, 0.1)
RAW_WINDOWS = 64
OVERFIT = PhysicsConfig(lambda_pix=1.0, lambda_sem=0.0)
GOAL_CELLS = 0.5
DRAWS = 1000


def raw_temperatures(denoiser: WanDenoiser, blocks: Sequence[int], bank: WindowBank) -> dict[int, float]:
    """The temperature of each block's cosines, by the error on windows of ``bank``."""
    tried = {f"{b}/{t}": ReadOut.raw(b, t) for b in blocks for t in RAW_TEMPERATURES}
    found = measure(denoiser, tried, bank)
    return {b: min(RAW_TEMPERATURES, key=lambda t: found.over_sigmas(f"{b}/{t}")) for b in blocks}


def overfit(
    bank: WindowBank,
    config: TrainWorldModelConfig,
    *,
    goal: float = GOAL_CELLS,
    every: int = 25,
    say: Callable[[str], None] = lambda line: None,
) -> list[tuple[int, float]]:
    """A fresh network and phi learn all windows of ``bank`` with L_pix alone, until the end-point error over ``SIGMAS`` is below
    ``goal`` cells or for ``config.run.steps`` updates. Returns (updates, error in cells) on the way."""
    device = bank.latents_WCFhw.device
    trainer = Trainer(config, bank, device)
    denoiser, forcing, grid = trainer.denoiser, trainer.forcing, tuple(bank.latents_WCFhw.shape[2:])
    assert forcing is not None and config.physics.lambda_sem == 0
    flow, curve = FlowMatchingConfig(train_shift=1.0), []
    rows = torch.arange(len(bank.table), device=device)
    for step in range(config.run.steps + 1):
        if step % every == 0 or step == config.run.steps:
            now = measure(denoiser, {"phi": ReadOut.of_head(config.backbone.tap, forcing)}, bank).over_sigmas("phi")
            curve.append((step, now))
            say(f"{step} updates: {now:.3f} cells")
            if now < goal or step == config.run.steps:
                break
        batch = bank.batch(rows)
        noise, sigma, order = draw_noise(
            batch["latents_BCFhw"].shape, flow, step_generator(config.run.seed + 1, step, device)
        )
        set_learning_rate(trainer.optimizer, learning_rate(config.optim, step, config.run.steps))
        x0 = batch["latents_BCFhw"]
        with autocast(config.run, device):
            context = denoiser.context(batch["text_BLD"], batch["proprioception_BKA"])
            noisy, times = add_noise(x0, noise, sigma), frame_timesteps(sigma, x0.shape[2])
            tapped = denoiser(noisy, times, context, need_tap=True)[1]
        forcing(tapped, grid, batch["targets"], order).loss.backward()
        nn.utils.clip_grad_norm_(trainer.model.parameters(), config.optim.clip)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
    return curve


def intervals(sum_W: Tensor, count_W: Tensor, episode_W: Tensor) -> tuple[float, float]:
    """95 % bootstrap over episodes of the mean error."""
    places = torch.unique(episode_W, return_inverse=True)[1]
    totals = torch.zeros(2, int(places.max()) + 1, dtype=torch.float64)
    totals.index_add_(1, places, torch.stack([sum_W, count_W]))
    drawn = np.random.default_rng(0).integers(0, totals.shape[1], (DRAWS, totals.shape[1]))
    means = totals.numpy()[0][drawn].sum(1) / np.maximum(totals.numpy()[1][drawn].sum(1), 1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def probe_lines(options: argparse.Namespace, parts: dict[str, probe_data.Part], shared: dict[str, Any]) -> list[dict]:
    device = pick_device(options.device)
    train, heldout = (parts[name].bank(PhysicsConfig(), device) for name in ("train", "heldout"))
    config, lines = model_config(options), []
    some = torch.linspace(0, len(train.table) - 1, min(RAW_WINDOWS, len(train.table))).long()
    task_W = [parts["heldout"].episodes[place]["task"] for place in heldout.table.episode_W.tolist()]
    tasks = {task: torch.tensor([place for place, t in enumerate(task_W) if t == task]) for task in sorted(set(task_W))}
    blocks = range(1, config.backbone.num_layers + 1)
    shared |= {"n": len(parts["heldout"].episodes), "seeds": [e["seed"] for e in parts["heldout"].episodes]}
    found: Measured | None = None
    for state in ("untrained", "trained"):
        config.run.init = str(options.model) if state == "trained" else None
        torch.manual_seed(options.seed)
        modules = {name: module.to(device).eval() for name, module in build_modules(config, train).items()}
        denoiser: WanDenoiser = modules["denoiser"].requires_grad_(False)  # type: ignore[assignment]
        sharp = raw_temperatures(denoiser, blocks, probe_data.rows_of(train, some))
        probes = train_probes(
            denoiser, blocks, train, steps=options.probe_steps, batch=options.batch, seed=options.seed
        )
        readouts = {f"raw/block{b}": ReadOut.raw(b, sharp[b]) for b in blocks}
        readouts |= {f"probe/block{b}": ReadOut.of_head(b, probes[b]) for b in blocks}
        if state == "trained":
            readouts[f"head/block{denoiser.tap}"] = ReadOut.of_head(denoiser.tap, modules["forcing"])  # type: ignore[arg-type]
        before, found = found, measure(denoiser, readouts, heldout)
        print(f"{state}: temperatures of raw cosines {sharp}", flush=True)
        rows = [("still", None), ("uniform", None)] if state == "untrained" else []
        for name, sigma in rows + [(name, sigma) for name in readouts for sigma in SIGMAS]:
            value, total = found.mean(name, "soft", sigma), found.errors[name, "soft", sigma]
            low, high = intervals(total, found.count_W, heldout.table.episode_W)
            claim, against = f"probe/pico/{name}/epe_cells", {"px_of_240x320": value * cell_px(heldout)}
            if sigma is not None:
                claim = f"probe/pico/{state}/{name}/sigma{sigma}/epe_cells"
                against["argmax_cells"] = found.mean(name, "argmax", sigma)
                against |= {other: found.mean(other, "soft", None) for other in ("still", "uniform")}
                if name.startswith("raw"):
                    against["temperature"] = sharp[readouts[name].block]
                if before is not None and (name, "soft", sigma) in before.errors:
                    against["untrained"] = before.mean(name, "soft", sigma)
            against["by_task"] = {task: round(found.mean(name, "soft", sigma, at), 4) for task, at in tasks.items()}
            lines.append(measurement(claim, value, unit="cells", low=low, high=high, against=against, **shared))
        for name in readouts:
            print(f"{state}/{name}: " + " ".join(f"{found.mean(name, 'soft', s):.2f}" for s in SIGMAS), flush=True)
    return lines


def cell_px(bank: WindowBank) -> float:
    """Pixels of 240x320 a cell; cells are square."""
    height, width = bank.latents_WCFhw.shape[-2:]
    assert REPORT_SIZE[0] / height == REPORT_SIZE[1] / width
    return REPORT_SIZE[0] / height


def overfit_lines(options: argparse.Namespace, parts: dict[str, probe_data.Part], shared: dict[str, Any]) -> list[dict]:
    bank = parts["train"].bank(OVERFIT, pick_device(options.device))
    moving = torch.nonzero(bank.targets.targets.select_WN.sum(1).cpu() >= 20).flatten()  # type: ignore[union-attr]
    clips = moving[torch.linspace(0, len(moving) - 1, options.clips).long()]
    bank, curves = probe_data.rows_of(bank, clips), {}
    for seed in options.seeds:
        config = TrainWorldModelConfig(physics=OVERFIT)
        config.run.seed, config.run.steps, config.optim.warmup = seed, options.steps, 50
        curves[seed] = overfit(bank, config, say=lambda line, seed=seed: print(f"seed {seed}, {line}", flush=True))
    ends = [curve[-1][1] for curve in curves.values()]
    against = {
        "goal": GOAL_CELLS,
        "updates": {str(seed): curve[-1][0] for seed, curve in curves.items()},
        "curves": {str(seed): [[s, round(v, 4)] for s, v in curve] for seed, curve in curves.items()},
    }
    values = {"low": min(ends), "high": max(ends), "n": options.clips, "against": against} | shared
    claim = f"probe/pico/overfit{options.clips}/epe_cells"
    return [measurement(claim, float(np.mean(ends)), unit="cells", seeds=options.seeds, **values)]


def model_config(options: argparse.Namespace) -> TrainWorldModelConfig:
    """Sizes of the model, with the losses at their defaults."""
    config = TrainWorldModelConfig(codec=str(options.codec or options.model.parent / "vae"))
    config.run.init = str(options.model)
    adopt_world_model(config)
    return config


def main() -> int:
    options = parse()
    if options.plot:
        plot(json.loads(options.json.read_text()))
        return 0
    choose_kernels(pick_device(options.device), False)
    parts, about = probe_data.load(options.windows)
    config = model_config(options)
    probe_data.check_latents(about, Path(config.codec))
    shared: dict[str, Any] = {"provenance": machine_provenance()}
    words = [f"python benchmarks/probe.py --windows {options.windows.name}"]
    words += [f"--overfit --steps {options.steps}"] if options.overfit else [f"--probe-steps {options.probe_steps}"]
    words += [f"--batch {options.batch}"] * (not options.overfit)
    words += [f"--model runs/{options.model.name}"] * (options.model != weights_root() / "worldmodel")
    lines = (overfit_lines if options.overfit else probe_lines)(options, parts, shared | {"command": " ".join(words)})
    if options.json:
        write_measurements(options.json, lines)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=Path, help="file of physics_choices.py --prepare")
    parser.add_argument(
        "--model", type=Path, default=weights_root() / "worldmodel", help="world model (the shipped one)"
    )
    parser.add_argument("--codec", type=Path, help="its codec (vae beside it)")
    parser.add_argument("--probe-steps", type=int, default=400, help="updates of each fresh phi")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the untrained network and of the probes")
    parser.add_argument("--overfit", action="store_true", help="learn clips by heart instead")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3000, help="of over-fitting, at most")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of over-fitting")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the measurements here")
    parser.add_argument("--plot", action="store_true", help="pictures and tables of the page from --json")
    options = parser.parse_args()
    needed = "json" if options.plot else "windows"
    if getattr(options, needed) is None:
        parser.error(f"--{needed} FILE")
    return options


BEGIN, END = "<!-- results:begin -->\n", "<!-- results:end -->"
PAGE = """# Where correspondence lives in the pico network

Measurements: [probe.json](probe.json), written by `benchmarks/probe.py`, which says how each figure is made; held-out demonstrations
with simulator truth, points of the default regions, intervals and single tasks in the measurements. The shipped model was trained on three of
the six tasks (click_bell, adjust_bottle, stack_blocks_two).

![End-point error by block](../images/probe.png)

![Learning clips by heart](../images/probe_overfit.png)

"""


def plot(lines: list[dict[str, Any]]) -> None:
    """Draw the pictures and write the tables of the page; its other text stays."""
    pattern = re.compile(r"probe/pico/(trained|untrained)/(raw|probe)/block(\d+)/sigma([\d.]+)/epe_cells")
    claims = {line["claim"]: line for line in lines}
    found = {m.groups(): line["value"] for claim, line in claims.items() if (m := pattern.fullmatch(claim))}
    fits = {c: line for c, line in claims.items() if c.startswith("probe/pico/overfit")}
    levels = {name: claims[f"probe/pico/{name}/epe_cells"]["value"] for name in ("still", "uniform")}
    blocks, sigmas = sorted({int(key[2]) for key in found}), sorted({float(key[3]) for key in found})
    if not found or not fits:
        raise SystemExit("--plot needs the measurements of both calls, with and without --overfit")
    draw_blocks(found, levels, blocks, sigmas)
    draw_overfit(fits)
    text = f"End-point error in cells (16 pixels of 240x320): trained network (untrained). Points that stay {levels['still']:.2f}, uniform map {levels['uniform']:.2f}.\n"
    for kind, title in (("raw", "Raw cosines"), ("probe", "A fresh phi on the frozen block")):
        head = f"| {title} | " + " | ".join(f"sigma {s:g}" for s in sigmas) + " |\n"
        text += f"\n{head}{'|---' * (len(sigmas) + 1)}|\n"
        for b in blocks:
            pairs = [[found[state, kind, str(b), f"{s:g}"] for state in ("trained", "untrained")] for s in sigmas]
            text += f"| block {b} | " + " | ".join(f"{after:.2f} ({before:.2f})" for after, before in pairs) + " |\n"
    heads = sorted(c for c in claims if "/trained/head/" in c)
    if heads:
        text += (
            "\nThe phi of the model itself: "
            + ", ".join(f"{claims[c]['value']:.2f} at {c.split('/')[-2].replace('sigma', 'sigma ')}" for c in heads)
            + ".\n"
        )
    for line in fits.values():
        ends = f"{line['value']:.2f} cells ({line['low']:.2f} to {line['high']:.2f}, {len(line['against']['updates'])} seeds)"
        updates = ", ".join(map(str, line["against"]["updates"].values()))
        text += f"\n{line['n']} clips learned by heart with L_pix alone: {ends} after {updates} updates.\n"
    fill_page(ROOT / "docs" / "results" / "probe.md", PAGE, text)


def fill_page(path: Path, template: str, text: str) -> None:
    """Write ``text`` between the marks of a page; a page that is not there begins as ``template``."""
    page = path.read_text(encoding="utf-8") if path.is_file() else template + BEGIN + END + "\n"
    start, stop = page.index(BEGIN) + len(BEGIN), page.index(END)
    path.write_text(page[:start] + text + page[stop:], encoding="utf-8")


def draw_blocks(found: dict, levels: dict[str, float], blocks: list[int], sigmas: list[float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, kind, title in zip(axes, ("raw", "probe"), ("raw cosines", "fresh phi on the frozen block"), strict=True):
        for place, sigma in enumerate(sigmas):
            colour = matplotlib.colormaps["viridis"](place / max(1, len(sigmas) - 1) * 0.9)
            for state, style in (("trained", "-"), ("untrained", ":")):
                values = [found[state, kind, str(b), f"{sigma:g}"] for b in blocks]
                label = f"sigma {sigma:g}" if state == "trained" else None
                axis.plot(blocks, values, style, color=colour, marker=".", label=label)
        for name, value in levels.items():
            axis.axhline(value, color="grey", linewidth=0.8, linestyle="--")
            axis.text(blocks[-1], value, name, ha="right", va="bottom", fontsize=8, color="grey")
        axis.set(title=title, xlabel="block", xticks=blocks)
    axes[0].set(ylabel="end-point error, cells", ylim=(0, None))
    figure.legend(
        *axes[1].get_legend_handles_labels(),
        loc="outside right center",
        fontsize=8,
        title="solid: trained\ndotted: untrained",
        title_fontsize=8,
    )
    figure.savefig(ROOT / "docs" / "images" / "probe.png", dpi=110)


def draw_overfit(fits: dict[str, dict[str, Any]]) -> None:
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(5, 3), layout="constrained")
    for line in fits.values():
        for seed, curve in line["against"]["curves"].items():
            axis.plot([s for s, _ in curve], [v for _, v in curve], label=f"{line['n']} clips, seed {seed}")
    axis.axhline(GOAL_CELLS, color="grey", linewidth=0.8, linestyle="--")
    axis.set(xlabel="updates with L_pix alone", ylabel="end-point error, cells", ylim=(0, None))
    axis.legend(fontsize=8)
    figure.savefig(ROOT / "docs" / "images" / "probe_overfit.png", dpi=110)


if __name__ == "__main__":
    sys.exit(main())
