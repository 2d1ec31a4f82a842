"""What worker processes may use: one GPU of several each, numeric threads."""

import os
import subprocess
import sys

import pytest

from physisforcing.envs.machine import few_threads, one_gpu, visible_gpus

SHOW = [sys.executable, "-c", "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"]


def seen_by_a_child(number):
    with one_gpu(number) as given:
        assert given == number
        return subprocess.run(SHOW, capture_output=True, text=True, check=True).stdout.strip()


def test_workers_take_gpus_in_turn(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-7,5")
    assert [seen_by_a_child(number) for number in range(4)] == ["2", "GPU-7", "5", "2"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2, GPU-7,5"


@pytest.mark.parametrize("chosen", ["", "3"])
def test_one_gpu_or_none_stays_as_the_user_said(monkeypatch, chosen):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert seen_by_a_child(1) == chosen


def test_gpus_are_counted_by_their_device_files(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "sda"):
        (tmp_path / name).touch()
    assert visible_gpus(tmp_path) == ["0", "1"]
    monkeypatch.setattr("physisforcing.envs.machine.visible_gpus", lambda: ["0", "1"])
    assert seen_by_a_child(3) == "1"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_opencv_takes_one_thread_in_a_worker(monkeypatch):
    """The classical tracker scores imaginations in every worker: on a machine with many cores each would start as many threads."""
    monkeypatch.delenv("OPENCV_FOR_THREADS_NUM", raising=False)
    show = [sys.executable, "-c", "import cv2; print(cv2.getNumThreads())"]
    with few_threads(2):
        inside = subprocess.run(show, capture_output=True, text=True, check=True).stdout.strip()
    assert inside == "1" and "OPENCV_FOR_THREADS_NUM" not in os.environ


def test_threads_are_divided_and_given_back(monkeypatch):
    for name in ("OMP_NUM_THREADS", "LP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    with few_threads(3):
        assert os.environ["OMP_NUM_THREADS"] == "1" and os.environ["LP_NUM_THREADS"] == "2"
        assert os.environ["MKL_NUM_THREADS"] == "7", "what the user chose stays"
    assert "OMP_NUM_THREADS" not in os.environ and "LP_NUM_THREADS" not in os.environ
