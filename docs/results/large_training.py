"""Gather what the benchmarks of the large backbones measured: ``python docs/results/large_training.py FILE.json ... [--without CLAIM]``.

Lines go into ``large_training.json``; the card stands in their claims, since the same rows were measured on several. Lines of the same
claim replace older ones. The operations of a denoiser step and their share of the peak are computed here, by ``flops.forward_flops``, also
of rows that were written before there was one. Without files, what is there is written anew.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
from pathlib import Path
from typing import Any

from physisforcing.planner.measurements import placeless

FOLDER = Path(__file__).resolve().parent
DATA, PAGE = FOLDER / "large_training.json", FOLDER / "training.md"
#: Card -> MiB that nvidia-smi says it has (benchmarks/paper_memory.py).
CARDS = {24: 24564, 48: 46068, 80: 81559, 141: 143771}
BEGIN, END = "<!-- rows:begin -->\n", "<!-- rows:end -->"
#: What TI2V-5B differs in from its diffusers class, its latents at 480x640x81 and the tokens of its sentences.
TI2V = {"num_attention_heads": 24, "num_layers": 30, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48}
LATENTS, TEXT = (1, 48, 21, 30, 40), 512
HEAD = "| claim | value | n | of the peak | memory, GiB | beside it |\n|---|---|---|---|---|---|\n"
#: Fields of ``against`` that the table shows.
SHOWN = (
    "plain_ms",
    "plain_compiled_ms",
    "lora_plain_ms",
    "relative_difference",
    "scaling_efficiency",
    "before",
    "after",
    "steps",
)


def gathered(known: list[dict[str, Any]], lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All lines, sorted by claim; new ones replace those of the same claim."""
    found = {line["claim"]: line for line in known}
    for line in map(named, lines):
        found[line["claim"]] = line
    found = {claim: counted(line) for claim, line in found.items()}
    return [found[claim] for claim in sorted(found)]


def named(line: dict[str, Any]) -> dict[str, Any]:
    """A line with the card in its claim."""
    card = next((name for name in ("H100", "H200", "A100") if name in line["hardware"]), "cpu").lower()
    claim = line["claim"]
    if f"/{card}/" in claim:
        return line
    head, _, rest = claim.removeprefix("training/").partition("/")
    return line | {"claim": f"training/{head}/{card}/{rest}", "command": placeless(line["command"])}


def counted(line: dict[str, Any]) -> dict[str, Any]:
    """A line of a denoiser step of TI2V-5B with the operations of its forward passes, one or two samples, and their share of the peak;
    another one as it is. Rows from before there was a count of forward passes alone say a third."""
    from physisforcing.worldmodel.training.flops import named_peak

    against, peak = line["against"], named_peak(line["hardware"])
    if not line["claim"].startswith("training/generate_5b/") or "tflop" not in against or not line["value"] or not peak:
        return line
    tflop = max(1, round(1e12 * against["tflop"] / forward())) * forward() / 1e12
    share = 100 * 1e12 * tflop / (1e-3 * line["value"]) / peak
    return line | {"against": against | {"tflop": round(tflop, 2), "mfu_pct": round(share, 2)}}


@functools.cache
def forward() -> float:
    """Operations of a forward pass of TI2V-5B."""
    from diffusers import WanTransformer3DModel

    from physisforcing.worldmodel.backbones.loading import build_empty
    from physisforcing.worldmodel.backbones.wan_paper import WanBackbone
    from physisforcing.worldmodel.training.flops import forward_flops

    model = build_empty(WanTransformer3DModel, TI2V | {"attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256})
    return forward_flops(WanBackbone(model, stride=(4, 16, 16)), LATENTS, TEXT)


def alone(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of memory as if their process had had the card to itself: what else lay there counts as context in them. The smallest context of
    a run is taken as that of each of its rows, cards that fit are told anew, and times, which others slowed down, are left out."""
    made = []
    for line in lines:
        if not line["claim"].startswith("training/memory/") or not line["against"].get("context_gib"):
            made.append(line)
            continue
        same = [other["against"].get("context_gib", 99.0) for other in lines if other["command"] == line["command"]]
        context = min(same)
        against = {name: value for name, value in line["against"].items() if not name.endswith(("_step", "_step_s"))}
        needed = (against["reserved_gib"] + context) * 1024
        fits = [card for card, mib in CARDS.items() if needed <= mib]
        made.append(line | {"against": against | {"context_gib": context, "fits_gb": fits}})
    return made


def table(lines: list[dict[str, Any]]) -> str:
    return HEAD + "".join(map(row, lines))


def row(line: dict[str, Any]) -> str:
    against = line["against"]
    memory = next((against[name] for name in ("peak_memory_gb", "memory_gib") if against.get(name)), "")
    peak = f"{against['mfu_pct']:.1f} %" if against.get("mfu_pct") else ""
    shown = ", ".join(f"{name} {against[name]:g}" for name in SHOWN if isinstance(against.get(name), int | float))
    if against.get("fits_gb"):
        shown = f"fits {', '.join(map(str, against['fits_gb']))} GB"
    value = "failed" if line["value"] is None else f"{line['value']:.4g} {line['unit']}"
    return f"| `{line['claim'].removeprefix('training/')}` | {value} | {line['n']} | {peak} | {memory} | {shown} |\n"


def page(text: str, lines: list[dict[str, Any]]) -> str:
    """The page with its table."""
    return re.sub(f"{BEGIN}.*?{END}", lambda _: BEGIN + table(lines) + END, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--without", action="append", default=[], help="claims that are left out")
    options = parser.parse_args()
    known = json.loads(DATA.read_text(encoding="utf-8")) if DATA.is_file() else []
    new = [line for path in options.files for line in json.loads(path.read_text(encoding="utf-8"))]
    lines = gathered(known, alone([line for line in new if line["claim"] not in options.without]))
    DATA.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), lines), encoding="utf-8")


if __name__ == "__main__":
    main()
