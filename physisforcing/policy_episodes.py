"""Single episodes of ``physis eval policy``: policies and the replayed expert, beside what ``physis eval plan`` runs."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from physisforcing.planner.summary import MODEL

from .plan_episodes import EpisodeRunner
from .policies import PLANNER, policy_folder
from .policy_opening import close_policy, open_policy

if TYPE_CHECKING:
    from physisforcing.core.protocols import Policy
    from physisforcing.core.types import ActionSpec

    from .eval_policy import EvalPolicyConfig
    from .model_process import ServerAddress
    from .policies import ActingPolicy

#: The scripted expert's drive targets of the same scene, replayed: what the control mode leaves of a perfect plan.
EXPERT = "expert"


class PolicyRunner(EpisodeRunner):
    """Runs episodes in one process (``envs.seeds.Handler``): keeps one policy and one environment a task.

    ``films``: (task, row, seed) -> name of its video. ``servers``: addresses of the processes that hold policies, and under ``planner`` the
    planner's world model. ``plans``: row -> what its server must say of its plans, so that no process reads weights that another one
    holds. ``cameras``: row -> whose pictures its policy wants, where it is not the head's alone.
    """

    def __init__(
        self,
        config: EvalPolicyConfig,
        policies: Mapping[str, ActingPolicy],
        entries: dict[tuple[str, int], Any],
        films: Mapping[tuple[str, str, int], str],
        environments: dict[str, dict[str, Any]],
        servers: Mapping[str, ServerAddress],
        plans: Mapping[str, str],
        cameras: Mapping[str, tuple[str, ...]],
    ) -> None:
        planned = {(task, seed): stem for (task, row, seed), stem in films.items() if self._plans(policies, row)}
        super().__init__(config, entries, planned, environments, servers.get(PLANNER))
        self.policies, self.films, self._servers, self._known = policies, films, servers, plans
        self._cameras, self._drawn = cameras, dict[str, Any]()
        self._held: tuple[str, ActionSpec, Policy] | None = None

    @staticmethod
    def _plans(policies: Mapping[str, ActingPolicy], row: str) -> bool:
        return row in policies and policies[row].is_planner

    def close(self) -> None:
        self._drop_policy()
        super().close()

    def _environment(self, task: str, **options: Any) -> Any:
        return super()._environment(task, **self._drawn, **options)

    def _episode(self, task: str, policy_name: str, seed: int) -> dict[str, Any]:
        # nobody's look draws a camera that only another row's policy wants
        self._drawn = {"cameras": self._cameras[policy_name]} if policy_name in self._cameras else {}
        if self._plans(self.policies, policy_name):
            return super()._episode(task, MODEL, seed)
        if policy_name not in self.policies and policy_name != EXPERT:
            return super()._episode(task, policy_name, seed)
        from physisforcing.envs.rollout import run_episode

        env, film = self._environment(task), self.films.get((task, policy_name, seed))
        policy = self._expert(env, seed) if policy_name == EXPERT else self._acting(policy_name, env)
        result = run_episode(
            env,
            policy,
            seed=seed,
            max_steps=self.config.max_steps,
            record=film is not None,
            expect=self.entries.get((task, seed)),
        )
        row = result.row() | {"status": result.status, "success": result.success}
        row["policy_fingerprint"] = result.fingerprint
        if film is not None and result.frames is not None:
            row["video"] = self._write_film(film, result)
        return row

    def _expert(self, env: Any, seed: int) -> Policy:
        from physisforcing.envs.baselines import Replay
        from physisforcing.envs.recording import expert_targets

        targets_TA = expert_targets(env.unwrapped, seed)
        return Replay(targets_TA[1:] if len(targets_TA) > 1 else targets_TA)

    def _acting(self, name: str, env: Any) -> Policy:
        """The policy of this row, for this robot. One is kept, since a policy may fill the memory."""
        import torch

        settings, limits = self.policies[name].settings, env.unwrapped.action_spec
        if policy_folder(settings.source) is None:
            torch.set_deterministic_debug_mode("warn")  # what others compute with is theirs to choose
        if self._held is None or self._held[:2] != (name, limits):
            self._drop_policy()
            opened = open_policy(settings, self._servers.get(name), limits, plans=self._known.get(name, ""))
            self._held = (name, limits, opened)
        self._check_rate(self._held[2], env)
        return self._held[2]

    @staticmethod
    def _check_rate(policy: Policy, env: Any) -> None:
        """``UserError`` for a policy whose rows are not as far apart as a robot takes that is given one a control step."""
        from physisforcing.policy.act import check_rate
        from physisforcing.policy.requests import PolicySpec

        spec = getattr(policy, "spec", None)
        if isinstance(spec, PolicySpec) and env.unwrapped.control == "interpolated":
            check_rate(spec, env.unwrapped.action_spec.dt)

    def _drop_policy(self) -> None:
        """Give its memory back as well: a policy and what it captured or compiled refer to each other, and two do not fit on a GPU."""
        import torch

        opened, self._held = self._held, None
        if opened is None:
            return
        close_policy(opened[2])
        del opened
        gc.collect()
        torch.cuda.empty_cache()

    def _write_film(self, stem: str, result: Any) -> str:
        from physisforcing.planner.videos import STRIDE, write_labelled

        path = Path(self.config.output) / "videos" / f"{stem}_{result.status}.mp4"
        label = f"recorded in a simulator, not generated: {result.fingerprint} acts, {result.task}, episode seed {result.seed}"
        write_labelled(path, result.frames[::STRIDE], label=label, scale=1)
        return str(path.relative_to(self.config.output))
