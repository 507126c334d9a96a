"""Launching a sweep's jobs through a Hydra launcher: the launcher itself, its callbacks, job overrides and Hydra's errors."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling_lab.core.errors import Interrupted, UserError, unknown
from scaling_lab.core.installation import extras, install_line
from scaling_lab.core.storage.store import RunStore
from scaling_lab.launching.progress import LineReporter
from scaling_lab.launching.sweeping import SweepJobs, plain, resume_hint
from scaling_lab.launching.workers import run_workers

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader
    from omegaconf import DictConfig

log = logging.getLogger(__name__)


@contextmanager
def open_launcher(config: DictConfig, loader: ConfigLoader) -> Iterator[Callable[[SweepJobs], None]]:
    """Within it, the Hydra launcher that `config` chooses, as a function that runs jobs until they end.

    Like a Hydra multirun without a sweeper: callbacks of `hydra.callbacks` see it start and end.

    Args:
        config: composed with `return_hydra_config=True`.
        loader: has the search path that `config` was composed with; launchers compose each job's config with it.

    Raises:
        UserError: the launcher is not installed or refuses its options.
    """
    from hydra._internal.callbacks import Callbacks
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.plugins import Plugins
    from hydra.core.utils import configure_log
    from hydra.types import HydraContext
    from omegaconf import OmegaConf

    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    # Launchers may fill in Hydra's part, which `set_config` makes read-only.
    OmegaConf.set_readonly(config.hydra, None)
    try:
        with hydra_errors(str(config.hydra.runtime.choices["hydra/launcher"])):
            configure_log(config.hydra.hydra_logging, config.hydra.verbose)
            callbacks = Callbacks(config)
            callbacks.on_multirun_start(config=config, config_name=config.hydra.job.config_name)
            launcher = Plugins.instance().instantiate_launcher(
                hydra_context=HydraContext(config_loader=loader, callbacks=callbacks),
                task_function=sweep_job,
                config=config,
            )
        yield lambda jobs: _launch(launcher, jobs, config)
        callbacks.on_multirun_end(config=config, config_name=config.hydra.job.config_name)
    finally:
        HydraConfig.instance().cfg = before


def _launch(launcher: Any, jobs: SweepJobs, config: DictConfig) -> None:
    if hasattr(launcher, "launch_runs"):
        # One of ours (hydra_plugins/scaling_lab): it starts workers or cluster jobs itself, from the run ids.
        launcher.launch_runs(jobs)
        return
    from hydra.core.utils import JobStatus

    try:
        returns = launcher.launch([job_overrides(jobs, ids) for ids in jobs.run_ids], initial_job_idx=0)
    except UserError:
        raise
    except Exception as error:
        # A launcher may lose a job's return value although its runs continue or have finished: the records decide.
        jobs.reporter.warn(f"the launcher lost a job ({type(error).__name__}: {first_line(error)})")
        log.debug("launcher error", exc_info=True)
        return
    failed = [r._return_value for r in returns if r.status == JobStatus.FAILED]
    for reason in failed:
        if isinstance(reason, (UserError, KeyboardInterrupt)):
            raise reason
    for reason in failed:
        jobs.reporter.warn(f"a job ended with {type(reason).__name__}: {reason}")


def sweep_job(config: Any) -> int:
    """One job of a sweep, in whichever process a Hydra launcher runs it: trains the runs of its config, as plan.json says.

    On CUDA it trains in a child process: an error of the device would leave the launcher's own one unusable for the jobs that
    follow. Returns the number of its runs that have a record, which nothing reads.
    """
    options = plain(config)
    store = RunStore(Path(str(options["results_dir"])) / str(options["sweep"]))
    run_ids = [str(run_id) for run_id in options["run_ids"] or ()]
    plan, tracker = store.read_plan(run_ids), options.get("tracker")
    if any(run.execution.device == "cuda" for run in plan.runs):
        run_workers(store, plan, run_ids, LineReporter(), workers=1, tracker=tracker, leave_others=True)
        return len(set(run_ids) & set(store.run_ids_with_record()))
    from scaling_lab.launching.worker import train_pending

    try:
        return len(train_pending(store, plan, run_ids, tracker))
    except Interrupted as stop:
        # The sweep is stopping, which is no error of this job; of all exceptions Hydra lets only KeyboardInterrupt pass.
        raise stop.with_hint(resume_hint(store)) from None


def job_overrides(jobs: SweepJobs, run_ids: Sequence[str]) -> list[str]:
    """What `sweep_job` needs, as Hydra overrides: the run ids, where they are stored, the tracker. plan.json has the rest."""
    folder = jobs.store.folder.absolute()
    options = {
        "sweep": folder.name,
        "results_dir": str(folder.parent),
        "tracker": jobs.tracker,
        "run_ids": run_ids,
    }
    return [f"++{key}={hydra_text(key, value)}" for key, value in options.items()]


def hydra_text(key: str, value: Any) -> str:
    """A value in Hydra's override grammar, so that the config holds exactly this value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{','.join(hydra_text(key, item) for item in value)}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{hydra_text(key, item)}" for name, item in value.items()) + "}"
    refuse_references(key, value)
    text = str(value)
    # Hydra halves backslashes before a quote and leaves the others alone.
    body = re.sub(r"(\\*)'", lambda m: m[1] * 2 + "\\'", text)
    body = re.sub(r"\\+$", lambda m: m[0] * 2, body)
    return f"'{body}'"


def refuse_references(key: str, value: Any) -> None:
    """Raise `UserError` for text that Hydra would read as a reference to another option."""
    if isinstance(value, (str, os.PathLike)) and "${" in str(value):
        raise UserError(f"{key}={str(value)!r}: '${{' means something else to Hydra; choose another name.")


@contextmanager
def hydra_errors(launcher: str = "basic") -> Iterator[None]:
    """Errors of Hydra as `UserError`. `launcher`: the choice of hydra/launcher."""
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except UserError:
        raise
    except MissingConfigException as error:
        group, _, choice = str(error.missing_cfg_file).strip("/").rpartition("/")
        if group == "hydra/launcher" and choice in extras():
            raise missing_extra(choice) from error
        raise unknown(group, choice, error.options or ()) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"Hydra refuses: {first_line(error)}") from error
    except (ImportError, RuntimeError) as error:
        # Raised by Hydra for a plugin class that it does not find.
        if not re.match(r"(Unknown|Invalid|Could not instantiate) plugin", first_line(error)):
            raise
        if launcher in extras():
            raise missing_extra(launcher) from error
        raise UserError(f"hydra/launcher={launcher}: {first_line(error)}.") from error


def missing_extra(launcher: str) -> UserError:
    """The error for a launcher of an optional extra, which has the launcher's name."""
    return UserError(f"hydra/launcher={launcher} is not installed: {install_line(launcher)}")


def first_line(error: BaseException) -> str:
    """The first line of a message that has any text, and the next one where it ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(error).__name__


@contextmanager
def environment_variables(**variables: str | None) -> Iterator[None]:
    """Sets environment variables (None: unset) for processes started within it; afterwards they are as before."""
    before = {name: os.environ.get(name) for name in variables}
    _set(variables)
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
