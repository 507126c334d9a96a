"""`plan`: the runs of a sweep and their cost, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling_lab.api.html import html_table
from scaling_lab.api.result import captured
from scaling_lab.core.storage.store import RunStore

if TYPE_CHECKING:
    import pandas as pd

    from scaling_lab.core.spec import Plan


def plan(experiment: str | None = None, **options: Any) -> PlanResult:
    """A sweep's runs with sizes, horizons, learning rates and every rounding. Nothing is written or trained.

    With a sweep's name alone (`sl.plan(sweep="mine")`) it is the plan on disk.

    Args:
        experiment: a whole study by name (`quickstart`), whose options the others change.
        **options: those of `scaling-lab plan`, by the same names; groups as dictionaries, whose `kind` chooses another member:
            `sweep="mine"`, `design={"budgets_flops": [1e11, 4e11]}`, `data={"kind": "tokens", "path": "tokens.npy"}`,
            `model={"context": 256}`, `seed=1`, `device="cuda"`, `results_dir="results"`.

    Raises:
        UserError: an unknown option, value or choice, or a sweep that cannot be planned.

    >>> made = sl.plan(sweep="mine", data="context_tree", design={"budgets_flops": [1e10, 4e10], "noise_seeds": 1})
    >>> made
    plan mine: 9 runs, 2.4e+11 FLOPs (six_n_with_head), ...
    >>> made.to_frame()["budget_flops"].tolist()[::6]
    [10000000000.0, 40000000000.0]
    """
    from scaling_lab.api.options import arguments
    from scaling_lab.cli.commands.plan import read_study, store_of
    from scaling_lab.cli.planning import defines_plan, make_merged_plan

    chosen = {} if experiment is None else {"experiment": experiment}
    command = read_study(arguments("plan", {**chosen, **options}), "plan", launches=False)
    trees = [combination.tree for combination in command.combinations]
    store = store_of(command)
    if defines_plan(command.given):
        made = make_merged_plan(trees, given=command.given)
    else:
        made = store.read_plan()
    return PlanResult(made, store, trees, command.given)


class PlanResult:
    """A sweep that is planned: `sl.train` trains it.

    >>> made = sl.plan(sweep="mine", data="context_tree", design={"budgets_flops": [1e10]})
    >>> made.save().name
    'plan.json'
    """

    def __init__(
        self, made: Plan, store: RunStore, trees: Sequence[Mapping[str, Any]], given: Mapping[str, str]
    ) -> None:
        self.plan, self._store, self._trees, self._given = made, store, list(trees), dict(given)

    @property
    def sweep(self) -> str:
        """The sweep's name."""
        return self.plan.sweep

    @property
    def folder(self) -> Path:
        """Where the sweep is, or will be: RESULTS_DIR/SWEEP."""
        return self._store.folder

    @property
    def run_ids(self) -> tuple[str, ...]:
        """The runs' ids, in the plan's order."""
        return tuple(run.run_id for run in self.plan.runs)

    @property
    def total_flops(self) -> float:
        """Training FLOPs of all runs, as the plan counts them."""
        return self.plan.total_flops

    @property
    def device(self) -> str:
        """cpu, cuda or mps."""
        return self.plan.runs[0].execution.device

    @property
    def notes(self) -> tuple[str, ...]:
        """What was rounded, and what there is to know about the plan."""
        return (*self.plan.rounding, *self.plan.notes)

    def seconds(self, workers: int | None = None) -> float | None:
        """An estimate of the time that `workers` processes take (default: one a core, or one on a GPU), from measured steps of
        this device where there are any (`scaling-lab plan probe=true`); None on a device of unknown speed."""
        from scaling_lab.launching.speeds import speeds_for
        from scaling_lab.planning.cost import estimate_plan_seconds
        from scaling_lab.planning.execution import usable_cores

        cores = 1 if self.device == "cuda" else usable_cores()
        side_by_side = workers or max(1, cores // self.plan.runs[0].execution.threads)
        return estimate_plan_seconds(self.plan.runs, side_by_side, speeds_for(self.device))

    def save(self) -> Path:
        """Write plan.json into the sweep's folder; returns its path.

        A plan of which no run has begun is replaced. Raises `UserError` where another plan has begun there.
        """
        from scaling_lab.cli.planning import settle_plan

        settle_plan(self._store, self._trees, self._given, replace_unstarted=True)
        return self._store.plan_path

    def to_frame(self) -> pd.DataFrame:
        """One row a run: budget_flops, width, depth, n_params, train_tokens, steps, batch_tokens, peak_lr, seed, ..."""
        import dataclasses

        import pandas as pd

        from scaling_lab.cli.commands.plan import corpus_tokens
        from scaling_lab.planning.plan import describe

        rows = describe(self.plan, corpus_tokens(self.plan))
        return pd.DataFrame([dataclasses.asdict(row) for row in rows]).set_index("run_id")

    def to_dict(self) -> dict[str, Any]:
        """What plan.json holds."""
        import json

        found: dict[str, Any] = json.loads(self.plan.to_json())
        return found

    def summary(self, width: int = 110) -> str:
        """Grid, cost, roundings and notes as the terminal shows them."""
        from scaling_lab.cli.commands.plan import print_plan

        return captured(lambda console: print_plan(console, self.plan, {}), width)

    def _cost(self) -> str:
        from scaling_lab.core.formatting import human_time

        seconds = self.seconds()
        time = "time not known beforehand" if seconds is None else f"about {human_time(seconds)}"
        total = f"{self.total_flops:.2g} FLOPs ({self.plan.convention})"
        return f"{len(self.plan.runs)} runs, {total}, {time} on {self.device}"

    def __repr__(self) -> str:
        return f"plan {self.sweep}: {self._cost()}"

    def _repr_html_(self) -> str:
        shown = (
            "budget_flops",
            "width",
            "depth",
            "n_params",
            "train_tokens",
            "steps",
            "batch_tokens",
            "peak_lr",
            "seed",
        )
        frame = self.to_frame()
        rows = [
            [f"{cell:g}" for cell in row]
            for row in frame[list(shown)].head(_MOST_ROWS).itertuples(index=False)
        ]
        more = len(frame) - len(rows)
        return html_table(repr(self), shown, rows, f"and {more} more" if more > 0 else "")


# A notebook shows so many runs of a plan; `to_frame()` has them all.
_MOST_ROWS = 40
