"""The `local` launcher: worker processes of this machine side by side instead of one job after another."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

if TYPE_CHECKING:
    from scaling_lab.launching.sweeping import SweepJobs

# Hydra imports this module at every start: nothing of ours is imported before a launch.


class LocalLauncher(Launcher):
    """Starts `scaling_lab.worker` processes over the runs of all jobs; claims assign each run to one of them."""

    def __init__(self, workers: int | None = None, max_attempts: int = 3) -> None:
        self.workers, self.max_attempts = workers, max_attempts

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Nothing to prepare: workers read plan.json."""

    def launch_runs(self, jobs: "SweepJobs") -> None:
        """Train the runs of a sweep; returns when each has a record."""
        from scaling_lab.core.storage.files import disk_error
        from scaling_lab.launching.workers import run_workers

        run_ids = [run_id for ids in jobs.run_ids for run_id in ids]
        try:
            run_workers(
                jobs.store,
                jobs.plan,
                run_ids,
                jobs.reporter,
                workers=self.workers,
                max_attempts=self.max_attempts,
                tracker=jobs.tracker,
            )
        except OSError as error:
            raise disk_error(error, jobs.store.folder) or error from error

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Hydra's entry for a multirun, which has no plan."""
        from scaling_lab.core.errors import UserError

        raise UserError(
            "hydra/launcher=local runs sweeps; train -m takes hydra/launcher=basic, joblib or another."
        )
