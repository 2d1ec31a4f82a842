"""Whether a world model can be planned with, and with which decoder: said from their specs, before anything is imagined."""

from __future__ import annotations

from collections.abc import Sequence

from physisforcing.core.errors import MissingCapabilityError
from physisforcing.core.types import DecoderNeeds, WorldModelSpec

from .decoder_checks import check_source

#: Conditions that a planner has to give: the instruction and the drive targets so far. Actions are what it looks for.
GIVEN = frozenset({"text", "proprioception"})
#: Imagined frames where model and decoder leave the choice.
USUAL_FRAMES = 17
#: What a source of models offers besides frames.
DECODERS = {"features": "feature", "latents": "latent"}


def check_plannable(
    spec: WorldModelSpec,
    needs: DecoderNeeds,
    *,
    horizon: int | None = None,
    also: frozenset[str] = frozenset(),
) -> None:
    """``MissingCapabilityError`` for a model that cannot be planned with, naming what is wrong and what to use instead.

    ``horizon``: the frames that are imagined for a plan (None: not checked). ``also``: what is asked for besides what the decoder needs.
    """
    check_conditions(spec)
    returns = needs.returns | also
    if spec.context_frames != 1 or not returns <= spec.returns:
        raise MissingCapabilityError(
            "world_model",
            got=f"{spec.context_frames} context frames, returns {sorted(spec.returns)}",
            wanted=f"1 context frame, returns {' and '.join(sorted(returns))}",
            fix=_instead(spec, needs, also),
        )
    check_source(spec, needs)
    if needs.features is not None and 0 < spec.blocks < max(needs.features.taps):
        raise MissingCapabilityError(
            "world_model",
            got=f"{spec.name} with {spec.blocks} blocks",
            wanted=f"features of blocks {', '.join(map(str, needs.features.taps))}, which the decoder reads",
            fix="plan with the world model that the decoder was trained on",
        )
    if horizon is not None and (horizon not in spec.horizons or (needs.horizons and horizon not in needs.horizons)):
        raise MissingCapabilityError(
            "planner.horizon",
            got=horizon,
            wanted=f"one of {common_horizons(spec, needs)}",
            fix="choose a horizon of the model that the decoder takes",
        )
    if needs.frame_dt is not None and abs(needs.frame_dt - spec.frame_dt) > 1e-6:
        raise MissingCapabilityError(
            "world_model",
            got=f"a picture every {spec.frame_dt:.3f} s",
            wanted=f"every {needs.frame_dt:.3f} s, as the decoder was trained",
            fix="use a decoder for this rate",
        )


def check_conditions(spec: WorldModelSpec) -> None:
    """``MissingCapabilityError`` for a model that needs what a planner does not have: actions, or a picture of the end."""
    if missing := sorted(spec.conditions - GIVEN):
        raise needs_more(spec.name, missing)


def needs_more(name: str, missing: Sequence[str]) -> MissingCapabilityError:
    """The refusal of the world model called ``name``, which must be given ``missing``."""
    fix = "plan with a text model (shipped, or physis train worldmodel with another experiment than pico_actions)"
    if "actions" in missing:
        fix += (
            "; an action model imagines what given actions do: physis eval evaluator, physis generate, docs/actions.md"
        )
    return MissingCapabilityError(
        "world_model",
        got=f"{name}, which must be given {' and '.join(missing)}",
        wanted="a model that imagines from a picture and an instruction: the planner reads actions out of what it imagines",
        fix=fix,
    )


def common_horizons(spec: WorldModelSpec, needs: DecoderNeeds) -> list[int]:
    """Numbers of frames that the model imagines and the decoder takes."""
    return [frames for frames in spec.horizons if not needs.horizons or frames in needs.horizons]


def planning_horizon(spec: WorldModelSpec, needs: DecoderNeeds) -> int:
    """Frames that are imagined for a plan: 17 where both have them, else the fewest that both have."""
    both = common_horizons(spec, needs)
    return USUAL_FRAMES if USUAL_FRAMES in both or not both else min(both)


def _instead(spec: WorldModelSpec, needs: DecoderNeeds, also: frozenset[str]) -> str:
    """What to use in place of a model that lacks what is read."""
    lacking = needs.returns - spec.returns
    if spec.context_frames != 1 or not lacking:
        return f"plan with an image-to-video model{' that returns ' + ' and '.join(sorted(also)) if also else ''}"
    kinds = " and ".join(DECODERS[name] for name in sorted(lacking) if name in DECODERS)
    if kinds and "frames" in spec.returns:
        return f"a decoder that reads pictures (planner.decoder=shipped), or the world model of this {kinds} decoder"
    return "plan with an image-to-video model, or a decoder that reads what this one returns"
