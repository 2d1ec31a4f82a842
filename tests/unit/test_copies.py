"""Copies of a process that tests kill (``tests/helpers/ranks.py``): one that dies takes nothing away from the process it is a copy of."""

import os
import threading
import time
from pathlib import Path

from tqdm import tqdm

from process_state import alive
from ranks import fork, kill_once


def test_a_copy_that_dies_while_it_draws_a_bar_stops_no_other(tmp_path: Path) -> None:
    bars = threading.Thread(target=lambda: list(tqdm(range(2), disable=True)), daemon=True)
    tqdm.get_lock()  # made before the copy, so that both have it
    drawn = tmp_path / "drawn"

    def draws() -> None:
        with tqdm.get_lock():
            drawn.touch()
            time.sleep(60)

    kill_once(fork(draws, "the copy"), drawn.exists, within_s=30)
    bars.start()
    bars.join(10)
    assert not bars.is_alive()


def test_copies_die_with_the_process_they_are_copies_of(tmp_path: Path) -> None:
    told = tmp_path / "told"

    def copy() -> None:
        told.write_text(str(os.getpid()))
        time.sleep(60)

    def parent() -> None:
        fork(copy, "the copy")
        time.sleep(60)

    kill_once(fork(parent, "the parent"), lambda: told.exists() and told.read_text(), within_s=30)
    end = time.monotonic() + 10
    while alive(int(told.read_text())):
        assert time.monotonic() < end
        time.sleep(0.01)
