"""Training of policies on large backbones, at a tiny size: the published recipes run, weights come from where they should, and a run that is
computed in another way or killed gives the same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tiny_large_policy as tiny
import tiny_paper
from physisforcing.core.config import compose
from physisforcing.core.errors import UserError
from physisforcing.core.paths import weights_root
from physisforcing.policy.backbone import build_policy
from physisforcing.policy.checkpoint import load_policy, read_settings
from physisforcing.policy.planning import PlanningConfig, load_chunk_model
from physisforcing.policy.training import PolicyTrainer, train_policy
from physisforcing.policy.training_config import TrainPolicyConfig
from physisforcing.policy.training_start import adopt, prepare_policy_banks
from physisforcing.worldmodel.data.batches import step_generator
from physisforcing.worldmodel.data.latents import LatentsCommand, make_latents
from physisforcing.worldmodel.storage import latents_fingerprint
from physisforcing.worldmodel.training.banks import open_stores
from physisforcing.worldmodel.training.checkpoint import load_training
from ranks import fork, kill_once, update_lines

pytestmark = pytest.mark.usefixtures("own_cache")  # sentences are embedded
CPU = torch.device("cpu")
#: The paper's six tasks and one more.
TASKS = (
    "place_empty_cup", "press_stapler", "grab_roller", "shake_bottle", "adjust_bottle", "stack_bowls_two", "click_bell",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.pipeline(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def store(model, tmp_path_factory) -> Path:
    return tiny.store(tmp_path_factory.mktemp("store") / "latents", latents=latents_fingerprint(model / "vae"))


def trainer(made: TrainPolicyConfig) -> PolicyTrainer:
    """With the last layers away from zero, below which nothing has a gradient at first."""
    adopt(made)
    found = PolicyTrainer(made, prepare_policy_banks(made, CPU, quiet=True)[0], CPU)
    generator = torch.Generator().manual_seed(3)
    for layer in (found.policy.expert.proj_out, found.policy.transformer.proj_out):
        layer.weight.data.normal_(std=0.3, generator=generator)
    return found


def gradients(found: PolicyTrainer) -> dict[str, torch.Tensor]:
    batch = found.batch(0)
    found._backward(batch, found.draw(batch, step_generator(7, 0)))
    return {name: p.grad.clone() for name, p in found.model.named_parameters() if p.grad is not None}


def video(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("experiment", ["robotwin", "six_tasks", "libero"])
def test_the_published_recipes_run(model: Path, tmp_path: Path, experiment: str) -> None:
    """Also what the folder says of windows, robot and encoders, on which acting depends."""
    libero = experiment == "libero"
    words = {"canvas": "libero", "joints": (7, 8)} if libero else {}
    known = latents_fingerprint(model / "vae")
    latents = tiny.store(tmp_path / "s", tasks=TASKS, episodes=15, windows=1, latents=known, **words)  # type: ignore[arg-type]
    made = tiny.config(
        model, latents, tmp_path / "run", "run.steps=2", "run.save_every=500", experiment=f"policy_{experiment}"
    )
    assert made.run.checkpointing == "full" and made.run.micro == 1 and made.data.workers == 2
    export = train_policy(made)
    policy, info = load_policy(export)
    assert (info.canvas, info.size) == (("libero", (224, 448)) if libero else ("robotwin", (384, 320)))
    assert (info.frames, info.frame_stride, info.control_hz, info.autoencoder) == (9, 4, 50.0, "ti2v")
    assert info.text == {"encoder": "umt5-xxl", "tokens": 8, "padded": 512, "fingerprint": "drawn"}
    assert info.latents == known and (policy.config.action_dim, policy.config.state_dim) == (
        (7, 8) if libero else (14, 14)
    )
    first, last = update_lines(tmp_path / "run")
    assert 0 < last["video"] < first["video"] and last["action"] > 0 and last["grad_norm"] > 0
    statistics = json.loads((export / "statistics.json").read_text())
    # three of the 15 episodes are of a seventh task; one is held out
    assert statistics["episodes"] == (15 - (experiment == "six_tasks") * 2 - 1)
    assert statistics["kind"] == ("minmax" if libero else "zscore")


def test_weights_come_from_where_they_are_said_to(model: Path, store: Path, tmp_path: Path) -> None:
    """Block by block as all at once by ``build_policy``; drawn ones are others, and of a policy all of its own."""
    made = tiny.config(model, store, tmp_path / "run", "run.seed=5")
    adopt(made)
    bank = prepare_policy_banks(made, CPU, quiet=True)[0]
    found = PolicyTrainer(made, bank, CPU).policy
    whole = build_policy(model, made.policy, seed=5)[0].state_dict()
    fresh = [n for n in whole if n.startswith(("proprioception.", "expert.action_in."))]
    for name, value in found.state_dict().items():
        assert torch.equal(value, whole[name]) == (name not in fresh), name
    assert len(fresh) == 4
    assert all(not v.any() for v in found.expert.proj_out.parameters())

    made.run.init = f"random:{model}"
    drawn = PolicyTrainer(made, bank, CPU)
    assert drawn.source["video"]["weights"] == "drawn, seed 5"
    same = [n for n, v in drawn.policy.state_dict().items() if v.ndim > 1 and torch.equal(v, whole[n])]
    assert same == ["expert.proj_out.weight"]
    assert not any(value.any() for value in drawn.policy.transformer.proj_out.parameters())
    again = PolicyTrainer(made, bank, CPU).policy.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in drawn.policy.state_dict().items())

    tiny_paper.wan_transformer(8, 8, 11).save_pretrained(tmp_path / "export" / "transformer")
    made.run.init = str(tmp_path / "export")
    other = PolicyTrainer(made, bank, CPU).policy.state_dict()
    for name, value in video(tmp_path / "export").items():
        assert torch.equal(other[f"transformer.{name}"], value) and name.startswith("rope") is False


def test_a_policy_is_trained_further(model: Path, store: Path, tmp_path: Path, capsys) -> None:
    export = train_policy(tiny.config(model, store, tmp_path / "one", "run.steps=1", "policy.mode=optional_idm"))
    held = load_policy(export)[0].state_dict()
    assert video(export)["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16
    made = tiny.config(model, store, tmp_path / "two", f"run.init={export}")
    found = trainer(made)
    assert made.policy.mode == "optional_idm" and found.source["policy"] == "one/export"
    drawn = ("expert.proj_out.weight", "transformer.proj_out.weight")  # by ``trainer``
    assert all(torch.equal(v, held[n]) for n, v in found.policy.state_dict().items() if n not in drawn)
    with pytest.raises(UserError, match=r"run\.init: .*random: before a backbone, not a policy"):
        adopt(tiny.config(model, store, tmp_path / "two", f"run.init=random:{export}"))
    with pytest.raises(UserError, match=r"text_tokens: got 9, wanted 8, as run\.init has"):
        adopt(tiny.config(model, store, tmp_path / "two", f"run.init={export}", "text_tokens=9"))
    adopt(tiny.config(model, store, tmp_path / "two", f"run.init={export}", "text_tokens=128"))
    assert "text_tokens=8 (from run.init; the default is 128)" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"text_tokens: got 128, wanted 8, as run\.init has"):
        adopt(tiny.config(model, store, tmp_path / "two", f"run.init={export}", "text_tokens=128"), {"text_tokens"})
    other = tiny.store(tmp_path / "other", latents="others")
    with pytest.raises(UserError, match=r"data\.latents: got 'latents others'"):
        trainer(tiny.config(model, other, tmp_path / "two", f"run.init={export}"))


def test_a_policy_is_trained_further_on_windows_like_its_own(model: Path, store: Path, tmp_path: Path) -> None:
    """Of another rate a chunk would last another time, and statistics of other motions would stay."""
    export = train_policy(tiny.config(model, store, tmp_path / "one", "run.steps=1"))
    known = latents_fingerprint(model / "vae")
    for number, (words, message) in enumerate([
        ({"hz": 20.0}, r"data\.latents: rate: got '20 rows a second', wanted 50, as run\.init has"),
        ({"hz": 50.4}, ""),
        ({"stride": 8}, r"data\.latents: stride: got 'a picture every 8 rows', wanted every 4, as"),
        ({"canvas": "libero"}, r"data\.latents: canvas: got 'libero', wanted robotwin, as"),
    ]):  # fmt: skip
        latents = tiny.store(tmp_path / f"{number}", latents=known, **words)  # type: ignore[arg-type]
        made = tiny.config(model, latents, tmp_path / "two", f"run.init={export}")
        adopt(made)
        if not message:
            prepare_policy_banks(made, CPU, quiet=True)
            continue
        with pytest.raises(UserError, match=message):
            prepare_policy_banks(made, CPU, quiet=True)


def test_words_round_a_sentence_are_not_forgotten(model: Path, store: Path, tmp_path: Path) -> None:
    """A converted policy may have them; windows hold sentences as they stand."""
    export = train_policy(tiny.config(model, store, tmp_path / "one", "run.steps=1"))
    settings = json.loads((export / "policy.json").read_text())
    for template, fine in (("{instruction}", True), ("A video of a robot that is to {instruction}", False)):
        settings["text"]["template"] = template
        (export / "policy.json").write_text(json.dumps(settings))
        made = tiny.config(model, store, tmp_path / "two", f"run.init={export}")
        if fine:
            adopt(made)
            continue
        with pytest.raises(
            UserError, match=r"run\.init: text\.template: got 'A video .*convert again with template='{instruction}'"
        ):
            adopt(made)


@pytest.mark.parametrize("frozen", [False, True])
def test_however_blocks_are_computed_gradients_are_the_same(
    model: Path, store: Path, tmp_path: Path, frozen: bool
) -> None:
    words = ["run.micro=0", "run.batch=4", *(["freeze_video=true", "video_weight=0"] if frozen else [])]

    def found(*more: str) -> dict[str, torch.Tensor]:
        return gradients(trainer(tiny.config(model, store, tmp_path / "run", *words, *more)))

    kept = found("run.checkpointing=none")
    assert sum(name.endswith("weight") for name in kept) >= (53 if frozen else 100)
    assert any(name.startswith("policy.transformer.patch") for name in kept) != frozen
    for kind in ("full", "selective"):
        again = found(f"run.checkpointing={kind}")
        assert again.keys() == kept.keys() and all(torch.equal(again[name], kept[name]) for name in kept), kind
    parts = found("run.micro=1", "run.checkpointing=full")
    for name, value in kept.items():
        torch.testing.assert_close(parts[name], value, rtol=2e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_compiled_blocks_compute_the_same(
    model: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block is compiled whole and once for all of them: with another backend than the usual one, which takes minutes on a CPU."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter, plain = CompileCounterWithBackend("aot_eager"), torch.nn.Module.compile
    words = ["run.micro=0", "run.batch=4"]
    kept = gradients(trainer(tiny.config(model, store, tmp_path / "run", *words, "run.checkpointing=none")))
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **more: plain(self, **more, backend=counter, fullgraph=True)
    )
    found = trainer(tiny.config(model, store, tmp_path / "run", *words, "run.compile=blocks"))
    assert found.config.run.checkpointing == "full"
    again = gradients(found)
    assert 1 <= counter.frame_count <= 2, counter.frame_count
    for name, value in kept.items():
        torch.testing.assert_close(again[name], value, rtol=2e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    torch._dynamo.reset()


def test_of_both_experts_nothing_inside_a_block_is_kept(model: Path, store: Path, tmp_path: Path) -> None:
    """Numbers kept for the backward pass of 360 video and of 32 action tokens a sample: three blocks' inputs and ends of the network."""
    kept: dict[str, dict[int, int]] = {}
    for kind in ("none", "full"):
        made = trainer(tiny.config(model, store, tmp_path / "run", f"run.checkpointing={kind}", "run.micro=0"))
        batch, seen = made.batch(0), {360: 0, 32: 0}
        drawn = made.draw(batch, step_generator(7, 0))

        def pack(value: torch.Tensor, seen: dict[int, int] = seen) -> torch.Tensor:
            if value.ndim == 3 and value.shape[1] in seen:
                seen[value.shape[1]] += value.numel()
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            made.terms(batch, drawn, None)
        kept[kind] = seen
    assert all(kept["full"][rows] < 0.2 * kept["none"][rows] for rows in (360, 32)), kept


def test_a_killed_run_goes_on_with_the_same_bits(model: Path, store: Path, tmp_path: Path) -> None:
    words = ["run.steps=6", "run.resume=true", "run.save_every=2"]
    straight, killed = (tiny.config(model, store, tmp_path / name, *words) for name in ("straight", "killed"))
    export, run = train_policy(straight), tmp_path / "killed"
    child = fork(lambda: train_policy(killed), "killed")
    kill_once(child, lambda: (run / "step-000002").exists(), within_s=60)
    assert not (run / "step-000006").exists()
    torch.manual_seed(999)  # a new process has other global random numbers
    again = train_policy(killed)
    for group in ("weights", "average", "optimizer", "rng"):
        one, two = (load_training(tmp_path / name / "last")[0][group] for name in ("straight", "killed"))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one), group
    files = [path.relative_to(export) for path in sorted(export.rglob("*")) if path.is_file()]
    assert len(files) == 5 and all((export / path).read_bytes() == (again / path).read_bytes() for path in files)
    known = latents_fingerprint(model / "vae")
    other = tiny.store(tmp_path / "more", episodes=5, latents=known)
    with pytest.raises(UserError, match=r"data\.latents: got 'another offset"):
        train_policy(tiny.config(model, other, run, *words))
    other = tiny.store(tmp_path / "fewer", windows=1, latents=known)
    with pytest.raises(UserError, match=r"data\.latents: got 'windows"):
        train_policy(tiny.config(model, other, run, *words))


def test_without_an_average_the_weights_themselves_are_written(model: Path, store: Path, tmp_path: Path) -> None:
    export = train_policy(tiny.config(model, store, tmp_path / "run", "run.steps=2", "optim.ema=0"))
    groups = load_training(tmp_path / "run" / "last")[0]
    assert "average" not in groups
    state = load_policy(export)[0].state_dict()
    for name, value in groups["weights"].items():
        kept = state[name.removeprefix("policy.")]
        assert torch.equal(kept, value) or torch.equal(kept, value.bfloat16().float()), name


def test_physics_losses_stay_on(model: Path, tmp_path: Path) -> None:
    """On the tapped tokens of the video; their heads are written, and a policy that is trained further goes on with them."""
    latents = tiny.store(tmp_path / "s", latents=latents_fingerprint(model / "vae"), targets=True)
    words = [
        "physics=recommended",
        "physics.phi_hidden=16",
        "physics.psi_hidden=16",
        "physics.feature_dim=16",
        "run.steps=2",
    ]
    made = tiny.config(model, latents, tmp_path / "run", *words)
    plain, found = gradients(trainer(tiny.config(model, latents, tmp_path / "run"))), gradients(trainer(made))
    for block, reached in ((0, True), (2, False)):  # the second of three blocks is tapped
        name = f"policy.transformer.blocks.{block}.ffn.net.2.weight"
        assert torch.equal(plain[name], found[name]) != reached, name
    export = train_policy(made)
    lines = update_lines(tmp_path / "run")
    assert all(line["pix"] > 0 and line["sem"] > 0 and line["video"] > 0 for line in lines)
    heads = load_file(export / "physics_heads.safetensors")
    further = trainer(tiny.config(model, latents, tmp_path / "two", *words, f"run.init={export}"))
    assert further.forcing is not None
    assert all(torch.equal(value, heads[name]) for name, value in further.forcing.state_dict().items())


@pytest.mark.parametrize("frozen", [False, True])
def test_operations_are_counted(model: Path, store: Path, tmp_path: Path, frozen: bool) -> None:
    """Against torch's own count of what an update does, without recomputation; through a frozen video gradients go to the proprioception."""
    words = ["run.checkpointing=none", *(["freeze_video=true", "video_weight=0"] if frozen else [])]
    found = trainer(tiny.config(model, store, tmp_path / "run", *words))
    batch = found.batch(0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        found._backward(batch, found.draw(batch, step_generator(7, 0)))
    counted = found.flops(batch["latents_BCFhw"].shape)
    # a first block that is frozen has nobody to pass the gradients of its queries, keys and values on to, which are counted
    assert counter.get_total_flops() == pytest.approx(counted, rel=0.05 if frozen else 0.02)


def test_a_frozen_video_stays_as_it_was(model: Path, store: Path, tmp_path: Path) -> None:
    """Its matrices lie in bfloat16, where the blocks compute in it, and are written as they came."""
    words = ["freeze_video=true", "video_weight=0", "run.steps=2", "run.precision=bf16"]
    made = tiny.config(model, store, tmp_path / "run", *words)
    found = trainer(made)
    types = {n: p.dtype for n, p in found.policy.named_parameters()}
    assert types["transformer.blocks.0.ffn.net.2.weight"] == torch.bfloat16
    assert (
        types["transformer.blocks.0.action.ffn.net.2.weight"]
        == types["transformer.blocks.0.norm2.weight"]
        == torch.float32
    )
    trained = {name for name, p in found.policy.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in found.policy.action_parameters()}
    export = train_policy(made)
    source = load_file(model / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, value in video(export).items():
        assert torch.equal(value.float(), source[name].bfloat16().float()) or torch.equal(value, source[name]), name
    assert read_settings(export)[1].source["video_trained"] is False


def test_it_acts_on_what_it_was_trained_on(model: Path, tmp_path: Path) -> None:
    """From recordings over a store to a plan: the first picture and the sentence of a window are, in use, the bits of training; and a run on
    ``data.roots`` makes the same updates without the store."""
    data = tiny.dataset(tmp_path / "data")
    windows = {"buckets": ["9x384x320"], "stride": 4, "start_stride": 16, "past_end": True, "canvas": "robotwin"}
    text = str(tmp_path / "text")
    make_latents(
        LatentsCommand(
            data=[str(data)], model=str(model), out=str(tmp_path / "s"), targets=False, device="cpu", dtype="fp32",
            text_cache=text, **windows,  # type: ignore[arg-type]
        )
    )  # fmt: skip
    words = ["run.steps=2", "data.heldout=0", "text_tokens=16"]
    made = tiny.config(model, tmp_path / "s", tmp_path / "run", *words)
    export = train_policy(made)
    live = [
        f"data.roots=[{data}]", "data.live.buckets=[9x384x320]", "data.live.stride=4", "data.live.start_stride=16",
        "data.live.past_end=true", "data.live.canvas=robotwin", "data.live.dtype=fp32", f"data.text_cache={text}",
        *words, "data.tasks=[press]",
    ]  # fmt: skip
    encoded = tiny.config(model, tmp_path / "s", tmp_path / "live", *live)
    encoded.data.latents = []
    train_policy(encoded)
    terms = [
        [line[n] for n in ("loss", "grad_norm")] for name in ("run", "live") for line in update_lines(tmp_path / name)
    ]
    assert terms[:2] == terms[2:]

    chunks = load_chunk_model(export, PlanningConfig(autoencoder=str(model), steps=2))
    bank = prepare_policy_banks(made, CPU, quiet=True)[0]
    batch = bank.batch(torch.arange(1))
    assert torch.equal(chunks._sentences.batch(["press the bell"]), batch["text"]) and batch["text"].shape == (
        1,
        16,
        16,
    )
    from physisforcing.core.lerobot import LeRobotDataset
    from physisforcing.worldmodel.data.canvas import compose as compose_canvas

    source = LeRobotDataset(data)
    names = ("head", "left_wrist", "right_wrist")
    canvas = compose_canvas("robotwin", {n: source.frames(0, [0], f"observation.images.{n}")[0] for n in names})
    latent = chunks._first_frame(torch.from_numpy(canvas)[None])
    torch.testing.assert_close(latent, batch["latents_BCFhw"][:, :, :1], rtol=1e-5, atol=1e-5)
    assert chunks.spec.control_hz == 50.0 and chunks.spec.chunk == 32
    other = tiny_paper.ti2v(tmp_path / "other")
    words = json.loads((export / "policy.json").read_text())
    words["text"]["fingerprint"] = "another"
    (export / "policy.json").write_text(json.dumps(words))
    with pytest.raises(UserError, match=r"policy\.autoencoder: .*wanted the text encoder another"):
        load_chunk_model(export, PlanningConfig(autoencoder=str(other), steps=2))


def test_tasks_choose_among_windows(model: Path, store: Path, tmp_path: Path, capsys) -> None:
    bank, held = open_stores([store], 1, CPU, None, tasks=["lift"])
    assert (
        capsys.readouterr().err
        == "data.latents: left out, 2 episodes of 1 other tasks (press); data.tasks=[] takes all\n"
    )
    open_stores([store], 1, CPU, None, tasks=["lift"], quiet=True)
    assert not capsys.readouterr().err
    assert held is not None and {w.episode for b in (bank, held) for _, w in b.windows} == {1, 3}
    with pytest.raises(UserError, match=r"data\.tasks.*'lfit'.*lift"):
        open_stores([store], 1, CPU, None, tasks=["lfit"])
    old = tiny.store(tmp_path / "old", tasks=("",))
    with pytest.raises(UserError, match="drawn episode 0 from step 0 of no known task"):
        open_stores([old], 1, CPU, None, tasks=["lift"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["policy.proprioception=backbone"], r"policy\.proprioception: .*linear with model="),
        (["policy.action_dim=7"], r"policy\.action_dim: got 7, wanted 14, as the windows have.*policy\.action_dim=14"),
        (["policy.steps_per_latent=8"], r"policy\.steps_per_latent: .*16\.0"),
        (["large.first_latent=mask"], r"large\.first_latent: got 'mask', wanted pinned"),
        (["text_tokens=3"], "a sentence of . tokens"),
        (["run.init=shipped"], "run.init: got .*small model"),
        (["codec=x"], "codec: .*no such setting with model="),
        (["data.latents=[]"], r"data\.latents: got 'no store'"),
        (["run.init=nowhere"], "transformer in diffusers format|a world model on this disk"),
    ],
)
def test_mistakes_are_named(model: Path, store: Path, tmp_path: Path, words: list[str], message: str) -> None:
    made = tiny.config(model, store, tmp_path / "run", *words)
    with pytest.raises(UserError, match=message):
        trainer(made).batch(0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("policy.action_dim=7", r"policy\.action_dim: got 7, wanted 14, as conditioner\.state_dim is"),
        ("policy.state_dim=8", r"policy\.state_dim: got 8"),
        ("data.latents=[x]", r"data\.latents: got \['x'\], wanted none without model="),
    ],
)
def test_what_the_small_models_do_not_do_is_refused(words: str, message: str) -> None:
    made = compose("train_policy", [words, f"codec={weights_root() / 'vae'}"], TrainPolicyConfig)

    def prepared() -> None:
        adopt(made)
        prepare_policy_banks(made, CPU)

    with pytest.raises(UserError, match=message):
        prepared()


def test_the_small_models_take_no_large_settings() -> None:
    made = compose("train_policy", ["data.live.stride=4", "codec=x"], TrainPolicyConfig)
    with pytest.raises(UserError, match=r"data\.live\.stride: .*no such setting without model="):
        adopt(made)
