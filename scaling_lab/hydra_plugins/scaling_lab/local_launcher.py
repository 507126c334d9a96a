"""Owns the `local` launcher: worker processes of this machine side by side instead of one job after another."""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

# Hydra imports this module at every start: nothing of ours is imported before a launch.


class LocalLauncher(Launcher):
    """Starts `scaling_lab.worker` processes over all the jobs' runs; they share them out by their claims."""

    def __init__(self, workers: int | None = None, max_attempts: int = 3) -> None:
        self.workers, self.max_attempts = workers, max_attempts
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from scaling_lab.cli.display.progress import ConsoleReporter
        from scaling_lab.cli.options.study import tracker_options
        from scaling_lab.core.errors import UserError
        from scaling_lab.core.storage.files import disk_error
        from scaling_lab.core.storage.store import RunStore
        from scaling_lab.launching.sweeping import plain, session
        from scaling_lab.launching.workers import run_workers

        assert self.config is not None
        assert self.hydra_context is not None
        loader = self.hydra_context.config_loader
        first = plain(loader.load_sweep_config(self.config, list(job_overrides[0])))
        if not first.get("run_ids"):
            raise UserError(
                "hydra/launcher=local runs sweeps; train -m takes hydra/launcher=basic, joblib or another."
            )
        run_ids = [run_id for overrides in job_overrides for run_id in _run_ids(overrides)]
        store = RunStore.for_sweep(first["results_dir"], first["sweep"])
        try:
            run_workers(
                store,
                session().plan or store.read_plan(),
                run_ids,
                ConsoleReporter(session().console),
                workers=self.workers,
                max_attempts=self.max_attempts,
                tracker=tracker_options(first),
            )
        except OSError as error:
            raise disk_error(error, store.folder) or error from error
        return [_returned(overrides) for overrides in job_overrides]


def _run_ids(overrides: Sequence[str]) -> list[str]:
    """Ids from a job's `++run_ids=['a','b']`: parsing them all by composing would take 0.1 s a job."""
    for override in overrides:
        key, _, value = override.partition("=")
        if key.lstrip("+") == "run_ids":
            return [item.strip().strip("'") for item in value.strip("[]").split(",") if item.strip()]
    return []


def _returned(overrides: Sequence[str]) -> JobReturn:
    done: Any = JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED)
    done.return_value = None
    return done
