"""Which tests can run here. A test that cannot is skipped with the reason; nothing is skipped silently."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chromium import BROWSER, Chromium

# Sums of several numeric threads round differently: this process computes with one, as the forks and servers do that it is compared with.
# Workers share the cores besides, and several threads each would wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """One numeric thread again, before a test and its fixtures of any scope: what computes here sets the number that it is configured with."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)


@functools.cache
def _no_simulator() -> str:
    """Why ``sim`` tests cannot run, or an empty string."""
    from physisforcing.core.errors import UserError, VulkanUnavailableError
    from physisforcing.core.vulkan import ensure_vulkan_env
    from physisforcing.envs.robotwin.runtime import runtime_installed

    if not runtime_installed():
        return "needs the RoboTwin runtime (make setup)"
    try:
        ensure_vulkan_env()
    except (VulkanUnavailableError, UserError) as error:
        return f"needs a Vulkan device: {error}"
    return ""


@functools.cache
def _no_gpu() -> str:
    import torch

    return "" if torch.cuda.is_available() else "needs an NVIDIA GPU"


@functools.cache
def _no_assets() -> str:
    place = os.environ.get("ROBOTWIN_ASSETS", "")
    found = bool(place) and (Path(place) / "objects").is_dir()
    return "" if found else "needs RoboTwin's official assets (ROBOTWIN_ASSETS)"


REASONS: dict[str, Callable[[], str]] = {"sim": _no_simulator, "gpu": _no_gpu, "assets": _no_assets}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run. The (slow) checks are made only when a test asks for them."""
    for item in items:
        for marker, reason in REASONS.items():
            if item.get_closest_marker(marker) is not None and (why := reason()):
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of this test alone: what another one or the user put into theirs, on another machine too, is not found, and nothing is left."""
    monkeypatch.setenv("PHYSIS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def tracked_files(repository: Path) -> list[Path]:
    """Files that git tracks; outside a checkout, everything that is not an output."""
    import subprocess

    command = ["git", "-C", str(repository), "-c", "safe.directory=*", "ls-files", "-z"]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip("needs a git checkout")
    names = [name for name in done.stdout.decode().split("\0") if name]
    return [repository / name for name in names if (repository / name).is_file()]


@pytest.fixture(scope="session")
def tiny_wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan image-to-video pipeline in diffusers format, in the layout of TI2V-5B, with tiny random weights and a tokenizer made here."""
    import torch
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel

    import tiny_paper

    with torch.random.fork_rng():
        text = tiny_paper.umt5()
        torch.manual_seed(0)
        vae = {"base_dim": 4, "decoder_base_dim": 4, "z_dim": 8, "dim_mult": [1] * 4, "num_res_blocks": 1}
        vae |= {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
        heads = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 2, "freq_dim": 32}
        pipeline = WanImageToVideoPipeline(
            **text,
            vae=AutoencoderKLWan(**vae, latents_mean=[0.0] * 8, latents_std=[1.0] * 8),
            scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
            transformer=WanTransformer3DModel(in_channels=8, out_channels=8, text_dim=16, **heads),
            expand_timesteps=True,
        )
    folder = tmp_path_factory.mktemp("wan") / "tiny-ti2v"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def write_black_episodes() -> Callable[..., Path]:
    """``write(folder, seeds, failed=())``: a dataset of short black click_bell episodes, where seeds and scene hashes matter alone."""

    def write(folder: Path, seeds: tuple[int, ...], failed: tuple[int, ...] = ()) -> Path:
        import numpy as np

        from physisforcing.core.lerobot import HEAD, LeRobotWriter, robot_features

        writer = LeRobotWriter(folder, robot_features([f"joint{k}" for k in range(14)], height=16, width=24))
        joints = np.zeros((5, 14), np.float32)
        columns = dict.fromkeys(("observation.state", "observation.state_measured", "action"), joints)
        for seed in seeds:
            writer.add_episode(
                columns={**columns, "next.success": np.arange(5) == 4},
                frames={HEAD: np.zeros((5, 16, 24, 3), np.uint8)},
                instruction="click the bell",
                task_name="click_bell",
                seed=seed,
                success=seed not in failed,
                scene_hash=f"scene-{seed}",
                policy="expert",
                embodiment="robot",
                assets_version="1",
            )
        return writer.finalize()

    return write


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """One browser for all tests of pages; ``chromium.needs_browser`` marks them."""
    if BROWSER is None:
        pytest.skip("no browser (chromium, chromium-browser, google-chrome) on the path")
    found = Chromium(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="session")
def wan_settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the shapes of ``wan_release`` do not say, as ``config=`` of a conversion."""
    from tiny_releases import write_settings

    return write_settings(tmp_path_factory.mktemp("settings") / "tiny.jsonc")


@pytest.fixture(scope="session")
def wan_release(tmp_path_factory: pytest.TempPathFactory, tiny_wan_folder: Path) -> Path:
    """A Wan2.2-TI2V-5B of tiny size as its authors release it. To be read only."""
    from tiny_releases import write_release

    return write_release(tmp_path_factory.mktemp("release") / "Wan2.2-TI2V-5B", tiny_wan_folder / "tokenizer")


@pytest.fixture(scope="session")
def converted_wan(wan_release: Path, wan_settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``wan_release`` as a diffusers folder. To be read only."""
    from tiny_releases import convert_release

    return convert_release(wan_release, wan_settings, tmp_path_factory.mktemp("converted") / "wan")
