"""Plans with few kernels give the numbers of those that they are the fast twin of, whatever was planned before and beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from physisforcing.policy.fused import FusedSampler, join_products
from physisforcing.policy.model import precision, to_inference
from physisforcing.policy.sampling import Sampler, SamplingConfig, draw_noise
from tests.helpers.tiny_policy import SHAPE, tiny_batch, tiny_policy

#: Of float32: a product of three matrices at once may add up in another order, and nothing else differs.
SAME: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-6}
CPU = torch.device("cpu")


def plan(sampler: Sampler, rows: slice = slice(None), seed: int = 0, kept: list[Any] | None = None) -> torch.Tensor:
    batch = tiny_batch(seed)
    noise, future = draw_noise((5 + seed, 6 + seed), (8, 3), SHAPE[1:] if sampler.imagines else None)
    future = None if future is None else future[rows]
    with torch.no_grad():
        begun = sampler.begin(batch["latents_BCFhw"][rows, :, :1], batch["text"][rows], batch["state_BA"][rows], future)
        if kept is not None:
            kept.append(begun)
        return sampler.steps(begun, noise[rows])


def pair(mode: str = "first_frame", **more: Any) -> tuple[Sampler, FusedSampler]:
    """The plain sampler of a model of its own, and the fused one of an equal model."""
    settings = {name: more.pop(name) for name in ("head", "coarse_times") if name in more}
    plain, model = (to_inference(tiny_policy(mode, **settings), CPU) for _ in range(2))
    config = SamplingConfig(steps=4, video_steps=2)
    made = FusedSampler(model, config, frames=3, **({"compiled": False} | more))
    return Sampler(plain, config, frames=3), made


@pytest.mark.parametrize("mode", ["first_frame", "optional_idm"])
def test_a_fused_plan_is_the_plain_one(mode: str) -> None:
    plain, made = pair(mode)
    wanted = plan(plain)
    torch.testing.assert_close(plan(made), wanted, **SAME)
    assert wanted.abs().max() > 0.5 and (wanted[0] - wanted[1]).abs().max() > 0.1


def test_the_published_design_too() -> None:
    plain, made = pair(head="bare", coarse_times=True)
    torch.testing.assert_close(plan(made), plan(plain), **SAME)


def test_plans_after_and_beside_each_other_do_not_touch() -> None:
    _, made = pair()
    first, second = plan(made), plan(made, seed=1)
    assert torch.equal(plan(made), first) and torch.equal(plan(made, seed=1), second)
    assert (first - second).abs().max() > 0.1
    alone = torch.cat([plan(made, slice(row, row + 1)) for row in range(2)])
    torch.testing.assert_close(alone, first, **SAME)
    with torch.no_grad():  # two prefills, and the steps of the older one last, with the rows of other steps in it
        kept: list[Any] = []
        plan(made, kept=kept), plan(made, seed=1, kept=kept)
        noise = draw_noise((5, 6), (8, 3), None)[0]
        assert torch.equal(made.steps(kept[0], noise), first)


def test_steps_write_behind_the_prefill_alone() -> None:
    _, made = pair()
    kept: list[Any] = []
    plan(made, kept=kept)
    plain, _ = pair()
    batch = tiny_batch()
    with torch.no_grad():
        context = plain.model.context(batch["text"], batch["state_BA"])
        keys = plain.model.prefill(batch["latents_BCFhw"][:, :, :1], torch.zeros(2), context)
    for room, one in zip(kept[0], keys, strict=True):
        assert room.joint.shape == (2, 6 + 8, 3, 2, 24)
        for place, wanted in ((1, one.key), (2, one.value)):
            torch.testing.assert_close(room.joint[:, :6, place].transpose(1, 2), wanted, **SAME)
        torch.testing.assert_close(room.text_key, one.text_key, **SAME)
        torch.testing.assert_close(room.text_value, one.text_value, **SAME)


def test_joined_weights_keep_names_values_and_memory() -> None:
    model, before = to_inference(tiny_policy(), CPU), tiny_policy().state_dict()
    places = {p.data_ptr() for p in model.parameters()}
    for _ in range(2):  # again is the same
        join_products(model)
        after = model.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert {p.data_ptr() for p in model.parameters()} != places
    for attn, names in ((model.blocks[1].action.attn1, "qkv"), (model.blocks[1].attn2, "kv")):
        storage = attn.joined_weight.untyped_storage().data_ptr()
        assert all(getattr(attn, f"to_{n}").weight.untyped_storage().data_ptr() == storage for n in names)
    with pytest.raises(AssertionError, match="not trained"):
        join_products(tiny_policy())


def test_with_the_roundings_of_a_gpu_it_is_as_near_to_float32_as_the_plain_one() -> None:
    """Weights and products in bfloat16: joined and plain differ by less than either does from float32."""
    exact = plan(pair()[0])
    plain, made = pair()
    for sampler in (plain, made):
        to_inference(sampler.model, CPU, half=True)
    join_products(made.model)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        rounded, fused = plan(plain), plan(made)
    rounding = float((rounded - exact).abs().max())
    assert 0.0 < rounding < 0.1 * float(exact.abs().max())
    assert float((fused - rounded).abs().max()) <= rounding


def test_compiled_it_is_four_graphs_for_all_blocks_steps_and_plans() -> None:
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(len(inputs))
        return graph.forward

    plain, made = pair(compiled=True, backend=backend)
    for seed in (0, 1):
        with precision(CPU):
            torch.testing.assert_close(plan(made, seed=seed), plan(plain, seed=seed), **SAME)
    assert len(graphs) == 4, (
        "prefill, block of a step, before and behind the blocks: three blocks, four steps, two plans"
    )
