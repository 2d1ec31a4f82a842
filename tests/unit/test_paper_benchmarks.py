"""The benchmarks of the large backbones rehearse on a CPU, and what they try out computes what the package computes."""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path

import pytest
import torch

import tiny_paper
from physisforcing.worldmodel.backbones.wan_paper import WanBackbone


@pytest.fixture
def benchmarks(monkeypatch, repository):
    """The scripts can be imported; what they set for the whole process is set back."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


def lines_of(path) -> dict[str, dict]:
    return {line["claim"]: line for line in json.loads(path.read_text())}


def backbone() -> WanBackbone:
    return WanBackbone(tiny_paper.wan_transformer(8, 8, 0), stride=(4, 16, 16))


def run(model: WanBackbone):
    """-> (velocity and tap, gradients of the trained weights by name) with inputs that are always the same."""
    draw = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 8, 3, 8, 12, generator=draw), torch.randn(1, 16, 16, generator=draw)
    shown = model.conditions(x[:, :, :1], text, 3)
    made = model(x, torch.tensor([0.5]), text, shown, need_tap=True)
    (made[0].square().mean() + made[1].square().mean()).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = [part.detach() for part in made], {name: p.grad for name, p in trained.items()}
    for parameter in trained.values():
        parameter.grad = None
    return found


def test_rotary_pairs_have_the_same_bits_and_joined_products_the_same_sums(benchmarks):
    from wan_variants import PairAttention, use_attention

    model = backbone()
    outputs, gradients = run(model)
    use_attention(model.blocks, PairAttention())
    pairs, pair_gradients = run(model)
    assert all(torch.equal(one, other) for one, other in zip(outputs, pairs, strict=True))
    for name, value in gradients.items():
        torch.testing.assert_close(pair_gradients[name], value, rtol=1e-5, atol=1e-7, msg=name)
    use_attention(model.blocks, PairAttention(join=True))
    joined, joined_gradients = run(model)
    for one, other in zip(outputs, joined, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    assert joined_gradients.keys() == gradients.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(joined_gradients[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_keys_and_values_of_the_text_are_made_once(benchmarks):
    from wan_variants import PairAttention, TextCache, use_attention

    model = backbone()
    outputs, _ = run(model)
    use_attention(model.blocks, PairAttention())
    model.run_block, counts = TextCache(), []
    model.blocks[0].attn2.to_k.register_forward_hook(lambda *_: counts.append(1))
    with torch.no_grad():
        draw = torch.Generator().manual_seed(0)
        x, text = torch.randn(1, 8, 3, 8, 12, generator=draw), torch.randn(1, 16, 16, generator=draw)
        shown = model.conditions(x[:, :, :1], text, 3)
        twice = [model(x, torch.tensor([0.5]), text, shown)[0] for _ in range(2)]
    assert len(counts) == 1 and all(torch.equal(found, outputs[0]) for found in twice)


def test_rows_of_training_are_written_and_one_that_fails_says_so(benchmarks, tmp_path, monkeypatch):
    import paper_training

    path, short = tmp_path / "found.json", ["--tiny", "--warmup", "1", "--repetitions", "5", "--json"]

    def full(*_inputs):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(paper_training, "optimizer_step", full)
    assert paper_training.main([*short, str(path), "--only", "plain,ours_eager,optimizer,lora_plain"]) == 1
    found = {claim.split("/")[2]: line for claim, line in lines_of(path).items()}
    assert set(found) == {"plain", "ours_eager", "optimizer", "lora_plain"}
    assert found["optimizer"]["value"] is None and "out of memory" in found["optimizer"]["against"]["failed"]
    ours = found["ours_eager"]
    assert ours["n"] == 5 and ours["low"] <= ours["value"] <= ours["high"]
    assert ours["against"]["q1_ms"] <= ours["value"] <= ours["against"]["q3_ms"] <= ours["against"]["p95_ms"]
    assert ours["against"]["plain_ms"] == pytest.approx(found["plain"]["value"], abs=0.01)


def test_rows_of_passes_are_written(benchmarks, tmp_path):
    import paper_generate

    short = ["--tiny", "--warmup", "1", "--repetitions", "2", "--json"]
    assert paper_generate.main([*short, str(tmp_path / "passes.json"), "--only", "plain,ours,ours_all"]) == 0
    passes = lines_of(tmp_path / "passes.json")
    assert len(passes) == 3
    for line in passes.values():
        assert line["value"] > 0 and line["against"]["difference_from"] == "plain"
        assert line["against"]["relative_difference"] < 0.02  # bfloat16


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("triton_poi_fused__scaled_dot_product_flash_attention_mul_0", "fused"),
        ("triton_red_fused__to_copy_addmm_native_layer_norm_3", "fused"),
        ("triton_tem_fused_addmm_gelu_7", "matrix_products"),
        ("triton_tem_fused__scaled_dot_product_attention_mm_t_2", "matrix_products"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 64>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_bias_TNT", "matrix_products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix_products"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", "other"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16>", "matrix_products"),
    ],
)
def test_kernels_are_told_by_their_names(benchmarks, kernel, kind):
    from kernel_times import kind_of

    assert kind_of(kernel) == kind


def test_exchange_that_computing_covers_is_not_exposed(benchmarks):
    from paper_exchange import kinds, spent

    kernels = [
        ("nvjet_a", (0.0, 2000.0)), ("ncclDevKernel_AllGather", (1000.0, 3000.0)), ("flash", (2500.0, 4000.0)),
        ("ncclDevKernel_ReduceScatter", (5000.0, 6000.0)), ("triton_b", (3500.0, 4500.0)), ("memcpy", (100.0, 200.0)),
    ]  # fmt: skip
    # two updates: 2 + 2 ms compute, 0.5 + 1 ms of 3 alone, 5.5 of 8 ms busy
    found = spent(kernels, whole_ms=4.0, steps=2)
    assert found == {"compute": 2.0, "exchange": 1.5, "exposed": 0.75, "between": 1.25}
    expected = {"matrix_products": 1.0, "attention": 0.75, "fused": 0.5, "copies": 0.05, "other": 0.0}
    assert kinds(kernels, 2) == expected


def test_an_update_is_timed_with_its_exchange(benchmarks, tmp_path, large_models):
    import paper_exchange

    model, store = large_models["ti2v"]
    words = ["--model", str(model), "--latents", str(store), "--work", str(tmp_path), "--device", "cpu", "--micro", "2"]
    words += ["--updates", "2", "--warmup", "1", "--json", str(tmp_path / "rows.json"), "--more", "run.compile=none"]
    paper_exchange.main(words)
    (row,) = lines_of(tmp_path / "rows.json").values()
    assert row["claim"] == "training/pf_wan_5b/exchange_compile_none_1_gpus_step_ms"
    assert (row["n"], row["against"]["samples"]) == (2, 2)
    assert row["low"] <= row["value"] <= row["high"]


def test_what_others_hold_on_a_card_is_no_context(benchmarks, tmp_path, monkeypatch):
    import paper_memory

    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\ntest "$1" = --id=GPU-7 && test "$2" = --query-gpu=memory.used && echo 1536\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-7,GPU-8")
    assert paper_memory.held_by_others() == 1536 * 2**20
    reserved = (24564 - 288) * 2**20
    found = paper_memory.fitting(reserved, 289 * 2**20)
    assert found == {"reserved_gib": 23.71, "context_gib": 0.28, "fits_gb": [48, 80, 141]}
    assert paper_memory.fitting(reserved, 288 * 2**20)["fits_gb"] == [24, 48, 80, 141]


def test_memory_is_written(benchmarks, tmp_path):
    import paper_memory

    memory = tmp_path / "memory.json"
    cases = "5b_bfloat16_none_81,a14b_lora_full_81,a14b_bfloat16_full_81,cosmos3_lora_full_81"
    assert paper_memory.main(["--tiny", "--eager", "--only", cases, "--json", str(memory)]) == 0
    for line in lines_of(memory).values():
        assert line["value"] is None and "GPU" in line["against"]["skipped"]  # no bytes without a GPU, and none said
        assert line["against"]["finite"] and line["against"]["trained_millions"] > 0
    assert len(lines_of(memory)) == 4


@pytest.mark.parametrize("offload", ["none", "block"])
def test_a_whole_clip_is_timed(benchmarks, paper_folders, tmp_path, offload):
    import paper_whole_clip

    out = tmp_path / "clip.json"
    words = ["--model", str(paper_folders["a14b"]), "--name", "tiny", "--device", "cpu", "--offload", offload]
    begun = time.perf_counter()
    paper_whole_clip.main([*words, "--frames", "5", "--size", "32x48", "--steps", "5", "--json", str(out)])
    whole = time.perf_counter() - begun
    (line,) = lines_of(out).values()
    assert line["claim"] == f"training/generate_tiny_offload_{offload}/clip_seconds"
    parts = line["against"]
    assert (parts["steps"], parts["frames"], parts["offload"], line["n"]) == (5, 5, offload, 1)
    assert 4 * parts["step_ms"] / 1e3 < line["value"] < whole - parts["first_clip_of_two_steps_s"] + 0.1


def test_shares_of_waiting_are_weighted_by_the_updates(benchmarks):
    from paper_scaling import waits

    found = [{"step_ms": ms, "data_wait_pct": share} for ms, share in ((100.0, 1.0), (300.0, 5.0), (100.0, 2.0))]
    assert waits(found) == {"data_wait_pct": 2.0, "data_wait_whole_pct": 3.6, "data_wait_most_pct": 5.0}


def test_runs_whose_memory_is_compared_made_the_videos_that_they_should(benchmarks, tmp_path, monkeypatch, capsys):
    import paper_recipes

    given = {"data": "runs/blocks", "work": str(tmp_path), "tiny": True, "steps": None, "lr": None, "json": None}
    given |= {"bucket": "81x480x640", "batch": 1, "alpha": 64.0, "checkpointing": "full", "compile": "", "more": []}
    recipe = paper_recipes.Recipe(argparse.Namespace(kind="5b", **given))
    trained = []

    def train(_: object, *words: str, pictures: bool) -> None:
        settings = dict(word.split("=", 1) for word in words[2:])  # the last of a name counts
        trained.append((settings["large.videos"], settings["run.eval_every"]))
        out = Path(settings["run.out"])
        (out / "videos").mkdir(parents=True, exist_ok=True)
        (out / "metrics.jsonl").write_text('{"grad_norm": 1.0, "memory_gib": 2.0}\n')
        if pictures and settings["large.videos"] == "1":
            (out / "videos" / "step-000002-0000.mp4").touch()

    monkeypatch.setattr(paper_recipes.Recipe, "physis", functools.partialmethod(train, pictures=True))
    recipe.videos()
    assert trained == [("0", "2"), ("1", "2")] and "needs a GPU" in capsys.readouterr().out and not recipe.lines
    (tmp_path / "videos_1" / "videos" / "step-000002-0000.mp4").unlink()
    monkeypatch.setattr(paper_recipes.Recipe, "physis", functools.partialmethod(train, pictures=False))
    with pytest.raises(RuntimeError, match=r"has 0 videos with large\.videos=1"):
        recipe.videos()


@pytest.mark.parametrize(
    ("seconds", "why"), [(60, "ended by itself"), (0, "0 updates within 0 s, of which 4 are left out")]
)
def test_a_training_without_updates_says_why(benchmarks, tmp_path, monkeypatch, capsys, seconds, why):
    import paper_scaling

    options = argparse.Namespace(work=str(tmp_path), updates=3, warmup=4, seconds=seconds)
    monkeypatch.setattr(paper_scaling, "overrides", lambda *_, **__: ["no_such_setting=1"])
    assert paper_scaling.run("full", 1, options) == ([], f"{why}; see its log")
    shown = capsys.readouterr().out
    assert shown.startswith(f"full on 1: {why}\n") and ("no_such_setting" in shown) == (seconds > 0)
