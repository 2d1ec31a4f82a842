"""Settings of the clip filters. Thresholds were chosen on planted clips of recordings of six tasks, none of which docs/data.md shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from physisforcing.core.errors import UserError, check_at_least, unknown_name

HELP = """Choose clips for training: motion, near-copies, captions that disagree. Writes clips.jsonl, report.md and report.json.

IN: a table of clips (jsonl, json, csv, tsv, parquet), a folder of videos with captions (clip.mp4 and clip.txt, or captions.csv), or a
LeRobot v2.1 or v3 dataset with to=clips.

settings (field=value):
  filters=[motion,duplicates,alignment]   which to apply
  columns=[video:path,caption:text]       names of a table's columns that are not found by themselves; videos=FOLDER: where its paths start
  captions=captions.csv                   table of captions of a folder          camera=head   camera of a dataset
  min_seconds=1                           shorter clips are dropped
  motion.least=0.03 motion.cut=0.012      static below, camera cut above
  duplicates.likeness=0.97                  one recording from this on; duplicates.neighbours=8, duplicates.shift=2 (seconds)
  duplicates.per_task=0                   the most clips of one task, the best of them; 0: any number
  alignment.least=null                    captions below are dropped; alignment.model=image_text alignment.path=FOLDER takes a CLIP or SigLIP model
  shard=0/4                               measure a part or, once all is measured, compare a part; the run after which nothing is
                                          missing decides
  device=cpu  sheet=true                  where networks run; a sheet of dropped clips
Run the same command again to continue, or with other thresholds: what is measured stays.
Exit code 3: videos that cannot be read; they are named in the report, everything else is done.
flags: --json prints the summary as JSON

examples:
  physis data prepare runs/clips rovid-x/robot.csv videos=rovid-x
  physis data prepare runs/clips my_clips to=clips alignment.least=0.3
  physis data prepare runs/clips my_lerobot_dataset to=clips"""

FILTERS = ("motion", "duplicates", "alignment")
MODELS = ("predicted", "image_text")
#: Seconds: as long as what is compared of a clip.
MOST_SHIFT = 20.0


@dataclass(slots=True, kw_only=True)
class MotionConfig:
    """``least``: a clip moves less than this (picture heights a second, see ``motion.motion_score``) and is static. ``cut``: a change
    between two frames larger than this (mean difference in [0,1], see ``motion.cut_score``) is a camera cut."""

    least: float = 0.03
    cut: float = 0.012


@dataclass(slots=True, kw_only=True)
class DuplicatesConfig:
    """``likeness``: from this on two clips are the same recording (see ``duplicates.likeness``). ``neighbours``: how many clips of
    nearest appearance each clip is compared with. ``shift``: seconds by which one may start later than the other. ``per_task``: the
    most clips of one task (task name, or caption where there is none), the best ones; 0 for any number."""

    likeness: float = 0.97
    neighbours: int = 8
    shift: float = 2.0
    per_task: int = 0


@dataclass(slots=True, kw_only=True)
class AlignmentConfig:
    """``model``: ``predicted`` (from the other clips' captions) or ``image_text`` (a CLIP or SigLIP model in the folder ``path``).
    ``least``: lower scores are dropped; None for the default of ``predicted``."""

    model: str = "predicted"
    path: str | None = None
    least: float | None = None


@dataclass(slots=True, kw_only=True)
class ClipsConfig:
    """Settings of ``physis data prepare to=clips`` (see ``HELP``)."""

    columns: list[str] = field(default_factory=list)
    videos: str | None = None
    captions: str | None = None
    camera: str | None = None
    filters: list[str] = field(default_factory=lambda: list(FILTERS))
    min_seconds: float = 1.0
    motion: MotionConfig = field(default_factory=MotionConfig)
    duplicates: DuplicatesConfig = field(default_factory=DuplicatesConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    shard: str = "0/1"
    device: str = "cpu"
    sheet: bool = True

    def check(self) -> None:
        """``UserError`` names the first setting that does not fit."""
        for name in self.filters:
            if name not in FILTERS:
                raise unknown_name("filters", name, FILTERS, see="docs/data.md")
        if self.alignment.model not in MODELS:
            raise unknown_name("alignment.model", self.alignment.model, MODELS, see="docs/data.md")
        check_at_least(self.duplicates, neighbours=1, per_task=0)
        within = [
            ("min_seconds", self.min_seconds, inf),
            ("motion.least", self.motion.least, inf),
            ("motion.cut", self.motion.cut, 1),
        ]
        within += [
            ("duplicates.likeness", self.duplicates.likeness, 1),
            ("duplicates.shift", self.duplicates.shift, MOST_SHIFT),
        ]
        for name, value, most in within:
            if not 0 <= value <= most:
                wanted = "0 or more" if most == inf else f"a number in [0, {most:g}]"
                raise UserError(name, got=value, wanted=wanted, fix=f"leave {name} out, or correct it")
        if self.alignment.least is not None and not -1 <= self.alignment.least <= 1:
            fix = "leave alignment.least out, or correct it"
            raise UserError("alignment.least", got=self.alignment.least, wanted="a cosine in [-1, 1]", fix=fix)
        if self.alignment.model == "image_text" and "alignment" in self.filters:
            for name in ("path", "least"):
                if getattr(self.alignment, name) is None:
                    wanted = "a model's folder" if name == "path" else "a cosine, which depends on the model"
                    fix = f"write alignment.{name}=..., or alignment.model=predicted"
                    raise UserError(f"alignment.{name}", got=None, wanted=wanted, fix=fix)
