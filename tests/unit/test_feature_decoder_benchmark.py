"""The benchmark of feature decoders rehearses without published weights and reads what a training run wrote."""

from __future__ import annotations

import dataclasses
import json

import pytest

from physisforcing.planner.feature_decoder.training import train_feature_decoder
from toy_decoders import feature_run


def test_the_benchmark_rehearses_and_reads_a_run(frozen, tmp_path, monkeypatch, repository):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import feature_decoder as benchmark

    lines = benchmark.main(["--tiny", "--steps", "3", "--device", "cpu", "--json", str(tmp_path / "found.json")])
    found = {line["claim"].removeprefix("planner/feature_decoder/"): line for line in lines}
    for preset, draws in (("paper", 4), ("worldarena", 1)):
        plan = found[f"{preset}/plan_p50_ms"]
        parts = [plan["against"][f"{part}_p50_ms"] for part in ("features", "resampler", "ddim")]
        assert plan["n"] == 3 and plan["against"]["draws"] == draws
        assert max(parts) <= plan["value"] <= found[f"{preset}/plan_p95_ms"]["value"]
    assert [step for step, _ in found["paper/overfit/loss_last"]["against"]["loss_curve"]] == [1, 2, 3]
    assert len(json.loads((tmp_path / "found.json").read_text())) == len(lines) == 6
    config = feature_run(steps=1)
    _, metrics = train_feature_decoder(config, frozen, folder=tmp_path / "run")
    metrics |= {"parameters": 1, "train_seconds": 1.0, "tasks": ["toy"], "world_model": "x"}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "config.json").write_text(json.dumps({"decoder": "feature", "feature": dataclasses.asdict(config)}))
    shared = {"command": "x", "provenance": benchmark.machine_provenance()}
    read = {line["claim"]: line for line in benchmark.pico(tmp_path, "pico", shared)}
    start = read["planner/feature_decoder/pico/start/joint_deg_drive"]
    assert start["value"] == pytest.approx(metrics["start"]["model"]["joint_deg"], abs=1e-3) and start["n"] == 1
    assert "planner/feature_decoder/pico/anywhere/joint_deg_measured" in read
    for place in ("start", "anywhere"):
        metrics[place]["real"] = metrics[place].pop("model")
    (tmp_path / "metrics.json").write_text(
        json.dumps({k: v for k, v in metrics.items() if k not in ("tasks", "now_deg")})
    )
    (tmp_path / "config.json").write_text(json.dumps({"decoder": "single_frame"}))
    single = benchmark.pico(tmp_path, "single", shared)
    assert single[0]["claim"] == "planner/feature_decoder/single/start/joint_deg_drive"
    assert single[0]["value"] == start["value"] and single[0]["against"]["decoder"] == "single_frame"
