"""Which windows are cut out of datasets and clips for a large backbone: the same settings for a store and for a run without one."""

from __future__ import annotations

from dataclasses import dataclass, field

from physisforcing.core.errors import UserError, check_at_least, unknown_name

from .canvas import canvas_layout


@dataclass(slots=True, kw_only=True, frozen=True)
class SettingNames:
    """What settings are called in messages, where they are given: ``prefix`` before the fields of ``WindowSettings``, ``data`` for the datasets,
    ``no_targets`` for what leaves targets out."""

    prefix: str = ""
    data: str = "data"
    no_targets: str = "targets=false"


#: Of ``physis data latents``, and of a training.
COMMAND = SettingNames()
TRAINING = SettingNames(prefix="data.live.", data="data.roots", no_targets="physics=none")


@dataclass(slots=True, kw_only=True)
class WindowSettings:
    """Fields of ``physis data latents``, whose ``--help`` describes them, and of ``data.live`` in a run that encodes while it trains.

    ``buckets``: FRAMESxROWSxCOLUMNS of pixels. ``stride``, ``start_stride``: recorded frames from one picture and from one window to the
    next, ``start_stride`` 0 is one window behind the other. ``canvas``: several cameras as one picture (``canvas.py``). ``past_end``: also windows
    that reach past the end of their episode, where the last picture repeats. ``limit``: windows an episode. ``fps``: of clips. ``grid_rows``,
    ``grid_columns``: points that are followed. ``dtype``: bf16 or fp32, in which latents and sentences are kept.
    """

    buckets: list[str] = field(default_factory=lambda: ["81x480x640"])
    stride: int = 1
    start_stride: int = 0
    limit: int | None = None
    fps: float = 16.0
    camera: str | None = None
    canvas: str = ""
    past_end: bool = False
    success_only: bool = True
    grid_rows: int = 25
    grid_columns: int = 25
    dtype: str = "bf16"

    def check_windows(self, names: SettingNames = COMMAND) -> None:
        """``UserError`` for what can be no window."""
        prefix = names.prefix
        check_at_least(self, prefix, stride=1, start_stride=0, grid_rows=1, grid_columns=1)
        if self.dtype not in ("bf16", "fp32"):
            raise unknown_name(f"{prefix}dtype", self.dtype, ("bf16", "fp32"), see="physis data latents --help")
        if not self.fps > 0:
            raise UserError(f"{prefix}fps", got=self.fps, wanted="frames a second", fix=f"{prefix}fps=16")
        if self.canvas:
            canvas_layout(self.canvas, prefix)
            if self.camera:
                wanted, fix = f"none beside {prefix}canvas=", "leave one of them out"
                raise UserError(f"{prefix}camera", got=self.camera, wanted=wanted, fix=fix)
        if self.limit is not None:
            check_at_least(self, prefix, limit=1)
