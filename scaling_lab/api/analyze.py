"""`analyze`, `predict`, `load` and `report`: from a table, a sweep or analysis.json to a result."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from scaling_lab.api.options import AnalysisOptions, analysis_settings, call_text
from scaling_lab.api.predictions import Predictions
from scaling_lab.api.result import AnalysisResult, LiveReport, budgets_of
from scaling_lab.api.tables import check_needed, column_names, table_of
from scaling_lab.core.errors import UserError

if TYPE_CHECKING:
    from scaling_lab.analysis.data.observations import Observations
    from scaling_lab.analysis.settings import AnalysisSettings
    from scaling_lab.core.record import RunRecord
    from scaling_lab.core.storage.store import RunStore

ANALYSIS_NAME = "analysis.json"


def analyze(
    data: Any,
    *,
    loss: str | None = None,
    params: str | None = None,
    tokens: str | None = None,
    flops: str | None = None,
    run_id: str | None = None,
    columns: Mapping[str, str] | None = None,
    units: Mapping[str, Any] | None = None,
    where: Mapping[str, Any] | None = None,
    tuning: str | Path | None = None,
    **options: Unpack[AnalysisOptions],
) -> AnalysisResult:
    """The compute-optimal scaling laws of a table of runs, or of a sweep, by the three approaches of Hoffmann et al. 2022.

    Args:
        data: a DataFrame, the path of a CSV, Parquet or JSON file, a dictionary of columns, a list of records, a table of
            pyarrow or polars; or a sweep: its folder, or what `sl.train` returned. A table has one row a run, or several
            with one `run_id` (its curve), and the columns `params`, `tokens`, `flops` (one of the three may be missing:
            C = 6 N D is assumed, and said) and `loss` (nats per token); optional `run_id`, `budget_flops`, `seed`,
            `loss_sem`.
        loss: what the table calls its loss; likewise `params`, `tokens`, `flops` and `run_id`.
        columns: the same for any column, ours to theirs.
        units: the unit a column is written in: `{"params": "M", "tokens": "B", "loss": "bits"}`.
        where: rows to keep: `{"dataset": "c4", "params.min": 1e6}`.
        tuning: folder of a sweep of `design=learning_rate`, to measure the excess loss of each run from a mistuned learning
            rate.
        **options: those of `scaling-lab analyze`, by the same names (`AnalysisOptions`).

    Returns:
        Exponents with intervals, the law's parameters, figures, predictions, a report.

    Raises:
        UserError: a missing column, an unknown option or value, too few usable rows. An approach that cannot be
            applied to these data is not an error: its status and message say why.

    >>> df = pd.read_csv("my_runs.csv").rename(columns={"loss": "val_loss"})
    >>> sl.analyze(df, loss="val_loss", bootstrap={"resamples": 200}, sensitivity=False).parametric.status
    'converged'
    """
    settings = analysis_settings(options)
    given = {"loss": loss, "params": params, "tokens": tokens, "flops": flops, "run_id": run_id}
    named = {**given, "columns": columns, "units": units, "where": where}
    store = sweep_store(data)
    if store is None:
        if tuning is not None:
            raise UserError(f"tuning={str(tuning)!r} is for a sweep; data is a table.")
        return _analyze_table(data, settings, column_names(columns, **given), named, options)
    used = [name for name, value in named.items() if value is not None]
    if used:
        raise UserError(
            f"{used[0]}: this option is for tables; of a sweep's records metric= and metrics= choose the loss."
        )
    return analyze_sweep(store, settings, tuning, call_text("analyze", repr(str(store.folder)), options))


def predict(data: Any, compute_flops: float | Iterable[float], **options: Any) -> Predictions:
    """The compute-optimal parameters, tokens and loss at a budget, from a table, a sweep or an analysis.

    Args:
        data: what `analyze` takes, or what it returned.
        compute_flops: training FLOPs, one budget or several.
        **options: those of `analyze`.

    Raises:
        UserError: as `analyze`, or no approach has a frontier to predict from.

    >>> sl.predict("my_runs.csv", 1e22, bootstrap={"resamples": 200}).isoflop.tokens_per_param.estimate > 5
    True
    """
    budgets = budgets_of(compute_flops)
    if isinstance(data, AnalysisResult):
        if options:
            raise UserError(f"{min(options)}: the analysis is made already; give the option to analyze.")
        analysis = data
    else:
        quick = {"sensitivity": False, "backtest": False, "profile": False, "study": "none"}
        analysis = analyze(data, **{**quick, **options})
    found = analysis.predict(budgets)
    if not found.runs:
        reasons = "; ".join(f"{a.name}: {a.message}" for a in analysis.approaches)
        raise UserError(f"no approach has a frontier to predict from. {reasons}")
    return found


def load(path: str | Path) -> AnalysisResult:
    """An analysis from disk.

    Args:
        path: a sweep's folder (`results/NAME`), whose finished runs are analyzed with the default options; a folder with
            an analysis.json, as reports have it; or such a file. From analysis.json alone there are numbers, frames, findings
            and a report, but no figures of the three approaches and no new predictions: it holds no runs.

    Raises:
        UserError: nothing of the kind is there, or it is of a newer version.

    >>> analysis.to_json("analysis.json") == sl.load("analysis.json").to_json()
    True
    """
    from scaling_lab.analysis.analysis_json import read_document

    where = Path(path).expanduser()
    store = sweep_store(where)
    if store is not None and store.run_ids_with_record():
        return analyze(store.folder)
    candidates = (where, where / ANALYSIS_NAME, where / "report" / ANALYSIS_NAME)
    file = next((c for c in candidates if c.is_file()), None)
    if file is None:
        what = f"has no finished runs and no {ANALYSIS_NAME}" if where.exists() else "does not exist"
        raise UserError(
            f"path={str(path)!r} {what}. Choices: a sweep's folder, a folder with {ANALYSIS_NAME}, such a file."
        )
    return AnalysisResult(read_document(file), str(file))


def report(data: Any, folder: str | Path, **options: Any) -> Path:
    """Write a report (report.html, analysis.json, figures) of a table, a sweep or an analysis; returns the page's path.

    Args:
        data: what `analyze` takes, or what it returned.
        folder: where to write; made if it does not exist.
        **options: those of `analyze`.

    Raises:
        UserError: as `analyze`, or the folder holds a report.html that scaling-lab did not write.

    >>> sl.report(analysis, "report").name
    'report.html'
    """
    if isinstance(data, AnalysisResult):
        if options:
            raise UserError(f"{min(options)}: the analysis is made already; give the option to analyze.")
        return data.report(folder)
    return analyze(data, **options).report(folder)


# -- where observations come from
def sweep_store(data: Any) -> RunStore | None:
    """The store of a sweep's folder, or of a sweep that was trained here; None for anything else."""
    from scaling_lab.core.storage.store import RunStore

    store = getattr(data, "store", None)
    if isinstance(store, RunStore):
        return store
    if not isinstance(data, (str, Path)):
        return None
    folder = Path(data).expanduser()
    return RunStore(folder) if (folder / "plan.json").is_file() or (folder / "runs").is_dir() else None


def _analyze_table(
    data: Any,
    settings: AnalysisSettings,
    columns: Mapping[str, str],
    named: Mapping[str, Any],
    options: Mapping[str, Any],
) -> AnalysisResult:
    from scaling_lab.analysis import analysis as core

    observations, name = observations_of(data, settings, columns, named["units"], named["where"])
    analysis = core.analyze(observations, settings)
    is_file = isinstance(data, (str, Path))
    shown = repr(str(data)) if is_file else type(data).__name__
    command = call_text("analyze", shown, {**named, **options})
    source = str(Path(data).expanduser().resolve()) if is_file else None
    document = analysis.to_json_dict(command, None, source)
    return AnalysisResult(document, name, analysis)


def observations_of(
    data: Any,
    settings: AnalysisSettings,
    columns: Mapping[str, str],
    units: Mapping[str, Any] | None,
    where: Mapping[str, Any] | None,
) -> tuple[Observations, str]:
    """(observations, the table's name). Raises `UserError` naming the argument that is wrong."""
    from scaling_lab.analysis.analysis import observations_of_table
    from scaling_lab.analysis.data.observations import Observations

    if isinstance(data, Observations):
        return data, f"{data.n_runs} runs"
    table = table_of(
        data,
        columns=columns,
        units=units,
        where=where,
        metric=settings.metric,
        metrics=settings.metrics,
        decimal=settings.decimal,
    )
    check_needed(table)
    return observations_of_table(table, settings), table.source


def analyze_sweep(
    store: RunStore, settings: AnalysisSettings, tuning: str | Path | None = None, command: str = ""
) -> AnalysisResult:
    """The analysis of a sweep's finished runs; a record that cannot be read is a warning.

    Where no law can be fitted to them there are findings alone, if any; otherwise `UserError` says why.
    """
    from scaling_lab.analysis import analysis as core
    from scaling_lab.analysis.data.sweep_records import split_by_role
    from scaling_lab.core.storage.store import RunStore
    from scaling_lab.reporting.page import ReportOptions, document_of

    records, problems = _records(store, "data")
    elsewhere = [] if tuning is None else _records(RunStore(Path(tuning).expanduser()), "tuning")[0]
    split = split_by_role(records, elsewhere)
    result = core.analyze_records(split, settings)
    core.require_result(result, split, settings)
    options = ReportOptions(
        command=command,
        plan=store.read_plan() if store.plan_path.exists() else None,
        problem=result.problem,
        findings=result.findings,
        unreadable=problems,
    )
    shown = split.law or tuple(records)
    document = document_of(result.analysis, options)
    return AnalysisResult(document, store.folder.name, result.analysis, LiveReport(options, shown))


def _records(store: RunStore, option: str) -> tuple[list[RunRecord], list[tuple[str, str]]]:
    from scaling_lab.analysis.data.ledger import load_ledger

    records, problems = load_ledger(store)
    for name, reason in problems:
        warnings.warn(f"{name} is left out: {reason}", stacklevel=4)
    if not records:
        raise UserError(f"{option}={str(store.folder)!r} has no finished runs.")
    return records, problems
