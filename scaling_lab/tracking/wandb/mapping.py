"""Convert runs from an external tracker into rows of our table, given a mapping of names.

An `ExternalRun` holds a tracker's data on one run, independent of where it was read from; a `RunMapping` defines params,
tokens, flops and loss as names, or arithmetic over names, in that data. Does not depend on any tracker's client.
"""

from __future__ import annotations

import ast
import difflib
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from scaling_lab.core.counts import FLOPS_PER_PARAM_TOKEN
from scaling_lab.core.errors import UserError

# Fields of a mapping that are not columns of the table.
NON_COLUMNS = ("extra", "not_job_type")
ROOTS = ("config", "history", "summary")
_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "log": math.log,
    "exp": math.exp,
    "sqrt": math.sqrt,
    "min": min,
    "max": max,
}
# 9 ** 9 ** 9 in a mapping must not hang the import.
_MAX_POWER = 64


class MissingValueError(Exception):
    """A run has no value of this name."""


class IncompleteHistoryError(Exception):
    """The tracker returned only part of a run's curve; the message has the counts."""


@dataclass(frozen=True)
class ExternalRun:
    """One run of a tracker."""

    run_id: str
    name: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    history_keys: Mapping[str, int | None]
    """Metric -> number of history rows that contain it; None if the tracker does not say."""
    read_history: Callable[[Sequence[str]], list[dict[str, Any]]] = field(repr=False)
    """Keys -> all rows that contain all of them, in order."""
    group: str | None = None
    job_type: str | None = None
    state: str = "finished"
    """W&B's state: finished, failed, crashed, running, ..."""
    tags: Sequence[str] = ()


@dataclass(frozen=True)
class RunMapping:
    """Definitions of our columns: a metric of the history, a key of the config or the summary (nested keys joined by dots),
    or arithmetic over them. The prefixes `config.`, `history.` and `summary.` are optional; `history["val/loss"]` quotes a
    name."""

    loss: str
    """The loss, in nats, from the history"""
    params: str
    """Number of parameters N"""
    tokens: str | None = None
    """Tokens seen at each point of the history"""
    flops: str | None = None
    """Training FLOPs at each point of the history; default: 6 N D"""
    run_id: str | None = None
    """The run's id in the table; default: the tracker's id"""
    budget_flops: str | None = None
    """The FLOP budget that a run was planned for"""
    seed: str | None = None
    """The run's seed"""
    loss_sem: str | None = None
    """Standard error of the loss"""
    extra: Mapping[str, str] = field(default_factory=dict)
    """Further numeric columns by name"""
    not_job_type: str | None = None
    """Skip runs of this job type, which did not train"""

    def __post_init__(self) -> None:
        if self.tokens is None and self.flops is None:
            raise UserError("mapping.tokens and mapping.flops are both missing: at least one is required.")
        for name, text in self.columns().items():
            Expression(text, f"mapping.{name}")

    def columns(self) -> dict[str, str]:
        """Column -> expression, for the columns that are given."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in NON_COLUMNS}
        return {name: text for name, text in own.items() if text is not None} | dict(self.extra)


class Expression:
    """One value of a mapping. Raises `UserError` (naming `option`) unless it is a name or arithmetic over names."""

    def __init__(self, text: str, option: str) -> None:
        self.text, self.option = text.strip(), option
        self._tree: ast.expr | None = None
        try:
            self._tree = ast.parse(self.text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError):
            return  # may still be a name, such as `val loss`: depends on the run
        self._check(self._tree)

    def history_keys(self, run: ExternalRun) -> set[str]:
        """The history metrics that the expression uses in this run. Raises `MissingValueError`."""
        return {name for root, name in self._names(run) if root == "history"}

    def value(self, run: ExternalRun, row: Mapping[str, Any]) -> Any:
        """Its value at one row of the history. Raises `MissingValueError` or `ValueError`."""
        whole = self._whole_name(run)
        if whole is not None:
            return _look_up(run, row, *whole)
        assert self._tree is not None
        try:
            return self._evaluate(self._tree, run, row)
        except (ArithmeticError, TypeError) as error:
            raise ValueError(f"{self.option}={self.text}: {error}") from None

    def _whole_name(self, run: ExternalRun) -> tuple[str, str] | None:
        """The (root, name) of the whole text if it is a single name in this run (`val/loss`, `model.n_params`)."""
        found = _resolve(run, self.text)
        if found is None and self._tree is None:
            raise MissingValueError(_missing_message(run, self.option, self.text))
        return found

    def _names(self, run: ExternalRun) -> Iterator[tuple[str, str]]:
        whole = self._whole_name(run)
        if whole is not None:
            yield whole
            return
        assert self._tree is not None
        pending = [self._tree]
        while pending:
            node = pending.pop()
            dotted = _dotted(node)
            if dotted is None:
                pending += [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.expr)]
                continue
            if isinstance(node, ast.Name) and node.id in _FUNCTIONS:
                continue
            found = _resolve(run, dotted)
            if found is None:
                raise MissingValueError(_missing_message(run, self.option, dotted))
            yield found

    def _check(self, node: ast.expr) -> None:
        """Raise `UserError` for anything except names, numbers and arithmetic."""
        if _dotted(node) is not None:
            return
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            return
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            self._check(node.left)
            self._check(node.right)
        elif isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
            self._check(node.operand)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            if node.func.id not in _FUNCTIONS:
                raise UserError(
                    f"{self.option}={self.text}: there is no function {node.func.id!r}. Choices: {', '.join(_FUNCTIONS)}."
                )
            for argument in node.args:
                self._check(argument)
        else:
            raise UserError(
                f"{self.option}={self.text} is neither a name nor arithmetic over names; expected for example "
                "config.n_params, history['val/loss'] or history.step * config.batch_tokens."
            )

    def _evaluate(self, node: ast.expr, run: ExternalRun, row: Mapping[str, Any]) -> Any:
        dotted = _dotted(node)
        if dotted is not None:
            found = _resolve(run, dotted)
            if found is None:
                raise MissingValueError(_missing_message(run, self.option, dotted))
            return _number(_look_up(run, row, *found))
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.UnaryOp):
            return _OPERATORS[type(node.op)](self._evaluate(node.operand, run, row))
        if isinstance(node, ast.BinOp):
            left, right = self._evaluate(node.left, run, row), self._evaluate(node.right, run, row)
            if isinstance(node.op, ast.Pow) and abs(right) > _MAX_POWER:
                raise ValueError(f"{self.option}={self.text}: a power above {_MAX_POWER}.")
            return _OPERATORS[type(node.op)](left, right)
        assert isinstance(node, ast.Call)
        assert isinstance(node.func, ast.Name)
        return _FUNCTIONS[node.func.id](*(self._evaluate(a, run, row) for a in node.args))


def rows_of_run(run: ExternalRun, mapping: RunMapping) -> list[dict[str, Any]]:
    """The run's curve as rows of our table.

    Raises:
        MissingValueError: the run, or every row of it, lacks a name in the mapping: the run should be skipped.
        IncompleteHistoryError: the tracker returned only part of the history; the message has the counts.
    """
    columns = {name: Expression(text, f"mapping.{name}") for name, text in mapping.columns().items()}
    # Annotations may be missing from a run or a row, but not the numbers used in fits.
    optional = {"run_id", "budget_flops", "seed", "loss_sem", *mapping.extra}
    needed: set[str] = set()
    optional_keys: set[str] = set()
    for name in list(columns):
        try:
            keys = columns[name].history_keys(run)
        except MissingValueError:
            if name not in optional:
                raise
            del columns[name]
            continue
        (optional_keys if name in optional else needed).update(keys)
    loss_keys = columns["loss"].history_keys(run)
    if not loss_keys:
        raise MissingValueError(f"mapping.loss={mapping.loss} is not a metric in its history")
    rows = read_complete_history(run, sorted(needed), sorted(loss_keys), sorted(optional_keys - needed))
    return [_table_row(run, columns, row, optional) for row in rows]


def read_complete_history(
    run: ExternalRun, keys: Sequence[str], loss_keys: Sequence[str], optional_keys: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """All history rows that have the loss, checked against the tracker's count; includes the `optional_keys` of rows that
    have them.

    Raises `MissingValueError` if there are none and `IncompleteHistoryError`, with the counts, if some are missing.
    """
    counts = [run.history_keys.get(key) for key in loss_keys]
    expected = min((c for c in counts if c is not None), default=None)
    if optional_keys and expected is not None:
        rows = run.read_history([*keys, *optional_keys])
        if rows and len(rows) == expected:
            return rows
    rows = run.read_history(keys)
    for key in optional_keys:
        values = {row["_step"]: row[key] for row in run.read_history(["_step", key])}
        rows = [row | {key: values[row["_step"]]} if row.get("_step") in values else row for row in rows]
    if expected is None or len(rows) == expected:
        if not rows:
            raise MissingValueError(f"no row in its history has {' and '.join(keys)}")
        return rows
    shown = " and ".join(repr(key) for key in loss_keys)
    with_loss = len(rows) if set(keys) == set(loss_keys) else len(run.read_history(loss_keys))
    if with_loss == expected:
        others = " and ".join(repr(key) for key in keys if key not in loss_keys)
        raise IncompleteHistoryError(
            f"only {len(rows)} of its {expected} rows with {shown} also have {others}, because they were logged in separate "
            "calls; map tokens and flops by arithmetic over the config and history._step"
        )
    raise IncompleteHistoryError(f"only {with_loss} of its {expected} points of {shown} were returned")


def _table_row(
    run: ExternalRun, columns: Mapping[str, Expression], row: Mapping[str, Any], optional: set[str]
) -> dict[str, Any]:
    out: dict[str, Any] = {"run_id": run.run_id}
    for name, expression in columns.items():
        try:
            value = expression.value(run, row)
        except (MissingValueError, ValueError):
            if name not in optional:
                raise
            continue
        out[name] = str(value) if name == "run_id" else _number(value)
    if "flops" not in out:
        out["flops"] = float(FLOPS_PER_PARAM_TOKEN) * out["params"] * out["tokens"]
    if "tokens" not in out:
        out["tokens"] = out["flops"] / (FLOPS_PER_PARAM_TOKEN * out["params"])
    return out


def _dotted(node: ast.expr) -> str | None:
    """The dotted name of `a`, `a.b.c` or `history["val/loss"]`; None for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value)
        return None if before is None else f"{before}.{node.attr}"
    if (
        isinstance(node, ast.Subscript)
        and isinstance(node.slice, ast.Constant)
        and isinstance(node.slice.value, str)
    ):
        before = _dotted(node.value)
        return None if before is None else f"{before}.{node.slice.value}"
    return None


def _resolve(run: ExternalRun, name: str) -> tuple[str, str] | None:
    """(root, name) of a name in this run: looked up in its history, then its config, then its summary."""
    root, _, rest = name.partition(".")
    if root in ROOTS and rest:
        if root == "history":
            return (root, rest) if rest in run.history_keys else None
        return (root, rest) if _walk(getattr(run, root), rest) is not None else None
    if name in run.history_keys:
        return "history", name
    for root in ("config", "summary"):
        if _walk(getattr(run, root), name) is not None:
            return root, name
    return None


def _walk(tree: Any, name: str) -> Any:
    """The value at a dotted name, or None; keys may contain dots themselves."""
    if not isinstance(tree, Mapping):
        return None
    if name in tree:
        return tree[name]
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        head = ".".join(parts[:cut])
        if head in tree:
            found = _walk(tree[head], ".".join(parts[cut:]))
            if found is not None:
                return found
    return None


def _look_up(run: ExternalRun, row: Mapping[str, Any], root: str, name: str) -> Any:
    value = row.get(name) if root == "history" else _walk(getattr(run, root), name)
    if value is None:
        raise MissingValueError(f"{root}.{name} has no value")
    return value


def _number(value: Any) -> float | int:
    """A value as a number; W&B stores NaN and infinities as text. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        try:
            return float(value)
        except TypeError:
            raise ValueError(f"{value!r} is not a number") from None
    return value


def _missing_message(run: ExternalRun, option: str, name: str) -> str:
    known = [*run.history_keys, *_flat_names(run.config)]
    last = {k.rpartition(".")[2]: k for k in known}
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5) or [
        last[k] for k in difflib.get_close_matches(name.rpartition(".")[2], last, n=1, cutoff=0.5)
    ]
    return f"it has no {name!r} for {option}" + (f" (closest: {near[0]!r})" if near else "")


def _flat_names(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat_names(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
