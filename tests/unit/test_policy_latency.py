"""The latency benchmark rehearses its full-size path on a CPU: every stage is timed, and arms are held against each other."""

from __future__ import annotations

import argparse
import json
from typing import NamedTuple

import pytest
import torch


class Event(NamedTuple):
    """What the profiler says of a kernel."""

    key: str
    self_device_time_total: float
    count: int


def test_the_full_size_path_on_a_cpu(monkeypatch, repository):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import kernel_times
    import policy_latency

    options = argparse.Namespace(
        tiny=True, pico=False, policy="", arms=["eager", "fused_half"], steps=2, tokens=4, plans=2, warm=0, json=None
    )
    monkeypatch.setitem(policy_latency.ARMS, "fused_half", "eager")  # nothing is compiled here
    arms, video, expert = policy_latency.run(options)
    events = [Event("triton_red_fused_add_0", 600.0, 60), Event("nvjet_tst_64x8", 900.0, 120), Event("idle", 0.0, 9)]
    arms["eager"].kernels = {"steps": kernel_times.counted(0.75, events, 3)}
    found = {line["claim"]: line for line in policy_latency.lines(arms, options, (video, expert))}
    assert set(arms) == {"eager", "fused_half"} and video > 10 * expert > 0
    for stage in ("canvas", "encode", "prefill", "steps", "total"):
        line = found[f"policy/latency/tiny/eager/{stage}_ms"]
        assert 0 < line["low"] <= line["value"] <= line["high"] and line["n"] == 2
        assert line["low"] <= line["against"]["p5"] <= line["value"] <= line["against"]["p95"] <= line["high"], "of two"
    parts = sum(arms["eager"].ms[stage][1] for stage in policy_latency.STAGES)
    assert 0.5 * arms["eager"].ms["total"][1] < parts <= arms["eager"].ms["total"][1]
    gap = found["policy/latency/tiny/fused_half/largest_difference"]
    largest = float(arms["eager"].actions_BPA.abs().max())
    assert 0.0 < gap["value"] < 0.1 * largest and gap["against"]["largest_action"] == pytest.approx(largest)
    assert found["policy/latency/tiny/fused_half/total_ms"]["against"]["vae"] == "bf16"
    kinds = {"fused": (0.2, 20), "matrix_products": (0.3, 40), "copies": (0.0, 0), "between": (0.25, None)}
    for kind, (ms, count) in kinds.items():
        line = found[f"policy/latency/tiny/eager/kernels/steps/{kind}_ms"]
        assert line["value"] == pytest.approx(ms) and line["against"] == {"whole_ms": 0.75, "kernels": count}
    assert not torch.equal(arms["eager"].actions_BPA[0], arms["eager"].actions_BPA[1])


def test_the_fused_arms_encode_as_they_say(monkeypatch, repository):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import policy_latency

    asked: list[dict] = []
    monkeypatch.setattr(policy_latency, "first_frame_by", lambda _vae, _device, **more: asked.append(more))
    monkeypatch.setattr(policy_latency, "ChunkModel", lambda *parts: asked[-1].update(compute=parts[5].compute))
    parts = None, None, argparse.Namespace(vae=None), None
    monkeypatch.setattr(policy_latency, "PipelineVae", lambda vae: vae)
    for name in policy_latency.ARMS:
        policy_latency.full_arm(parts, name, argparse.Namespace(steps=2), torch.device("cuda"))
    said = [(one["compute"], one["fast"], one["half"]) for one in asked]
    eager, graph, compiled = (("eager", False, False), ("graph", False, False), ("compile", False, False))
    assert said == [eager, graph, compiled, ("fused", True, False), ("fused", True, True)]


def test_rows_of_a_small_update_are_rehearsed_on_a_cpu(monkeypatch, repository, tmp_path):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import policy_small_update

    words = ["--tiny", "--batch", "2", "--updates", "2", "--warm", "0", "--json", str(tmp_path / "rows.json")]
    monkeypatch.setattr("sys.argv", ["benchmarks/policy_small_update.py", *words])
    policy_small_update.main()
    rows = {row["claim"].split("/")[3]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert set(rows) == set(policy_small_update.ROWS)
    gflop = {name: row["against"]["gflop"] for name, row in rows.items()}
    assert gflop["both_compiled"] > 4 * gflop["actions"] > 0, "four frames behind the first"
    assert all(0 < row["against"]["batch_ms"] < row["low"] <= row["value"] <= row["high"] for row in rows.values())


@pytest.mark.parametrize(("gap", "code"), [(0.0019, None), (0.003, 1), (float("nan"), 1)])
def test_actions_that_differ_too_far_fail(repository, monkeypatch, gap, code):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import policy_latency

    line = {
        "claim": "policy/latency/cpu/tiny/graph/largest_difference",
        "value": gap,
        "unit": "z",
        "low": None,
        "against": {},
    }
    monkeypatch.setattr(policy_latency, "run", lambda _: ({}, 1, 1))
    monkeypatch.setattr(policy_latency, "lines", lambda *_: [line])
    monkeypatch.setattr("sys.argv", ["policy_latency.py", "--tiny"])
    if code is None:
        policy_latency.main()
    else:
        with pytest.raises(SystemExit) as ended:
            policy_latency.main()
        assert ended.value.code == code
