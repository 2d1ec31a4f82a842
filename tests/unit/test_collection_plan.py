"""Which recorded episodes a collection counts as its own, and that it writes alone."""

import subprocess
import sys

import pytest

from physisforcing.core.errors import UserError
from physisforcing.core.files import locked
from physisforcing.envs.collect import CollectConfig, _by_policy, collect
from physisforcing.envs.collector import POLICIES, episode_key
from physisforcing.envs.seeds import Job


def test_no_policy_counts_the_episodes_of_another():
    known = [*POLICIES, "my_policies:random"]
    keys = {policy: episode_key(Job(task="click_bell", seed=100_000_001), policy) for policy in known}
    assert len(set(keys.values())) == len(known)
    for policy in known:
        assert [other for other in known if _by_policy(keys[other], policy)] == [policy]


def test_an_output_is_collected_into_by_one_process_at_a_time(tmp_path):
    """The other process is killed: its lock ends with it, and does not stand in the way."""
    output = tmp_path / "bell"
    code = f"import time; from pathlib import Path; from physisforcing.core.files import locked\nwith locked(Path({str(output)!r}), 'collection'): print('held', flush=True); time.sleep(60)"
    config = CollectConfig(tasks=["click_bell"], episodes=1, output=str(output), workers=0)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"output: got .*bell, in use'?, wanted one collection at a time\. Fix:"):
            collect(config, progress=False)
        assert not output.exists()
        other.kill()
    with locked(output, "collection"):
        assert list(tmp_path.glob(".*.lock"))
    assert not list(tmp_path.glob(".*.lock"))
