"""Which rows of ``physis eval policy`` act at the same time, and the servers of their policies: started for open episodes alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .episode_jobs import open_jobs, open_results, run_jobs, stored
from .model_process import ServerAddress, given_server, model_server
from .policies import PLANNER
from .policy_episodes import PolicyRunner
from .policy_opening import policy_server

if TYPE_CHECKING:
    from .eval_policy import EvalPolicyConfig, PolicyPlan
    from .policies import ActingPolicy


def known_servers(
    config: EvalPolicyConfig, policies: Mapping[str, ActingPolicy], stack: contextlib.ExitStack
) -> dict[str, ServerAddress]:
    """Row -> where its policy is served by somebody else; under ``planner``: its world model. One that only says what it is once it is loaded is
    served from here on, until ``stack`` is closed, since the keys depend on it."""
    from .planners import is_ours

    found: dict[str, ServerAddress] = {}
    for name, policy in policies.items():
        server = config.planner.server if policy.is_planner else policy.settings.server
        if server not in ("", "auto"):
            found[PLANNER if policy.is_planner else name] = given_server(server)
        elif server and policy.is_planner and not is_ours(config.planner.world_model):
            address = stack.enter_context(model_server(config))
            assert address is not None
            found[PLANNER] = address
    return found


def run_turns(
    config: EvalPolicyConfig, plan: PolicyPlan, servers: Mapping[str, ServerAddress], *, progress: bool
) -> list[dict[str, Any]]:
    """Run what is open, and return the lines of all episodes. A policy with a server that is started here has a turn of its own, and only where it
    has open episodes: what two of them hold need not fit in together."""
    results = open_results(Path(config.output))
    alone = [row for row, policy in plan.policies.items() if _starts(config, policy, servers)]
    for rows in ([row for row in plan.rows if row not in alone], *([row] for row in alone)):
        mine = [job for job in plan.jobs if job.task.split("/")[1] in rows]
        todo = open_jobs(mine, plan.key, results, retry_errors=config.retry_errors)
        if not todo:
            continue
        with _started(config, plan.policies, rows if rows[0] in alone else ()) as own:
            make = partial(
                PolicyRunner, config, plan.policies, plan.scenes.entries, plan.films, plan.scenes.environments,
                {**servers, **own}, plan.plans, plan.cameras,
            )  # fmt: skip
            run_jobs(
                todo,
                plan.key,
                results,
                make,
                workers=config.workers,
                retry_errors=config.retry_errors,
                progress=progress,
            )
    return stored(plan.jobs, plan.key, results)


def _starts(config: EvalPolicyConfig, policy: ActingPolicy, servers: Mapping[str, ServerAddress]) -> bool:
    """Whether this policy's server is to be started here."""
    if policy.is_planner:
        return config.planner.server == "auto" and PLANNER not in servers
    return policy.settings.server == "auto"


@contextlib.contextmanager
def _started(
    config: EvalPolicyConfig, policies: Mapping[str, ActingPolicy], rows: Sequence[str]
) -> Iterator[dict[str, ServerAddress]]:
    """The servers of these rows, as ``known_servers`` names them, while they act."""
    with contextlib.ExitStack() as stack:
        found = {}
        for row in rows:
            served: contextlib.AbstractContextManager[ServerAddress | None]
            if policies[row].is_planner:
                name, served = PLANNER, model_server(config)
            else:
                name, served = (
                    row,
                    policy_server(policies[row].settings, threads=config.threads, workers=config.workers),
                )
            address = stack.enter_context(served)
            assert address is not None
            found[name] = address
        yield found
