"""The report's tables: plain text cells, ready for the page, from analysis.json as plain data and from the records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scaling_lab.analysis.estimate import BudgetStatus, FitStatus
from scaling_lab.analysis.finding import Finding, FindingTable, KeyQuantity
from scaling_lab.analysis.text import (
    APPROACH_NAMES,
    GREEK,
    NOTHING,
    SHORT_APPROACH_NAMES,
    format_flops,
    format_range,
    number_format,
)
from scaling_lab.reporting.captions import Document, estimate_of, has_frontier

# Rows of a table of runs beyond this are left to analysis.json and the records: a page of 10,000 rows is not read.
MAX_ROWS = 400

# Hoffmann et al. 2022 (arXiv 2203.15556), table 2, with the 10th and 90th percentiles; Kaplan et al. 2020
# (arXiv 2001.08361), section 6; Besiroglu et al. 2024 (arXiv 2404.10102), 90% from their standard error of .020.
PUBLISHED = (
    ("Kaplan et al. 2020", "0.73", NOTHING, "0.27", NOTHING),
    ("Chinchilla, approach 1", "0.50", "0.488 to 0.502", "0.50", "0.501 to 0.512"),
    ("Chinchilla, approach 2", "0.49", "0.462 to 0.534", "0.51", "0.483 to 0.529"),
    ("Chinchilla, approach 3", "0.46", "0.454 to 0.455", "0.54", "0.542 to 0.543"),
    ("Chinchilla, approach 3, refitted (Besiroglu et al. 2024)", "0.513", "SE 0.020", "0.487", NOTHING),
)


@dataclass(frozen=True)
class TableRow:
    """One row of text cells."""

    cells: tuple[str, ...]
    mark: str = ""
    """CSS class: "published", "warn", or nothing."""


@dataclass(frozen=True)
class TextTable:
    """`numeric` columns are set flush right; `note` goes below."""

    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]
    numeric: frozenset[int] = frozenset()
    note: str = ""


def exponents(document: Document) -> TextTable:
    """Ours next to Kaplan's and Chinchilla's."""
    rows, how = [], []
    for estimate in document["estimates"]:
        ok = estimate["status"] == FitStatus.CONVERGED
        values = (NOTHING,) * 4
        if has_frontier(estimate):
            values = (
                _maybe(estimate["params_exponent"], ".3f"),
                _range(estimate["interval"]["params_exponent"], ".3f"),
                _maybe(estimate["tokens_exponent"], ".3f"),
                _range(estimate["interval"]["tokens_exponent"], ".3f"),
            )
            how.append(f"{SHORT_APPROACH_NAMES[estimate['approach']]}, {_how(estimate['interval'])}")
        cells = (APPROACH_NAMES[estimate["approach"]], *values, estimate["status"])
        rows.append(TableRow(cells, "" if ok else "warn"))
    rows += [TableRow((*p, "published"), "published") for p in PUBLISHED]
    level = _level(document)
    return TextTable(
        ("", "N as C to the", level, "D as C to the", level, "status"),
        tuple(rows),
        frozenset({1, 2, 3, 4}),
        (f"Our intervals: {'; '.join(how)}. " if how else "")
        + "Chinchilla's intervals are the 10th and 90th percentiles of its table 2. Exponents compare only under the same "
        "counting of N and C: see “How N and C are counted”.",
    )


def _level(document: Document) -> str:
    """The level of the intervals, "90%"."""
    return f"{document['estimates'][0]['interval']['level']:.0%}"


def _how(interval: Document) -> str:
    """How intervals were made: the method, the unit of resampling, how many resamples succeeded."""
    if interval["params_exponent"] is None:
        return interval["message"] or "no interval"
    unit = "" if interval["unit"] in interval["method"] else f" by {interval['unit']}"
    done = f"{interval['resamples'] - interval['failed']} of {interval['resamples']} resamples"
    text = f"{interval['method']}{unit}, {done}"
    return text if interval["message"] is None else f"{text}. {interval['message']}"


def law_parameters(document: Document) -> TextTable | None:
    """The fitted law's parameters with bootstrap standard errors; None where no law was fitted."""
    estimate = estimate_of(document, "parametric")
    if estimate["parameters"] is None:
        return None
    rows = [
        TableRow(
            (
                GREEK.get(name, name),
                _maybe(value, "sig4"),
                _maybe(estimate["standard_errors"].get(name), "sig2"),
                _range(estimate["interval"].get(name), "sig4"),
            )
        )
        for name, value in estimate["parameters"].items()
    ]
    fit = estimate.get("fit") or {"message": "", "huber_delta": None}  # of version 2
    delta = _maybe(fit["huber_delta"], "g")
    objective = _maybe(estimate["objective"], ".6g")
    note = (
        f"{fit['message']} Objective {objective} (sum of Huber losses of ln L, delta {delta}) over "
        f"{estimate['n_observations']} points. Standard errors and intervals: {_how(estimate['interval'])}."
    )
    columns = ("", "value", "standard error", f"{estimate['interval']['level']:.0%}")
    return TextTable(columns, tuple(rows), frozenset({1, 2, 3}), note.strip())


def budgets(document: Document) -> TextTable:
    """The IsoFLOP valleys: each budget's minimum, or why it has none."""
    rows = []
    for b in estimate_of(document, "isoflop")["budgets"]:
        n, d = b["params_opt"], b["tokens_opt"]
        cells = (
            format_flops(b["budget_flops"]),
            str(b["n_runs"]),
            _maybe(n, "count"),
            _maybe(d, "count"),
            _maybe(None if not n or d is None else d / n, ".3g"),
            _maybe(b["loss_opt"], ".4f"),
            b["status"],
            b["message"] or "",
        )
        rows.append(TableRow(cells, "" if b["status"] == BudgetStatus.OK else "warn"))
    columns = ("FLOPs", "runs", "best N", "best D", "D / N", "loss there", "status", "why")
    return limited(TextTable(columns, tuple(rows), frozenset(range(6))))


def backtest(document: Document) -> TextTable:
    """Predicted against reached at the largest budget, which the fits had not seen."""
    rows = []
    for test in document["backtest"]:
        p = test["predicted"]
        cells = (
            APPROACH_NAMES[test["approach"]],
            _quantity(p and p["loss_opt"], ".4f"),
            f"{test['best_sampled_loss_nats']:.4f}",
            _quantity(p and p["params_opt"], "count"),
            _maybe(test["observed"]["params_opt"], "count"),
            NOTHING if p is None else f"{_maybe(p['extrapolation_factor'], '.3g')}x",
        )
        rows.append(TableRow(cells, "" if p is not None else "warn"))
    columns = ("", "loss predicted", "best run", "best N predicted", "best N found", "beyond the fit")
    return TextTable(columns, tuple(rows), frozenset({1, 2, 3, 4, 5}))


def predictions(document: Document) -> TextTable:
    """What each approach expects at larger budgets."""
    rows = [
        TableRow(
            (
                format_flops(p["compute_flops"]),
                SHORT_APPROACH_NAMES[p["approach"]],
                _quantity(p["params_opt"], "count"),
                _quantity(p["tokens_opt"], "count"),
                _quantity(p["tokens_per_param"], ".3g"),
                _quantity(p["loss_opt"], ".3f"),
                f"{_maybe(p['extrapolation_factor'], '.3g')}x",
            ),
            "warn" if (p["extrapolation_factor"] or 0.0) > 30 else "",
        )
        for p in document["predictions"]
    ]
    columns = ("FLOPs", "by", "best N", "best D", "D / N", "loss", "beyond the data")
    return TextTable(columns, tuple(rows), frozenset({0, 2, 3, 4, 5, 6}))


def agreement(document: Document) -> TextTable:
    """Every pair of approaches: difference, its interval, and whether it may be zero."""
    at = document["estimates"][0]["at_mean_compute"]["compute_flops"]
    names = {
        "params_exponent": "exponent of N",
        "tokens_exponent": "exponent of D",
        "log_params_opt": f"ln N at {format_flops(at)} FLOPs",
    }
    rows = [
        TableRow(
            (
                " - ".join(SHORT_APPROACH_NAMES[a] for a in p["approaches"]),
                names.get(p["quantity"], p["quantity"]),
                _maybe(p["difference"], "+.3f"),
                _range(p["interval"], "+.3f"),
                {True: "yes", False: "no", None: "not known"}[p["agree"]],
            ),
            "warn" if p["agree"] is False else "",
        )
        for p in document["agreement"]["pairs"]
    ]
    columns = ("", "quantity", "difference", _level(document), "agree")
    return TextTable(columns, tuple(rows), frozenset({2, 3}))


def sensitivity(document: Document) -> TextTable:
    """The same question under every other choice that was tried."""
    rows = [
        TableRow(
            (
                r["kind"],
                r["choice"],
                SHORT_APPROACH_NAMES[r["approach"]],
                _maybe(r["params_exponent"], ".3f"),
                _maybe(r["tokens_exponent"], ".3f"),
                _maybe(r["change"], "+.3f"),
                r["message"] or ("" if r["status"] == "converged" else r["status"]),
            ),
            "" if r["status"] == "converged" else "warn",
        )
        for r in document["sensitivity"]
    ]
    columns = ("kind", "choice", "approach", "N as C to the", "D as C to the", "change in N's", "")
    return TextTable(columns, tuple(rows), frozenset({3, 4, 5}))


def finding_tables(finding: Finding) -> list[tuple[str, TextTable]]:
    """(caption, table) of a finding: its tables, and its numbers where no table has them or a paper gives them too."""
    tables = []
    if finding.quantities and (not finding.tables or any(q.published for q in finding.quantities)):
        tables.append(("The numbers of the answer", quantities(finding)))
    return [*tables, *((t.caption, finding_table(t)) for t in finding.tables)]


def quantities(finding: Finding) -> TextTable:
    """The numbers of the answer, next to the published ones."""
    level = "" if finding.level is None else f", {finding.level:.0%}"
    published = any(q.published for q in finding.quantities)
    rows = [
        TableRow(
            (
                q.name,
                format_range(q.estimate, q.interval, q.form),
                q.unit,
                *([_published(q)] if published else []),
            )
        )
        for q in finding.quantities
    ]
    columns = ("", f"value{level}", "unit", *(["published"] if published else []))
    return TextTable(columns, tuple(rows), frozenset({1}))


def _published(quantity: KeyQuantity) -> str:
    return "; ".join(
        f"{format_range(p.value, p.interval, quantity.form)} ({p.source})" for p in quantity.published
    )


def finding_table(table: FindingTable) -> TextTable:
    """A finding's table as text."""
    columns = tuple(c.title for c in table.columns)
    rows = tuple(
        TableRow(
            tuple(column.text(cell) for cell, column in zip(row, table.columns)),
            "warn" if i in table.warnings else "",
        )
        for i, row in enumerate(table.rows)
    )
    numeric = frozenset(i for i, column in enumerate(table.columns) if column.form)
    return limited(TextTable(columns, rows, numeric, table.note))


def dropped(document: Document | None, unreadable: Sequence[tuple[str, str]] = ()) -> TextTable:
    """Rows and runs that are not analyzed, and records that could not be read, with the reason of each."""
    observations = (document or {}).get("observations") or {"dropped": ()}
    rows = [
        TableRow((d["run_id"], NOTHING if d["row"] is None else str(d["row"]), d["reason"]))
        for d in observations["dropped"]
    ]
    rows += [TableRow((run_id, NOTHING, reason), "warn") for run_id, reason in unreadable]
    return limited(TextTable(("run", "row", "why it is left out"), tuple(rows), frozenset({1})))


def limited(table: TextTable) -> TextTable:
    """The table with at most `MAX_ROWS` rows, and a note that says of how many."""
    if len(table.rows) <= MAX_ROWS:
        return table
    note = f"{table.note} The first {MAX_ROWS} of {len(table.rows)} rows.".strip()
    return TextTable(table.columns, table.rows[:MAX_ROWS], table.numeric, note)


def _maybe(value: float | None, form: str) -> str:
    return NOTHING if value is None else number_format(form)(value)


def _range(interval: Sequence[float | None] | None, form: str) -> str:
    """The two ends of an interval."""
    if interval is None:
        return NOTHING
    low, high = ("unbounded" if end is None else number_format(form)(end) for end in interval)
    return f"{low} to {high}"


def _quantity(quantity: Document | None, form: str) -> str:
    """An estimate with its interval."""
    if quantity is None or quantity["estimate"] is None:
        return NOTHING
    return format_range(quantity["estimate"], quantity["interval"], form)
