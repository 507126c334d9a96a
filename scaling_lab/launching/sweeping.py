"""A sweep as jobs: which runs each job trains, and the outcome, read from the records alone."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling_lab.core.record import RunStatus
from scaling_lab.core.reporter import Reporter
from scaling_lab.core.spec import Plan, PlannedRun
from scaling_lab.core.storage.store import FINISHED, RunState, RunStore
from scaling_lab.launching.progress import LaunchReporter


@dataclass(frozen=True)
class SweepJobs:
    """The pending runs of a sweep, divided into jobs."""

    store: RunStore
    plan: Plan
    run_ids: tuple[tuple[str, ...], ...]
    """The runs of each job."""
    tracker: Mapping[str, Any]
    """`kind` and the tracker's options."""
    reporter: LaunchReporter
    gpu: str | None = None
    """The `gpu=` option, from which cluster jobs get their time limits."""


def group_into_jobs(
    runs: Sequence[PlannedRun], pending: Collection[str], size: int
) -> tuple[tuple[str, ...], ...]:
    """The pending runs in jobs of about `size`. Runs of one stack are trained as one program: they stay in one job."""
    units: dict[str, list[str]] = {}
    for run in runs:
        if run.run_id in pending:
            units.setdefault(run.execution.stack or run.run_id, []).append(run.run_id)
    jobs: list[list[str]] = []
    for unit in units.values():
        if not jobs or len(jobs[-1]) + len(unit) > size:
            jobs.append([])
        jobs[-1] += unit
    return tuple(tuple(job) for job in jobs)


def plain(config: Any) -> dict[str, Any]:
    """A composed config as plain values, without Hydra's own part."""
    from omegaconf import OmegaConf

    tree = OmegaConf.to_container(config, resolve=True)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items() if key != "hydra"}


def resume_hint(store: RunStore) -> str:
    """The message of an interrupted sweep."""
    plan = store.read_plan()
    done = len(set(store.run_ids_with_record()) & {run.run_id for run in plan.runs})
    results = store.folder.parent
    where = (
        ""
        if results.absolute() == Path("results").absolute()
        else f" results_dir={shlex.quote(str(results))}"
    )
    return f"{done} of {len(plan.runs)} runs are done; `scaling-lab sweep sweep={store.folder.name}{where}` resumes the sweep."


def report_outcome(reporter: Reporter, store: RunStore, plan: Plan, launch: Sequence[str] = ()) -> int:
    """Report how the plan's runs ended and return the exit status: 0 all completed, 1 otherwise.

    `launch`: the overrides that chose the launcher, repeated in the advice.
    """
    results = "" if store.folder.parent == Path("results") else f" results_dir={store.folder.parent}"
    again = " ".join(
        [f"scaling-lab sweep sweep={store.folder.name}{results}", *(shlex.quote(o) for o in launch)]
    )
    states = list(store.states(plan))
    bad = [s for s in states if s.state in (RunStatus.FAILED, RunStatus.DIVERGED)]
    open_runs = [s for s in states if s.state not in FINISHED]
    done = len(states) - len(bad) - len(open_runs)
    reporter.say(
        f"{done} of {len(states)} runs completed" + (f", {len(bad)} failed or diverged" if bad else "")
    )
    for state in bad:
        reporter.warn(f"{state.run_id} {state.state}: {state.reason}")
    if bad:
        reporter.say(f"to retry them: {again} retry=failed")
    if open_runs:
        reporter.warn(f"{len(open_runs)} runs have not finished ({_counts(open_runs)}); to resume: {again}")
    return 1 if bad or open_runs else 0


def _counts(states: Sequence[RunState]) -> str:
    names = [s.state for s in states]
    return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
