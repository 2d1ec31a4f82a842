"""Where a policy's weights come from: the transformer of any world-model export, and an account of what was taken from where.

Three kinds of export have a transformer that fits: folders of the small models (``world_model.json``), what ``physis train worldmodel``
writes of a large backbone, and diffusers folders of Wan2.2-TI2V-5B's kind. ``random:SOURCE`` is the architecture of one with drawn weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from physisforcing.core.errors import UserError
from physisforcing.core.paths import weights_root
from physisforcing.worldmodel.backbones.folder import describe_backbone
from physisforcing.worldmodel.backbones.loading import (
    build_empty,
    file_entries,
    in_modules,
    kept_in_float32,
    load_transformer,
    read_transformer,
)
from physisforcing.worldmodel.backbones.wan import ConditionerConfig, ProprioceptionConditioner
from physisforcing.worldmodel.storage import fingerprint, latents_fingerprint, read_json

from .config import PolicyModelConfig
from .initial import FRESH
from .model import WorldActionModel

SHIPPED, RANDOM = "shipped", "random:"
#: What may lie beside a transformer in an export and has no place in a policy: file or folder -> what it is.
NO_PLACE = {
    "physics_heads.safetensors": "heads of the physics losses",
    "actions.safetensors": "conditioner on actions",
    "adapter": "adapters, which the transformer has in its weights",
}
CONDITIONER = "conditioner.safetensors"


@dataclass(slots=True, kw_only=True)
class Backbone:
    """A transformer that can be a policy's, before its weights are read.

    ``name``: what reports call it, ``shipped`` or the last parts of its path. ``folder``: with the transformer's ``config.json``; ``home``: the
    export that it lies in. ``config``: arguments of ``WanTransformer3DModel``. ``tap``: block that physics losses read, counted from 1, or
    None. ``conditioner``: of a small model. ``latents``: fingerprint of its autoencoder's latents, "" where nothing says it;
    ``autoencoder``: its folder, ``shipped``, or "". ``drawn``: its weights are drawn instead of read.
    """

    name: str
    folder: Path
    home: Path
    config: dict[str, Any]
    tap: int | None = None
    conditioner: ConditionerConfig | None = None
    latents: str = ""
    autoencoder: str = ""
    drawn: bool = False
    beside: dict[str, int] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Of the transformer's config and weights; "" for drawn ones."""
        return "" if self.drawn else fingerprint(self.folder)

    def transformer(self, device: str | torch.device = "cpu", dtype: torch.dtype | None = torch.float32) -> Any:
        """The stock transformer with its weights. Drawn ones come from torch's global generator, with a head that begins at zero."""
        from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

        if not self.drawn:
            return load_transformer(self.folder, WanTransformer3DModel, device, dtype).eval()
        made = WanTransformer3DModel(**self.config)
        torch.nn.init.zeros_(made.proj_out.weight)
        torch.nn.init.zeros_(made.proj_out.bias)
        exact = kept_in_float32(made)
        for name, parameter in made.named_parameters():
            if dtype is not None and not in_modules(name, exact):
                parameter.data = parameter.data.to(dtype)
        return made.to(device).eval()

    def load_conditioner(self) -> ProprioceptionConditioner:
        """The small model's conditioner in float32. ``UserError`` for a backbone without one. Where the weights are drawn, its layers are too,
        and what it knows of the joints' ranges stays."""
        from safetensors.torch import load_file

        if self.conditioner is None:
            fix = "policy.proprioception=linear"
            raise UserError(
                "policy.proprioception", got="backbone", wanted=f"linear: {self.name} has no tokens of it", fix=fix
            )
        made = ProprioceptionConditioner(self.conditioner)
        state = {name: value.float() for name, value in load_file(self.home / CONDITIONER).items()}
        if self.drawn:
            state |= {name: value for name, value in made.state_dict().items() if name.startswith("net.")}
        made.load_state_dict(state)
        return made


def open_backbone(source: str | Path | None, *, autoencoder: str | Path | None = None) -> Backbone:
    """The backbone called ``source``: ``shipped``, a folder, ``random:`` before either, or None for ``random:shipped``.

    ``autoencoder``: the folder of the one that its latents are of, where the export does not say. Headers alone are read here.
    ``UserError`` for a folder that is none, for Cosmos3, transformers with conditioning channels or two experts, and for another
    autoencoder than the export was trained on.
    """
    asked = f"{RANDOM}{SHIPPED}" if source is None else str(source)
    drawn, name = asked.startswith(RANDOM), asked.removeprefix(RANDOM)
    home = weights_root() / "worldmodel" if name == SHIPPED else Path(name).expanduser()
    if not home.is_dir():
        fix = f"{SHIPPED}, or the folder of an export of physis train worldmodel or of a diffusers model"
        raise UserError("backbone", got=asked, wanted="a world model on this disk", fix=fix)
    label = SHIPPED if name == SHIPPED else tail(home)
    made = _small(home, label) if (home / "world_model.json").is_file() else _large(home, label)
    made.drawn = drawn
    for file in (*NO_PLACE, CONDITIONER):
        if (home / file).exists():
            made.beside[file] = _tensors(home / file)
    _find_autoencoder(made, autoencoder)
    return made


def _small(home: Path, label: str) -> Backbone:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    settings, denoiser = read_json(home / "world_model.json"), read_json(home / "denoiser.json")
    return Backbone(
        name=label,
        folder=home / "transformer",
        home=home,
        config=read_transformer(home / "transformer", WanTransformer3DModel),
        tap=int(denoiser["tap"]),
        conditioner=ConditionerConfig.of(denoiser["conditioner"]),
        latents=str(settings.get("latents_fingerprint", "")),
    )


def _large(home: Path, label: str) -> Backbone:
    found = describe_backbone(home, stride=(4, 16, 16))  # of whatever autoencoder: no matter here
    why = None
    if found.cosmos:
        why = "Cosmos3 has no cross-attention and no patches that an expert of this design could share"
    elif found.conditioned:
        why = "it has conditioning channels: the first picture is not a latent frame of its own at time 0"
    elif (home / "transformer_2").is_dir():
        why = "it has an expert for high and one for low noise, and a policy one for all"
    if why is not None:
        fix = "a Wan transformer without conditioning channels, such as Wan2.2-TI2V-5B"
        raise UserError("backbone", got=label, wanted=f"a transformer that a policy can have: {why}", fix=fix)
    config = read_transformer(found.path, found.kind)
    patch = tuple(config.get("patch_size", (1, 2, 2)))
    if patch[0] != 1:
        raise UserError(
            "backbone", got=f"patches of {list(patch)}", wanted="patches one latent frame deep", fix="another backbone"
        )
    return Backbone(name=label, folder=found.path, home=home, config=config, tap=found.tap)


def _find_autoencoder(backbone: Backbone, given: str | Path | None) -> None:
    """The autoencoder that was named, the one beside the transformer, or the packaged one where the latents are its."""
    shipped = weights_root() / "vae"
    near = [backbone.home]
    if backbone.latents or backbone.folder == backbone.home:  # what lies around a large export may be another model's
        near.append(backbone.home.parent)
    beside = [folder / "vae" for folder in near]
    if given == SHIPPED or (given is None and backbone.name == SHIPPED):
        folder: Path | None = shipped
    elif given is not None:
        folder = autoencoder_in(Path(given).expanduser())
    else:
        folder = next((path for path in beside if (path / "config.json").is_file()), None)
        if backbone.latents and folder is not None and latents_fingerprint(folder) != backbone.latents:
            folder = None  # of another model: it lies beside this one by chance
        if folder is None and backbone.latents == latents_fingerprint(shipped):
            folder = shipped
    if folder is None:
        return
    latents = latents_fingerprint(folder)
    if backbone.latents and backbone.latents != latents:
        got, wanted = (
            f"{tail(folder)} (latents {latents})",
            f"the latents {backbone.latents} that {backbone.name} was trained on",
        )
        raise UserError("autoencoder", got=got, wanted=wanted, fix="autoencoder=<the one of that model>")
    backbone.latents, backbone.autoencoder = latents, SHIPPED if folder == shipped else str(folder)


def autoencoder_in(folder: Path) -> Path:
    """``folder`` itself, or ``vae`` in a pipeline's folder."""
    return folder / "vae" if (folder / "vae" / "config.json").is_file() else folder


def _tensors(path: Path) -> int:
    """Tensors in a safetensors file, or in those of a folder."""
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    return sum(len(file_entries(file)) for file in files)


def build_policy(
    source: str | Path | Backbone | None,
    config: PolicyModelConfig,
    *,
    seed: int = 0,
    autoencoder: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> tuple[WorldActionModel, dict[str, Any]]:
    """-> (a new policy on the backbone ``source``, what was taken from where).

    ``seed``: of everything that is drawn; torch's generators stay as they were. ``dtype``: of the transformer (None: as stored); the
    action expert is float32. The transformer's weights are read once, into a model without any, and interpolated once. The report holds
    no path beyond its last parts. ``UserError`` as ``open_backbone``, and for proprioception that the backbone has not or of another width.
    """
    backbone = source if isinstance(source, Backbone) else open_backbone(source, autoencoder=autoencoder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        conditioner = backbone.load_conditioner() if config.proprioception == "backbone" else None
        if conditioner is not None and conditioner.config.state_dim != config.state_dim:
            got, wanted = (
                config.state_dim,
                f"{conditioner.config.state_dim}, which the conditioner of {backbone.name} reads",
            )
            raise UserError("policy.state_dim", got=got, wanted=wanted, fix="policy.proprioception=linear")
        transformer = backbone.transformer(device, dtype)
        model = WorldActionModel(transformer, config, tap=backbone.tap, conditioner=conditioner).to(device)
    return model, _account(model, backbone, seed)


def _account(model: WorldActionModel, backbone: Backbone, seed: int) -> dict[str, Any]:
    """See ``build_policy``."""
    state = model.state_dict()
    parts: dict[str, dict[str, Any]] = {}
    for name, value in state.items():
        part = "action_expert" if ".action." in name or name.startswith("expert.") else "video"
        part = "proprioception" if name.startswith("proprioception.") else part
        told = parts.setdefault(part, {"tensors": 0, "parameters": 0})
        told["tensors"] += 1
        told["parameters"] += value.numel()
    drawn = f"drawn, seed {seed}"
    parts["video"] |= {
        "from": backbone.name,
        **video_account(backbone),
        "weights": drawn if backbone.drawn else "taken",
    }
    interpolated = model.config.initial == "interpolated"
    fresh = sum(1 for name in state if name.startswith(tuple(f"expert.{one}" for one in FRESH)))
    parts["action_expert"] |= {
        "from": "the video's, resized" if interpolated else drawn,
        "drawn_tensors": fresh if interpolated else parts["action_expert"]["tensors"],
    }
    own = model.config.proprioception == "backbone"
    parts["proprioception"]["from"] = backbone.name if own and not backbone.drawn else drawn
    left = {name: count for name, count in backbone.beside.items() if not (own and name == CONDITIONER)}
    return {
        **parts,
        "not_taken": {
            name: {"tensors": count, "what": NO_PLACE.get(name, "proprioception of the world model")}
            for name, count in left.items()
        },
        "latents": backbone.latents,
        "seed": seed,
    }


def video_account(backbone: Backbone) -> dict[str, Any]:
    """What identifies a backbone in reports."""
    return {"fingerprint": backbone.fingerprint, "tap": backbone.tap}


def check_architecture(wanted: Mapping[str, Any], backbone: Backbone, where: str) -> None:
    """``UserError`` that names every setting of the transformer in which ``backbone`` differs from ``wanted`` (its class's arguments)."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    mine, other = (
        {
            name: value
            for name, value in json.loads(build_empty(WanTransformer3DModel, config).to_json_string()).items()
            if name[0] != "_"
        }
        for config in (wanted, backbone.config)
    )
    different = [name for name in mine if mine[name] != other[name]]
    if different:
        got = ", ".join(f"{name} {other[name]}" for name in different)
        told = ", ".join(f"{name} {mine[name]}" for name in different)
        raise UserError(
            "backbone",
            got=f"{backbone.name} with {got}",
            wanted=f"{told}, as {where} has",
            fix="another backbone, or build a new policy on this one",
        )


def check_latents(latents: str, backbone: Backbone, where: str) -> str | None:
    """``UserError`` where both are known and differ; where one is not known, what to note about it."""
    if latents and backbone.latents and latents != backbone.latents:
        got, wanted = f"{backbone.name} (latents {backbone.latents})", f"the latents {latents} of {where}"
        raise UserError(
            "backbone", got=got, wanted=wanted, fix="a backbone that was trained on the same autoencoder's latents"
        )
    if latents and backbone.latents:
        return None
    unknown = where if not latents else backbone.name
    return f"nothing says which autoencoder's latents {unknown} has; autoencoder=FOLDER does"


def tail(path: Path) -> str:
    """The last two parts of a path, which are no machine's own."""
    return "/".join(path.absolute().parts[-2:])
