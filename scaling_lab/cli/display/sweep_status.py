"""The status of a whole sweep, read from its folder alone: every run's state, progress, ETA and the last error.

`launching/progress.py` measures the speed of one launch; here the speed is the sum of what the live claims report.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from scaling_lab.core.formatting import human_time
from scaling_lab.core.spec import Plan, RunSpec
from scaling_lab.core.storage.store import FINISHED, LIVE, RunState, RunStore


@dataclass(frozen=True)
class RunRow:
    """One run and its state; spec is None if its spec.json cannot be read."""

    spec: RunSpec | None
    state: RunState


@dataclass(frozen=True)
class SweepStatus:
    """All runs of a sweep at one moment."""

    rows: tuple[RunRow, ...]

    @cached_property
    def counts(self) -> dict[str, int]:
        """State -> number of runs, final states first."""
        found = Counter(row.state.state for row in self.rows)
        order = ("completed", "diverged", "failed", "interrupted", "running", "claimed", "planned")
        return {name: found[name] for name in order if found[name]}

    @property
    def is_finished(self) -> bool:
        return all(row.state.state in FINISHED for row in self.rows)

    @cached_property
    def flops(self) -> tuple[float, float]:
        """Training FLOPs done (steps of unfinished runs included) and of all runs."""
        done = total = 0.0
        for row in self.rows:
            flops = 0.0 if row.spec is None else row.spec.own_train_flops()
            total += flops
            done += flops * (1.0 if row.state.state in FINISHED else _share(row.state))
        return done, total

    @cached_property
    def flops_per_s(self) -> float | None:
        """The sum of what the live claims report; None if none does."""
        speeds = [speed for row in self.rows if (speed := _speed(row)) is not None]
        return sum(speeds) if speeds else None

    @cached_property
    def eta_s(self) -> float | None:
        """FLOPs left divided by FLOP/s now; at least the slowest live run's own."""
        rate = self.flops_per_s
        if rate is None:
            return None
        done, total = self.flops
        own = [
            row.spec.own_train_flops() * (1 - _share(row.state)) / speed
            for row in self.rows
            if row.spec is not None and (speed := _speed(row)) is not None
        ]
        return max([(total - done) / rate, *own])

    @cached_property
    def last_error(self) -> RunState | None:
        """The run that failed or diverged last."""
        bad = [row.state for row in self.rows if row.state.state in ("failed", "diverged")]
        return max(bad, key=lambda state: state.ended_unix_s or 0.0, default=None)

    def headline(self) -> str:
        """Progress and ETA in one line."""
        done, total = self.flops
        over = sum(n for state, n in self.counts.items() if state in FINISHED)
        parts = [f"{over} of {len(self.rows)} runs finished"]
        if total > 0 and not self.is_finished:
            parts.append(f"{done / total:.0%} of the FLOPs")
        live = sum(self.counts.get(name, 0) for name in LIVE)
        if self.flops_per_s is not None and self.eta_s is not None:
            parts.append(
                f"{live} running at {self.flops_per_s / 1e9:.3g} GFLOP/s, ETA {human_time(self.eta_s)}"
            )
        elif live:
            parts.append(f"{live} starting")
        elif not self.is_finished:
            parts.append("no worker is running")
        return ", ".join(parts)


def read_status(store: RunStore, plan: Plan | None, before: SweepStatus | None = None) -> SweepStatus:
    """Read the state of every run of the plan, and of runs in the folder that no plan has (`train`'s).

    Runs that were completed in `before` are not read again.
    """
    specs: dict[str, RunSpec | None] = {} if plan is None else {run.run_id: run.spec for run in plan.runs}
    known = {} if before is None else {row.state.run_id: row for row in before.rows}
    runs = store.folder / "runs"
    present = sorted(path.name for path in runs.iterdir()) if runs.is_dir() else []
    for name in present:
        if name not in specs and (runs / name / "spec.json").is_file():
            specs[name] = known[name].spec if name in known else _spec(runs / name / "spec.json")
    there = set(present)
    rows = []
    for run_id, spec in specs.items():
        old = known.get(run_id)
        if old is not None and old.state.state == "completed":
            rows.append(old)
        else:
            rows.append(RunRow(spec, store.state(run_id) if run_id in there else RunState(run_id, "planned")))
    return SweepStatus(tuple(rows))


def grouped_reasons(rows: Sequence[RunRow], limit: int) -> list[str]:
    """Why runs failed or diverged, one line per reason; at most `limit` lines, and how many more there are."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.state.reason:
            reason = " ".join(row.state.reason.split())
            groups.setdefault((row.state.state, reason), []).append(row.state.run_id)
    lines = [
        f"{ids[0]} {state}: {reason}"
        if len(ids) == 1
        else f"{len(ids)} runs {state} ({ids[0]}, ...): {reason}"
        for (state, reason), ids in groups.items()
    ]
    more = len(lines) - limit
    return lines if more <= 0 else [*lines[:limit], f"and {more} more reasons: --json lists them all"]


def _share(state: RunState) -> float:
    claim = state.claim
    return claim.step / claim.steps if claim is not None and claim.steps else 0.0


def _speed(row: RunRow) -> float | None:
    """FLOP/s of a run that is being trained; otherwise None."""
    claim = row.state.claim
    if row.spec is None or claim is None or row.state.state not in LIVE or not claim.tokens_per_s:
        return None
    return claim.tokens_per_s * row.spec.flops_per_token()


def _spec(path: Path) -> RunSpec | None:
    try:
        return RunSpec.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, OSError):
        return None  # shown without its numbers; analysis reports what is wrong with it
