"""The report: what it says, that it is one safe file, and that a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from physisforcing.core.errors import UserError
from physisforcing.core.report import (
    MAX_BYTES,
    Curve,
    Figure,
    LossChange,
    ReportData,
    Stage,
    SuccessRow,
    from_run,
    load_report,
    main,
    write_report,
)
from physisforcing.core.report.charts import line_chart
from physisforcing.core.report.data import interval
from physisforcing.core.report.draw import draw_mask, draw_tracks, side_by_side, upscale, write_png
from physisforcing.core.report.markup import fill, join
from physisforcing.core.report.runs import read_success
from physisforcing.core.results import ResultKey, ResultsFile
from physisforcing.core.video import probe_mp4, write_mp4

NASTY = "<script>alert('x')</script> & \"quoted\" {braces}"


def moving_square(frames: int = 12) -> np.ndarray:
    video = np.full((frames, 60, 80, 3), 60, np.uint8)
    for t in range(frames):
        video[t, 20:40, 4 * t : 4 * t + 20] = (220, 120, 40)
    return video


@pytest.fixture
def data(tmp_path: Path) -> ReportData:
    video = moving_square()
    write_mp4(tmp_path / "media/pair.mp4", side_by_side([video, video[::-1]]), 25 / 3)
    write_png(tmp_path / "media/mask.png", video[0])
    return ReportData(
        title="A run of the demo",
        summary="What happened, in one paragraph.",
        created="2026-01-02 03:04 UTC",
        imagined=[
            Figure(
                path="media/pair.mp4",
                title="click_bell",
                caption="Seed 100000.",
                description="Two videos.",
                panels=["a", "b"],
            )
        ],
        physics=[Figure(path="media/mask.png", title="Mask", caption="Bright cells.", description="A picture.")],
        curves=[Curve(name="loss", steps=list(range(60)), values=[1 / (1 + s) for s in range(60)], meaning="the sum")],
        losses=[
            LossChange(term="L_FM", meaning="flow matching", before=0.5, after=0.4),
            LossChange(term="L_pix", meaning="trajectory", before=0.1, after=0.2),
        ],
        held_out="Measured on 8 windows.",
        success=[
            SuccessRow(task="click_bell", policy="world model", successes=4, episodes=5, errors=1),
            SuccessRow(task="click_bell", policy="no-op", successes=0, episodes=5, baseline=True),
        ],
        closed_loop="Counts of episodes.",
        stages=[
            Stage(name="collect", what="demonstrations", seconds=61.0),
            Stage(name="train", what="x", seconds=1, reused=True),
        ],
        provenance={"code": {"commit": "abc123"}},
        limits=["Few episodes."],
    )


def test_page_is_one_file_without_script_or_link_outside(data: ReportData, tmp_path: Path) -> None:
    page = write_report(data, tmp_path)
    text = page.read_text(encoding="utf-8")
    assert page.stat().st_size < MAX_BYTES
    assert "<script" not in text and "http://" not in text and "https://" not in text
    assert text.count("data:video/mp4;base64,") == 1 and text.count("data:image/png;base64,") == 1
    assert "default-src &#x27;none&#x27;" in text  # a browser would refuse to fetch anything
    for anchor in ("imagined", "physics", "training", "success", "time", "provenance", "limits"):
        assert f'<section id="{anchor}">' in text


def test_table_counts_intervals_and_honest_words(data: ReportData, tmp_path: Path) -> None:
    text = write_report(data, tmp_path).read_text(encoding="utf-8")
    assert "4 / 5" in text and "1 crashed, not counted" in text and "not lower" in text and "1 of 2" in text
    low, high = interval(data.success[0])
    assert low == pytest.approx(0.3755, abs=1e-3) and high == pytest.approx(0.9638, abs=1e-3)  # Wilson 95 %, 4 of 5
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "4 / 5" in markdown and "95 % interval 38% to 96%" in markdown


def test_all_text_from_data_is_escaped(data: ReportData, tmp_path: Path) -> None:
    data.title = data.summary = data.created = data.held_out = data.closed_loop = NASTY
    data.limits = [NASTY]
    data.provenance = {NASTY: {NASTY: NASTY}}
    for item in [*data.imagined, *data.physics]:
        item.title = item.caption = item.description = NASTY
        item.panels = [NASTY]
    for curve in data.curves:
        curve.name = curve.unit = curve.meaning = NASTY
    for loss in data.losses:
        loss.term = loss.meaning = NASTY
    for row in data.success:
        row.task = row.policy = row.note = NASTY
    for stage in data.stages:
        stage.name = stage.what = NASTY
    text = write_report(data, tmp_path).read_text(encoding="utf-8")
    assert "<script" not in text and "&lt;script&gt;" in text
    assert not re.search(r'="[^"]*<', text)  # no markup inside an attribute
    assert "<script" not in (tmp_path / "report.md").read_text(encoding="utf-8").replace(r"\<script", "")


def test_fill_escapes_and_join_keeps_markup() -> None:
    inner = fill("<b>{x}</b>", x="<i>")
    assert inner == "<b>&lt;i&gt;</b>"
    assert join([inner, "<i>"]) == "<b>&lt;i&gt;</b>&lt;i&gt;"
    assert fill("{x}", x=inner) == inner


def test_json_twin_comes_back_equal_and_renders_the_same(data: ReportData, tmp_path: Path) -> None:
    data.curves[0].values[3] = float("nan")
    page = write_report(data, tmp_path).read_bytes()
    again = load_report(tmp_path / "report.json")
    assert np.isnan(again.curves[0].values[3])
    assert write_report(again, tmp_path).read_bytes() == page
    plain = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert plain["success"][0]["interval"][0] == pytest.approx(0.3755, abs=1e-3)


@pytest.mark.parametrize("content", ["[]", "{}", '{"schema": 1}', '{"schema": 1, "title": "t", "oops": 1}', "{"])
def test_damaged_twin_is_a_user_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "report.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"report\.json"):
        load_report(tmp_path / "report.json")


def test_figures_outside_the_run_folder_are_refused(data: ReportData, tmp_path: Path) -> None:
    outside = tmp_path / "secret.png"
    write_png(outside, moving_square()[0])
    run = tmp_path / "run"
    for path in ("../secret.png", str(outside), "media/missing.png", "notes.txt"):
        data.imagined, data.physics = [], [Figure(path=path, title="t", caption="c", description="d")]
        with pytest.raises(UserError, match="figure"):
            write_report(data, run)
    assert not (run / "report.html").exists()


def test_too_large_a_page_is_refused(data: ReportData, tmp_path: Path) -> None:
    (tmp_path / "media/pair.mp4").write_bytes(bytes(MAX_BYTES))
    with pytest.raises(UserError, match="20 MB"):
        write_report(data, tmp_path)


def test_from_run_reads_log_losses_and_results(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run folder"):
        from_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "loss": 2.0}\n', encoding="utf-8")
    with pytest.raises(UserError, match="a log with two lines or more"):
        from_run(tmp_path)
    log = [{"step": s, "loss": 2.0 - s, "fm": 1.0} for s in range(2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log), encoding="utf-8")
    heldout = {"before": {"heldout_fm": 1.0, "heldout_pix": 0.2}, "after": {"heldout_fm": 0.9, "heldout_pix": 0.3}}
    (tmp_path / "heldout.json").write_text(json.dumps(heldout), encoding="utf-8")
    write_mp4(tmp_path / "videos/a.mp4", moving_square(), 25 / 3)
    results = ResultsFile(tmp_path / "results.jsonl")
    film = {"video": "videos/a.mp4", "instruction": "click <it>", "steps": 50, "telemetry": {"plans": 2.0}}
    for seed, (policy, status) in enumerate([("model", "success"), ("model", "error"), ("random", "failure")]):
        key = ResultKey(manifest="m", episode=str(seed), fingerprint=policy, config="c")
        results.append(key, status, task="click_bell", policy=policy, seed=seed, **(film if seed == 0 else {}))
    with (tmp_path / "results.jsonl").open("a", encoding="utf-8") as torn:
        torn.write('{"task": "cut of')
    data = from_run(tmp_path)
    assert [curve.name for curve in data.curves] == ["loss", "fm"] and data.curves[0].values == [2.0, 1.0]
    assert [(change.term[:5].strip(","), change.lower) for change in data.losses] == [("L_FM", True), ("L_pix", False)]
    assert [(r.policy, r.successes, r.episodes, r.errors, r.baseline) for r in data.success] == [
        ("world model + inverse dynamics", 1, 1, 1, False),
        ("random", 0, 1, 0, True),
    ]
    assert [figure.title for figure in data.imagined] == ["click_bell, scene 0: succeeded"]
    assert "3.0 s" in data.imagined[0].caption and "2 plans" in data.imagined[0].caption
    assert main([str(tmp_path)]) == 0 and "click &lt;it&gt;" in (tmp_path / "report.html").read_text(encoding="utf-8")
    key = ResultKey(manifest="m", episode="9", fingerprint="model", config="c")
    ResultsFile(tmp_path / "results.jsonl").append(key, "failure", task="click_bell", policy="model")
    assert from_run(tmp_path).success[0].episodes == 2  # results win over a report written earlier


def test_the_report_of_a_training_run_follows_its_log(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    for steps in (2, 5):
        log.write_text("".join(json.dumps({"step": s, "loss": 2.0 - s}) + "\n" for s in range(steps)), encoding="utf-8")
        assert main([str(tmp_path)]) == 0
        assert len(load_report(tmp_path / "report.json").curves[0].steps) == steps


def test_other_weights_settings_and_scenes_are_not_pooled(tmp_path: Path) -> None:
    """Two evaluations in one folder: the report's row of the later one agrees with its summary."""
    from physisforcing.planner.summary import summarise

    results = ResultsFile(tmp_path / "results.jsonl")
    keys = {"model-old": "model", "model-new": "model", "noop": "noop"}
    for seed in range(6):
        for fingerprint, policy in keys.items():
            key = ResultKey(manifest="m", episode=f"click_bell/{seed}", fingerprint=fingerprint, config="c")
            status = "success" if fingerprint == "model-new" or (policy == "model" and seed < 1) else "failure"
            results.append(key, status, task="click_bell", policy=policy, seed=seed)
    table = from_run(tmp_path).success
    assert [(row.successes, row.episodes, row.note.split("; ")[-1]) for row in table] == [
        (1, 6, "fingerprint model-old"),
        (6, 6, "fingerprint model-new"),
        (0, 6, "holds the first joint targets"),
    ]
    latest = summarise(row for row in results.rows if row["fingerprint"] != "model-old")["tasks"]["click_bell"]["model"]
    assert (latest["successes"], latest["n"]) == (table[1].successes, table[1].episodes)
    for changed in ("manifest", "config"):
        key = {"manifest": "m", "episode": "click_bell/0", "fingerprint": "noop", "config": "c"} | {changed: "other"}
        results.append(ResultKey(**key), "success", task="click_bell", policy="noop", seed=0)
    notes = [row.note for row in read_success(results.rows) if row.policy == "no-op"]
    assert [note.split("; ")[-1] for note in notes] == [
        "manifest m, config c",
        "manifest other, config c",
        "manifest m, config other",
    ]


def test_videos_of_two_evaluations_say_which_is_which(tmp_path: Path) -> None:
    results = ResultsFile(tmp_path / "results.jsonl")
    for fingerprint in ("old", "new"):
        write_mp4(tmp_path / f"videos/{fingerprint}.mp4", moving_square(), 25 / 3)
        for seed in range(4):
            key = ResultKey(manifest="m", episode=f"click_bell/{seed}", fingerprint=fingerprint, config="c")
            about = {"task": "click_bell", "policy": "model", "seed": seed, "video": f"videos/{fingerprint}.mp4"}
            results.append(key, "success", **about)
    titles = [figure.title for figure in from_run(tmp_path).imagined]
    assert titles[0] == "click_bell, scene 0: succeeded (fingerprint old)" and len(titles) == 6
    assert titles[3] == "click_bell, scene 0: succeeded (fingerprint new)"


def test_films_of_policies_show_what_happened_alone(tmp_path: Path) -> None:
    """A policy imagines no video and no decoder reads one; the planner beside it does."""
    results = ResultsFile(tmp_path / "results.jsonl")
    planned = {"plans": 2.0, "resampled": 1.0}
    for policy, telemetry in (("pico", {"plans": 5.0, "canvas_s": 0.1}), ("expert", {}), ("planner", planned)):
        write_mp4(tmp_path / f"videos/{policy}.mp4", moving_square(), 25 / 3)
        key = ResultKey(manifest="m", episode="click_bell/0", fingerprint=policy, config="c")
        about = {
            "task": "click_bell",
            "policy": policy,
            "seed": 0,
            "video": f"videos/{policy}.mp4",
            "telemetry": telemetry,
        }
        results.append(key, "success", **about)
    shown = {figure.path: figure for figure in from_run(tmp_path).imagined}
    own, pair = shown["videos/pico.mp4"], shown["videos/planner.mp4"]
    assert own.panels == ["executed in the simulator by pico"] and "imagined" not in own.caption + own.description
    assert own.caption.rstrip().endswith("5 plans.") and shown["videos/expert.mp4"].panels[0].endswith("by expert")
    assert len(pair.panels) == 2 and "1 imagined again" in pair.caption
    alone = ReportData(title="", summary="", created="", imagined=[own])
    write_report(alone, tmp_path)
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "Executed" in text and "Left of each pair" not in text and "Imagined" not in text, name


def test_line_chart_covers_the_values_and_skips_gaps() -> None:
    chart = line_chart(Curve(name="loss", steps=[0, 1, 2, 3], values=[4.0, float("nan"), 2.0, 1.0]))
    raw = re.search(r'class="raw" points="([^"]+)"', chart)
    points = np.array([[float(v) for v in p.split(",")] for p in raw[1].split()])
    assert (
        len(points) == 3 and (np.diff(points[:, 0]) > 0).all() and (np.diff(points[:, 1]) > 0).all()
    )  # y grows downward
    assert points[:, 1].min() >= 12 and points[:, 1].max() <= 190 - 30
    assert "no finite value" in line_chart(Curve(name="loss", steps=[0], values=[float("nan")]))
    assert line_chart(Curve(name="flat", steps=[5], values=[0.25]))


def test_drawing_marks_the_right_pixels() -> None:
    frames = np.full((3, 40, 60, 3), 100, np.uint8)
    points = np.zeros((3, 2, 2), np.float32)
    points[:, 0] = [[10, 20], [14, 20], [18, 20]]
    points[:, 1] = [50, 5]
    visible = np.ones((3, 2), bool)
    visible[2, 1] = False
    drawn = draw_tracks(frames, points, visible, np.array([True, False]))
    assert np.ptp(drawn[2, 20, 18].astype(int)) > 100  # a saturated dot where the selected point is
    assert np.ptp(drawn[2, 20, 11].astype(int)) > 10  # its path behind it
    assert (drawn[1, 5, 50] > 110).all() and (drawn[2, 5, 50] == 80).all()  # faint while visible, absent when hidden
    mask = np.zeros((3, 4, 6), bool)
    mask[:, 1, 2] = True
    shown = draw_mask(frames, mask)
    assert (shown[:, 10:20, 20:30] == 100).all() and (shown[:, :10] == 30).all()
    assert upscale(frames, 2).shape == (3, 80, 120, 3) and (upscale(frames, 2) == 100).all()
    assert side_by_side([frames, frames]).shape == (3, 40, 126, 3)


def test_png_holds_the_pixels(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    write_png(tmp_path / "a.png", image)
    raw = (tmp_path / "a.png").read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    start = raw.index(b"IDAT")
    length = struct.unpack(">I", raw[start - 4 : start])[0]
    rows = np.frombuffer(zlib.decompress(raw[start + 4 : start + 4 + length]), np.uint8).reshape(7, 16)
    assert (rows[:, 0] == 0).all() and (rows[:, 1:].reshape(7, 5, 3) == image).all()


def test_importing_the_report_stays_light() -> None:
    code = (
        "import sys, physisforcing.core.report; "
        "print([m for m in ('av', 'torch', 'pyarrow', 'hydra') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


def browse(page: Path, profile: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", *quiet, f"--user-data-dir={profile}", *arguments]
    return subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=90, check=True)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no browser (chromium, chromium-browser, google-chrome) on the path")
def test_a_browser_shows_the_page(data: ReportData, tmp_path: Path) -> None:
    page = write_report(data, tmp_path / ".")
    document = browse(page, tmp_path / "profile-a", "--dump-dom").stdout
    for text in (
        "Imagined and executed",
        "What the physics losses look at",
        "Closed loop",
        "4 / 5",
        "Provenance",
        "abc123",
    ):
        assert text in document
    shot = tmp_path / "shot.png"
    browse(page, tmp_path / "profile-b", f"--screenshot={shot}", "--window-size=1100,1400", "--hide-scrollbars")
    from PIL import Image

    picture = np.asarray(Image.open(shot).convert("RGB"))
    assert picture.shape == (1400, 1100, 3)
    assert (
        len(np.unique(picture.reshape(-1, 3), axis=0)) > 200
    )  # text with soft edges, charts, pictures: not a blank page
    orange = (np.abs(picture.astype(int) - (220, 120, 40)).max(-1) < 40).sum()
    assert orange > 500  # the embedded video or picture was decoded and drawn


def test_video_in_the_page_is_h264(data: ReportData, tmp_path: Path) -> None:
    info = probe_mp4(tmp_path / data.imagined[0].path)
    assert info.codec == "h264" and info.frames == 12
