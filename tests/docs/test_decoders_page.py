"""The page about decoders: its table is what the decoders need, its settings exist, its masks are the code's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from physisforcing.core.config import compose
from physisforcing.envs.collect import CollectConfig, expand_lists
from physisforcing.eval_plan import EvalPlanConfig
from physisforcing.planner.decoder_files import KINDS, PICTURE_KINDS
from physisforcing.planner.feature_decoder.config import FeatureDecoderConfig, check_config
from physisforcing.planner.feature_decoder.decoder import FeatureInverseDynamics
from physisforcing.planner.inverse_dynamics import PixelInverseDynamics
from physisforcing.planner.latent_decoder import LatentInverseDynamics
from physisforcing.planner.single_frame import SingleFrameInverseDynamics
from physisforcing.planner.train import TrainIdmCommand
from physisforcing.worldmodel.features import FIRST_FRAME_MASKS

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "decoders.md").read_text(encoding="utf-8")
CLASSES = {
    "pixel": PixelInverseDynamics,
    "latent": LatentInverseDynamics,
    "feature": FeatureInverseDynamics,
    "single_frame": SingleFrameInverseDynamics,
}


def test_the_table_says_what_each_decoder_reads() -> None:
    told = dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", PAGE, re.MULTILINE))
    assert set(told) == set(KINDS) == set(CLASSES)
    for kind, reads in told.items():
        assert CLASSES[kind]().needs.returns == {reads}, kind
        assert (reads == "frames") == (kind in PICTURE_KINDS)


def test_its_commands_are_settings_that_exist() -> None:
    blocks = [block.replace("\\\n", " ").strip() for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)]
    lines = [line for block in blocks for line in block.splitlines()]
    kinds, decoders = [], set()
    for line in lines:
        words = shlex.split(line)
        if words[1:3] == ["train", "idm"]:
            made = compose("train_idm", words[3:], TrainIdmCommand)
            check_config(made.feature.model)
            kinds.append(made.decoder)
        elif words[1:3] == ["data", "collect"]:
            compose("collect", expand_lists(words[3:], {"tasks": "tasks"}), CollectConfig).check()
        else:
            assert words[1:3] == ["eval", "plan"]
            planner = compose("eval_plan", words[3:], EvalPlanConfig).planner
            folder = Path(__file__).parents[2] / planner.decoder
            decoders.add(planner.decoder)
            assert planner.decoder.startswith("runs/") or (folder / "config.json").is_file()
            assert planner.picture_decoder == "shipped"
    assert set(kinds) == set(KINDS)
    assert decoders == {"runs/feature/model", "physisforcing/weights/idm_six_tasks"}


def test_the_masks_are_those_of_the_code() -> None:
    assert tuple(re.findall(r"^- `(\w+)`:", PAGE, re.MULTILINE)) == FIRST_FRAME_MASKS
    assert FeatureDecoderConfig().first_frame_mask == FIRST_FRAME_MASKS[0]


def test_other_pages_lead_to_it() -> None:
    for page in (DOCS.parent / "README.md", DOCS / "planning.md", DOCS / "compare.md"):
        assert "decoders.md)" in page.read_text(encoding="utf-8"), page.name
