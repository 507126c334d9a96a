"""A small IsoFLOP sweep, planned, trained and analyzed as `scaling-lab sweep` and `analyze` do, without the command line."""

from __future__ import annotations

from typing import Any

from gpu_checks.runner import Context
from gpu_checks.sweep import train_seconds
from scaling_lab.core.schedules import Cosine
from scaling_lab.core.sources.pysource import PySource
from scaling_lab.core.spec import EvalSpec
from scaling_lab.core.storage.store import RunStore
from scaling_lab.planning.designs.isoflop import IsoFlopDesign
from scaling_lab.planning.plan import make_plan
from scaling_lab.planning.recipes.default import DefaultRecipe
from scaling_lab.planning.settings import ExecutionSettings, ModelSettings, SweepSettings

BUDGETS_FLOPS = {"full": (5e11, 2e12, 8e12), "tiny": (2e8, 4e8, 8e8)}
# Of an estimate in analysis.json; the files of gpu_check stay small.
LARGE_FIELDS = ("loss_curve", "profile")
VALIDATION_TOKENS = {"full": 32_768, "tiny": 1024}


def settings_of(device: str, size: str) -> SweepSettings:
    from scaling_lab.training.engine.devices import cuda_memory_gb

    tiny: dict[str, Any] = {"sizes_per_budget": 4, "noise_seeds": 1} if size == "tiny" else {}
    execution = ExecutionSettings(
        device=device,
        # Eager steps in CUDA graphs: compiling each shape and batch would take longer than training it.
        compile="false" if device == "cuda" else "auto",
        deterministic=device == "cpu",
        memory_gb=cuda_memory_gb() if device == "cuda" else None,
    )
    return SweepSettings(
        sweep="gpu_check", design=IsoFlopDesign(budgets_flops=BUDGETS_FLOPS[size], **tiny), recipe=DefaultRecipe(),
        model=ModelSettings(), data=PySource(), schedule=Cosine(), eval=EvalSpec(tokens=VALIDATION_TOKENS[size]),
        execution=execution,
    )  # fmt: skip


def analyzed(store: RunStore, size: str) -> dict[str, Any]:
    """Each approach's exponents and status. Raises `UserError` if no law can be fitted."""
    from scaling_lab.analysis.analysis import analyze_records
    from scaling_lab.analysis.data.sweep_records import split_by_role
    from scaling_lab.analysis.inference.bootstrap import BootstrapSettings
    from scaling_lab.analysis.settings import AnalysisSettings

    quick = {
        "bootstrap": BootstrapSettings(resamples=20),
        "sensitivity": False,
        "backtest": False,
        "profile": False,
    }
    settings = AnalysisSettings(**quick) if size == "tiny" else AnalysisSettings()  # type: ignore[arg-type]
    # Not the ledger, which is faster for thousands of runs but needs pyarrow.
    records, problems = store.load_records()
    found = analyze_records(split_by_role(records), settings)
    if found.analysis is None:
        raise RuntimeError(f"the sweep gave no law: {found.problem}")
    document = found.analysis.to_json_dict(versions={})
    return {
        "estimates": [{k: v for k, v in e.items() if k not in LARGE_FIELDS} for e in document["estimates"]],
        "problems": [str(problem) for problem in problems],
        "mfu": {record.run_id: record.mfu for record in records},
    }


def run(context: Context) -> None:
    plan = make_plan(settings_of(context.device, context.size))
    stacked = sum(run.execution.stack is not None for run in plan.runs)
    context.write(
        runs=len(plan.runs),
        total_flops=plan.total_flops,
        steps=sum(run.spec.steps for run in plan.runs),
        compiled=sum(run.execution.compile for run in plan.runs),
        stacked=stacked,
    )
    folder = context.folder / "work" / "isoflop"
    seconds = train_seconds(plan, folder)
    store = RunStore(folder)
    losses = {run.run_id: store.state(run.run_id).final_val_loss_nats for run in plan.runs}
    context.write(train_s=round(seconds, 2), losses_nats=losses)
    context.write(**analyzed(store, context.size))
    for each in context.result["estimates"]:
        context.say(f"{each['approach']}: {each['status']}")
