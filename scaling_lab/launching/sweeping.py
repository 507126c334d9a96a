"""Owns a sweep from the command line to Hydra and back: the argument list for `hydra.main`, the job that any launcher
runs, and the outcome, which is read from the records and never from what a job returned."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling_lab.cli.display.console import Console
from scaling_lab.cli.options.compose import Command, environment, first_line, hydra_overrides, own_configs
from scaling_lab.cli.options.configs import builtin_folder
from scaling_lab.cli.options.study import tracker_options
from scaling_lab.core.errors import Interrupted, UserError, unknown
from scaling_lab.core.record import RunStatus
from scaling_lab.core.spec import Plan
from scaling_lab.core.storage.store import FINISHED, RunState, RunStore


@dataclass
class Session:
    """What the command and the plugins that Hydra makes in between share in this process."""

    console: Console
    given: set[str] | None = None
    """Keys that the user gave; None where Hydra was started by other means."""
    trees: Sequence[Mapping[str, Any]] | None = None
    """The composed combinations of the command line, checked; None where Hydra was started by other means."""
    plan: Plan | None = None
    """What is being run, once it is settled: a plan of 10,000 runs takes a second to read."""
    local: bool = False
    """Whether the local launcher showed the progress itself."""


_session: list[Session] = []


def session() -> Session:
    """The current session, or a plain one where the plugins are used outside our command line."""
    return _session[-1] if _session else Session(Console())


@contextmanager
def open_session(new: Session) -> Iterator[Session]:
    _session.append(new)
    try:
        yield new
    finally:
        _session.pop()


def run_multirun(
    command: Command, config_name: str, job: Callable[[Any], Any], *, extra: Sequence[str] = ()
) -> None:
    """`hydra.main` over `command`: composes, sweeps and launches as any Hydra multirun. Exceptions reach the caller."""
    import hydra
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    argv = ["scaling-lab", *extra, *hydra_overrides(command)]
    decorated = hydra.main(version_base="1.3", config_path=str(builtin_folder()), config_name=config_name)(
        job
    )
    old_argv, sys.argv = sys.argv, argv
    own = None if command.config_dir is None else Path(command.config_dir).expanduser()
    try:
        # Without it Hydra prints its own error block and exits 1; with it the exception comes to us.
        with environment(HYDRA_FULL_ERROR="1"), own_configs(own):
            decorated()
    except UserError:
        raise
    except MissingConfigException as error:
        group, _, choice = str(error.missing_cfg_file).strip("/").rpartition("/")
        if group == "hydra/launcher" and choice in _extras():
            raise UserError(
                f"hydra/launcher={choice} is not installed: pip install 'scaling-lab[{choice}]' (in a clone: "
                f"pip install -e '.[{choice}]')."
            ) from error
        raise unknown(group, choice, error.options or ()) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"Hydra refuses: {first_line(error)}") from error
    finally:
        sys.argv = old_argv


def _extras() -> list[str]:
    """What `pip install scaling-lab[NAME]` adds."""
    from importlib.metadata import PackageNotFoundError, metadata

    try:
        return metadata("scaling-lab").get_all("Provides-Extra") or []
    except PackageNotFoundError:
        return []


def sweep_job(config: Any) -> int:
    """One job of a sweep under any launcher: trains the runs whose ids it was handed, as plan.json says.

    Returns how many records it made; nobody relies on it.
    """
    from scaling_lab.launching.worker import train_pending

    store = RunStore(Path(str(config.results_dir)) / str(config.sweep))
    run_ids = [str(run_id) for run_id in config.run_ids or ()]
    try:
        return len(train_pending(store, store.read_plan(run_ids), run_ids, tracker_options(plain(config))))
    except Interrupted as stop:
        # Not an error of this job: the whole sweep was told to stop, and Hydra passes only this on.
        raise stop.with_hint(go_on_hint(store)) from None


def go_on_hint(store: RunStore) -> str:
    """What an interrupted sweep says."""
    plan = store.read_plan()
    done = len(set(store.run_ids_with_record()) & {run.run_id for run in plan.runs})
    results = store.folder.parent
    where = (
        ""
        if results.absolute() == Path("results").absolute()
        else f" results_dir={shlex.quote(str(results))}"
    )
    return f"{done} of {len(plan.runs)} runs are done; `scaling-lab sweep sweep={store.folder.name}{where}` goes on."


def plain(config: Any) -> dict[str, Any]:
    """A composed config as plain values, without Hydra's own part."""
    from omegaconf import OmegaConf

    tree = OmegaConf.to_container(config, resolve=True)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items() if key != "hydra"}


def report_outcome(console: Console, store: RunStore, plan: Plan, launch: Sequence[str] = ()) -> int:
    """Say how the plan's runs stand and return the exit status: 0 all completed, 1 otherwise.

    `launch`: the overrides that chose the launcher, to be given again.
    """
    results = "" if store.folder.parent == Path("results") else f" results_dir={store.folder.parent}"
    again = " ".join(
        [f"scaling-lab sweep sweep={store.folder.name}{results}", *(shlex.quote(o) for o in launch)]
    )
    states = list(store.states(plan))
    bad = [s for s in states if s.state in (RunStatus.FAILED, RunStatus.DIVERGED)]
    open_runs = [s for s in states if s.state not in FINISHED]
    done = len(states) - len(bad) - len(open_runs)
    console.say(
        f"{done} of {len(states)} runs completed" + (f", {len(bad)} failed or diverged" if bad else "")
    )
    for state in bad:
        console.warn(f"{state.run_id} {state.state}: {state.reason}")
    if bad:
        console.say(f"to try them again: {again} retry=failed")
    if open_runs:
        console.warn(f"{len(open_runs)} runs are not over ({_counts(open_runs)}); to go on: {again}")
    return 1 if bad or open_runs else 0


def _counts(states: Sequence[RunState]) -> str:
    names = [s.state for s in states]
    return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
