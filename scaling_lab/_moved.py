"""Old module paths: importing one raises `ImportError` that names the new path."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import FrameType
from typing import NoReturn

# Old package -> new package -> the modules that went there, `old=new` where the name changed too. A module of an old
# package that is not listed has its place and name in the package's `*`.
MOVED: dict[str, dict[str, str]] = {
    "": {"": "analyse=analysis plan=planning prepare=corpora report=reporting train=training"},
    "analyse": {
        "analysis": "*",
        "analysis.approaches.isoflop": "grid_bias",
        "analysis.data": "ledger observations record_losses record_observations tuning_records=sweep_records",
        "analysis.data.tables": "table_files=files table_rows=rows tables=table units",
        "analysis.fitting": "fitting=fit fitting_newton=newton fitting_objective=objective fitting_profile=profile "
        "fitting_scale=scale fitting_search=search fitting_status=status",
        "analysis.inference": "agreement bounded=bands calibration caveats compare_laws=law_comparison predict=prediction "
        "profiles sensitivity uncertainty=bootstrap",
        "analysis.studies": "fact_exponents known_floor lr_transfer skills",
        "analysis.studies.shared": "known_floor_error=floor_error tuning=excess_loss tuning_fit=lr_quadratic",
        "tracking.wandb": "foreign_runs=mapping",
    },
    "analyse.approaches": {
        "analysis.approaches": "*",
        "analysis.approaches.envelope": "annealing ends envelope hull",
        "analysis.approaches.isoflop": "grid_fit isoflop shared_shape valley=minimum valleys",
    },
    "cli": {
        "cli.display": "console prepare_display progress standing=sweep_status summary",
        "cli.options": "analysis_options arguments compose configs forms helptext=help study values",
        "launching": "cluster cluster_job slurm submitit_backends sweeping workers",
        "tracking.wandb": "wandb_files=run_files wandb_runs=runs wandb_study=study",
    },
    "core": {
        "core": "source_option=sources",
        "core.sources.files": "shard_check token_parquet",
        "core.sources.generation": "counter_random generated=documents integer_zipf zipf_exposure",
        "core.storage": "claims files serial=serialization store",
    },
    "plan": {"planning": "* design=plan"},
    "prepare": {"corpora": "*"},
    "report": {
        "analysis.studies": "floor_words=known_floor",
        "reporting": "* figures_floor=finding_figures figures_skills=finding_figures gallery=figure_list report=page "
        "report_tables=tables tables_checks=tables tables_tuning=tables words=captions",
        "reporting.studies": "figures_transfer=lr_transfer figures_tuning=tuning",
    },
    "train": {
        "training": "*",
        "launching": "worker",
        "tracking.sink": "tracking=trackers wandb_client",
        "training.data": "feed order",
        "training.engine": "cuda_graph devices gradient memory optim=optimizer parametrization=optimizer step "
        "step_library",
        "training.measure": "coordinates divergence evaluate=evaluation noise=noise_scale",
        "training.parallel": "distributed=team sharded",
        "training.run": "checkpoint curve loop member pulse=heartbeat session stopping",
    },
    "train.data": {"training.data.generated": "*"},
}
_HINTS = {
    "cli.cluster_job": "an older version submitted this job, the same `scaling-lab sweep` command submits it again",
    "train.worker": "start one with `scaling-lab worker FOLDER` or `python -m scaling_lab.worker FOLDER`",
}
_ROOT = "scaling_lab."


def new_path(old: str) -> str | None:
    """The new path of a module, both without `scaling_lab.`; None if it never moved."""
    package, _, name = old.rpartition(".")
    rest: str | None = None
    for new, names in MOVED.get(package, {}).items():
        for entry in names.split():
            before, _, after = entry.partition("=")
            if before == name:
                return ".".join(part for part in (new, after or before) if part)
            if before == "*":
                rest = f"{new}.{name}"
    if rest is None and package and (parent := new_path(package)) is not None:
        return f"{parent}.{name}"
    return rest


class _MovedModules:
    """A meta path finder that finds nothing and refuses old paths."""

    @staticmethod
    def find_spec(fullname: str, path: object = None, target: object = None) -> None:
        if fullname.startswith(_ROOT) and new_path(fullname.removeprefix(_ROOT)) is not None:
            _refuse(_asked_for(fullname).removeprefix(_ROOT))


def _asked_for(fullname: str) -> str:
    """What is being imported: of `import a.b.c` Python imports `a.b` first, below frames of its own that say `a.b.c`."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("importlib."):
        name = frame.f_locals.get("name")
        if isinstance(name, str) and name.startswith(f"{fullname}."):
            fullname = name
        frame = frame.f_back
    return fullname


def _refuse(old: str) -> NoReturn:
    wanted = new_path(old) or ""
    new = wanted
    # What was moved once more, or divided: its package at least.
    while "." in new and find_spec(_ROOT + new) is None:
        new = new.rpartition(".")[0]
    verb = "is now" if new == wanted else "is now in"
    hint = f": {_HINTS[old]}" if old in _HINTS else ""
    raise ImportError(f"{_ROOT}{old} {verb} {_ROOT}{new}{hint}.", name=_ROOT + old)


sys.meta_path.insert(0, _MovedModules)
