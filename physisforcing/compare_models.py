"""Which world models of a comparison act in closed loop, with which decoder the controls are read, and what has to be left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from physisforcing.core.errors import UserError
from physisforcing.core.types import ActionSpec, WorldModelSpec

from .compare_controls import VIDEOS

if TYPE_CHECKING:
    from physisforcing.core.protocols import InverseDynamics, WorldModel

    from .compare import CompareConfig, ComparedModel
    from .episode_settings import PlannerSettings

#: What the control that decodes a retrieved video is called: it reads windows of its own, without a planner.
RETRIEVED = "retrieval_video"


@dataclasses.dataclass(slots=True, kw_only=True)
class Looked:
    """Specs of the models by name; ``resting``: models that do not act in closed loop -> what they would need."""

    specs: dict[str, WorldModelSpec] = dataclasses.field(default_factory=dict)
    resting: dict[str, str] = dataclasses.field(default_factory=dict)


def look_at_models(config: CompareConfig, models: Mapping[str, ComparedModel], rows: Collection[str]) -> Looked:
    """Open every model once, on the CPU, and see whether it can be planned with.

    An action model rests: its sensitivity to actions is measured where the settings ask for it. So does one of ``rows`` that this decoder
    cannot read. ``UserError`` for any other model that cannot be planned with, before the simulator starts.
    """
    from physisforcing.planner.plannable import GIVEN

    from .compare_episodes import load_compared
    from .planners import open_decoder

    decoder, found = open_decoder(config.planner.decoder, "cpu"), Looked()
    for name, model in models.items():
        opened = load_compared(config, model.source, "cpu")
        spec = found.specs[name] = opened.spec
        try:
            try_planner(config.planner, opened, decoder)
        except UserError as error:
            measured = config.sensitivity and "actions" in spec.conditions
            if not measured and name not in rows:
                raise
            more = "; how it follows given actions is measured" if measured else ""
            needed = " and ".join(sorted(spec.conditions - GIVEN))
            found.resting[name] = f"a planner that gives it {needed}{more}" if needed else f"another setting: {error}"
        finally:
            if hasattr(opened, "close"):
                opened.close()
    return found


def try_planner(settings: PlannerSettings, model: WorldModel, decoder: InverseDynamics) -> None:
    """``UserError`` where no planner can be made of these. Nothing is imagined."""
    from .planners import make_planner, planner_verifier

    anything = ActionSpec(names=("any",), low=(-np.inf,), high=(np.inf,))
    make_planner(settings, model, decoder, action_spec=anything, verifier=planner_verifier(settings, "cpu"))


def refused_controls(settings: PlannerSettings, controls: Sequence[str]) -> dict[str, str]:
    """Controls that show pictures, where no decoder at hand can read them -> what they need. ``UserError`` for a second decoder that does
    not read pictures at all."""
    from physisforcing.envs.control_models import FrozenFrame

    from .planners import open_decoder, picture_decoder_name, recorded_video_needs

    shown = [name for name in controls if name in VIDEOS]
    found: dict[str, str] = {}
    if RETRIEVED in controls and (needed := recorded_video_needs(settings)):
        found[RETRIEVED] = needed
    if not shown:
        return found
    try:
        try_planner(settings, FrozenFrame(), open_decoder(picture_decoder_name(settings), "cpu"))
    except UserError as error:
        found |= dict.fromkeys(shown, f"other settings or another decoder: {error}")
    return found


def picture_note(settings: PlannerSettings) -> str:
    """A sentence on the second decoder, or nothing where there is none."""
    from .planners import open_decoder, picture_decoder_name, reads_pictures

    decoder = open_decoder(settings.decoder, "cpu")
    if reads_pictures(decoder):
        return ""
    reads = " and ".join(sorted(decoder.needs.returns))
    return (
        f"The decoder of the models reads {reads}; controls that show pictures are read by another one "
        f"({picture_decoder_name(settings)}), so differences to them are also differences between decoders."
    )


def unmeasured_sensitivity(specs: Mapping[str, WorldModelSpec]) -> dict[str, str]:
    """Models whose sensitivity cannot be measured -> what that needs."""
    found: dict[str, Any] = {}
    for name, spec in specs.items():
        if not spec.conditions & {"text", "actions"}:
            found[name] = "an instruction or actions among the model's conditions"
        elif "goal" in spec.conditions or spec.context_frames != 1 or "frames" not in spec.returns:
            found[name] = "a model that shows frames from one picture"
    return found
