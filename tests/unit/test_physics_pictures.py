"""Pictures of what the physics losses see: what is drawn stands where and means what it should, and the command writes it."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from PIL import Image

from physisforcing import cli
from physisforcing.core.errors import UserError
from physisforcing.core.lerobot import LeRobotDataset
from physisforcing.core.paths import weights_root
from physisforcing.worldmodel.data.target_shards import TargetRecipe
from physisforcing.worldmodel.data.targets import build
from physisforcing.worldmodel.physics.config import PhysicsConfig
from physisforcing.worldmodel.physics.forcing import PhysisForcing
from physisforcing.worldmodel.physics.relation import gather_tokens, relation_matrix
from physisforcing.worldmodel.pictures import files, panels
from physisforcing.worldmodel.pictures.command import draw_dataset
from physisforcing.worldmodel.pictures.predict import load_forcing, predict
from physisforcing.worldmodel.pictures.window import Prediction, Relations, Tracks, Window, load_window
from physisforcing.worldmodel.teachers.ground_truth import point_tracks
from physisforcing.worldmodel.text import _key, _store
from physisforcing.worldmodel.training import pictures as training_pictures
from physisforcing.worldmodel.training import steplog
from physisforcing.worldmodel.training.config import DataConfig, TrainWorldModelConfig
from physisforcing.worldmodel.training.worldmodel import Trainer, prepare_banks

_other = importlib.util.spec_from_file_location("targets_of_boxes", Path(__file__).with_name("test_targets.py"))
assert _other is not None and _other.loader is not None
boxes = importlib.util.module_from_spec(_other)
_other.loader.exec_module(boxes)

SENTENCE = "turn the cube"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures") / "data"
    writer = boxes.LeRobotWriter(folder, boxes.robot_features([f"joint{i}" for i in range(14)]), robot_type="boxes")
    for seed, length in ((0, 41), (1, 25), (2, 9)):
        boxes._add(writer, boxes.scene.make_truth(frames=length), seed)
    writer.finalize()
    return folder


@pytest.fixture(scope="module")
def cache(root: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Targets of the dataset, computed once."""
    folder = tmp_path_factory.mktemp("cache")
    build(LeRobotDataset(root), TargetRecipe(), cache=folder)
    return str(folder)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache home that knows the sentence: no text encoder is loaded."""
    monkeypatch.setenv("PHYSIS_HOME", str(tmp_path / "home"))
    text = tmp_path / "home" / "text"
    _store(text / f"{_key(SENTENCE)}.safetensors", np.ones((3, 384), np.float16), SENTENCE)
    return text


def window(grey: int = 200) -> Window:
    """Three points over plain pictures: one goes right and is selected, one stays, one is selected and hidden in the end."""
    points = np.tile(np.array([[0.2, 0.3], [0.7, 0.3], [0.3, 0.75]], np.float32), (17, 1, 1))
    points[:, 0, 0] = np.linspace(0.2, 0.6, 17)
    points[:, 2, 0] = np.linspace(0.3, 0.5, 17)
    visible = np.ones((17, 3), bool)
    visible[9:, 2] = False
    frames = np.full((17, 240, 320, 3), grey, np.uint8)
    select = np.array([True, False, True])
    mask = np.zeros((5, 15, 20), bool)
    mask[0, 2, 3] = mask[1, 2:4, 5] = mask[4, 14, 19] = True
    token = np.flatnonzero(mask)
    return Window(
        title="boxes: a title\nepisode 3",
        name="episode_000003_step_0016",
        start=16,
        pictures_FHWC=frames[[0, 3, 7, 11, 15]],
        mask_Fhw=mask,
        relations=Relations(
            matrices={"teacher: some": np.eye(4, dtype=np.float32)},
            token_K=token,
            groups=[("cube", 0, 2), ("bar", 2, 4)],
        ),
        tracks=Tracks(
            frames_THWC=frames,
            seconds_T=np.arange(17) * 0.12,
            points_TN2=points,
            visible_TN=visible,
            select_N=select,
            motion_N=np.array([128, 0, 64], np.float32),
            weight_N=np.array([1, 2, 5], np.float32),
            threshold=149.3,
            min_motion=8.0,
        ),
        notes=["a note"],
    )


LATER = [3, 7, 11, 15]


def prediction(shown: Window, offset_2: list[float], student_KK: np.ndarray, **metrics: float) -> Prediction:
    """The first point is predicted ``offset_2`` beside its target in the pictures ``LATER``, the others where they are."""
    assert shown.tracks is not None
    target = shown.tracks.points_TN2[LATER]
    points = target.copy()
    points[:, 0] += offset_2
    return Prediction(
        model="tiny",
        sigma=0.5,
        points_FN2=points,
        target_FN2=target,
        weight_FN=(shown.tracks.select_N & shown.tracks.visible_TN[LATER]).astype(np.float32),
        student_KK=student_KK,
        metrics={"epe_px": 1.25, "epe_still_px": 9.0, "epe_uniform_px": 80.0, "sem": 0.0} | metrics,
    )


def pixel(figure: Figure, place: int, at: tuple[float, float]) -> np.ndarray:
    """The colour (0 to 1) that a picture of the figure has at a position in [0,1]."""
    if not hasattr(figure, "drawn"):
        figure.drawn = files.render(figure)
    image, (x, y) = figure.drawn, figure.axes[place].transData.transform(at)
    return image[image.shape[0] - 1 - int(y), int(x)] / 255.0


def distance(colour: np.ndarray, name: str) -> float:
    return float(np.abs(colour - np.array(to_rgb(name))).max())


def test_points_and_paths_have_the_colours_of_the_legend() -> None:
    shown = window()
    assert shown.tracks is not None
    figure = panels.tracks_panel(shown)
    assert len(figure.axes) == 4
    for place, t in enumerate((0, 5, 11, 16)):
        moved, still, lost = (pixel(figure, place, tuple(shown.tracks.points_TN2[t, n])) for n in range(3))
        assert distance(moved, panels.SELECTED) < 0.05
        assert distance(still, panels.OTHER) < 0.15
        hidden = t > 8
        assert (distance(lost, panels.SELECTED) < 0.05) != hidden, "hidden points are faint"
        assert distance(lost, "#c8c8c8") > 0.1, "and still to be seen"
        middle = tuple(shown.tracks.points_TN2[[0, t], 0].mean(0))
        on_path = pixel(figure, place, middle)
        assert t == 0 or on_path[2] > on_path[0] + 0.2, "the path so far is blue"
    ahead = pixel(figure, 1, (0.5, 0.3))
    assert distance(ahead, "#c8c8c8") < 0.05, "no path before it is gone"
    assert "2 of 3 points" in figure.texts[0].get_text()


def test_scores_grow_with_motion_and_nearness_and_selected_points_are_ringed() -> None:
    shown = window()
    assert shown.tracks is not None
    np.testing.assert_array_equal(shown.tracks.score_N, [128, 0, 320])
    figure = panels.scores_panel(shown)
    colours = [
        [pixel(figure, place, tuple(shown.tracks.points_TN2[0, n])).mean() for n in range(3)] for place in range(3)
    ]
    for place, values in enumerate((shown.tracks.motion_N, shown.tracks.weight_N, shown.tracks.score_N)):
        assert np.argsort(colours[place]).tolist() == np.argsort(values).tolist(), "more is brighter"
    ringed = figure.axes[2].collections[1].get_offsets()
    np.testing.assert_allclose(ringed, shown.tracks.points_TN2[0, [0, 2]])
    text = figure.texts[1].get_text()
    assert "149" in text and "8 px" in text


def test_the_mask_lights_exactly_its_cells() -> None:
    shown = window()
    pictures = panels.masked_pictures(shown)
    bright = (pictures == 200).all(-1)
    np.testing.assert_array_equal(bright, shown.mask_Fhw.repeat(16, 1).repeat(16, 2))
    assert pictures[~bright].max() < 100
    figure = panels.mask_panel(shown)
    assert len(figure.axes) == 5
    assert pixel(figure, 0, (3.5 / 20, 2.5 / 15)).mean() > 0.75
    for outside in ((2.5 / 20, 2.5 / 15), (4.5 / 20, 2.5 / 15), (3.5 / 20, 1.5 / 15)):
        assert pixel(figure, 0, outside).mean() < 0.4
    border = np.asarray(figure.axes[1].collections[0].get_segments())
    assert len(border) == 6, "two cells above each other have six edges"
    assert border[..., 0].min() == 5 / 20 and border[..., 0].max() == 6 / 20
    assert border[..., 1].min() == 2 / 15 and border[..., 1].max() == 4 / 15
    assert "4 of 1500 tokens" in figure.texts[0].get_text()


def test_relations_become_brighter_with_the_cosine_and_unknown_is_grey() -> None:
    values = np.linspace(-0.2, 1.0, 16, dtype=np.float32).reshape(4, 4)
    values[3, 0] = np.nan
    figure = Figure(figsize=(4, 4), dpi=100)
    axis = figure.add_axes((0, 0, 1, 1))
    panels.draw_matrix(axis, values, Normalize(-0.2, 1.0))
    image = files.render(figure).astype(float)
    cells = image[50::100, 50::100]
    luminance = (cells @ [0.2126, 0.7152, 0.0722]).ravel()
    known = np.isfinite(values.ravel())
    assert (np.diff(luminance[known]) > 2).all()
    assert np.abs(cells[3, 0] / 255 - to_rgb(panels.UNKNOWN)).max() < 0.01


def test_matrices_stand_side_by_side_on_one_scale() -> None:
    shown = window()
    student = np.full((4, 4), -0.4, np.float32)
    shown.prediction = prediction(shown, [0, 0], student, sem=0.123)
    figure = panels.relations_panel(shown)
    images = [axis.images[0] for axis in figure.axes if axis.images]
    assert [image.get_clim() for image in images] == [(pytest.approx(-0.4), 1.0)] * 2
    np.testing.assert_array_equal(images[1].get_array(), student)
    assert "0.123" in figure.texts[1].get_text()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["cube", "bar"]


def test_predictions_are_drawn_where_they_are_with_their_error() -> None:
    shown = window()
    said = shown.prediction = prediction(shown, [6 / 320, 8 / 240], np.eye(4, dtype=np.float32), epe_px=5.0)
    figure = panels.prediction_panel(shown)
    assert len(figure.axes) == 4
    assert figure.axes[0].get_title(loc="left") == "latent 1: mean 5.0 px, largest 10.0 px"
    assert figure.axes[2].get_title(loc="left") == "latent 3: mean 10.0 px, largest 10.0 px", (
        "hidden points do not count"
    )
    assert "5.0 px" in figure.texts[0].get_text() and "9.0 px" in figure.texts[1].get_text()
    assert distance(pixel(figure, 0, tuple(said.points_FN2[0, 0])), panels.PREDICTED) < 0.1
    assert distance(pixel(figure, 0, tuple(said.target_FN2[0, 0])), panels.SELECTED) < 0.1


def test_a_window_holds_the_targets_of_training(root: Path) -> None:
    dataset = LeRobotDataset(root)
    shown, batch = load_window(dataset, 0, 8, PhysicsConfig())
    assert (shown.name, shown.start) == ("episode_000000_step_0008", 8) and SENTENCE in shown.title
    assert not (root / "targets").exists(), "inspecting writes nothing into a dataset"
    tracks = point_tracks(boxes.scene.make_truth(frames=41), TargetRecipe().steps(8, 41))
    assert shown.tracks is not None
    near = np.abs(tracks.points_TN2) < 500
    drawn = shown.tracks.points_TN2 * [320, 240] - 0.5
    assert np.abs(drawn - tracks.points_TN2)[near].max() < 1 / 64
    np.testing.assert_array_equal(shown.tracks.frames_THWC, dataset.frames(0, TargetRecipe().steps(8, 41).tolist()))
    np.testing.assert_array_equal(shown.tracks.select_N, batch["select_BN"][0])
    score, valid = shown.tracks.score_N, shown.tracks.visible_TN[0]
    assert shown.tracks.threshold == pytest.approx(score[valid].mean())
    rule = valid & (score >= shown.tracks.threshold) & (shown.tracks.motion_N >= shown.tracks.min_motion)
    np.testing.assert_array_equal(shown.tracks.select_N, rule)


def test_relations_are_those_of_the_loss_in_another_order(root: Path, cache: str) -> None:
    shown, batch = load_window(LeRobotDataset(root), 0, 0, PhysicsConfig(), cache=cache)
    found = shown.relations
    assert found is not None
    assert sorted(found.token_K) == np.flatnonzero(shown.mask_Fhw).tolist()
    index = torch.from_numpy(found.token_K)[None]
    teacher = relation_matrix(gather_tokens(batch["teacher_BFhwC"].flatten(1, 3), index))[0]
    np.testing.assert_allclose(found.matrices["teacher: efficientnet-lite0"], teacher, atol=1e-5)
    same = found.matrices["simulator: same rigid body"]
    assert {name for name, _, _ in found.groups} <= {"cube", "bar", "table"}
    assert [first for _, first, _ in found.groups] == [0, *(last for _, _, last in found.groups[:-1])]
    for name, first, last in found.groups:
        assert (same[first:last, first:last] == 1).all(), name
        assert same[first:last, :first].max(initial=0) == 0


def test_without_a_start_the_fullest_window_is_drawn(root: Path, cache: str) -> None:
    dataset, physics = LeRobotDataset(root), PhysicsConfig()
    chosen, _ = load_window(dataset, 0, None, physics, cache=cache)
    windows = [load_window(dataset, 0, start, physics, cache=cache)[0] for start in (0, 8, 16, 24, 32, 40)]
    counts = [int(one.tracks.select_N.sum()) for one in windows]
    assert (
        int(chosen.tracks.select_N.sum()) == max(counts) > min(counts)
        and windows[chosen.start // 8].name == chosen.name
    )
    last, _ = load_window(dataset, 1, 24, physics, cache=cache)
    assert last.relations is None and not last.mask_Fhw.any(), "one repeated frame shows no motion"
    assert any("no relations" in note for note in last.notes)
    assert set(files.draw(last)) == {"tracks", "scores", "mask"}


def test_what_a_model_predicts_is_what_its_loss_measures(root: Path, cache: str) -> None:
    shown, batch = load_window(LeRobotDataset(root), 0, 0, PhysicsConfig(), cache=cache)
    torch.manual_seed(0)
    forcing = PhysisForcing(PhysicsConfig(phi_hidden=16, psi_hidden=16, feature_dim=16), width=8, teacher_dim=112)
    hidden = torch.randn(1, 1500, 8)

    class Denoiser:
        def context(self, text: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
            return text

        def action_embedding(self, actions: torch.Tensor | None, state: torch.Tensor) -> None:
            return None

        def __call__(
            self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, *, action_BFD: None, need_tap: bool
        ) -> tuple:
            assert need_tap and timesteps.tolist() == [[0, 250, 250, 250, 250]]
            return x, hidden

    latents = torch.zeros(1, 4, 5, 15, 20)

    def predicted() -> Prediction:
        state = torch.zeros(1, 1)
        return predict(
            Denoiser(), forcing, latents, torch.zeros(1, 1), state, batch, shown.relations, sigma=0.25, model="x"
        )

    said = predicted()
    out = forcing(hidden, (5, 15, 20), batch)
    assert said.metrics["epe_px"] == pytest.approx(float(out.metrics["epe_px"]))
    np.testing.assert_array_equal(said.weight_FN > 0, (batch["select_BN"] & batch["visible_BFN"][0, 1:]).numpy())
    half = np.array([0.5 / 20, 0.5 / 15])
    np.testing.assert_allclose(said.target_FN2, batch["points_BFN2"][0, 1:].numpy().clip(half, 1 - half), atol=1e-6)
    error = np.linalg.norm((said.points_FN2 - said.target_FN2) * [320, 240], axis=-1)
    assert np.average(error, weights=said.weight_FN) == pytest.approx(said.metrics["epe_px"], rel=1e-4)
    assert shown.relations is not None
    teacher = shown.relations.matrices["teacher: efficientnet-lite0"]
    assert np.abs(said.student_KK - teacher).mean() == pytest.approx(said.metrics["sem"], rel=1e-4)
    with torch.autocast("cpu", torch.bfloat16):  # as a model that is spread over GPUs gives them
        assert (
            forcing.match(forcing.features(hidden.unflatten(1, (5, 15, 20))), batch).logits_BFNL.dtype == torch.bfloat16
        )
        np.testing.assert_allclose(predicted().points_FN2, said.points_FN2, atol=0.02)


def test_heads_are_loaded_with_their_own_widths(tmp_path: Path) -> None:
    forcing = load_forcing(weights_root() / "worldmodel", PhysicsConfig(phi_hidden=8, upsample=2))
    assert (forcing.width, forcing.teacher_dim, forcing.config.phi_hidden, forcing.config.upsample) == (
        256,
        112,
        256,
        2,
    )
    with pytest.raises(UserError, match=r"--model.*physics_heads\.safetensors"):
        load_forcing(tmp_path, PhysicsConfig())


def test_the_command_writes_the_files_it_names(
    root: Path, cache: str, tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["data", "inspect", str(root), "--quick", "--json"]
    more = ["physics.select=topk", "--pictures", str(out), "--model", "shipped", "physics.top_k=5", f"cache={cache}"]
    assert cli.main([*words, *more]) == 0
    report = json.loads(capsys.readouterr().out)
    names = [Path(path).name for path in report["pictures"]]
    stem = names[0].removesuffix(".png")
    parts = ("tracks", "scores", "mask", "relations", "prediction")
    assert names == [f"{stem}.png", *(f"{stem}_{part}.png" for part in parts)]
    assert sorted(names) == sorted(path.name for path in out.iterdir())
    images = [Image.open(path) for path in report["pictures"]]
    assert {image.width for image in images} == {panels.WIDTH}
    assert images[0].height > sum(image.height for image in images[1:])
    about = images[0].text["Description"]
    assert SENTENCE in about and "select=topk, top_k=5" in about and "physis-pico" in about
    assert not (root / "targets").exists()
    assert cli.main(words) == 0
    assert "pictures" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--episode", "3"], "--episode: got 3, wanted one of the 3 episodes"),
        (["--start", "12"], "--start: got 12, wanted a multiple of 8"),
        (["--start", "48"], "use --start 40"),
        (["--sigma", "1.5"], "--sigma: got 1.5"),
        (["--model", "nowhere"], "world_model"),
        (["physics.selekt=topk"], "physics.select"),
        (["teacher=permissiv"], "permissive"),
    ],
)
def test_mistakes_are_named(
    root: Path, tmp_path: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", "inspect", str(root), "--quick", "--pictures", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_dataset_without_ground_truth_and_options_without_a_folder(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(root, bare, ignore=shutil.ignore_patterns("ground_truth"))
    assert cli.main(["data", "inspect", str(bare), "--quick", "--pictures", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "ground truth of episode 0" in error and "teacher=permissive" in error
    for words in (["--start", "8"], ["--model", "shipped"], ["physics.select=topk"]):
        assert cli.main(["data", "inspect", str(root), "--quick", *words]) == 2
        assert "--pictures FOLDER" in capsys.readouterr().err
    drawn = draw_dataset(str(bare), folder=str(tmp_path / "out"), episode=2, start=0, overrides=["teacher=permissive"])
    assert {path.stem.rpartition("_")[2] for path in drawn[1:]} >= {"tracks", "scores", "mask"}


class Board:
    """Stands for TensorBoard's writer."""

    def __init__(self) -> None:
        self.images: list[tuple[str, np.ndarray, int]] = []
        self.closed = False

    def add_image(self, name: str, image: np.ndarray, step: int, *, dataformats: str) -> None:
        assert dataformats == "HWC" and image.dtype == np.uint8 and image.shape[2] == 3
        self.images.append((name, image, step))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def test_tensorboard_gets_the_same_panels(
    root: Path, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    with pytest.raises(UserError, match="pip install tensorboard"):
        draw_dataset(str(root), tensorboard=str(tmp_path / "board"))
    board = Board()
    monkeypatch.setattr("physisforcing.worldmodel.pictures.command.check_board", lambda: None)
    monkeypatch.setattr("physisforcing.worldmodel.pictures.command.open_board", lambda folder: board)
    paths = draw_dataset(
        str(root),
        tensorboard=str(tmp_path / "board"),
        folder=str(tmp_path / "out"),
        start=0,
        overrides=[f"cache={cache}"],
    )
    stem = "episode_000000_step_0000"
    assert [name for name, _, _ in board.images] == [f"{stem}/{p}" for p in ("tracks", "scores", "mask", "relations")]
    for (_, image, _), path in zip(board.images, paths[1:], strict=True):
        np.testing.assert_array_equal(image, np.asarray(Image.open(path)))
    assert board.closed


def test_training_shows_one_held_out_window(
    root: Path, cache: str, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainWorldModelConfig(codec=str(weights_root() / "vae"))
    config.backbone.num_layers, config.backbone.tap, config.backbone.num_heads = 2, 1, 1
    settings = {"success_only": False, "heldout": 1, "start_stride": 8, "targets_cache": cache}
    config.data = DataConfig(roots=[str(root)], text_cache=str(home), **settings)
    bank, heldout = prepare_banks(config, torch.device("cpu"))
    trainer = Trainer(config, bank, torch.device("cpu"))
    board = Board()
    monkeypatch.setattr(steplog, "_tensorboard", lambda *_: board)
    log = steplog.StepLog(tmp_path, steps=1, batch=1, device=torch.device("cpu"))
    before = copy.deepcopy(trainer.model.state_dict())
    for step in (0, 7):
        training_pictures.heldout_pictures(trainer, heldout, step, log)
    assert [(name, step) for name, _, step in board.images] == [
        (f"heldout/{panel}", step) for step in (0, 7) for panel in ("mask", "relations", "prediction")
    ]
    np.testing.assert_array_equal(board.images[0][1], board.images[3][1])
    after = trainer.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items()), "the weights are put back"
    count = len(board.images)
    training_pictures.heldout_pictures(trainer, SimpleNamespace(targets=None), 8, log)
    trainer.config.codec = str(tmp_path)
    training_pictures.heldout_pictures(trainer, heldout, 8, log)
    assert len(board.images) == count and "not drawn" in (tmp_path / "metrics.jsonl").read_text()
    log.close()
