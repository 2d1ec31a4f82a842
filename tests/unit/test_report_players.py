"""Reports with players: one allowed script, and in a real browser videos that play, stay together and obey the keyboard."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from pathlib import Path

import numpy as np
import pytest

from chromium import Chromium, needs_browser
from physisforcing.core.report import (
    Panel,
    Player,
    ReportData,
    SuccessRow,
    Table,
    load_report,
    within_bytes,
    write_report,
)
from physisforcing.core.video import write_mp4

NASTY = "<script>alert('x')</script> & \"quoted\" {braces}"
COLOURS = {"real": (220, 60, 40), "imagined": (60, 160, 90), "tracks": (70, 90, 210)}


def counting_video(colour: tuple[int, int, int], frames: int, size: tuple[int, int] = (120, 160)) -> np.ndarray:
    """A bar that moves steadily from left to right, so that a picture tells its time."""
    video = np.full((frames, *size, 3), 40, np.uint8)
    for t in range(frames):
        x = int(t / frames * (size[1] - 12))
        video[t, 20:-20, x : x + 12] = colour
    return video


def make_data(folder: Path, groups: int = 2, frames: int = 40, short: int = 24) -> ReportData:
    for name, colour in COLOURS.items():
        write_mp4(folder / f"media/{name}.mp4", counting_video(colour, frames), 25 / 3)
    write_mp4(folder / "media/short.mp4", counting_video((200, 180, 60), short), 25 / 3)
    names = [("real", "executed in the simulator"), ("imagined", "imagined by a"), ("short", "imagined by b")]
    names.append(("tracks", "tracks, imagined and true"))
    panels = [Panel(path=f"media/{n}.mp4", label=label, description=f"A video: {label}.") for n, label in names]
    players = [
        Player(title=f"click_bell/10000{k}", caption="Instruction: click it.", panels=list(panels), outcome="success")
        for k in range(groups)
    ]
    failure = Player(title="click_bell/100009", caption="Missed.", panels=panels[:2], outcome="failure")
    return ReportData(
        title="Checkpoint comparison",
        summary="Two models on the same episodes.",
        created="2026-01-02 03:04 UTC",
        players=players,
        failures=[failure],
        failures_note="1 of 3 failures is shown.",
        tables=[Table(title="Paired", text="A minus B.", head=["a", "b", "difference", "p"] * 4,
                      rows=[["one model", "another model", "+10 %", "0.5"] * 4] * 3, numeric=[2, 3])],
        verdicts=["The robot follows the video it is shown."],
        skipped=["WoW: skipped: needs weights"],
        crashed=["b on click_bell/100001: the simulator died"],
        published=[Table(title="Table 3", text="Percent.", head=["model", "task 1"], rows=[["WoW", "20"]], numeric=[1])],
        success=[SuccessRow(task="click_bell", policy="a", successes=2, episodes=3)],
    )  # fmt: skip


def test_script_is_the_only_one_and_its_hash_is_allowed(tmp_path: Path) -> None:
    text = write_report(make_data(tmp_path), tmp_path).read_text(encoding="utf-8")
    scripts = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    assert len(scripts) == 1 and text.count("<script") == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1].replace("&#x27;", "'")
    assert f"script-src 'sha256-{digest}'" in policy and policy.startswith("default-src 'none'")
    assert "unsafe-eval" not in policy and policy.count("'unsafe-inline'") == 1  # styles only
    assert "http://" not in text and "https://" not in text
    assert not re.search(r"\son[a-z]+=", text)  # no event handler in the markup


def test_reports_without_players_stay_free_of_scripts(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    data.players, data.failures, data.failures_note = [], [], ""
    text = write_report(data, tmp_path).read_text(encoding="utf-8")
    assert "<script" not in text and "script-src" not in text
    assert "nothing for" in text and "clock" not in text.split("nothing for")[1]  # comparison sections are not missed


def test_sections_twin_and_markdown(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    page = write_report(data, tmp_path).read_bytes()
    for anchor in ("players", "failures", "success", "verdicts", "tables", "skipped", "crashed", "published"):
        assert f'<section id="{anchor}">'.encode() in page
    again = load_report(tmp_path / "report.json")
    assert again == data
    assert write_report(again, tmp_path).read_bytes() == page
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert b"b on click_bell/100001: the simulator died" in page
    assert b"every other panel was imagined" not in page and b"what a control put in its place" in page
    for text in (
        "skipped: needs weights",
        "b on click\\_bell/100001: the simulator died",
        "not measured here",
        "did not succeed",
        "media/imagined.mp4",
        "+10 %",
    ):
        assert text in markdown
    assert markdown.index("+10 %") < markdown.index("not measured here")


def test_all_text_is_escaped(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    for player in data.players + data.failures:
        player.title = player.caption = NASTY
        for panel in player.panels:
            panel.label = panel.description = NASTY
    for table in data.tables + data.published:
        table.title = table.text = NASTY
        table.head, table.rows = [NASTY] * 2, [[NASTY] * 2]
    data.verdicts = data.skipped = data.crashed = [NASTY]
    data.players_note = data.failures_note = NASTY
    text = write_report(data, tmp_path).read_text(encoding="utf-8")
    assert text.count("<script") == 1 and "&lt;script&gt;" in text


def test_a_folded_table_is_opened_without_a_script(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    data.players, data.failures, data.tables[0].folded = [], [], True
    text = write_report(data, tmp_path).read_text(encoding="utf-8")
    assert "<details" in text and "<summary>Paired</summary>" in text and "<script" not in text
    assert load_report(tmp_path / "report.json").tables[0].folded


def test_players_are_chosen_to_fit(tmp_path: Path) -> None:
    data = make_data(tmp_path, groups=4)
    size = sum((tmp_path / p.path).stat().st_size for p in data.players[0].panels)
    kept, dropped = within_bytes(data.players, tmp_path, max_bytes=2 * size + 10)
    assert (len(kept), dropped) == (2, 2)
    kept, dropped = within_bytes([data.players[0], *data.failures], tmp_path, max_bytes=size - 1)
    assert (kept, dropped) == (data.failures, 1)  # the short one fits though the first does not


GROUP = "document.querySelector('[data-players]')"
TIMES = f"[...{GROUP}.querySelectorAll('video')].map(v => v.currentTime)"
READY = f"[...{GROUP}.querySelectorAll('video')].every(v => v.readyState >= 2)"
#: Frames of the players above last 0.12 s; videos that are this close show the same or the next frame.
TOGETHER = 0.15


@pytest.mark.slow
@needs_browser
def test_videos_play_together_in_a_browser(tmp_path: Path, browser: Chromium) -> None:
    page = write_report(make_data(tmp_path), tmp_path)
    browser.events.clear()
    browser.open(page, 1280, 900)
    browser.wait(READY)
    assert browser.run(f"{GROUP}.querySelector('.controls').hidden") is False
    assert browser.run("[...document.querySelectorAll('video')].every(v => !v.controls)")
    browser.run(f"{GROUP}.querySelector('button').click()")
    spread, seen = [], []
    for _ in range(12):
        time.sleep(0.12)
        real, imagined, short, tracks = browser.run(TIMES)
        seen.append(real)
        spread.append(max(real, imagined, tracks) - min(real, imagined, tracks))
        assert short <= 24 * 0.12 and (short > 2.7 or abs(short - real) < 2 * TOGETHER)
    assert seen[-1] - seen[0] > 0.6 and all(b > a for a, b in zip(seen, seen[1:]) if a < 4.6), seen
    assert np.median(spread) < TOGETHER and max(spread) < 2 * TOGETHER, spread
    assert browser.run(f"{GROUP}.querySelector('button').textContent") == "Pause"
    browser.run(f"{GROUP}.querySelector('button').click()")
    paused = browser.run(TIMES)
    time.sleep(0.3)
    assert browser.run(TIMES) == pytest.approx(paused, abs=0.05)
    others = browser.run("[...document.querySelectorAll('[data-players]')].slice(1).map(g => g.dataset.playing)")
    assert others == ["false", "false"]  # each group has its own clock
    assert browser.complaints() == []


@pytest.mark.slow
@needs_browser
def test_keyboard_moves_time_and_all_videos_follow(tmp_path: Path, browser: Chromium) -> None:
    page = write_report(make_data(tmp_path), tmp_path)
    browser.events.clear()
    browser.open(page, 1280, 900)
    browser.wait(READY)
    slider = f"{GROUP}.querySelector('input')"
    browser.run(f"{slider}.focus()")
    for _ in range(10):
        browser.press("ArrowRight", "ArrowRight", 39)
    browser.wait(f"{TIMES}.every(t => Math.abs(t - 1.2) < 0.02)")
    assert browser.run(f"{GROUP}.querySelector('output').value") == "1.20 s"
    browser.press("End", "End", 35)  # the longest video's end; the short one holds its last frame
    browser.wait(f"{TIMES}[0] > 4.6 && {TIMES}[2] > 2.7 && {TIMES}[2] < 2.89")
    browser.run(f"{GROUP}.querySelector('button').focus()")
    browser.press(" ", "Space", 32, " ")
    browser.wait(f"{GROUP}.dataset.playing === 'true' && {TIMES}[0] > 0.2 && {TIMES}[0] < 3")  # from the start again
    browser.press(" ", "Space", 32, " ")
    browser.wait(f"{GROUP}.dataset.playing === 'false'")
    assert browser.complaints() == []


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_phone_width_fits_and_shows_the_videos(tmp_path: Path, browser: Chromium, dark: bool) -> None:
    page = write_report(make_data(tmp_path), tmp_path)
    browser.events.clear()
    browser.open(page, 390, 844, mobile=True, dark=dark)
    assert browser.run("document.documentElement.scrollWidth") <= 390
    wide = "[...document.querySelectorAll('.scroll')].some(t => t.scrollWidth > t.clientWidth && t.tabIndex === 0)"
    assert browser.run(wide)  # a wide table scrolls by itself, also by keyboard
    browser.run(f"{GROUP}.scrollIntoView()")
    browser.wait(READY)
    browser.run(
        f"(() => {{ const s = {GROUP}.querySelector('input'); s.value = 2; s.dispatchEvent(new Event('input')); }})()"
    )
    browser.wait(f"{TIMES}.every(t => Math.abs(t - 2) < 0.1)")
    time.sleep(0.3)
    picture = browser.screenshot().astype(int)
    assert picture.shape == (844, 390, 3)
    for colour in COLOURS.values():  # each video's bar was decoded and drawn
        assert (np.abs(picture - colour).max(-1) < 40).sum() > 40, colour
    corner = picture[5, 5].mean()
    assert corner < 60 if dark else corner > 200
    target = browser.run(
        f"(() => {{ const b = {GROUP}.querySelector('button').getBoundingClientRect(); return b.height; }})()"
    )
    assert target >= 30  # large enough for a thumb
    assert browser.complaints() == []


@pytest.mark.slow
@needs_browser
def test_many_players_do_not_exhaust_the_browser(tmp_path: Path, browser: Chromium) -> None:
    """A page may hold about 75 loaded videos in Chromium; these are 122, loaded where the window is."""
    data = make_data(tmp_path, groups=30, frames=10, short=6)
    page = write_report(data, tmp_path)
    browser.events.clear()
    browser.open(page, 1280, 900)
    browser.wait(READY)
    for part in range(0, 31, 3):
        browser.run(f"document.querySelectorAll('[data-players]')[{part}].scrollIntoView()")
        there = f"[...document.querySelectorAll('[data-players]')[{part}].querySelectorAll('video')]"
        browser.wait(f"{there}.every(v => v.readyState >= 2)")
    assert browser.run("[...document.querySelectorAll('video')].filter(v => v.src).length") < 75
    assert browser.run(f"{TIMES}.length") == 4
    assert browser.complaints() == []
