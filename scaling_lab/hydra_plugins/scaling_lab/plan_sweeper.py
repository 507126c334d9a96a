"""Owns the `scaling_lab_plan` sweeper: a Hydra multirun whose jobs are the pending runs of a plan.

Hydra alone has cartesian products only, no resume (facebookresearch/hydra#3328), and a sweep with a failed job exits 0.
Here lists on the command line multiply the plan, finished runs are left out, each job's overrides are its run ids and
where they are stored, and failures are read from the records afterwards.
"""

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

# Hydra imports this module at every start: nothing of ours is imported before a sweep begins.
log = logging.getLogger(__name__)


class PlanSweeper(Sweeper):
    """Hands the plan's pending runs to the launcher, `runs_per_job` a job."""

    def __init__(self, runs_per_job: int = 1, params: Mapping[str, str] | None = None) -> None:
        """`params` are lists of the experiment: the command line has already taken them over (`with_lists`)."""
        self.runs_per_job = runs_per_job
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None
        self.hydra_context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from hydra.core.plugins import Plugins

        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from scaling_lab.cli.planning import pending, settle_plan
        from scaling_lab.core.errors import UserError
        from scaling_lab.core.storage.store import RunStore
        from scaling_lab.launching.sweeping import plain, session

        assert self.config is not None
        assert self.hydra_context is not None
        if not isinstance(self.runs_per_job, int) or self.runs_per_job < 1:
            raise UserError(
                f"hydra.sweeper.runs_per_job={self.runs_per_job!r} must be a whole number of at least 1."
            )
        console, given, trees = session().console, session().given, session().trees
        loader = self.hydra_context.config_loader
        overrides = OverridesParser.create(loader).parse_overrides(arguments)
        if trees is None:
            # Hydra was started by other means than our command, which has composed every combination already.
            combinations = itertools.product(*(_values(override) for override in overrides))
            trees = [plain(loader.load_sweep_config(self.config, list(combo))) for combo in combinations]
        if given is None:
            given = {override.key_or_group.lstrip("+") for override in overrides}
        store = RunStore.for_sweep(trees[0]["results_dir"], trees[0]["sweep"])
        settled = settle_plan(store, trees, given)
        plan = session().plan = settled.plan
        if settled.new:
            console.say(f"planned {len(plan.runs)} runs, {plan.total_flops:.3g} FLOPs: {store.plan_path}")
            for note in plan.notes:
                console.say(f"  {note}")
        if trees[0].get("retry"):
            again = store.reopen_failed(plan)
            console.say(f"{len(again)} failed or diverged runs are tried again.")
        run_ids = pending(store, plan)
        done = len(plan.runs) - len(run_ids)
        if not run_ids:
            console.say(f"nothing to do: all {done} runs of {store.folder} are done.")
            return []
        if done:
            console.say(f"{done} of {len(plan.runs)} runs are done already; {len(run_ids)} to go.")
        jobs = [
            self._job(store, overrides, chunk)
            for chunk in _chunks(plan.runs, set(run_ids), self.runs_per_job)
        ]
        return self._launch(jobs)

    def _job(self, store: Any, overrides: Sequence[Any], run_ids: Sequence[str]) -> list[str]:
        """A job's overrides: the run ids, where they are stored, and who is told about them; plan.json has the rest."""
        from scaling_lab.cli.options.compose import hydra_text

        folder = store.folder.absolute()
        tracker = [o.input_line for o in overrides if o.key_or_group.partition(".")[0] == "tracker"]
        ids = ",".join(f"'{run_id}'" for run_id in run_ids)
        return [
            *tracker,
            f"++sweep={hydra_text('sweep', folder.name)}",
            f"++results_dir={hydra_text('results_dir', str(folder.parent))}",
            f"++run_ids=[{ids}]",
        ]

    def _launch(self, jobs: list[list[str]]) -> Any:
        from scaling_lab.cli.options.compose import first_line
        from scaling_lab.core.errors import UserError
        from scaling_lab.launching.sweeping import session

        assert self.launcher is not None
        console = session().console
        try:
            returns = self.launcher.launch(jobs, initial_job_idx=0)
        except UserError:
            raise
        except Exception as error:
            # A launcher may lose a job's return value though the run goes on or is over: the records know.
            console.warn(f"the launcher lost a job ({type(error).__name__}: {first_line(error)})")
            log.debug("launcher error", exc_info=True)
            return []
        failed = [r._return_value for r in returns if r.status == JobStatus.FAILED]
        for reason in failed:
            if isinstance(reason, (UserError, KeyboardInterrupt)):
                raise reason
        for reason in failed:
            console.warn(f"a job ended with {type(reason).__name__}: {reason}")
        return [returns]


def _values(override: Any) -> list[str]:
    """An override as texts, one for each value of a list."""
    from scaling_lab.core.errors import UserError

    key = override.get_key_element()
    if not override.is_sweep_override():
        return [f"{key}={override.get_value_element_as_str()}"]
    if not override.is_discrete_sweep():
        raise UserError(f"{override.input_line}: only lists, range() and choice() multiply a plan.")
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def _chunks(runs: Sequence[Any], pending: set[str], size: int) -> list[list[str]]:
    """The pending runs in jobs of `size`. Runs of one stack are trained as one program: they stay in one job."""
    units: dict[str, list[str]] = {}
    for run in runs:
        if run.run_id in pending:
            units.setdefault(run.execution.stack or run.run_id, []).append(run.run_id)
    jobs: list[list[str]] = []
    for unit in units.values():
        if not jobs or len(jobs[-1]) + len(unit) > size:
            jobs.append([])
        jobs[-1] += unit
    return jobs
