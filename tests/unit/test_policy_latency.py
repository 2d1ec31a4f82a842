"""The latency benchmark rehearses its full-size path on a CPU: every stage is timed, and arms are held against each other."""

from __future__ import annotations

import argparse

import pytest
import torch


def test_the_full_size_path_on_a_cpu(monkeypatch, repository):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import policy_latency

    options = argparse.Namespace(
        tiny=True, pico=False, policy="", arms=["eager", "eager again"], steps=2, tokens=4, plans=2, warm=0, vae="fp32"
    )
    kinds = iter(("eager", "eager"))
    plain = policy_latency.PlanningConfig
    monkeypatch.setattr(policy_latency, "PlanningConfig", lambda **more: plain(**(more | {"compute": next(kinds)})))
    arms, video, expert = policy_latency.run(options)
    found = {line["claim"]: line for line in policy_latency.lines(arms, options, (video, expert))}
    assert set(arms) == {"eager", "eager again"} and video > 10 * expert > 0
    for stage in ("canvas", "encode", "prefill", "steps", "total"):
        line = found[f"policy/latency/tiny/eager/{stage}_ms"]
        assert 0 < line["low"] <= line["value"] <= line["high"] and line["n"] == 2
        assert line["low"] <= line["against"]["p5"] <= line["value"] <= line["against"]["p95"] <= line["high"], "of two"
    parts = sum(arms["eager"].ms[stage][1] for stage in policy_latency.STAGES)
    assert 0.5 * arms["eager"].ms["total"][1] < parts <= arms["eager"].ms["total"][1]
    gap = found["policy/latency/tiny/eager again/largest_difference"]
    assert gap["value"] == 0.0 and gap["against"]["largest_action"] == pytest.approx(
        float(arms["eager"].actions_BPA.abs().max())
    )
    assert not torch.equal(arms["eager"].actions_BPA[0], arms["eager"].actions_BPA[1])
