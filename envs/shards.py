"""Parts of a collection for several machines: disjoint seeds, and the same episodes as one machine would record.

Episode i of a task (0 <= i < episodes) tries the seeds start + i, start + i + episodes, start + i + 2 episodes, ...: a seed
whose scene does not come to rest is replaced within its own sequence. Shard k of n records the episodes i = k, k + n,
k + 2n, ..., so no two shards ever try the same seed, and all of them together record what shard 0/1 records.
"""

from __future__ import annotations

from collections.abc import Mapping

from .seeds import Job, Outcome, SeedPlan


class ShardPlan(SeedPlan):
    """The part ``shard`` = (k, n) of a collection (see the module's text). Takes what ``SeedPlan`` takes."""

    def __init__(
        self,
        tasks: list[str],
        episodes: int,
        start_seed: int,
        taken: Mapping[tuple[str, int], str],
        shard: tuple[int, int],
    ) -> None:
        super().__init__(tasks, episodes, start_seed, {})
        part, parts = shard
        self.slots = range(part, episodes, parts)
        self._kinds = dict(taken)
        self._busy: set[tuple[str, int]] = set()
        self._full = {(task, slot) for task in tasks for slot in self.slots if self._candidate(task, slot) is None}
        self.recorded = {task: sum((task, slot) in self._full for slot in self.slots) for task in tasks}

    def _candidate(self, task: str, slot: int) -> int | None:
        """The seed that this episode tries next, or None when it is recorded. Past the split's end it is too large."""
        seed = self.start_seed + slot
        while (task, seed) in self._kinds:
            if self._kinds[task, seed] == "recorded":
                return None
            seed += self.episodes
        return seed

    def missing(self) -> int:
        return len(self.tasks) * len(self.slots) - len(self._full)

    def next(self) -> Job | None:
        for task in self.tasks:
            for slot in self.slots:
                if (task, slot) in self._full or (task, slot) in self._busy:
                    continue
                seed = self._candidate(task, slot)
                if seed is not None and seed <= self.last_seed:
                    self._busy.add((task, slot))
                    return Job(task=task, seed=seed)
        return None

    def report(self, outcome: Outcome) -> None:
        place = (outcome.task, (outcome.seed - self.start_seed) % self.episodes)
        self._busy.discard(place)
        self._kinds[outcome.task, outcome.seed] = outcome.kind
        if outcome.kind == "recorded":
            self._full.add(place)
            self.recorded[outcome.task] += 1
