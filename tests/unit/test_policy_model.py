"""The world-action model: who sees whom, caches, gradients, and the video branch against the stock transformer."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from physisforcing.core.errors import UserError
from physisforcing.policy import pattern
from physisforcing.policy.config import PolicyModelConfig, fastwam_compat
from physisforcing.policy.flops import step_flops
from physisforcing.policy.mixture import attend
from physisforcing.policy.model import Copy, WorldActionModel, to_inference
from physisforcing.policy.objective import draw, policy_losses
from physisforcing.policy.positions import action_rotary, action_times, rotate
from tests.helpers.tiny_policy import SHAPE, tiny_batch, tiny_policy, tiny_transformer

SIGMA, ACTION_SIGMA = torch.tensor([0.7, 0.3]), torch.tensor([0.4, 0.9])


def velocities(model: WorldActionModel, latents: torch.Tensor, **more):
    batch = tiny_batch()
    context = model.context(batch["text"], batch["state_BA"])
    with torch.no_grad():
        return model(latents, SIGMA, batch["actions_BPA"], ACTION_SIGMA, context, **more)


def changed(latents: torch.Tensor, frame: int) -> torch.Tensor:
    other = latents.clone()
    other[:, :, frame] += 1.0
    return other


@pytest.mark.parametrize(("mode", "sees"), [("first_frame", False), ("joint", True)])
def test_actions_see_the_noisy_future_in_joint_alone(mode: str, sees: bool) -> None:
    model, latents = tiny_policy(mode), tiny_batch()["latents_BCFhw"]
    video, acted, _ = velocities(model, latents)
    other_video, other, _ = velocities(model, changed(latents, 2))
    assert torch.equal(acted, other) is not sees
    assert not torch.equal(video[:, :, 1], other_video[:, :, 1]), "future frames see each other"
    _, seen, _ = velocities(model, changed(latents, 0))
    assert not torch.equal(acted, seen)


def test_actions_see_the_copy_in_idm_where_they_may() -> None:
    model, latents = tiny_policy("optional_idm"), tiny_batch()["latents_BCFhw"]
    level = torch.tensor([0.0, 0.5])
    seen = torch.tensor([True, False])
    shown = velocities(model, latents, copy=Copy(latents, level, seen))[1]
    noisy_changed = velocities(model, changed(latents, 2), copy=Copy(latents, level, seen))[1]
    torch.testing.assert_close(shown, noisy_changed, rtol=0, atol=0)
    copy_changed = velocities(model, latents, copy=Copy(changed(latents, 2), level, seen))[1]
    assert not torch.allclose(shown[0], copy_changed[0])
    assert torch.equal(shown[1], copy_changed[1])
    model.config.mode = "first_frame"
    alone = velocities(model, latents)[1]
    torch.testing.assert_close(shown[1], alone[1], rtol=1e-5, atol=1e-6)
    model.config.mode = "idm"
    always = velocities(model, latents, copy=Copy(latents, level))[1]
    torch.testing.assert_close(shown[0], always[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["first_frame", "joint", "idm"])
def test_video_never_sees_actions(mode: str) -> None:
    model, batch = tiny_policy(mode), tiny_batch()
    context = model.context(batch["text"], batch["state_BA"])
    more = {"copy": Copy(batch["latents_BCFhw"], torch.zeros(2))} if mode == "idm" else {}
    with torch.no_grad():
        one = model(batch["latents_BCFhw"], SIGMA, batch["actions_BPA"], ACTION_SIGMA, context, **more)[0]
        other = model(batch["latents_BCFhw"], SIGMA, batch["actions_BPA"] + 1, ACTION_SIGMA, context, **more)[0]
        without = model(batch["latents_BCFhw"], SIGMA, None, None, context)[0]
    assert torch.equal(one, other)
    torch.testing.assert_close(one, without, rtol=1e-5, atol=1e-6)


#: All frames see each other, as in the stock transformer.
BIDIRECTIONAL = {"first": ("first", "future"), "future": ("first", "future"), "action": ("first", "action")}


def test_the_video_branch_is_the_stock_transformer(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = tiny_transformer().eval()
    model = WorldActionModel(copy.deepcopy(stock), PolicyModelConfig(action_dim=3, state_dim=3, width=16, ffn_dim=24))
    batch = tiny_batch()
    context = model.context(batch["text"], batch["state_BA"])
    times = torch.zeros(2, 18)
    times[:, 6:] = 1000 * SIGMA[:, None]
    with torch.no_grad():
        wanted = stock(batch["latents_BCFhw"], times, context, return_dict=False)[0]
        causal = model(batch["latents_BCFhw"], SIGMA, None, None, context)[0]
        monkeypatch.setitem(pattern.PATTERNS, "first_frame", BIDIRECTIONAL)
        got = model(batch["latents_BCFhw"], SIGMA, None, None, context)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-6)
    assert not torch.allclose(causal, wanted, atol=1e-3), "the first frame does not see the future"


@pytest.mark.parametrize("mode", ["first_frame", "idm"])
def test_cached_actions_are_the_uncached_ones(mode: str) -> None:
    model, batch = tiny_policy(mode), tiny_batch()
    latents, context = batch["latents_BCFhw"], model.context(batch["text"], batch["state_BA"])
    more = {"copy": Copy(latents, torch.zeros(2))} if mode == "idm" else {}
    whole = velocities(model, latents, **more)[1]
    with torch.no_grad():
        shown = latents if mode == "idm" else latents[:, :, :1]
        kept = model.prefill(shown, torch.zeros(2), context)
        cached = model.act(batch["actions_BPA"], model.action_times(ACTION_SIGMA), kept)
    torch.testing.assert_close(cached, whole, rtol=1e-5, atol=1e-6)


def test_keys_of_the_first_frame_do_not_depend_on_the_future() -> None:
    model, batch = tiny_policy(), tiny_batch()
    context = model.context(batch["text"], batch["state_BA"])
    with torch.no_grad():
        alone = model.prefill(batch["latents_BCFhw"][:, :, :1], SIGMA, context)
        among = model.prefill(batch["latents_BCFhw"], SIGMA, context)
    for one, many in zip(alone, among, strict=True):
        torch.testing.assert_close(one.key, many.key[:, :, :6], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one.value, many.value[:, :, :6], rtol=1e-5, atol=1e-6)


def test_the_action_loss_reaches_the_first_frame_and_not_the_future() -> None:
    model, batch = tiny_policy(), tiny_batch()
    latents = batch["latents_BCFhw"].clone().requires_grad_(True)
    context = model.context(batch["text"], batch["state_BA"])
    _, acted, _ = model(latents, SIGMA, batch["actions_BPA"], ACTION_SIGMA, context)
    (gradient,) = torch.autograd.grad(acted.square().sum(), latents)
    assert torch.count_nonzero(gradient[:, :, 1:]) == 0
    assert gradient[:, :, 0].abs().max() > 0


def test_without_a_video_loss_no_future_is_computed_and_the_action_loss_is_the_same() -> None:
    model, batch = tiny_policy(), tiny_batch()
    drawn = draw(SHAPE, model.config, torch.Generator().manual_seed(3))
    seen: list[int] = []
    model.run_block = lambda block, video, *rest: seen.append(video.x_BLD.shape[1]) or block(video, *rest)
    both, _ = policy_losses(model, batch, drawn)
    alone, _ = policy_losses(model, batch, drawn, video_weight=0.0)
    assert set(seen[:3]) == {18} and set(seen[3:]) == {6}
    torch.testing.assert_close(both["action"], alone["action"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(both["loss"], both["action"] + both["video"])
    assert alone["loss"] == alone["action"] and "video" not in alone


def mask(mode: str, lengths: dict[str, int]) -> torch.Tensor:
    """bool [L,L], rows are queries: a mode's pattern as one table."""
    part = [name for name in pattern.PARTS for _ in range(lengths.get(name, 0))]
    return torch.tensor([[key in pattern.PATTERNS[mode][query] for key in part] for query in part])


@pytest.mark.parametrize("mode", ["first_frame", "joint", "idm", "bidirectional"])
def test_attention_by_groups_is_masked_attention(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pattern.PATTERNS, "bidirectional", BIDIRECTIONAL)
    lengths = {"first": 3, "future": 4, "copy": 4 * (mode == "idm"), "action": 5}
    total = sum(lengths.values())
    query, key, value = torch.randn(3, 2, 2, total, 8, generator=torch.Generator().manual_seed(0))
    wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=mask(mode, lengths))
    got = attend(query, key, value, pattern.groups(mode, lengths))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


PARTS = {"first": 3, "future": 4, "action": 5}
#: Strides of [B,H,L,D] gradients of two heads of eight numbers that lie as [B,L,H,D] without gaps.
LAID = [(length * 16, 8, 16, 1) for length in PARTS.values()]


def attended_loss(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Of [B,L,H,D], what the layers behind attention do with it: each expert takes its tokens."""
    found = attend(*(x.transpose(1, 2) for x in (query, key, value)), pattern.groups("first_frame", PARTS))
    video, action = (part.transpose(1, 2).flatten(2) for part in found.split([7, 5], 2))
    return video.square().sum() + action.square().sum()


def heads() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 12, 2, 8, generator=generator).requires_grad_() for _ in range(3)]


def test_attention_is_given_gradients_of_one_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    strides: list[tuple[int, ...]] = []
    plain, made = F.scaled_dot_product_attention, heads()

    def seen(*parts: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        found = plain(*parts, **more)
        found.register_hook(lambda gradient: strides.append(gradient.stride()))
        return found

    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", seen)
        attended_loss(*made).backward()
    assert sorted(strides) == LAID
    query, key, value = (x.transpose(1, 2) for x in made)
    whole = F.scaled_dot_product_attention(query, key, value, attn_mask=mask("first_frame", PARTS)).square().sum()
    for tensor, wanted in zip(made, torch.autograd.grad(whole, made), strict=True):
        torch.testing.assert_close(tensor.grad, wanted, rtol=1e-4, atol=1e-6)


def test_attention_in_a_compiled_block_is_given_gradients_of_the_same_layout() -> None:
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.compilers import nop

    strides: list[tuple[int, ...]] = []

    def backward(graph: torch.fx.GraphModule, inputs: object) -> object:
        for node in graph.graph.nodes:
            if "scaled_dot_product" in str(node.target) and "backward" in str(node.target):
                strides.append(node.args[0].meta["val"].stride())
        return nop(graph, inputs)

    backend = aot_autograd(fw_compiler=nop, bw_compiler=backward)
    torch.compile(attended_loss, backend=backend, fullgraph=True)(*heads()).backward()
    assert sorted(strides) == LAID


def test_the_published_mask() -> None:
    """Section 1.5 of the reference, RoboTwin's 120 tokens a latent frame: rows see columns."""
    table = mask("first_frame", {"first": 120, "future": 240, "action": 32})
    assert table.shape == (392, 392)
    blocks = [[bool(table[a, b]) for b in (0, 200, 380)] for a in (0, 200, 380)]
    assert blocks == [[True, False, False], [True, True, False], [True, False, True]]
    assert [table[a].sum().item() for a in (0, 200, 380)] == [120, 360, 152]


def test_positions_of_actions_lie_on_the_time_axis_of_the_video() -> None:
    rope = tiny_transformer().rope
    assert action_times(32, 16.0)[[15, 31]].tolist() == [1.0, 2.0]
    cos, sin = action_rotary(rope, "shared", 8, 4.0)
    video_cos, video_sin = rope(torch.zeros(1, 4, 3, 4, 6))
    # action 3 precedes the last picture of latent frame 1, whose first token lies at row 0, column 0
    torch.testing.assert_close(cos[0, 3], video_cos[0, 6])
    torch.testing.assert_close(sin[0, 3], video_sin[0, 6])
    plain, _ = action_rotary(rope, "separate", 8, 4.0)
    rates = 10000.0 ** (-torch.arange(0, 24, 2, dtype=torch.float64) / 24)
    torch.testing.assert_close(plain[0, 5, 0, ::2].double(), (5 * rates).cos(), rtol=0, atol=1e-6)


def test_rotation_keeps_lengths_and_depends_on_distance_alone() -> None:
    rope = tiny_transformer().rope
    cos, sin = action_rotary(rope, "shared", 8, 4.0)
    x = torch.randn(2, 24, generator=torch.Generator().manual_seed(0))
    query, key = (row.expand(1, 8, 1, 24) for row in x)
    turned, other = rotate(query, (cos, sin)), rotate(key, (cos, sin))
    torch.testing.assert_close(turned.norm(dim=-1), query.norm(dim=-1), rtol=1e-5, atol=1e-6)
    products = torch.einsum("bqhd,bkhd->qk", turned, other)
    for shift in range(1, 4):
        torch.testing.assert_close(products[shift:, shift:], products[:-shift, :-shift], rtol=1e-4, atol=1e-4)


def test_a_new_policy_gives_no_velocity_and_keeps_the_backbone() -> None:
    stock = tiny_transformer()
    model = WorldActionModel(
        copy.deepcopy(stock), PolicyModelConfig(action_dim=3, state_dim=3, width=16, ffn_dim=24, chunk=8)
    )
    batch = tiny_batch()
    context = model.context(batch["text"], batch["state_BA"])
    with torch.no_grad():
        acted = model(batch["latents_BCFhw"], SIGMA, batch["actions_BPA"], ACTION_SIGMA, context)[1]
    assert torch.count_nonzero(acted) == 0
    mine = {name for name, _ in model.action_parameters()}
    rest = {f"transformer.{name}" for name, _ in stock.named_parameters()}
    assert rest | mine == {name for name, _ in model.named_parameters()} and not rest & mine


def test_coarse_times_are_those_of_bfloat16() -> None:
    fine, coarse = tiny_policy(), tiny_policy(coarse_times=True)
    level = torch.tensor([0.97826, 0.980])
    assert torch.equal(*coarse.action_times(level)[0]), "978.26 and 980 are one number of bfloat16"
    assert not torch.equal(*fine.action_times(level)[0])


def test_the_published_design_has_its_parts() -> None:
    config = fastwam_compat(action_dim=3, state_dim=3, width=16, ffn_dim=24, chunk=8)
    model = WorldActionModel(tiny_transformer(), config)
    assert not hasattr(model.expert, "norm_out")
    assert (config.video_shift, config.action_shift, config.weighting) == (5.0, 5.0, "bell")


def test_a_policy_acts_with_the_numbers_that_it_was_trained_with() -> None:
    """Training rounds float32 weights at every matrix product; acting keeps the rounded ones. Both under autocast: equal bits."""
    batch = tiny_batch()
    made = []
    for half in (False, True):
        model = to_inference(tiny_policy(), torch.device("cpu"), half=half)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            context = model.context(batch["text"], batch["state_BA"])
            made.append(model(batch["latents_BCFhw"], SIGMA, batch["actions_BPA"], ACTION_SIGMA, context)[:2])
            kept = model.prefill(batch["latents_BCFhw"][:, :, :1], torch.zeros(2), context)
            made[-1] += (model.act(batch["actions_BPA"], model.action_times(ACTION_SIGMA), kept),)
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))
    assert model.expert.action_in.weight.dtype == torch.float32
    model, sent = tiny_policy(), list[torch.dtype]()
    model.to = lambda *_: (sent.append(model.blocks[0].action.attn1.to_q.weight.dtype), model)[1]  # type: ignore[method-assign]
    to_inference(model, torch.device("cpu"), half=True)
    assert sent == [torch.bfloat16], "rounded before they go to the device"
    assert model.blocks[0].action.attn1.to_q.weight.dtype == torch.bfloat16
    assert made[0][1].dtype == torch.float32


@pytest.mark.parametrize("mode", ["first_frame", "optional_idm"])
def test_a_block_is_one_graph(mode: str) -> None:
    """Forward and gradients of compiled blocks, which break into no parts, are those of plain ones."""
    batch, gradients = tiny_batch(), []
    for compiled in (False, True):
        model = tiny_policy(mode)
        if compiled:
            for block in model.blocks:
                block.compile(dynamic=False, fullgraph=True, backend="aot_eager")
        drawn = draw(SHAPE, model.config, torch.Generator().manual_seed(0))
        policy_losses(model, batch, drawn)[0]["loss"].backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [("mode", "everything"), ("head", "two"), ("chunk", 0), ("idm_share", 1.5), ("action_shift", -1.0)],
)
def test_settings_that_mean_nothing_are_refused(name: str, value: object) -> None:
    with pytest.raises(UserError, match=f"policy.{name}"):
        PolicyModelConfig(**{name: value})


@pytest.mark.parametrize(
    ("mode", "tap"),
    [*((mode, 0) for mode in pattern.PATTERNS), ("first_frame", 2), ("joint", 2), ("first_frame", 3)],
)
def test_without_a_video_loss_what_nobody_reads_is_not_computed_and_gradients_are_the_same(
    mode: str, tap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a model whose velocity is computed, and thrown away. Weights that nobody reads have no gradients, also where blocks are compiled:
    gradients of zero would let weight decay at them. ``tap``: the block of three that a loss reads as well."""
    batch, gradients, called = tiny_batch(), {}, list[str]()
    for arm in ("alone", "compiled", "thrown away"):
        model = tiny_policy(mode=mode)
        model.tap = tap or model.tap
        last = model.transformer.blocks[-1]
        for name, layer in {"proj_out": model.transformer.proj_out, "ffn": last.ffn, "query": last.attn1.to_q}.items():
            layer.register_forward_hook(lambda *_, told=f"{arm}: {name}": called.append(told))
        if arm == "compiled":
            for block in model.blocks:
                block.compile(backend="aot_eager", dynamic=False)
        if arm == "thrown away":
            plain = model.forward
            monkeypatch.setattr(
                model, "forward", lambda *some, need_velocity, plain=plain, **more: plain(*some, **more)
            )
        drawn = draw(SHAPE, model.config, torch.Generator().manual_seed(3))
        terms, tapped = policy_losses(model, batch, drawn, video_weight=0.0, need_tap=tap > 0)
        (terms["loss"] if tapped is None else terms["loss"] + tapped.square().mean()).backward()
        gradients[arm] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    last, alone, read = f"transformer.blocks.{len(model.blocks) - 1}.", gradients["alone"], tap == len(model.blocks)
    needless = [
        told for told in called if not told.startswith("thrown away") and (told.endswith("proj_out") or not read)
    ]
    assert "thrown away: proj_out" in called and not needless
    unread = tuple(last + name for name in ("attn1.to_q", "attn1.norm_q", "attn1.to_out", "attn2", "ffn", "norm2"))
    assert any(name.startswith(unread) for name in alone) == read and last + "attn1.to_k.weight" in alone
    assert not any("proj_out" in name for name in alone if not name.startswith("expert."))
    assert gradients["compiled"].keys() == alone.keys()
    for name, grad in gradients["thrown away"].items():
        assert torch.equal(grad, alone[name]) if name in alone else not grad.any(), name
    for name, grad in gradients["compiled"].items():
        torch.testing.assert_close(grad, alone[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tap", [0, 2, 3])
@pytest.mark.parametrize("mode", ["first_frame", "joint", "idm"])
def test_operations_without_a_video_loss_are_those_that_pytorch_counts(mode: str, tap: int) -> None:
    """``tap``: the block of three that a loss reads as well."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model, batch = tiny_policy(mode=mode), tiny_batch()
    model.tap = tap or model.tap
    drawn = draw(SHAPE, model.config, torch.Generator().manual_seed(3))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        terms, tapped = policy_losses(model, batch, drawn, video_weight=0.0, need_tap=tap > 0)
        (terms["loss"] if tapped is None else terms["loss"] + tapped.square().mean()).backward()
    counted = step_flops(model, SHAPE, batch["text"].shape[1] + 1, video=False, tap=tap > 0)
    assert counter.get_total_flops() == pytest.approx(SHAPE[0] * counted, rel=0.002)
