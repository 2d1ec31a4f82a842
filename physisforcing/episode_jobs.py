"""Work through closed-loop episodes and keep their results: a killed evaluation continues where it stopped."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from physisforcing.core.results import ResultKey, ResultsFile

if TYPE_CHECKING:
    from .plan_scenes import Scenes


def job_key(job: Any, scenes: Scenes, fingerprints: Mapping[str, str], config: str) -> ResultKey:
    """The key of a job's result. ``fingerprints``: of the policies by name; ``config``: a hash of what else may change an episode."""
    task, policy = job.task.split("/")
    return ResultKey(
        manifest=scenes.manifests[task],
        episode=f"{task}/{job.seed}",
        fingerprint=fingerprints[policy],
        config=config,
    )


def open_results(output: Path) -> ResultsFile:
    """``output/results.jsonl``; lines that an interrupted writer tore are told on standard error."""
    output.mkdir(parents=True, exist_ok=True)
    results = ResultsFile(output / "results.jsonl")
    if (torn := results.report_torn()) is not None:
        print(torn, file=sys.stderr)
    return results


def open_jobs(
    jobs: Sequence[Any], key: Callable[[Any], ResultKey], results: ResultsFile, *, retry_errors: bool
) -> list[Any]:
    """The jobs that have no result yet."""
    return [job for job in jobs if not results.done(key(job), retry_errors=retry_errors)]


def stored(jobs: Sequence[Any], key: Callable[[Any], ResultKey], results: ResultsFile) -> list[dict[str, Any]]:
    """The lines of these jobs, with the policy's name as the job has it: a line may have been written under another name of the same policy, or by
    the other command, and the key is what says whose it is."""
    return [row | {"policy": job.task.split("/")[1]} for job in jobs if (row := results.get(key(job))) is not None]


def run_jobs(
    jobs: Sequence[Any],
    key: Callable[[Any], ResultKey],
    output: Path | ResultsFile,
    make: Callable[[], Any],
    *,
    workers: int = 0,
    retry_errors: bool = False,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Run the ``envs.seeds.Job``s that ``output/results.jsonl`` has no line of, and return the lines of all (``stored``).

    A job's task is ``<task>/<policy>``. ``make``: makes the handler of a process (``envs.seeds.Handler``), whose outcome's details hold
    ``status`` and whatever else the line says; a job that crashed twice is an ``error``.
    """
    from tqdm import tqdm

    from physisforcing.envs.seeds import FixedJobs, Job, Outcome, run_seeds

    results = output if isinstance(output, ResultsFile) else open_results(output)
    todo = open_jobs(jobs, key, results, retry_errors=retry_errors)
    bar = tqdm(total=len(todo), desc="episodes", unit="ep", disable=not progress, file=sys.stderr)

    def on_outcome(outcome: Outcome) -> None:
        job = Job(task=outcome.task, seed=outcome.seed)
        row = dict(outcome.details)
        status = row.pop("status", "error")
        task, policy = outcome.task.split("/")
        row = {"task": task, "policy": policy, "seed": job.seed, "error": outcome.message, **row}
        if outcome.attempts > 1:
            row["attempts"] = outcome.attempts
        results.append(key(job), status, **row, seconds=round(outcome.seconds, 3))
        bar.update()
        bar.set_postfix_str(f"{outcome.task} {job.seed}: {status}")

    with bar:
        if todo:  # else nothing is loaded, and nothing needs the device
            run_seeds(FixedJobs(todo), make, workers=workers, on_outcome=on_outcome)
    return stored(jobs, key, results)
