"""The run store: the layout of a sweep's folder, and the state of each run in it.

    <root>/<sweep>/plan.json
    <root>/<sweep>/runs/<run_id>/spec.json      the run's RunSpec
                                 claim-<g>.json owner of attempt g, rewritten as a heartbeat
                                 curve.jsonl    append-only
                                 checkpoint/    the last two (training/run/checkpoint.py)
                                 weights.safetensors  of a completed run (training/run/weights.py)
                                 record.json    written last: the run is finished
    <root>/<sweep>/report/

Files are replaced atomically (files.py); runs are claimed without locks (claims.py).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scaling_lab.core.errors import UserError
from scaling_lab.core.record import EvalPoint, RunRecord, RunStatus
from scaling_lab.core.spec import Plan, RunSpec
from scaling_lab.core.storage.claims import Claim, ClaimInfo, acquire, last_claim
from scaling_lab.core.storage.files import create_exclusive, synced_size, write_atomic
from scaling_lab.core.storage.serialization import NEWER, dumps

# States of runs that are being computed, and of those that are finished.
LIVE = ("claimed", "running")
FINISHED = ("completed", "diverged", "failed")
# For a finished run whose files are damaged; other runs are not affected.
RETRY_ADVICE = "`scaling-lab sweep` with retry=failed trains it again"
SWEEP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class RunState:
    """State of one run of a plan, from the files on disk."""

    run_id: str
    state: str
    """planned, claimed (its owner is loading or compiling), running, interrupted, completed, diverged or failed."""
    reason: str | None = None
    claim: ClaimInfo | None = None
    """Current or last owner: host, pid, start time, last heartbeat. None once the run is finished."""
    final_val_loss_nats: float | None = None
    wall_time_s: float | None = None
    ended_unix_s: float | None = None
    """When its record was written."""


class RunStore:
    """One sweep's folder. A damaged run does not prevent reading the others: see `problems` of `load_records`."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._shared: dict[str, Any] = {}

    @staticmethod
    def for_sweep(root: Path | str, sweep: str) -> RunStore:
        if not SWEEP_NAME.fullmatch(sweep):
            raise UserError(
                f"sweep={sweep!r} is not a valid name: use letters, digits, '.', '_' and '-' (it names a folder)."
            )
        return RunStore(Path(root) / sweep)

    # -- paths
    @property
    def plan_path(self) -> Path:
        return self.folder / "plan.json"

    @property
    def report_folder(self) -> Path:
        return self.folder / "report"

    def run_folder(self, run_id: str) -> Path:
        return self.folder / "runs" / run_id

    # -- plan
    def create_plan(self, plan: Plan) -> bool:
        """Write plan.json unless it exists; returns whether it did."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return create_exclusive(self.plan_path, plan.to_json())

    def write_plan(self, plan: Plan) -> None:
        """Write plan.json, replacing an existing one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.plan_path, plan.to_json())

    def read_plan(self, run_ids: Collection[str] | None = None) -> Plan:
        """The plan on disk. With `run_ids`, only these runs and those they are trained with, so that a job of a plan of
        10,000 runs starts quickly. Raises `UserError` if there is no plan or it cannot be read."""
        try:
            data = json.loads(self.plan_path.read_text(encoding="utf-8"))
            if run_ids is not None:
                data["runs"] = _select_runs(data["runs"], set(run_ids))
            return Plan.from_dict(data)
        except FileNotFoundError:
            raise UserError(
                f"sweep={self.folder.name!r}: there is no plan at {self.plan_path}. Choices: "
                f"{', '.join(self.other_sweeps()) or 'none yet (create one with `scaling-lab sweep`)'}."
            ) from None
        except UserError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            advice = (
                "update scaling-lab to read it"
                if NEWER in str(error)
                else "move it away and plan again with the same options: the run ids will be the same, and finished runs are kept"
            )
            raise UserError(
                f"{self.plan_path} cannot be read ({type(error).__name__}: {error}): {advice}."
            ) from None

    def other_sweeps(self) -> list[str]:
        """Sweeps in the same results folder."""
        if not self.folder.parent.is_dir():
            return []
        return sorted(p.parent.name for p in self.folder.parent.glob("*/plan.json"))

    def family(self, parent: str) -> list[str]:
        """Ids of a run of the plan and of those that continue from its checkpoints; empty if there is no plan or it keeps
        these checkpoints (keep=resume). It does not build the plan, which may have thousands of other runs."""
        try:
            runs = json.loads(self.plan_path.read_text(encoding="utf-8"))["runs"]
        except (OSError, ValueError, KeyError):
            return []
        found = [run for run in runs if parent in (run["run_id"], run["spec"].get("parent"))]
        if any(run["execution"].get("keep", "resume") == "resume" for run in found):
            return []
        return [str(run["run_id"]) for run in found]

    # -- claims
    def claim(self, spec: RunSpec) -> Claim | None:
        """A claim on `spec`; None if the run is finished or a live process is computing it."""
        folder = self.run_folder(spec.run_id())
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "record.json").exists():
            return None
        claim = acquire(folder, spec.steps)
        if claim is None:
            return None
        # The previous owner may have finished between the check above and the claim.
        if (folder / "record.json").exists():
            claim.release()
            return None
        if not (folder / "spec.json").exists():
            write_atomic(folder / "spec.json", dumps(spec.to_dict()))
        return claim

    # -- curve and record
    def start_curve(self, run_id: str, kept: Iterable[EvalPoint] = ()) -> Any:
        """Start this attempt's curve with the points `kept` from the last one; returns a file opened for appending.

        A new file replaces the old one, so that writes of a previous owner that is still running have no effect.
        """
        path = self.run_folder(run_id) / "curve.jsonl"
        write_atomic(path, "".join(curve_line(point) for point in kept))
        return open(path, "a", encoding="utf-8")

    def write_record(self, record: RunRecord) -> bool:
        """Write record.json unless it exists; returns whether it did. The curve is synced to disk first."""
        folder = self.run_folder(record.run_id)
        record = replace(record, curve_bytes=synced_size(folder / "curve.jsonl"))
        return create_exclusive(folder / "record.json", dumps(record.to_dict()))

    def read_curve(self, run_id: str) -> list[EvalPoint]:
        """Complete lines of a curve, in order; a truncated last line is ignored."""
        path = self.run_folder(run_id) / "curve.jsonl"
        if not path.exists():
            return []
        points = []
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
            try:
                points.append(curve_point(json.loads(line)))
            except (ValueError, TypeError):
                break
        return points

    def read_record(self, run_id: str, *, curve: bool = True) -> RunRecord:
        """One run's record. Raises `UserError` naming the problem if it is missing or damaged."""
        path = self.run_folder(run_id) / "record.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            points = tuple(self.read_curve(run_id)) if curve else ()
            record = RunRecord.from_dict(data, points[: data["curve_points"]])
        except FileNotFoundError:
            raise UserError(f"run={run_id!r} has no record at {path}: it is not finished.") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} {unreadable_message(error)}.") from None
        if curve and len(record.curve) < record.curve_points:
            raise UserError(
                f"{path.with_name('curve.jsonl')} has {len(record.curve)} of {record.curve_points} points: {RETRY_ADVICE}."
            )
        return record

    def load_records(self, *, curve: bool = True) -> tuple[list[RunRecord], list[tuple[str, str]]]:
        """All records of the folder, by run id, and (run id, reason) for each that cannot be read."""
        records, problems = [], []
        for run_id in self.run_ids_with_record():
            try:
                records.append(self.read_record(run_id, curve=curve))
            except UserError as error:
                problems.append((run_id, str(error)))
        return records, problems

    def run_ids_with_record(self) -> list[str]:
        runs = self.folder / "runs"
        return sorted(p.parent.name for p in runs.glob("*/record.json")) if runs.is_dir() else []

    def reopen_failed(self, plan: Plan) -> list[str]:
        """Make a plan's failed and diverged runs pending again; their records are kept as record-failed-<k>.json.

        A diverged run restarts from scratch, since its last checkpoint may already be bad. Returns the run ids.
        """
        reopened = []
        for state in self.states(plan):
            if state.state not in ("failed", "diverged"):
                continue
            folder = self.run_folder(state.run_id)
            kept = len(list(folder.glob("record-failed-*.json"))) + 1
            try:
                (folder / "record.json").rename(folder / f"record-failed-{kept}.json")
            except FileNotFoundError:
                continue  # another sweep with retry=failed was faster
            for path in folder.glob("process-errors-*.json"):  # it may be retried again
                path.unlink(missing_ok=True)
            if state.state == "diverged":
                for path in (folder / "checkpoint").glob("step-*.json"):
                    path.unlink(missing_ok=True)
            reopened.append(state.run_id)
        return reopened

    # -- states
    def state(self, run_id: str) -> RunState:
        """State of one run."""
        folder = self.run_folder(run_id)
        record = folder / "record.json"
        if record.exists():
            try:
                data = json.loads(record.read_text(encoding="utf-8"))
                state = RunState(
                    run_id,
                    str(RunStatus(data["status"])),
                    data.get("reason"),
                    final_val_loss_nats=data.get("final_val_loss_nats"),
                    wall_time_s=data.get("wall_time_s"),
                    ended_unix_s=record.stat().st_mtime,
                )
                # A record that the analysis could not read does not count as completed.
                RunRecord.from_dict(data, shared=self._shared)
                lost = _curve_problem(folder / "curve.jsonl", data) if state.state == "completed" else None
                return replace(state, state="failed", reason=lost) if lost else state
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                return RunState(run_id, "failed", f"record.json {unreadable_message(error)}")
        claim = last_claim(folder)
        if claim is None:
            return RunState(run_id, "planned")
        if claim.is_live(time.time()):
            return RunState(run_id, "running" if claim.step else "claimed", claim=claim)
        return RunState(run_id, "interrupted", "its process is gone", claim=claim)

    def states(self, plan: Plan) -> Iterator[RunState]:
        for run in plan.runs:
            yield self.state(run.run_id)


def _select_runs(runs: list[dict[str, Any]], wanted: set[str]) -> list[dict[str, Any]]:
    """The wanted runs of a plan.json, their parents, and all members of their stacks, in the plan's order."""
    parents = {r["spec"].get("parent") for r in runs if r["run_id"] in wanted}
    chosen = wanted | parents
    stacks = {r["execution"].get("stack") for r in runs if r["run_id"] in chosen} - {None}
    return [r for r in runs if r["run_id"] in chosen or r["execution"].get("stack") in stacks]


def unreadable_message(error: Exception) -> str:
    """Message about a record that cannot be read: truncated, damaged, or from another version."""
    advice = "update scaling-lab to read it" if NEWER in str(error) else RETRY_ADVICE
    return f"cannot be read ({type(error).__name__}: {error}): {advice}"


def _curve_problem(path: Path, record: dict[str, Any]) -> str | None:
    """What is wrong with a finished run's curve, judged by its size alone so that 10,000 runs take a second."""
    found = path.stat().st_size if path.exists() else 0
    expected = record.get("curve_bytes") or min(1, record.get("curve_points", 0))
    if found >= expected:
        return None
    what = f"is truncated ({found:,} of {expected:,} bytes)" if found else "is missing"
    return f"it was completed, but its curve.jsonl {what}: {RETRY_ADVICE}"


def curve_point(fields: Any) -> EvalPoint:
    """A point from a parsed line of curve.jsonl. Raises ValueError or TypeError for a value that is not a number."""
    point = EvalPoint(**fields)
    evals = {} if point.evals is None else dict(point.evals)
    values = [*(value for name, value in fields.items() if name != "evals"), *evals.values()]
    if any(isinstance(v, bool) or not isinstance(v, (int, float, type(None))) for v in values):
        raise ValueError(f"not a number in {fields}")
    return point


def curve_line(point: EvalPoint) -> str:
    """One line of curve.jsonl; fields that are None are omitted."""
    # Not `asdict`, which copies deeply: this is most of the host's work in a stack of 64 short runs.
    return _encode({k: v for k, v in vars(point).items() if v is not None}) + "\n"


_encode = json.JSONEncoder(allow_nan=False).encode
