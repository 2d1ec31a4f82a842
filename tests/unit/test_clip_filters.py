"""Each filter against numbers known by construction."""

from __future__ import annotations

import shutil
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from drawn_clips import FPS, film
from physisforcing.core.errors import UserError
from physisforcing.core.video import write_mp4
from physisforcing.worldmodel.data.clips import alignment, duplicates
from physisforcing.worldmodel.data.clips.alignment import PredictedAlignment, centre, nearest
from physisforcing.worldmodel.data.clips.config import AlignmentConfig, ClipsConfig, DuplicatesConfig, MotionConfig
from physisforcing.worldmodel.data.clips.decode import Span
from physisforcing.worldmodel.data.clips.duplicates import candidates, grey_film, keep_best, likeness, reading_order
from physisforcing.worldmodel.data.clips.image_text import ImageTextAlignment
from physisforcing.worldmodel.data.clips.motion import cut_score, motion_score, sharpness


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(30, 220, (height // 4, width // 4, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.mark.parametrize("pixels", [1.5, 3.0])
def test_motion_is_the_speed_of_what_moves_fastest(pixels: float) -> None:
    background, patch = texture(120, 160), texture(80, 80, 1)
    frames = []
    for k in range(8):
        picture = background.copy()
        shift = np.array([[1, 0, 20 + pixels * k], [0, 1, 20]], np.float64)
        laid = cv2.warpAffine(patch, shift, (160, 120))
        inside = cv2.warpAffine(np.ones((80, 80), np.uint8), shift, (160, 120)) > 0
        picture[inside] = laid[inside]
        frames.append(picture)
    # The patch is a third of the picture, more than the 5 % that count: its speed is the score.
    assert motion_score(np.stack(frames), 0.25) == pytest.approx(pixels / 120 / 0.25, rel=0.25)


def test_noise_lamps_and_single_pictures_do_not_move() -> None:
    rng, picture = np.random.default_rng(0), texture(120, 160).astype(np.float32)
    noisy = np.clip(picture + rng.normal(0, 4, (6, *picture.shape)), 0, 255).astype(np.uint8)
    lamp = np.clip(picture * np.linspace(0.85, 1, 6)[:, None, None, None], 0, 255).astype(np.uint8)
    assert motion_score(noisy, 0.25) < 0.002 and motion_score(lamp, 0.25) < 0.01
    assert motion_score(noisy[:1], 0.25) == 0.0


def test_a_cut_is_one_large_change() -> None:
    one, two = texture(32, 32, 1), texture(32, 32, 2)
    grey, red = np.full((32, 32, 3), 100, np.uint8), np.full((32, 32, 3), (151, 100, 100), np.uint8)
    # Between plain pictures every pixel is as far from its nearest as they differ: 51 of 255 in one of three channels.
    assert cut_score([grey] * 4 + [red] * 4) == pytest.approx(0.2 / 3, abs=1e-6)
    assert cut_score([one] * 4 + [two] * 4) > 0.04
    assert cut_score([one] * 4 + [two] + [one] * 4) == 0.0, "a flash is no cut"
    assert cut_score([np.roll(one, k, axis=1) for k in range(9)]) == 0.0, "fast motion is no cut"
    assert cut_score([one, two, one]) == 0.0
    arm = [grey.copy() for _ in range(8)]
    for k, picture in enumerate(arm):
        left = 4 if k < 4 else 7  # it jumps by a tenth of the picture between two frames
        picture[:, left : left + 6] = 20
    assert cut_score(arm) < 0.005
    assert cut_score(arm[:4] + [grey] * 4) > 0.02, "but it does not vanish"


def test_a_cut_in_a_long_recording_needs_little_memory() -> None:
    one, two = texture(32, 32, 1), texture(32, 32, 2)
    for where in (1022, 1023, 1024, 1025, 4000):  # pieces that are compared at once begin and end here
        long = [one] * where + [two] * (12_000 - where)
        tracemalloc.start()
        found = cut_score(long)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found == cut_score([one] * 4 + [two] * 4) and peak < 40e6, "12000 thumbnails as float32 are 147 MB"


def test_sharpness_falls_with_blur_and_ignores_contrast() -> None:
    picture = texture(96, 128)[None]
    flat = (picture * 0.6 + 40).astype(np.uint8)
    assert sharpness(cv2.blur(picture[0], (3, 3))[None]) < 0.85 * sharpness(picture)
    assert sharpness(flat) == pytest.approx(sharpness(picture), rel=0.05)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Span]:
    """A take, copies of it, and another take of the same task."""
    folder = tmp_path_factory.mktemp("recordings")
    one, two = (film("bell", np.random.default_rng(seed), 30) for seed in (3, 4))
    bright = np.clip(one * 1.1 + 10.0, 0, 255).astype(np.uint8)
    enlarged = np.stack([cv2.resize(f[8:92, 10:122], (128, 96), interpolation=cv2.INTER_CUBIC) for f in one])
    films = {"one": one, "bright": bright, "late": one[6:], "two": two}
    films |= {"cropped": one[:, 4:88, 10:122], "enlarged": enlarged[2:]}
    for name, frames in films.items():
        write_mp4(folder / f"{name}.mp4", frames, FPS, crf=28 if name != "one" else 18)
    return {name: Span(path=folder / f"{name}.mp4") for name in films}


@pytest.mark.parametrize("copy", ["bright", "late", "cropped", "enlarged"])
def test_copies_are_the_same_recording_from_both_sides(recordings: dict[str, Span], copy: str) -> None:
    assert likeness(recordings["one"], recordings[copy], 2.0) > 0.96
    assert likeness(recordings[copy], recordings["one"], 2.0) > 0.96


def test_another_take_of_the_task_is_not(recordings: dict[str, Span]) -> None:
    assert likeness(recordings["one"], recordings["two"], 2.0) < 0.9
    late = likeness(recordings["one"], recordings["late"], 0.0)
    assert late < 0.9, "without a time shift the late copy does not fit"


def test_a_film_is_of_the_file_as_it_is_now(recordings: dict[str, Span], tmp_path: Path) -> None:
    there = Span(path=tmp_path / "a.mp4")
    found = []
    for name in ("one", "two"):
        shutil.copy(recordings[name].path, there.path)
        found.append(likeness(recordings["one"], there, 2.0))
    assert found[0] == pytest.approx(1.0) and found[1] == likeness(recordings["one"], recordings["two"], 2.0) < 0.9


def test_aligning_two_pictures_never_ends_where_they_fit_worse():
    """Scene 232 is one in which ECC leads away from where the pictures fit already: from a correlation of .993 to .990."""
    for seed in (232, 376, 5):
        scene, noise = np.random.default_rng(seed), np.random.default_rng(1000 + seed)
        picture = np.full((96, 128), scene.uniform(60, 200), np.float32)
        picture[: scene.integers(20, 50)] = scene.uniform(20, 220)
        for _ in range(scene.integers(2, 7)):
            (y, x), (height, width) = (scene.integers(0, 90), scene.integers(0, 120)), scene.integers(3, 30, 2)
            picture[y : y + height, x : x + width] = scene.uniform(0, 255)
        picture = cv2.GaussianBlur(picture, (0, 0), float(scene.uniform(0.5, 2)))
        flat = (0.75 * picture + 40 + noise.normal(0, 0.6, picture.shape)).astype(np.float32)
        picture = (picture + noise.normal(0, 0.6, picture.shape)).astype(np.float32)
        same = np.eye(2, 3, dtype=np.float32)
        for one, two in ((picture, flat), (flat, picture)):
            found = duplicates._refined(one, two, same)
            assert found is not None
            assert duplicates._fit(one, two, found) >= duplicates._fit(one, two, same) > 0.99, seed


def test_films_are_remembered_up_to_a_size(recordings: dict[str, Span], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_films", {})
    monkeypatch.setattr(duplicates, "REMEMBERED", 3 * grey_film(recordings["one"]).frames_THW.nbytes)
    for name in ("one", "bright", "two", "late", "one", "bright"):
        grey_film(recordings[name])
    kept = [span for span, _ in duplicates._films]
    assert kept == [recordings[name] for name in ("late", "one", "bright")]
    assert grey_film(recordings["late"]) is grey_film(recordings["late"])


def test_the_best_of_copies_is_kept_and_chains_are_not_followed() -> None:
    # 2 - 0 - 1 - 3: the best, 1, takes its neighbours 0 and 3; 2 repeats only the dropped 0 and stays.
    assert keep_best([1, 0, 3, 2], [(0, 2), (0, 1), (1, 3)]) == {0: 1, 3: 1}
    assert keep_best([0, 1, 2], []) == {}


def test_nearest_by_cosine_of_standardised_columns() -> None:
    seen = np.random.default_rng(0).normal(0, (1, 5, 20), (40, 3)).astype(np.float32)
    unit = (seen - seen.mean(0)) / seen.std(0)
    cosine = unit @ unit.T / np.outer(np.linalg.norm(unit, axis=1), np.linalg.norm(unit, axis=1))
    np.fill_diagonal(cosine, -2)
    assert nearest(seen, 4) == np.argsort(-cosine, axis=1, kind="stable")[:, :4].tolist()
    assert nearest(seen[:1], 4) == [[]] and nearest(seen[:3], 9) == [row[:2] for row in nearest(seen[:3], 2)]
    tied = np.random.default_rng(1).integers(0, 2, (60, 3)).astype(np.float32)
    like = centre(tied) @ centre(tied).T
    np.fill_diagonal(like, -np.inf)
    assert nearest(tied, 5) == np.argsort(-like, axis=1, kind="stable")[:, :5].tolist(), "ties by number"


@pytest.mark.parametrize(("clips", "count"), [(1027, 4), (600, 1), (300, 70)])
def test_the_nearest_of_many_are_those_of_a_whole_sort(clips: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are planted: exact ones, which tie, with numbers in a row, and near ones far away."""
    monkeypatch.setattr(alignment, "_BLOCK", 128)  # the same products here and there, to the last bit
    rng = np.random.default_rng(clips)
    seen = rng.standard_normal((clips, 24)).astype(np.float32)
    seen[1:9] = seen[0]
    seen[clips - 40 :] = seen[:40] + rng.normal(0, 0.01, (40, 24)).astype(np.float32)
    rows = centre(seen)
    likeness = np.concatenate([rows[first : first + 128] @ rows.T for first in range(0, clips, 128)])
    np.fill_diagonal(likeness, -np.inf)
    found = nearest(seen, count)
    assert found == np.argsort(-likeness, axis=1, kind="stable")[:, :count].tolist()
    assert all(clips - 40 + k in found[k] for k in range(20, 40)), "its near copy is among them"


def test_pairs_are_read_so_that_films_are_remembered() -> None:
    rng = np.random.default_rng(0)
    kind = rng.permutation(np.arange(800) % 20)
    seen = (rng.normal(0, 1, (20, 64))[kind] + rng.normal(0, 0.2, (800, 64))).astype(np.float32)
    pairs = candidates(seen, 4)

    def films_read(order: list[tuple[int, int]], remembered: int = 64) -> int:
        last, count = dict[int, None](), 0
        for clip in (clip for pair in order for clip in pair):
            count += clip not in last
            last.pop(clip, None)
            last[clip] = None
            if len(last) > remembered:
                del last[next(iter(last))]
        return count

    order = reading_order(pairs)
    assert sorted(order) == pairs and reading_order([]) == [] and reading_order([(3, 9)]) == [(3, 9)]
    assert films_read(order) <= 1.1 * 800 < 2.5 * 800 < films_read(pairs), "each once, not once a pair"


def test_predicted_captions_equal_the_regression_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    kind = np.arange(60) % 3
    seen = (rng.normal(0, 1, (3, 8))[kind] + rng.normal(0, 0.3, (60, 8))).astype(np.float32)
    text = rng.normal(0, 1, (3, 5))
    wrong = [4, 17, 33]
    said = kind.copy()
    said[wrong] = (said[wrong] + 1) % 3
    vectors = {str(k): (text[k] / np.linalg.norm(text[k])).astype(np.float32) for k in range(3)}
    monkeypatch.setattr(alignment, "sentence_vectors", lambda texts: np.stack([vectors[t] for t in texts]))
    captions = [str(k) for k in said]
    found = PredictedAlignment().scores(seen, captions, [(0, 3), (3, 6)])
    part = alignment._parts(60, [(0, 3), (3, 6)])
    assert part[0] == part[3] == part[6] and sorted(np.unique(part)) == list(range(alignment.PARTS))
    x, y = centre(seen).astype(float), np.stack([vectors[c] for c in captions]).astype(float)
    for i in (0, 4, 21):
        rest = part != part[i]
        mean = y[rest].mean(0)
        stacked = np.vstack([x[rest], np.sqrt(alignment.RIDGE) * np.eye(8)])
        weights = np.linalg.lstsq(stacked, np.vstack([y[rest] - mean, np.zeros((8, 5))]), rcond=None)[0]
        a, b = x[i] @ weights, y[i] - mean
        assert found[i] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-6)
    assert max(found[wrong]) < min(np.delete(found, wrong))
    assert (PredictedAlignment().scores(seen[:10], captions[:10], []) == 1).all(), "ten clips teach nothing"


@pytest.fixture(scope="module", params=["clip", "siglip"])
def model_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights and a tokenizer, as transformers saves them."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"[PAD]": 0, "[UNK]": 1, "</s>": 2, "press": 3, "the": 4, "bell": 5, "lift": 6, "bottle": 7}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="</s>")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = size | {
        "vocab_size": 8,
        "max_position_embeddings": 8,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "bos_token_id": 2,
    }
    vision = size | {"image_size": 32, "patch_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if request.param == "clip":
            config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
            model = transformers.CLIPModel(config)
        else:
            model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def test_a_model_from_a_folder_gives_its_own_cosines(model_folder: Path) -> None:
    import transformers

    kind = transformers.CLIPModel if model_folder.name.startswith("clip") else transformers.SiglipModel
    stock = kind.from_pretrained(model_folder).eval()
    scorer = ImageTextAlignment(model_folder)
    pictures = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
    captions = ["press the bell", "lift the bottle", "press the bell"]
    seen = scorer.look(pictures)
    found = scorer.scores(np.stack([seen, seen, -seen]), captions, [])
    mean, std = scorer.mean.flatten() / 255, scorer.std.flatten() / 255
    pixels = (torch.from_numpy(pictures).float() / 255 - mean) / std
    ids = torch.tensor([[3, 4, 5], [6, 4, 7]])
    if kind is transformers.SiglipModel:
        ids = torch.nn.functional.pad(ids, (0, 5))
    with torch.no_grad():
        out = stock(pixel_values=pixels.permute(0, 3, 1, 2), input_ids=ids)
    image = out.image_embeds.mean(0)
    wanted = torch.nn.functional.cosine_similarity(image[None], out.text_embeds)
    np.testing.assert_allclose(found[:2], wanted.numpy(), atol=1e-5)
    assert found[2] == pytest.approx(-found[0], abs=1e-6)


def test_folders_with_code_or_without_a_tokenizer_are_refused(model_folder: Path, tmp_path: Path) -> None:
    import json
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"auto_map": {"AutoTokenizer": "evil.Words"}}))
    with pytest.raises(UserError, match="auto_map"):
        ImageTextAlignment(folder)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="a tokenizer in the folder"):
        ImageTextAlignment(folder)
    with pytest.raises(UserError, match="checksum"):
        ImageTextAlignment(model_folder, checksum="00")
    with pytest.raises(UserError, match=r"config.json|path"):
        ImageTextAlignment(tmp_path)


def test_settings_that_do_not_fit_are_named() -> None:
    for config, message in (
        (ClipsConfig(filters=["motoin"]), "did you mean 'motion'"),
        (ClipsConfig(filters=["alignment"], alignment=ClipsConfig().alignment.__class__(model="image_text")), "path"),
        (ClipsConfig(motion=MotionConfig(least=float("nan"))), r"motion\.least: got nan, wanted 0 or more"),
        (
            ClipsConfig(duplicates=DuplicatesConfig(likeness=97)),
            r"duplicates\.likeness: got 97, wanted a number in \[0, 1\]",
        ),
        (ClipsConfig(duplicates=DuplicatesConfig(shift=float("inf"))), r"duplicates\.shift: got inf"),
        (ClipsConfig(min_seconds=-1), "min_seconds: got -1"),
        (ClipsConfig(alignment=AlignmentConfig(least=32)), r"alignment\.least: got 32, wanted a cosine"),
    ):
        with pytest.raises(UserError, match=message):
            config.check()
