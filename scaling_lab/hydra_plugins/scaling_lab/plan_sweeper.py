"""The `scaling_lab_plan` sweeper: the `hydra.sweeper` options of `scaling-lab sweep`."""

from collections.abc import Mapping
from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

# Hydra imports this module at every start: nothing of ours is imported.


class PlanSweeper(Sweeper):
    """Names the options; `scaling-lab sweep` reads them and gives its jobs to the launcher itself. Hydra makes a sweeper
    only for a multirun (`train -m`), whose jobs are combinations of values and not the runs of a plan."""

    def __init__(self, runs_per_job: int = 1, params: Mapping[str, str] | None = None) -> None:
        self.runs_per_job, self.params = runs_per_job, params

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Nothing to prepare."""

    def sweep(self, arguments: list[str]) -> Any:
        """Hydra's entry for a multirun."""
        from scaling_lab.core.errors import UserError

        raise UserError(
            "hydra/sweeper=scaling_lab_plan is for sweep; train -m takes hydra/sweeper=basic or another."
        )
