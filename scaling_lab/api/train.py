"""`train`: a plan's runs in worker processes or in this one, or a single run; `load_model`: what a run ended with."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scaling_lab.api.plan import PlanResult
from scaling_lab.api.sweep import Sweep
from scaling_lab.core.errors import UserError
from scaling_lab.core.installation import require

if TYPE_CHECKING:
    from scaling_lab.core.spec import Plan, PlannedRun
    from scaling_lab.core.storage.store import RunStore
    from scaling_lab.launching.progress import LaunchReporter


def train(
    sweep: PlanResult | Sweep | str | Path | None = None,
    /,
    *,
    workers: int | None = None,
    retry: Literal["failed"] | None = None,
    tracker: str | Mapping[str, Any] | None = None,
    progress: bool = True,
    **options: Any,
) -> Sweep:
    """Train what of a sweep is not done yet, or one run; returns the sweep. Safe to interrupt and to repeat.

    Args:
        sweep: what `plan` returned, or the folder of a sweep that has a plan. Without it the options describe one run.
        workers: worker processes; default: one a CPU core, or a few a GPU. 0 trains in this process, one run after another.
        retry: `"failed"` trains those again that failed or diverged, from their last checkpoint.
        tracker: `"wandb"` or `{"kind": "wandb", "project": ..., "mode": "offline"}` shows the runs there too.
        progress: whether to print lines about what is going on.
        **options: of a single run, those of `scaling-lab train`: `model={"width": 64, "depth": 2}, train_tokens=2e6`, also
            `data=`, `schedule=`, `seed=`, `device=` and so on. It is stored in results/train (`results_dir=`, `sweep=`).

    Returns:
        The sweep, with its runs' states and losses. A run that failed or diverged is no exception: it is a warning here, and
        its state and reason are in `to_frame()`.

    Raises:
        UserError: torch is not installed; a bad option; data other than the plan's; another plan has begun in the folder.
        DiskError: the folder cannot be written.

    >>> made = sl.plan(sweep="tiny", data={"max_mb": 1}, device="cpu", compile="false",
    ...     design={"budgets_flops": [1e8], "sizes_per_budget": 4, "noise_seeds": 1}, eval={"tokens": 1024})
    >>> sl.train(made, workers=0, progress=False)
    sweep tiny in results/tiny: 4 completed
    """
    from scaling_lab.cli.planning import add_corpus
    from scaling_lab.planning.preparation import with_corpus

    require("torch", "training")
    if workers is not None and workers < 0:
        raise UserError(f"workers={workers} must be at least 1, or 0 to train in this process.")
    if retry not in (None, "failed"):
        raise UserError(f"retry={retry!r} is not known. Choices: failed.")
    if sweep is None:
        return _train_one(options, tracker, progress)
    if options:
        raise UserError(f"{min(options)}: a sweep's runs are what its plan says; give the option to sl.plan.")
    if isinstance(sweep, PlanResult):
        sweep.save()
        store = Sweep(sweep.folder).store
    else:
        store = (sweep if isinstance(sweep, Sweep) else Sweep(sweep)).store
    plan = add_corpus(store, store.read_plan())
    with_corpus(plan, store.folder)  # refuses before processes are started
    if retry is not None:
        store.reopen_failed(plan)
    _train_plan(store, plan, workers, tracker_dict(tracker), _reporter(progress))
    return _outcome(store, [run.run_id for run in plan.runs])


def load_model(folder: str | Path, /, *, device: str = "cpu") -> Any:
    """The model that a run ended with, a `torch.nn.Module` in evaluation mode: logits (B, T, vocabulary) of tokens (B, T).

    Args:
        folder: a run's folder, RESULTS_DIR/SWEEP/runs/RUN_ID, or its weights.safetensors alone, wherever it is.
        device: where to put it.

    Raises:
        UserError: torch is not installed; the run has not ended or kept no weights (keep=none); the file is damaged.

    >>> made = sl.plan(sweep="tiny", data={"max_mb": 1}, device="cpu", compile="false",
    ...     design={"budgets_flops": [1e8], "sizes_per_budget": 4, "noise_seeds": 1}, eval={"tokens": 1024})
    >>> sweep = sl.train(made, workers=0, progress=False)
    >>> model = sl.load_model(f"results/tiny/runs/{made.run_ids[0]}")
    >>> sum(p.numel() for p in model.parameters()) > 0
    True
    """
    require("torch", "loading a model")
    from scaling_lab.training.run.weights import load_model as load

    return load(Path(folder).expanduser(), device)


def tracker_dict(tracker: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """The tracker's kind and options, checked."""
    from scaling_lab.cli.options.study import tracker_options

    node = (
        {"kind": "none"}
        if tracker is None
        else {"kind": tracker}
        if isinstance(tracker, str)
        else dict(tracker)
    )
    return tracker_options({"tracker": node})


def _train_plan(
    store: RunStore, plan: Plan, workers: int | None, tracker: dict[str, Any], reporter: LaunchReporter
) -> None:
    from scaling_lab.cli.planning import pending
    from scaling_lab.core.storage.files import disk_error

    run_ids = pending(store, plan)
    if not run_ids:
        return
    try:
        if workers == 0:
            from scaling_lab.launching.worker import train_pending

            train_pending(store, plan, run_ids, tracker)
        else:
            from scaling_lab.launching.workers import run_workers

            run_workers(store, plan, run_ids, reporter, workers=workers, tracker=tracker)
    except OSError as error:
        raise disk_error(error, store.folder) or error from error


def _train_one(options: Mapping[str, Any], tracker: str | Mapping[str, Any] | None, progress: bool) -> Sweep:
    """One run in this process; nothing to do where it is done."""
    from scaling_lab.cli.commands.train import refuse_changed_data
    from scaling_lab.core.storage.store import RunStore
    from scaling_lab.launching.worker import train_claimed
    from scaling_lab.tracking.sink.trackers import mirrors_closed

    planned, tree = _single(options)
    store = RunStore.for_sweep(Path(str(tree["results_dir"])).expanduser(), str(tree["sweep"]))
    reporter, chosen = _reporter(progress), tracker_dict(tracker)
    claim = store.claim(planned.spec)
    if claim is None:
        refuse_changed_data(store, planned)
        reporter.say(f"{planned.run_id} is {store.state(planned.run_id).state} already: nothing to do.")
    else:
        with mirrors_closed():
            train_claimed(planned, store, claim, None, chosen)
    return _outcome(store, [planned.run_id])


def _single(options: Mapping[str, Any]) -> tuple[PlannedRun, dict[str, Any]]:
    from scaling_lab.api.options import arguments
    from scaling_lab.cli.commands.train import planned_run
    from scaling_lab.cli.options.compose import read_command
    from scaling_lab.cli.options.study import TrainOnly, form_of_tree

    command = read_command(
        arguments("train", options), "train", lambda tree: form_of_tree(tree, extra=(TrainOnly,))
    )
    return planned_run(command.tree), command.tree


def _outcome(store: RunStore, run_ids: list[str]) -> Sweep:
    """The sweep; runs that did not end well are warnings."""
    for run_id in run_ids:
        state = store.state(run_id)
        if state.state in ("failed", "diverged"):
            warnings.warn(f"{run_id} {state.state}: {state.reason}", stacklevel=3)
    return Sweep(store.folder)


class _Silent:
    """A reporter for scripts that print their own lines: warnings become Python's."""

    def say(self, text: str) -> None:
        """Nothing is printed."""

    def note(self, text: str) -> None:
        """Nothing is printed."""

    def warn(self, text: str) -> None:
        warnings.warn(text, stacklevel=2)

    @contextmanager
    def display(self, sweep: str) -> Iterator[Any]:
        from scaling_lab.launching.progress import LineDisplay

        yield LineDisplay(sweep, self.say)


def _reporter(progress: bool) -> LaunchReporter:
    from scaling_lab.launching.progress import LineReporter

    return LineReporter() if progress else _Silent()
