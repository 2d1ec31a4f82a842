"""Figures of the demo's report: tracks and mask drawn on a demonstration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from physisforcing.core.report.data import Figure
from physisforcing.core.report.draw import draw_mask, draw_tracks, side_by_side, upscale
from physisforcing.core.types import DT
from physisforcing.core.video import write_mp4

#: Token grid of the small geometry, (h, w): one token is 16x16 pixels of the 240x320 picture.
GRID = (15, 20)
#: Videos play at half speed, so that two seconds can be followed by eye.
SLOW = 2


def physics_figure(root: Path, episode: int, folder: Path, name: str) -> Figure:
    """Draw the tracks and the physics-informative mask of a window: demonstration | tracks | mask.

    ``root``: a dataset with ground truth. The window is the episode's one with the most selected points; at the very
    start the arms may be outside the picture. Writes ``media/<name>.mp4`` below ``folder``.
    """
    import torch

    from physisforcing.core import ground_truth
    from physisforcing.core.lerobot import LeRobotDataset
    from physisforcing.worldmodel.data.windows import window_steps
    from physisforcing.worldmodel.physics.config import PhysicsConfig
    from physisforcing.worldmodel.physics.regions import (
        informative_points,
        latent_frame,
        normalise_points,
        token_mask,
    )
    from physisforcing.worldmodel.teachers.ground_truth import point_tracks

    dataset = LeRobotDataset(root)
    info = dataset.episodes[episode]
    truth = ground_truth.load(ground_truth.episode_path(root, episode))
    maps: dict[int, Any] = {}
    best = None
    for start in truth.stored_frames_D.tolist():
        tracks = point_tracks(truth, window_steps(start, info.length), maps=maps)
        points = normalise_points(torch.from_numpy(tracks.points_TN2)[None], tracks.size)
        visible, depth = torch.from_numpy(tracks.visible_TN)[None], torch.from_numpy(tracks.depth_N)[None]
        chosen = informative_points(points, visible, depth, tracks.size, PhysicsConfig())
        if best is None or chosen.sum() > best[0].sum():
            best = chosen, start, tracks, token_mask(points, visible, chosen, GRID)
    assert best is not None, "every episode has stored frames"
    chosen, start, tracks, mask_BFhw = best
    steps = window_steps(start, info.length)
    frames = dataset.frames(episode, steps)
    mask = mask_BFhw[0][latent_frame(len(steps))].numpy()
    large = upscale(frames, 2)
    selected = chosen[0].numpy()
    drawn = draw_tracks(large, (tracks.points_TN2 + 0.5) * 2 - 0.5, tracks.visible_TN, selected)
    path = f"media/{name}.mp4"
    fps = 1 / (2 * DT) / SLOW
    write_mp4(folder / path, side_by_side([large, drawn, draw_mask(large, mask)]), fps, crf=22)
    seconds = (len(steps) - 1) * 2 * DT
    return Figure(
        path=path,
        title=f"{info.task_name}: {info.instruction}",
        caption=(
            f"A demonstration (training seed {info.seed}) from {start * DT:.1f} s on, {seconds:.2f} s at half speed. Of "
            f"{tracks.points_TN2.shape[1]} points followed, {int(selected.sum())} move enough and are near enough to count "
            f"(coloured, with their path); they pass through {mask.mean():.0%} of the picture's cells (bright)."
        ),
        description=f"Demonstration of {info.task_name}, its point tracks, and the physics-informative mask.",
        panels=["demonstration", "tracks", "physics-informative mask"],
    )
