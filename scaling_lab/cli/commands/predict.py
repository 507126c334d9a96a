"""`scaling-lab predict`: the compute-optimal size, data and loss at a budget, from a sweep or a table."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from scaling_lab.analysis.data.tables.units import units_sentence
from scaling_lab.cli.commands.analyze import Where, analyze_source, command_text
from scaling_lab.cli.display.console import Console
from scaling_lab.cli.display.summary import predictions_table
from scaling_lab.cli.options.analysis_options import analysis_form, analysis_settings, resolve_where
from scaling_lab.cli.options.arguments import Arguments
from scaling_lab.cli.options.compose import read_command
from scaling_lab.cli.options.forms import Form, build
from scaling_lab.core.errors import UserError


@dataclass(frozen=True)
class Predict(Where):
    """Options of `predict` in addition to the analysis's own."""

    compute_flops: tuple[float, ...] = ()
    """Budget to predict at, training FLOPs; several as [1e14,1e15]"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.compute_flops:
            raise UserError(
                "compute_flops is missing: the budget to predict at, for example compute_flops=1e15."
            )
        for flops in self.compute_flops:
            if not flops > 0:
                raise UserError(f"compute_flops={flops:g} must be positive.")


def form(arguments: Arguments) -> Form:
    made = analysis_form("predict", Predict, arguments.get("config_dir"))
    # What only analyze writes or prints has no meaning here.
    hidden = (
        "out",
        "tuning",
        "predict_flops",
        "sensitivity",
        "backtest",
        "metrics",
        "compare_laws",
        "profile",
        "study",
    )
    return Form({k: v for k, v in made.options.items() if k not in hidden}, free=made.free)


def run(arguments: Arguments) -> int:
    from scaling_lab.analysis.studies import NO_STUDY

    arguments = resolve_where(arguments)
    command = read_command(arguments, "predict", lambda tree: form(arguments))
    own = tuple(Predict.__dataclass_fields__)
    where: Predict = build(Predict, command.tree, skip=tuple(command.tree.keys() - set(own)))
    settings = analysis_settings(command.tree, skip=own)
    settings = replace(
        settings,
        predict_flops=where.compute_flops,
        sensitivity=False,
        backtest=False,
        profile=False,
        study=NO_STUDY,
    )
    console = Console.for_flags(arguments.flags)
    result, _ = analyze_source(where, settings, console)
    analysis = result.analysis
    assert analysis is not None  # without findings a sweep that has no law is an error
    wanted = [p for p in analysis.predictions if p.compute_flops in where.compute_flops]
    if "json" in arguments.flags:
        whole = analysis.to_json_dict(command=command_text(arguments))
        rows = [p for p in whole["predictions"] if p["compute_flops"] in where.compute_flops]
        head = {key: whole[key] for key in ("schema_version", "command", "versions")}
        print(json.dumps({**head, "predictions": rows}, indent=1, allow_nan=False))
        return 0
    if not wanted:
        for estimate in analysis.estimates:
            console.warn(f"{estimate.approach}: {estimate.message}")
        raise UserError("no approach has a frontier to predict from: see the warnings.")
    if analysis.observations.units:
        console.print(f"  note: {units_sentence(analysis.observations.units)}", markup=False)
    console.print(predictions_table(wanted, analysis.bands[0].level))
    far = max(p.extrapolation_factor for p in wanted)
    if far > 100:
        console.print(
            f"  note: {far:.3g} times beyond the data; the intervals do not include a law that bends there."
        )
    source = f"sweep={where.sweep}" if where.sweep else f"runs='{where.runs}'"
    where_to = "" if where.results_dir == "results" else f" results_dir={where.results_dir}"
    console.next_step(f"scaling-lab analyze {source}{where_to}")
    return 0
