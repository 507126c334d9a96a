"""The `submitit_slurm` and `submitit_local` launchers: a sweep's jobs through submitit, judged by their records.

hydra-submitit-launcher's own launchers wait for return values, which a killed job never gives, and have no plan. They
still run an ordinary multirun (train -m).
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

if TYPE_CHECKING:
    from scaling_lab.launching.sweeping import SweepJobs

# Hydra imports this module at every start: nothing of ours and no submitit is imported before a launch.


class _SubmititLauncher(Launcher):
    """Options as in conf/hydra/launcher/submitit_*.yaml."""

    kind = ""

    def __init__(
        self,
        workers: int | None = None,
        max_attempts: int = 3,
        timeout_min: int | None = None,
        mem_gb: float | None = None,
        time_factor: float = 3.0,
        memory_factor: float = 1.5,
        max_num_timeout: int = 20,
        name: str | None = None,
        **options: Any,
    ) -> None:
        self.workers, self.max_attempts, self.name = workers, max_attempts, name
        self.timeout_min, self.mem_gb = timeout_min, mem_gb
        self.time_factor, self.memory_factor = time_factor, memory_factor
        self.max_num_timeout = max_num_timeout
        self.options = options
        self.config: DictConfig | None = None
        self.context: tuple[HydraContext, TaskFunction] | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.context = config, (hydra_context, task_function)

    def launch_runs(self, jobs: "SweepJobs") -> None:
        """Submit a sweep's jobs, and wait until every run has a record or no job is left."""
        from scaling_lab.launching.cluster import JobRequest, launch_jobs
        from scaling_lab.launching.hydra_jobs import environment_variables
        from scaling_lab.launching.speeds import gpu_of_job, gpus_of_job, speeds_for

        options = self._plain_options()
        named = None if jobs.gpu else gpu_of_job(options)
        workers = 1 if self.workers is None else self.workers
        request = JobRequest(self.timeout_min, self.mem_gb, workers, self.time_factor, self.memory_factor)
        # What a worker's -P does (launching/workers.py): submitit starts its own Python, and sbatch passes the environment on.
        with environment_variables(PYTHONSAFEPATH="1"):
            launch_jobs(
                self._backend(jobs.plan.runs[0].execution, workers),
                jobs,
                request,
                name=self.name,
                max_attempts=self.max_attempts,
                speeds=speeds_for(jobs.plan.runs[0].execution.device, named.name if named else jobs.gpu),
                gpus=gpus_of_job(options),
            )

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Hydra's entry for a multirun (`train -m`)."""
        from scaling_lab.launching.hydra_jobs import environment_variables

        with environment_variables(PYTHONSAFEPATH="1"):
            return self._multirun(job_overrides, initial_job_idx)

    @abstractmethod
    def _backend(self, execution: Any, workers: int) -> Any:
        """What submits jobs of `workers` workers each (`launching.submitit_backends`)."""

    def _multirun(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """An ordinary Hydra multirun, by hydra-submitit-launcher; its options are a part of ours."""
        from scaling_lab.core.errors import UserError
        from scaling_lab.core.installation import install_line

        try:
            from hydra_plugins.hydra_submitit_launcher import config, submitit_launcher
        except ImportError as error:
            raise UserError(
                f"train -m hydra/launcher=submitit_{self.kind} needs hydra-submitit-launcher ({error}): "
                f"{install_line('slurm')}"
            ) from error
        from omegaconf import OmegaConf

        assert self.config is not None
        assert self.context is not None
        slurm = self.kind == "slurm"
        known = OmegaConf.structured(config.SlurmQueueConf if slurm else config.LocalQueueConf)
        given = {k: v for k, v in self._plain_options().items() if k in known and v is not None}
        parameters: dict[str, Any] = {"timeout_min": self.timeout_min or 60, **given}
        if self.mem_gb:
            parameters["mem_gb"] = self.mem_gb
        if slurm:
            parameters["max_num_timeout"] = self.max_num_timeout
        if self.name:
            parameters["name"] = self.name
        folder = f"{self.config.hydra.sweep.dir}/cluster/multirun/%j"
        cls = submitit_launcher.SlurmLauncher if slurm else submitit_launcher.LocalLauncher
        launcher = cls(submitit_folder=folder, **parameters)
        launcher.setup(hydra_context=self.context[0], task_function=self.context[1], config=self.config)
        returns: Sequence[JobReturn] = launcher.launch(job_overrides, initial_job_idx)
        return returns

    def _plain_options(self) -> Mapping[str, Any]:
        from omegaconf import OmegaConf

        return {
            k: OmegaConf.to_container(v, resolve=True) if OmegaConf.is_config(v) else v
            for k, v in self.options.items()
        }


class SubmititSlurm(_SubmititLauncher):
    """Job arrays of a Slurm cluster."""

    kind = "slurm"

    def _backend(self, execution: Any, workers: int) -> Any:
        from scaling_lab.launching.submitit_backends import SlurmBackend

        options = {k: v for k, v in self._plain_options().items() if v is not None and v != {}}
        if not {"cpus_per_task", "cpus_per_gpu"} & options.keys():
            options["cpus_per_task"] = workers * execution.threads
        if execution.device == "cuda" and not {"gpus_per_node", "gpus_per_task", "gres"} & options.keys():
            options["gpus_per_node"] = 1
        return SlurmBackend(options, self.max_num_timeout)


class SubmititLocal(_SubmititLauncher):
    """The same jobs as processes of this machine."""

    kind = "local"

    def _backend(self, execution: Any, workers: int) -> Any:
        import os

        from scaling_lab.launching.submitit_backends import LocalBackend

        cores = os.cpu_count() or 1
        parallel = self.options.get("array_parallelism") or max(1, cores // (workers * execution.threads))
        return LocalBackend(parallel, self.max_num_timeout)
