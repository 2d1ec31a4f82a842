"""Which recorded episodes a collection counts as its own."""

from physisforcing.envs.collect import _by_policy
from physisforcing.envs.collector import POLICIES, episode_key
from physisforcing.envs.seeds import Job


def test_no_policy_counts_the_episodes_of_another():
    known = [*POLICIES, "my_policies:random"]
    keys = {policy: episode_key(Job(task="click_bell", seed=100_000_001), policy) for policy in known}
    assert len(set(keys.values())) == len(known)
    for policy in known:
        assert [other for other in known if _by_policy(keys[other], policy)] == [policy]
