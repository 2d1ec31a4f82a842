"""Generation with parts that are on the CPU but for their turn: the same bits, less memory."""

import copy
import functools

import pytest
import torch

GPU = pytest.mark.gpu
SIDE, ROWS, BLOCKS = 4096, 16384, 12


def through(blocks, x, call):
    """The output of the blocks, and what was in use on the GPU at most: by tensors, and by copies that kernels still wait for."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for block in blocks:
        x = torch.nn.functional.silu(call(block, x))
    torch.cuda.synchronize()
    return x, torch.cuda.memory_stats()["active_bytes.all.peak"]


def after_a_while(stream, call, *inputs):
    """``call`` with the stream busy for some ten milliseconds before what it puts there."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
    return call(*inputs)


@GPU
@pytest.mark.parametrize("late", ["nothing", "computing", "copying"])
@pytest.mark.parametrize("compiled", [False, True])
def test_streamed_blocks_compute_the_same_bits_with_two_of_them_on_the_device(compiled, late):
    """Where a block is computed late, the next copy into its slot must wait for it; where a copy is late, the block and what is to be copied next
    must wait for that."""
    from physisforcing.worldmodel.placement import StreamedBlocks

    torch.manual_seed(0)
    blocks = torch.nn.ModuleList(torch.nn.Linear(SIDE, SIDE, dtype=torch.bfloat16) for _ in range(BLOCKS))
    blocks.requires_grad_(False)
    x, there = torch.randn(ROWS, SIDE, dtype=torch.bfloat16, device="cuda"), copy.deepcopy(blocks).cuda()
    if compiled:
        for block in (*blocks, *there):
            block.compile()
    through(there, x, lambda block, x: block(x))  # compiles
    plain, whole = through(there, x, lambda block, x: block(x))
    there.cpu()  # compiled code may hold on to the module
    home = [value.data_ptr() for value in blocks.parameters()]
    streamed = StreamedBlocks(blocks, torch.device("cuda"))
    weights = sum(value.nbytes for value in blocks[0].parameters())
    if late == "copying":
        streamed._copy = functools.partial(after_a_while, streamed._stream, streamed._copy)
    run = streamed.run
    if late == "computing":
        run = functools.partial(after_a_while, torch.cuda.current_stream(), run)
    for _ in range(3):
        made, used = through(blocks, x, run)
        assert torch.equal(made, plain)
        del made
    # the tensors that are there besides are the same, but for the plain pass's output, which is kept for comparison
    copies = (used - plain.nbytes - (whole - BLOCKS * weights)) / weights
    assert 1.9 < copies < 2.5, copies
    streamed.close()
    assert [value.data_ptr() for value in blocks.parameters()] == home


@GPU
@pytest.mark.parametrize("name", ["a14b", "ti2v", "cosmos3"])
def test_offloaded_models_make_the_same_latents(name, tmp_path):
    import tiny_paper
    from physisforcing.worldmodel.paper_generate import PaperConfig, PaperGenerator

    folder = getattr(tiny_paper, name)(tmp_path / name)
    found = {}
    for offload in ("none", "model", "block"):
        config = PaperConfig(
            **tiny_paper.SIZE, steps=4, device="cuda", dtype="bf16", offload=offload, text_cache=tmp_path
        )
        maker = PaperGenerator(folder, config)
        found[offload] = tiny_paper.our_latents(maker, [7, 8])
        weights = maker.experts.high.transformer.parameters()
        assert {value.device.type for value in weights} == {"cuda" if offload == "none" else "cpu"}
    for offload in ("model", "block"):
        assert all(torch.equal(one, other) for one, other in zip(found[offload], found["none"], strict=True)), offload
