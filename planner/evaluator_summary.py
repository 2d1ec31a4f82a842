"""From verdicts to the question that a policy evaluator must answer: does success in the world model rank policies as reality does?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from physisforcing.core.stats import bootstrap_correlation, correlation, pearson_interval, permutation_p, wilson

#: Ways to count a verdict that is no verdict, both of which are always reported.
COUNTINGS = ("valid_only", "errors_as_failures")
#: With fewer policies a correlation is reported with a warning; with fewer than three there is none.
FEW_POLICIES, FEWEST_POLICIES = 10, 3


def summarise(
    rows: Sequence[Mapping[str, Any]], real: Mapping[str, tuple[int, int]], *, seed: int = 0
) -> dict[str, Any]:
    """``rows``: one a rollout, with ``policy`` and ``status`` (success, failure, error). ``real``: policy -> (successes, episodes) in the
    simulator. ``seed``: of the bootstrap.

    -> ``policies``: counts and rates of each, ``correlation``: counting -> statistics or ``skipped``, ``judge``: verdicts against what the
    model knows to be true (``truth`` of a row), where it does, ``warnings``.
    """
    names = list(dict.fromkeys(str(row["policy"]) for row in rows))
    policies = {name: _policy([row for row in rows if row["policy"] == name], real.get(name)) for name in names}
    found = {counting: _correlate(policies, counting, seed) for counting in COUNTINGS}
    return {"policies": policies, "correlation": found, "judge": _judge(rows), "warnings": _warnings(policies)}


def _judge(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """How often verdicts are right, by what is true; None where no row knows it."""
    known = [(row["status"], bool(row["truth"]["success"])) for row in rows if "success" in row.get("truth", {})]
    if not known:
        return None
    judged = [(status == "success", true) for status, true in known if status != "error"]
    sides = {}
    for name, wanted in (("successes_seen", True), ("failures_seen", False)):
        right = [said == true for said, true in judged if true is wanted]
        sides[name] = _rate(sum(right), len(right))
    rates = [side["rate"] for side in sides.values()]
    balanced = None if None in rates else sum(rates) / 2
    return {**sides, "balanced_accuracy": balanced, "n": len(judged), "errors": len(known) - len(judged)}


def _policy(rows: Sequence[Mapping[str, Any]], real: tuple[int, int] | None) -> dict[str, Any]:
    count = {status: sum(row["status"] == status for row in rows) for status in ("success", "failure", "error")}
    seeds = sorted({int(row["seed"]) for row in rows if "seed" in row})
    entry: dict[str, Any] = {"errors": count["error"], "seeds": seeds}
    for counting in COUNTINGS:
        n = count["success"] + count["failure"] + (count["error"] if counting == "errors_as_failures" else 0)
        entry[counting] = _rate(count["success"], n)
    entry["real"] = None if real is None else _rate(*real)
    seen, truth = entry["valid_only"]["rate"], None if real is None else entry["real"]["rate"]
    entry["bias"] = None if seen is None or truth is None else seen - truth
    return entry


def _rate(successes: int, n: int) -> dict[str, Any]:
    low, high = wilson(successes, n)
    return {"successes": successes, "n": n, "rate": successes / n if n else None, "low": low, "high": high}


def _correlate(policies: Mapping[str, Mapping[str, Any]], counting: str, seed: int) -> dict[str, Any]:
    pairs = {
        name: (entry[counting], entry["real"])
        for name, entry in policies.items()
        if entry["real"] is not None and entry["real"]["n"] and entry[counting]["n"]
    }
    if len(pairs) < FEWEST_POLICIES:
        have = f"has {len(pairs)}"
        return {"skipped": f"needs {FEWEST_POLICIES} policies with verdicts and simulator results, {have}"}
    imagined = np.array([pair[0]["rate"] for pair in pairs.values()])
    real = np.array([pair[1]["rate"] for pair in pairs.values()])
    for what, values in (("the world model", imagined), ("the simulator", real)):
        if np.ptp(values) == 0:
            return {"skipped": f"needs policies that differ: all have rate {values[0]:.2f} in {what}"}
    rng = np.random.default_rng(seed)
    r = correlation(imagined, real)
    low, high, left_out = bootstrap_correlation(imagined, real, rng)
    noise_low, noise_high = _episode_noise(list(pairs.values()), rng)
    return {
        "policies": list(pairs),
        "n": len(pairs),
        "pearson_r": r,
        "fisher": pearson_interval(r, len(pairs)),
        "permutation_p": permutation_p(imagined, real, rng),
        "bootstrap_policies": (low, high),
        "bootstrap_left_out": left_out,
        "bootstrap_episodes": (noise_low, noise_high),
        "kendall_tau": correlation(imagined, real, "kendall"),
        "kendall_p": permutation_p(imagined, real, rng, "kendall"),
        "mean_bias": float((imagined - real).mean()),
    }


def _episode_noise(
    pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], rng: np.random.Generator, draws: int = 4000
) -> tuple[float, float]:
    """Percentile interval of r for these policies if their episodes were drawn again (rates as seen)."""

    def drawn(side: int) -> np.ndarray:
        counts = np.array([pair[side]["n"] for pair in pairs])
        rates = np.array([pair[side]["rate"] for pair in pairs])
        return rng.binomial(counts, rates, (draws, len(pairs))) / counts

    imagined, real = drawn(0), drawn(1)
    varied = (np.ptp(imagined, axis=1) > 0) & (np.ptp(real, axis=1) > 0)
    values = [correlation(x, y) for x, y in zip(imagined[varied], real[varied], strict=True)]
    if not values:
        return -1.0, 1.0
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _warnings(policies: Mapping[str, Mapping[str, Any]]) -> list[str]:
    found = []
    n = sum(entry["real"] is not None for entry in policies.values())
    if 0 < n < FEW_POLICIES:
        smallest = f"; no p-value of {n} policies is below {_smallest_p(n):.3g}" if FEWEST_POLICIES <= n <= 5 else ""
        found.append(f"n={n} policies: a correlation of so few points says little, whatever its value{smallest}")
    errors = sum(entry["errors"] for entry in policies.values())
    if errors:
        rollouts = sum(entry["errors_as_failures"]["n"] for entry in policies.values())
        found.append(f"{errors} of {rollouts} verdicts are errors: both ways of counting them are given")
    missing = [name for name, entry in policies.items() if entry["real"] is None]
    if missing:
        found.append(f"no simulator results of {', '.join(missing)}: not in the correlation")
    return found


def _smallest_p(n: int) -> float:
    """Of all orders of n different values one is as extreme as a perfect correlation (two where the values are evenly spaced)."""
    return 1 / float(np.prod(np.arange(1, n + 1)))


def markdown(summary: Mapping[str, Any], *, title: str, notes: Sequence[str] = ()) -> str:
    """Table of policies, the correlations, warnings first."""
    lines = [f"# {title}", "", *(f"**{text}**\n" for text in summary["warnings"])]
    lines += ["| policy | in the world model | 95 % | errors | in the simulator | 95 % | difference |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for name, entry in summary["policies"].items():
        bias = "-" if entry["bias"] is None else f"{100 * entry['bias']:+.0f}"
        cells = [name, *_cells(entry["valid_only"]), str(entry["errors"]), *_cells(entry["real"]), bias]
        lines.append("| " + " | ".join(cells) + " |")
    lines += _judge_lines(summary["judge"])
    for counting, found in summary["correlation"].items():
        lines += ["", f"## Correlation over policies, {counting.replace('_', ' ')}", ""]
        if "skipped" in found:
            lines.append(f"skipped: {found['skipped']}")
            continue
        lines += [
            f"- Pearson r {found['pearson_r']:.3f}, 95 % by Fisher's z {_span(found['fisher'])}, permutation p "
            f"{found['permutation_p']:.3g}, n={found['n']} policies",
            f"- bootstrap over policies {_span(found['bootstrap_policies'])} ({100 * found['bootstrap_left_out']:.0f} % of the "
            f"resamples had no correlation), over episodes of these policies {_span(found['bootstrap_episodes'])}",
            f"- Kendall tau-b {found['kendall_tau']:.3f}, permutation p {found['kendall_p']:.3g}",
            f"- mean difference, world model minus simulator: {100 * found['mean_bias']:+.1f} points",
        ]
    lines += ["", *(f"- {note}" for note in notes)]
    return "\n".join(lines).rstrip() + "\n"


def _judge_lines(part: Mapping[str, Any] | None) -> list[str]:
    if part is None:
        return []
    cells = {name: " (95 % ".join(_cells(part[name])) + ")" for name in ("successes_seen", "failures_seen")}
    accuracy = "not known" if part["balanced_accuracy"] is None else f"{100 * part['balanced_accuracy']:.0f} %"
    return [
        "",
        "## The judge against the truth",
        "",
        f"- successes called success: {cells['successes_seen']}; failures called failure: {cells['failures_seen']}",
        f"- balanced accuracy {accuracy}, n={part['n']} verdicts, {part['errors']} errors",
    ]


def measurements(
    summary: Mapping[str, Any], *, model: str, command: str, provenance: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Lines ``planner/evaluator/<model>/...``: success of every policy in the model, and r with its Fisher interval."""
    from .measurements import measurement

    shared: dict[str, Any] = {"command": command, "provenance": provenance}
    lines = []
    for name, entry in summary["policies"].items():
        rate = entry["valid_only"]
        if rate["n"]:
            against = {"errors": entry["errors"], "simulator": None if entry["real"] is None else entry["real"]["rate"]}
            interval = {"low": rate["low"], "high": rate["high"], "n": rate["n"], "seeds": entry["seeds"]}
            claim = f"planner/evaluator/{model}/{name}/success"
            lines.append(measurement(claim, rate["rate"], unit="share", against=against, **interval, **shared))
    for counting, found in summary["correlation"].items():
        if "skipped" not in found:
            low, high = found["fisher"]
            names = ("permutation_p", "kendall_tau", "bootstrap_policies", "bootstrap_episodes", "mean_bias")
            against = {name: found[name] for name in names}
            claim = f"planner/evaluator/{model}/{counting}/pearson_r"
            seeds = sorted({seed for entry in summary["policies"].values() for seed in entry["seeds"]})
            interval = {"low": low, "high": high, "n": found["n"], "seeds": seeds}
            lines.append(measurement(claim, found["pearson_r"], unit="1", against=against, **interval, **shared))
    return lines


def published_markdown() -> str:
    """The published correlations as a table of their own, with the intervals that follow from five policies (computed here)."""
    from .worldarena import published

    content = published()
    part = content["policy_evaluator"]
    lines = [f"## {part['title']} (not measured here)", "", part["note"], ""]
    lines += ["| world model | Pearson r | 95 % by Fisher's z, n=5 | source |", "| --- | --- | --- | --- |"]
    for row in part["rows"]:
        span = _span(pearson_interval(row["pearson_r"], part["policies"]))
        sources = "; ".join(content["sources"][name] for name in row["sources"])
        lines.append(f"| {row['world_model']} | {row['pearson_r']:.3f} | {span} | {sources} |")
    return "\n".join(lines) + "\n"


def _cells(rate: Mapping[str, Any] | None) -> list[str]:
    if rate is None or rate["rate"] is None:
        return ["-", "-"]
    share = f"{rate['successes']}/{rate['n']} = {100 * rate['rate']:.0f} %"
    return [share, f"{100 * rate['low']:.0f}-{100 * rate['high']:.0f} %"]


def _span(interval: Sequence[float]) -> str:
    return f"{interval[0]:.2f} to {interval[1]:.2f}"
