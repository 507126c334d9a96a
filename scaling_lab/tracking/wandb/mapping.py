"""Owns runs of other people's trackers as the analysis wants them: a mapping of their names, and rows of our table.

A `ForeignRun` is what a tracker has of one run, wherever it was read from; a `RunMapping` says which of its names, or
which arithmetic over them, are params, tokens, flops and loss. Nothing here knows a tracker's client.
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

# Fields of a mapping that are no column of the table.
NOT_COLUMNS = ("extra", "not_job_type")
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
# 9 ** 9 ** 9 in somebody's mapping must not hang the import.
_MAX_POWER = 64


class Missing(Exception):
    """A run has nothing of this name."""


class Incomplete(Exception):
    """A run's curve came back with fewer points than it has; the message has the counts."""


@dataclass(frozen=True)
class ForeignRun:
    """One run of a tracker."""

    run_id: str
    name: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    history_keys: Mapping[str, int | None]
    """Metric -> how many rows of the history hold it, None where the tracker does not say."""
    read_history: Callable[[Sequence[str]], list[dict[str, Any]]] = field(repr=False)
    """Keys -> every row that has all of them, in order."""
    group: str | None = None
    job_type: str | None = None
    state: str = "finished"
    """finished, failed, crashed, running ... as W&B says it."""
    tags: Sequence[str] = ()


@dataclass(frozen=True)
class RunMapping:
    """Which of a run's names are our columns: a metric of the history, a key of the config (dots go inside) or of the
    summary, or arithmetic over them. `config.X`, `history.X` and `summary.X` say where; `history["val/loss"]` quotes."""

    loss: str
    """The loss, in nats, of the history"""
    params: str
    """Number of parameters N"""
    tokens: str | None = None
    """Tokens seen at a point of the history"""
    flops: str | None = None
    """Training FLOPs at a point of the history; without it 6 N D"""
    run_id: str | None = None
    """The run's id in the table; default: the tracker's"""
    budget_flops: str | None = None
    """The FLOP budget that a run was planned for"""
    seed: str | None = None
    """The run's seed"""
    loss_sem: str | None = None
    """Standard error of the loss"""
    extra: Mapping[str, str] = field(default_factory=dict)
    """Further numeric columns by name"""
    not_job_type: str | None = None
    """Runs of this job type trained nothing, and are passed over"""

    def __post_init__(self) -> None:
        if self.tokens is None and self.flops is None:
            raise UserError("mapping.tokens and mapping.flops are both missing: at least one is needed.")
        for name, text in self.columns().items():
            Expression(text, f"mapping.{name}")

    def columns(self) -> dict[str, str]:
        """Column -> expression, of those that are given."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in NOT_COLUMNS}
        return {name: text for name, text in own.items() if text is not None} | dict(self.extra)


class Expression:
    """One value of a mapping. Raises `UserError` (naming `option`) for what is no name and no arithmetic."""

    def __init__(self, text: str, option: str) -> None:
        self.text, self.option = text.strip(), option
        self._tree: ast.expr | None = None
        try:
            self._tree = ast.parse(self.text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError):
            return  # a name such as `val loss` is one still: the run decides
        self._check(self._tree)

    def history_keys(self, run: ForeignRun) -> set[str]:
        """The metrics of the history that it reads in this run. Raises `Missing`."""
        return {name for root, name in self._names(run) if root == "history"}

    def value(self, run: ForeignRun, row: Mapping[str, Any]) -> Any:
        """Its value at one row of the history. Raises `Missing` and `ValueError`."""
        whole = self._whole(run)
        if whole is not None:
            return _look_up(run, row, *whole)
        assert self._tree is not None
        try:
            return self._evaluate(self._tree, run, row)
        except (ArithmeticError, TypeError) as error:
            raise ValueError(f"{self.option}={self.text}: {error}") from None

    def _whole(self, run: ForeignRun) -> tuple[str, str] | None:
        """Where the text as it stands is a name of the run's (`val/loss`, `model.n_params`)."""
        found = _place(run, self.text)
        if found is None and self._tree is None:
            raise Missing(_nothing(run, self.option, self.text))
        return found

    def _names(self, run: ForeignRun) -> Iterator[tuple[str, str]]:
        whole = self._whole(run)
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
            place = _place(run, dotted)
            if place is None:
                raise Missing(_nothing(run, self.option, dotted))
            yield place

    def _check(self, node: ast.expr) -> None:
        """Refuse everything but names, numbers and arithmetic."""
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
                f"{self.option}={self.text} is no name and no arithmetic over names: wanted for example "
                "config.n_params, history['val/loss'] or history.step * config.batch_tokens."
            )

    def _evaluate(self, node: ast.expr, run: ForeignRun, row: Mapping[str, Any]) -> Any:
        dotted = _dotted(node)
        if dotted is not None:
            place = _place(run, dotted)
            if place is None:
                raise Missing(_nothing(run, self.option, dotted))
            return _number(_look_up(run, row, *place))
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


def rows_of_run(run: ForeignRun, mapping: RunMapping) -> list[dict[str, Any]]:
    """The run's curve as rows of our table.

    Raises:
        Missing: the run has not what the mapping names, or no row with it: it is to be left out.
        Incomplete: the tracker gave back less than it has; the message says how much.
    """
    columns = {name: Expression(text, f"mapping.{name}") for name, text in mapping.columns().items()}
    # What only says more about a point may be missing from a run or a row; the numbers that are fitted may not.
    optional = {"run_id", "budget_flops", "seed", "loss_sem", *mapping.extra}
    needed: set[str] = set()
    further: set[str] = set()
    for name in list(columns):
        try:
            keys = columns[name].history_keys(run)
        except Missing:
            if name not in optional:
                raise
            del columns[name]
            continue
        (further if name in optional else needed).update(keys)
    loss_keys = columns["loss"].history_keys(run)
    if not loss_keys:
        raise Missing(f"mapping.loss={mapping.loss} is no metric of its history")
    rows = whole_history(run, sorted(needed), sorted(loss_keys), sorted(further - needed))
    return [_table_row(run, columns, row, optional) for row in rows]


def whole_history(
    run: ForeignRun, keys: Sequence[str], loss_keys: Sequence[str], further: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Every row of the run's history that has the loss, checked against how many there are; with the `further` metrics
    where rows have them.

    Raises `Missing` for none, `Incomplete` with the counts.
    """
    counts = [run.history_keys.get(key) for key in loss_keys]
    expected = min((c for c in counts if c is not None), default=None)
    if further and expected is not None:
        rows = run.read_history([*keys, *further])
        if rows and len(rows) == expected:
            return rows
    rows = run.read_history(keys)
    for key in further:
        values = {row["_step"]: row[key] for row in run.read_history(["_step", key])}
        rows = [row | {key: values[row["_step"]]} if row.get("_step") in values else row for row in rows]
    if expected is None or len(rows) == expected:
        if not rows:
            raise Missing(f"no row of its history has {' and '.join(keys)}")
        return rows
    shown = " and ".join(repr(key) for key in loss_keys)
    with_loss = len(rows) if set(keys) == set(loss_keys) else len(run.read_history(loss_keys))
    if with_loss == expected:
        others = " and ".join(repr(key) for key in keys if key not in loss_keys)
        raise Incomplete(
            f"{len(rows)} of its {expected} rows with {shown} have {others} too: they were not logged in one call; map "
            "tokens and flops by arithmetic over the config and history._step"
        )
    raise Incomplete(f"{with_loss} of its {expected} points of {shown} came back")


def _table_row(
    run: ForeignRun, columns: Mapping[str, Expression], row: Mapping[str, Any], optional: set[str]
) -> dict[str, Any]:
    out: dict[str, Any] = {"run_id": run.run_id}
    for name, expression in columns.items():
        try:
            value = expression.value(run, row)
        except (Missing, ValueError):
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
    """`a`, `a.b.c` and `history["val/loss"]` as a dotted name; None for anything else."""
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


def _place(run: ForeignRun, name: str) -> tuple[str, str] | None:
    """(root, name in it) of what a name means in this run: its history first, then its config, then its summary."""
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
    """The value at a dotted name; keys may hold dots themselves. None where there is nothing."""
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


def _look_up(run: ForeignRun, row: Mapping[str, Any], root: str, name: str) -> Any:
    value = row.get(name) if root == "history" else _walk(getattr(run, root), name)
    if value is None:
        raise Missing(f"{root}.{name} has no value")
    return value


def _number(value: Any) -> float | int:
    """A value as a number; W&B writes NaN and infinities as text. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        try:
            return float(value)
        except TypeError:
            raise ValueError(f"{value!r} is no number") from None
    return value


def _nothing(run: ForeignRun, option: str, name: str) -> str:
    known = [*run.history_keys, *_flat_names(run.config)]
    last = {k.rpartition(".")[2]: k for k in known}
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5) or [
        last[k] for k in difflib.get_close_matches(name.rpartition(".")[2], last, n=1, cutoff=0.5)
    ]
    return f"it has no {name!r} for {option}" + (f" (but {near[0]!r})" if near else "")


def _flat_names(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat_names(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
