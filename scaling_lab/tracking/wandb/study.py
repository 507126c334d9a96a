"""A whole sweep on W&B: its ledger as one artifact, one `analysis` run with the report, and uploads of what is missing.

Everything is read from the sweep's folder. Apart from `upload` and `upload_study`, errors of W&B are warnings.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling_lab.core.errors import UserError
from scaling_lab.core.formatting import human_time
from scaling_lab.core.record import RunRecord
from scaling_lab.core.reporter import Reporter
from scaling_lab.core.storage.store import RunStore
from scaling_lab.tracking.sink import wandb_client
from scaling_lab.tracking.sink.wandb_client import (
    RunInfo,
    Target,
    offline_folders,
    open_run,
    wandb_folder,
    wandb_mode,
)

if TYPE_CHECKING:
    from scaling_lab.analysis.finding import Finding

# Files of a run that belong to the ledger: no checkpoints, no claims.
LEDGER_FILES = ("spec.json", "record.json", "curve.jsonl")
LINE_EVERY_S = 5.0
API_TIMEOUT_S = 30
# An upload that the user asked for may take long.
UPLOAD_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Uploaded:
    """What W&B has of one training run."""

    lines: int
    status: str | None

    def is_whole(self, record: RunRecord) -> bool:
        return self.lines >= record.curve_points and self.status == record.status.value


def is_mirrored(store: RunStore) -> bool:
    """Whether runs of the sweep went to W&B, or to files for it."""
    return Target.load(wandb_folder(store.folder)) is not None


def mirror_study(store: RunStore, reporter: Reporter, report_folder: Path | None = None) -> None:
    """Upload ledger and report after an analysis, if the sweep's runs were mirrored to W&B."""
    target = Target.load(wandb_folder(store.folder))
    if target is None:
        return
    mode = wandb_mode(target.mode)
    if mode == "disabled":
        return
    if mode == "online" and not wandb_client.logged_in():
        mode = "offline"
    try:
        address = publish_study(store, target, mode, report_folder or store.report_folder)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        reporter.warn(
            f"the analysis could not be uploaded to W&B ({problem}); {upload_command(store)} uploads it later."
        )
        return
    if mode == "online" and address:
        reporter.say(f"W&B: {address}")


def report_unsynced_runs(store: RunStore, reporter: Reporter) -> None:
    """After training: name the command that uploads what W&B does not have yet."""
    target = Target.load(wandb_folder(store.folder))
    if target is None:
        return
    waiting = len(offline_folders(wandb_folder(store.folder)))
    if waiting:
        reporter.say(
            f"W&B: {waiting} runs were written offline; to upload all of them: {upload_command(store)}"
        )
        return
    if wandb_mode(target.mode) != "online" or not wandb_client.logged_in():
        return
    missing = None
    try:
        if wandb_client.server_has_failed():
            raise wandb_client.ServerFailed
        there = uploaded_runs(target, store.folder.name)
        records, _ = store.load_records(curve=False)
        missing = sum(not _is_there(there, record) for record in records)
    except Exception as error:
        reporter.note(f"W&B did not list its runs ({type(error).__name__}: {error})")
    if missing or missing is None:
        runs = "1 run is" if missing == 1 else f"{missing} runs are"
        which = "W&B did not list its runs" if missing is None else f"{runs} missing or incomplete on W&B"
        reporter.warn(
            f"{which}. The local records are complete; {upload_command(store)} uploads what is missing."
        )


def upload_command(store: RunStore) -> str:
    """The command that uploads a sweep."""
    import shlex

    results = str(store.folder.parent)
    where = "" if results == "results" else f" results_dir={shlex.quote(results)}"
    return f"scaling-lab upload-wandb sweep={store.folder.name}{where}"


def publish_study(
    store: RunStore, target: Target, mode: str, report_folder: Path, finish_timeout_s: float | None = None
) -> str | None:
    """Log the ledger and the report; returns the run's address if it has one. Raises wandb's errors."""
    import wandb

    from scaling_lab.analysis.analysis_json import findings_of

    name = store.folder.name
    info = RunInfo(
        id=f"{name}-analysis",
        name=f"{name} analysis",
        group=name,
        job_type="analysis",
        tags=["analysis"],
        config={"sweep": name},
    )
    run = open_run(info, target, wandb_folder(store.folder), mode, finish_timeout_s)
    try:
        run.log_artifact(ledger_artifact(wandb, store))
        analysis = _read_json(report_folder / "analysis.json")
        logged = report_media(wandb, report_folder)
        if analysis is not None:
            findings = findings_of(analysis)
            logged |= analysis_tables(wandb, analysis) | finding_tables(wandb, findings)
            run.summary.update(exponents(analysis) | finding_numbers(findings))
        if logged:
            run.log(logged)
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()
    return str(run.url) if mode == "online" and run.url else None


def ledger_artifact(wandb: Any, store: RunStore) -> Any:
    """plan.json, and each finished run's spec, record and curve, in the layout of results/, so that it can be analyzed after
    downloading it into an empty results/SWEEP. Unchanged content makes no new version."""
    artifact = wandb.Artifact(f"{store.folder.name}-ledger", type="ledger")
    if store.plan_path.exists():
        artifact.add_file(str(store.plan_path), name="plan.json")
    for run_id in store.run_ids_with_record():
        for name in LEDGER_FILES:
            path = store.run_folder(run_id) / name
            if path.exists():
                artifact.add_file(str(path), name=f"runs/{run_id}/{name}")
    return artifact


def report_media(wandb: Any, folder: Path) -> dict[str, Any]:
    """The report's page and its figures."""
    found = {
        f"figures/{path.stem}": wandb.Image(str(path)) for path in sorted((folder / "figures").glob("*.png"))
    }
    page = folder / "report.html"
    if page.exists():
        found["report"] = wandb.Html(page.read_text(encoding="utf-8"), inject=False)
    return found


def analysis_tables(wandb: Any, analysis: Mapping[str, Any]) -> dict[str, Any]:
    """The exponents of every approach, with intervals, and the optimum of every budget, as W&B tables."""
    rows, budgets = [], []
    for estimate in analysis["estimates"]:
        interval = estimate.get("interval") or {}
        a, b = (
            interval.get("params_exponent") or (None, None),
            interval.get("tokens_exponent") or (None, None),
        )
        rows.append(
            [estimate["approach"], estimate.get("law"), estimate["status"], estimate.get("params_exponent"), *a,
             estimate.get("tokens_exponent"), *b, interval.get("level"), estimate.get("message")]
        )  # fmt: skip
        budgets += [
            [estimate["approach"], *(budget.get(key) for key in BUDGET_COLUMNS)]
            for budget in estimate.get("budgets") or ()
        ]
    columns = ["approach", "law", "status", "params_exponent", "params_exponent_low", "params_exponent_high",
               "tokens_exponent", "tokens_exponent_low", "tokens_exponent_high", "level", "message"]  # fmt: skip
    tables = {"exponents": wandb.Table(columns=columns, data=rows, allow_mixed_types=True)}
    if budgets:
        tables["budgets"] = wandb.Table(
            columns=["approach", *BUDGET_COLUMNS], data=budgets, allow_mixed_types=True
        )
    return tables


BUDGET_COLUMNS = ("budget_flops", "n_runs", "params_opt", "tokens_opt", "loss_opt", "status", "message")


def exponents(analysis: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers for the table of runs: `isoflop/params_exponent`, its interval, a law's parameters."""
    found: dict[str, Any] = {}
    for estimate in analysis["estimates"]:
        approach = estimate["approach"]
        for name in ("params_exponent", "tokens_exponent"):
            found[f"{approach}/{name}"] = estimate.get(name)
            low_high = (estimate.get("interval") or {}).get(name)
            if low_high:
                found[f"{approach}/{name}_low"], found[f"{approach}/{name}_high"] = low_high
        for name, value in (estimate.get("parameters") or {}).items():
            found[f"{approach}/{name}"] = value
        found[f"{approach}/status"] = estimate["status"]
    return found


def finding_tables(wandb: Any, findings: Sequence[Finding]) -> dict[str, Any]:
    """One table of all answers, and each finding's own tables as text: `findings`, `findings/STUDY/TABLE`."""
    if not findings:
        return {}
    answers = [[f.name, f.question, f.answer, f.status.value, f.reason] for f in findings]
    columns = ["study", "question", "answer", "status", "reason"]
    tables = {"findings": wandb.Table(columns=columns, data=answers, allow_mixed_types=True)}
    for f in findings:
        for table in f.tables:
            rows = [[c.text(cell) for c, cell in zip(table.columns, row)] for row in table.rows]
            names = [column.title or "remark" for column in table.columns]
            tables[f"findings/{f.name}/{table.name}"] = wandb.Table(columns=names, data=rows)
    return tables


def finding_numbers(findings: Sequence[Finding]) -> dict[str, Any]:
    """The numbers of every answer for the table of runs: `finding/STUDY/QUANTITY`, with `_low` and `_high`."""
    found: dict[str, Any] = {}
    for f in findings:
        found[f"finding/{f.name}/status"] = f.status.value
        for q in f.quantities:
            key = f"finding/{f.name}/{q.name}"
            found[key] = q.estimate
            if q.interval is not None:
                found[f"{key}_low"], found[f"{key}_high"] = q.interval
    return found


# -- uploading from the records
def uploaded_runs(target: Target, sweep: str) -> dict[str, Uploaded]:
    """Run id -> what W&B has of it, for the runs of a sweep. Raises wandb's errors."""
    import wandb

    api = wandb.Api(timeout=API_TIMEOUT_S)
    path = target.path if target.entity else f"{api.default_entity}/{target.project}"
    found: dict[str, Uploaded] = {}
    try:
        for run in api.runs(path, filters={"group": sweep}, per_page=500, lazy=False):
            found[run.id] = Uploaded(int(run._attrs.get("historyLineCount") or 0), run.summary.get("status"))
    except ValueError as error:
        if "find project" not in str(error):  # a project that does not exist yet has no runs
            raise
    return found


def upload(store: RunStore, target: Target, reporter: Reporter) -> int:
    """Upload every finished run that is missing or incomplete on W&B; returns how many.

    Raises `UserError` if the server refuses: uploaded runs stay there, and the same command continues.
    """
    records, problems = store.load_records(curve=False)
    for run_id, reason in problems:
        reporter.warn(f"{run_id} was skipped: {reason}")
    there = _request(lambda: uploaded_runs(target, store.folder.name), target)
    todo = [record for record in records if not _is_there(there, record)]
    reporter.say(
        f"{len(records) - len(todo)} of {len(records)} finished runs are on W&B ({target.path}) already"
    )
    for brief in with_progress(todo, "runs uploaded", reporter):
        record = store.read_record(brief.run_id)
        _request(partial(upload_run, record, target, store), target)
    if todo:
        there = _request(lambda: uploaded_runs(target, store.folder.name), target)
    for record in todo:
        if not _is_there(there, record):
            has = there[_id(record)].lines if _id(record) in there else 0
            reporter.warn(
                f"{record.run_id}: W&B has {has} of its {record.curve_points} points and accepts none below its last "
                "step: delete that run there and repeat this command."
            )
    return len(todo)


def upload_study(store: RunStore, target: Target) -> str | None:
    """Upload the ledger and the report, if there is one. Raises `UserError` if the server refuses."""
    folder = wandb_folder(store.folder)
    address = _request(
        lambda: publish_study(store, target, "online", store.report_folder, UPLOAD_TIMEOUT_S), target
    )
    _mark_synced(folder, f"{store.folder.name}-analysis")
    return None if address is None else str(address)


def upload_run(record: RunRecord, target: Target, store: RunStore) -> None:
    """Log one run from its record. Raises wandb's errors."""
    from scaling_lab.core.spec import PlannedRun
    from scaling_lab.tracking.sink.trackers import close_mirror, log_point, open_mirror

    folder = wandb_folder(store.folder)
    planned = PlannedRun(record.spec, record.execution)
    run = open_mirror(
        planned, record.environment.data_fingerprint, target, folder, "online", UPLOAD_TIMEOUT_S
    )
    for point in record.curve:
        log_point(run, point)
    close_mirror(run, record)
    _mark_synced(folder, _id(record))


def _mark_synced(folder: Path, run_id: str) -> None:
    """Mark a run's offline files as `wandb sync` marks those that are uploaded."""
    for path in offline_folders(folder, run_id):
        for file in path.glob("*.wandb"):
            file.with_name(f"{file.name}.synced").touch()


def with_progress(items: list[Any], what: str, reporter: Reporter) -> Iterator[Any]:
    """The items; reports how many are done and an ETA every few seconds."""
    began = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - last >= LINE_EVERY_S:
            last = now
            eta = human_time((now - began) / done * (len(items) - done))
            reporter.say(f"{done} of {len(items)} {what}, ETA {eta}")
        yield item
    if items:
        reporter.say(f"{len(items)} of {len(items)} {what} in {human_time(time.monotonic() - began)}")


def _id(record: RunRecord) -> str:
    return f"{record.spec.sweep}-{record.run_id}"


def _is_there(there: Mapping[str, Uploaded], record: RunRecord) -> bool:
    found = there.get(_id(record))
    return found is not None and found.is_whole(record)


def _request(what: Callable[[], Any], target: Target) -> Any:
    try:
        return what()
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"W&B at {wandb_client.base_url()} refused {target.path} ({problem}). What is uploaded stays there; the same command "
            "continues."
        ) from None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
