"""Settings of ``physis train vae`` and ``physis train worldmodel``."""

from __future__ import annotations

from dataclasses import dataclass, field

from physisforcing.core.errors import UserError, check_at_least

from ..backbones.wan import ConditionerConfig, WanConfig
from ..data.latent_settings import WindowSettings
from ..flow_matching import FlowMatchingConfig
from ..physics.config import PhysicsConfig
from ..teachers.selection import TeachersConfig
from .optim import OptimConfig


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """``roots``: LeRobot datasets. ``limit``: episodes a task. ``heldout``: episodes kept from training, spread over the set.

    ``start_stride``: control steps between window starts; physics targets exist for starts at multiples of 8.
    ``end_fraction``: share of windows near an episode's end, where ``expert+random`` episodes are no longer the expert's;
    ``start_fraction``: share of the others that are at its first step. ``text_cache``: folder of cached instruction embeddings
    (the cache home's when empty). ``targets_cache``: folder of cached physics targets, as ``cache`` of ``physis data targets``
    (``targets`` inside each dataset when empty). ``targets``: ``cache``, or ``online``: the teachers look at each batch (at the
    pictures that are kept, 120x160), which costs their time at every step and nothing on disk.

    A large backbone is trained on ``latents``, the stores of ``physis data latents``, or on ``roots``, datasets and folders of clips that are
    encoded while it trains: ``live`` says how, with the fields of that command, in place of all here that chooses among windows but ``tasks``.
    ``heldout`` 0 measures nothing then, ``workers`` read ahead, and ``targets`` by any teacher may be ``online``.
    """

    roots: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    success_only: bool = True
    limit: int | None = None
    heldout: int = 8
    start_stride: int = 4
    start_fraction: float = 0.5
    end_fraction: float = 0.0
    workers: int = 4
    text_cache: str | None = None
    targets_cache: str | None = None
    targets: str = "cache"
    latents: list[str] = field(default_factory=list)
    live: WindowSettings = field(default_factory=WindowSettings)

    def __post_init__(self) -> None:
        if self.targets not in ("cache", "online"):
            raise UserError("data.targets", got=self.targets, wanted="cache or online", fix="data.targets=cache")
        for name in ("start_fraction", "end_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"data.{name}", got=getattr(self, name), wanted="a share, 0..1", fix=f"data.{name}=0.5")


@dataclass(slots=True, kw_only=True)
class RunConfig:
    """What both trainings share. ``out``: run folder. ``resume``: continue from its last complete checkpoint; without it a folder
    that holds checkpoints is refused.

    ``precision``: auto (bfloat16 on a GPU, float32 on a CPU), bf16 or fp32. ``compile``: none, or blocks (torch.compile of the
    repeated blocks). ``init``: a model folder to start from (fine-tuning); the sizes of the model are then its own. ``nonfinite``:
    an update whose loss or gradient is not finite stops the run, or skip: is left out, counted and logged.
    ``checkpointing``: what the backward pass of the world model's blocks computes again to save memory (``recompute.py``): none, full,
    or selective, which keeps what attention made. ``micro``: samples that a process computes at once, gradients are summed up; 0 is
    all of its share of ``batch``. ``sharding``: with several processes ``weights`` spreads them, ``none`` keeps them whole in each, and auto
    spreads what is trained whole but not what is frozen under adapters. ``gather``: how often spread weights are put together and gradients
    exchanged: for every ``part`` of an update (``micro``) and block by block, or once an ``update``, which keeps all weights in bfloat16 and whole
    gradients in memory until its end. ``deterministic``: kernels that give the same bits every time,
    on a GPU as well, which costs time (cuDNN's attention has no such backward pass). ``fp8``: the blocks of a large backbone that is trained whole
    multiply in 8-bit floats (``float8.py``; needs torchao). ``sequence``: processes that compute a sample of a large Wan model together
    (``backbones/sequence.py``). ``wandb``: a Weights & Biases project that is told the log's lines as well (needs wandb).
    ``keep``: how many checkpoints stay in the run folder, the newest; 0 keeps all.
    """

    out: str = "runs/train"
    seed: int = 0
    steps: int = 1000
    batch: int = 96
    device: str = "auto"
    precision: str = "auto"
    compile: str = "none"
    resume: bool = False
    init: str | None = None
    nonfinite: str = "stop"
    checkpointing: str = "none"
    micro: int = 0
    sharding: str = "auto"
    gather: str = "part"
    deterministic: bool = False
    fp8: bool = False
    sequence: int = 1
    wandb: str = ""
    log_every: int = 50
    save_every: int = 1000
    keep: int = 0
    eval_every: int = 1000

    def __post_init__(self) -> None:
        check_at_least(
            self, "run.", steps=1, batch=1, micro=0, sequence=1, log_every=1, save_every=1, keep=0, eval_every=1
        )

    def refuse_large(self) -> None:
        """``UserError`` for what large world models alone have."""
        for name, usual in (("fp8", False), ("sequence", 1)):
            if (got := getattr(self, name)) != usual:
                wanted = f"{usual}: large world models alone have it"
                raise UserError(f"run.{name}", got=got, wanted=wanted, fix="leave it out")


@dataclass(slots=True, kw_only=True)
class LoraConfig:
    """``rank`` 0: all weights are trained. ``targets``: ends of the names of the layers that get adapters; empty: the backbone's usual
    ones. Adapters are scaled with ``alpha / rank``. ``also``: ends of the names of modules that are trained whole beside the adapters."""

    rank: int = 0
    alpha: float = 32.0
    targets: list[str] = field(default_factory=list)
    also: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_at_least(self, "lora.", rank=0)


@dataclass(slots=True, kw_only=True)
class LargeConfig:
    """What is said of a large backbone (``model``) alone. ``first_latent``, ``tap``: see ``backbones.folder.load_backbone``; None is what the
    folder says. ``videos``: held-out windows that are imagined at every evaluation, in ``video_steps`` Euler steps without guidance.
    ``export``: with ``run.resume``, train nothing more and write ``export/`` of the last checkpoint, for a run that was ended early.
    """

    first_latent: str | None = None
    tap: int | None = None
    videos: int = 1
    video_steps: int = 20
    export: bool = False

    def __post_init__(self) -> None:
        check_at_least(self, videos=0, video_steps=1)


@dataclass(slots=True, kw_only=True)
class AutoencoderConfig:
    """Arguments of ``CausalVideoAutoencoder``."""

    latent_channels: int = 16
    fine_channels: int = 64
    decoder_fine_channels: int = 80
    coarse_channels: int = 128
    group_channels: int = 160
    fine_blocks: int = 2
    decoder_fine_blocks: int = 3


@dataclass(slots=True, kw_only=True)
class VaeLossConfig:
    """L1 on pictures in [-1,1], edges at ``edge_scales`` sizes, KL. What moves within a window counts up to ``1 + motion`` times."""

    edge: float = 0.5
    edge_scales: int = 3
    kl: float = 1e-4
    motion: float = 4.0


@dataclass(slots=True, kw_only=True)
class TrainVaeConfig:
    """``decoder_only``: train the decoder of ``run.init`` further; its latents, and world models trained on them, stay valid."""

    decoder_only: bool = False
    run: RunConfig = field(default_factory=lambda: RunConfig(out="runs/vae", steps=3000, batch=32))
    data: DataConfig = field(default_factory=lambda: DataConfig(start_fraction=0.1))
    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    loss: VaeLossConfig = field(default_factory=VaeLossConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=1e-3, warmup=100, weight_decay=0.0, beta2=0.99, ema=0.998)
    )

    def __post_init__(self) -> None:
        self.run.refuse_large()


@dataclass(slots=True, kw_only=True)
class TrainWorldModelConfig:
    """``model``: the pipeline folder of a large backbone (docs/training.md), empty for our own small models, which ``codec``, ``backbone`` and
    ``conditioner`` describe. ``codec``: folder of the video codec. ``teacher``: who makes the targets of the physics losses. ``heldout_windows``: windows of
    the held-out measurement, at fixed noise and timesteps. ``actions``: train an action model; from a text model as ``run.init`` it
    starts with that model's velocities. ``text_dropout``: share of the training windows whose sentence is left out (its tokens are zeros), so
    that an action model must look at the actions."""

    model: str = ""
    large: LargeConfig = field(default_factory=LargeConfig)
    codec: str = ""
    actions: bool = False
    text_dropout: float = 0.0
    heldout_windows: int = 64
    run: RunConfig = field(default_factory=lambda: RunConfig(out="runs/worldmodel", steps=5000, batch=128))
    data: DataConfig = field(default_factory=DataConfig)
    backbone: WanConfig = field(default_factory=WanConfig)
    conditioner: ConditionerConfig = field(default_factory=ConditionerConfig)
    flow: FlowMatchingConfig = field(default_factory=FlowMatchingConfig)
    physics: PhysicsConfig = field(default_factory=PhysicsConfig)
    teacher: TeachersConfig = field(default_factory=TeachersConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.text_dropout <= 1:
            raise UserError("text_dropout", got=self.text_dropout, wanted="a share, 0..1", fix="text_dropout=0.5")
