"""`scaling-lab import-wandb`: a table of observations from any W&B runs, for `analyze runs=FILE`."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scaling_lab.cli.display.console import Console
from scaling_lab.cli.options.arguments import Arguments
from scaling_lab.cli.options.compose import read_command
from scaling_lab.cli.options.configs import config_folders, default_groups, group_choices, plain_tree
from scaling_lab.cli.options.forms import Form, GroupOption, build, options_of
from scaling_lab.cli.options.values import unquoted
from scaling_lab.core.errors import UserError
from scaling_lab.core.formatting import human_time
from scaling_lab.tracking.wandb.mapping import (
    NON_COLUMNS,
    IncompleteHistoryError,
    MissingValueError,
    RunMapping,
    rows_of_run,
)

if TYPE_CHECKING:
    from scaling_lab.tracking.wandb.mapping import ExternalRun

SUFFIXES = (".csv", ".parquet")
SHOWN_PROBLEMS = 5
PROGRESS_EVERY_S = 5.0
FREE = {
    "mapping.extra.": "an additional numeric column",
    "where.": "keep runs whose config has this value; nested keys are joined by dots (where.model.kind=gpt)",
}


@dataclass(frozen=True)
class ImportWandb:
    """Options of `import-wandb`."""

    project: str | None = None
    """ENTITY/PROJECT on the server"""
    path: str | None = None
    """Or a folder with run files (results/SWEEP/wandb, a project's wandb/), or a single run-ID.wandb"""
    group: str | None = None
    """Only runs of this group"""
    job_type: str | None = None
    """Only runs of this job type"""
    tags: tuple[str, ...] = ()
    """Only runs with at least one of these tags"""
    state: Literal["finished", "failed", "crashed", "running", "any"] = "finished"
    """Only runs in this state; the last loss of an unfinished run is not a final loss"""
    out: str | None = None
    """The table to write, .csv or .parquet; default: results/imports/NAME.csv"""
    results_dir: str = "results"
    """Folder for the default of out"""
    config_dir: str | None = None
    """A folder with your own configs: config_dir/wandb_mapping/NAME.yaml is mapping=NAME"""

    def __post_init__(self) -> None:
        if (self.project is None) == (self.path is None):
            raise UserError("give exactly one of project=ENTITY/PROJECT and path=FOLDER.")
        if self.project is not None and len([p for p in self.project.split("/") if p]) != 2:
            raise UserError(
                f"project={self.project} must be ENTITY/PROJECT, as in the address wandb.ai/ENTITY/PROJECT."
            )
        if self.out is not None and Path(self.out).suffix.lower() not in SUFFIXES:
            raise UserError(f"out={self.out} must end in {' or '.join(SUFFIXES)}.")

    @property
    def table(self) -> Path:
        if self.out is not None:
            return Path(self.out).expanduser()
        name = self.project.replace("/", "-") if self.project else _folder_name(Path(str(self.path)))
        return Path(self.results_dir) / "imports" / f"{name}.csv"


def form(arguments: Arguments) -> Form:
    config_dir = arguments.get("config_dir")
    folders = config_folders(None if config_dir is None else unquoted(config_dir))
    (group,) = default_groups("import-wandb", folders)
    chosen = unquoted(arguments.get(group.package) or "scaling_lab")
    tree, meanings = plain_tree("import-wandb", {group.package: chosen}, folders)
    return form_of_tree(tree, meanings, GroupOption(
        group.package, chosen, tuple(group_choices(group.name, folders)), "names of params, tokens, flops and loss"
    ))  # fmt: skip


def form_of_tree(
    tree: Mapping[str, Any], meanings: Mapping[str, str] | None = None, *groups: GroupOption
) -> Form:
    options = options_of(ImportWandb) | {
        key: dataclasses.replace(option, default=tree.get("mapping", {}).get(key.partition(".")[2]))
        for key, option in options_of(RunMapping, "mapping.", meanings=meanings).items()
    }
    return Form(options, groups=groups, free=FREE)


def run(arguments: Arguments) -> int:
    from scaling_lab.tracking.wandb.runs import RunFilter, folder_runs, project_runs

    command = read_command(arguments, "import-wandb", form_of_tree)
    tree = command.tree
    options: ImportWandb = build(ImportWandb, tree, skip=("mapping", "where"))
    node = dict(tree["mapping"])
    extra = {str(k): str(v) for k, v in dict(node.pop("extra", None) or {}).items()}
    mapping: RunMapping = build(RunMapping, node, "mapping.", given={"extra": extra})
    console = Console.for_flags(arguments.flags)
    wanted = RunFilter(
        options.group,
        options.job_type,
        options.tags,
        None if options.state == "any" else options.state,
        {key: str(value) for key, value in dict(tree.get("where") or {}).items()},
    )
    if options.project is not None:
        count, runs = project_runs(options.project, wanted)
    else:
        count, runs = folder_runs(Path(str(options.path)).expanduser(), wanted)
    rows, imported, skipped = collect(progress(runs, count, console), mapping)
    if not rows:
        raise nothing_imported(count, skipped, options)
    write_table(rows, options.table)
    console.print(f"{imported} runs, {len(rows)} points: {options.table}", highlight=False, markup=False)
    for run_id, reason in skipped[:SHOWN_PROBLEMS]:
        console.warn(f"skipped {run_id}: {reason}")
    if len(skipped) > SHOWN_PROBLEMS:
        console.warn(f"skipped {len(skipped) - SHOWN_PROBLEMS} more runs")
    if len(rows) == imported:
        console.say(
            f"each run has only one point, but approach 1 needs curves: set mapping.loss (now {mapping.loss}) to a metric that "
            "is logged during training."
        )
    console.next_step(f"scaling-lab analyze runs={shlex.quote(str(options.table))}")
    return 0


def collect(
    runs: Iterator[ExternalRun], mapping: RunMapping
) -> tuple[list[dict[str, Any]], int, list[tuple[str, str]]]:
    """(rows, number of runs imported, (run, reason) of those skipped). Raises `UserError` for incomplete curves."""
    rows: list[dict[str, Any]] = []
    imported, skipped, incomplete = 0, [], []
    for run in runs:
        if mapping.not_job_type is not None and run.job_type == mapping.not_job_type:
            continue
        try:
            rows += rows_of_run(run, mapping)
            imported += 1
        except IncompleteHistoryError as error:
            incomplete.append(f"{run.name} ({run.run_id}): {error}")
        except (MissingValueError, ValueError) as error:
            skipped.append((f"{run.name} ({run.run_id})", str(error)))
    if incomplete:
        more = f"; and {len(incomplete) - 1} more such runs" if len(incomplete) > 1 else ""
        raise UserError(f"no table was written because a curve is incomplete: {incomplete[0]}{more}.")
    return rows, imported, skipped


def progress(runs: Iterator[ExternalRun], count: int, console: Console) -> Iterator[ExternalRun]:
    """The runs, with a progress line every few seconds."""
    began = last = time.monotonic()
    for done, item in enumerate(runs):
        now = time.monotonic()
        if done and now - last >= PROGRESS_EVERY_S:
            last = now
            eta = human_time((now - began) / done * max(0, count - done))
            console.say(f"{done} of {count} runs read, ETA {eta}")
        yield item


def nothing_imported(count: int, skipped: list[tuple[str, str]], options: ImportWandb) -> UserError:
    """The error that explains why there are no rows."""
    source = f"project={options.project}" if options.project else f"path={options.path}"
    if skipped:
        run_id, reason = skipped[0]
        return UserError(
            f"{source}: none of {len(skipped)} runs can be read with this mapping; the first, {run_id}: {reason}. "
            "Choose another mapping=NAME, or set mapping.COLUMN=NAME to the names that these runs use."
        )
    kept = f" (state={options.state}; state=any keeps all)" if options.state != "any" else ""
    return UserError(f"{source}: none of its {count} runs passes the filters{kept}.")


def write_table(rows: list[dict[str, Any]], path: Path) -> None:
    """Write CSV with full precision, or Parquet; replaces an existing file atomically."""
    import pandas as pd

    first = ["run_id", "params", "tokens", "flops", "loss"]
    known = [f.name for f in fields(RunMapping) if f.name not in (*NON_COLUMNS, *first)]
    present = {name for row in rows for name in row}
    names = [*first, *(n for n in known if n in present)]
    frame = pd.DataFrame(rows)
    frame = frame[[*names, *(c for c in frame.columns if c not in names)]]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    if path.suffix.lower() == ".csv":
        frame.to_csv(temporary, index=False)
    else:
        frame.to_parquet(temporary, index=False)
    temporary.replace(path)


def _folder_name(path: Path) -> str:
    """A name for a folder of run files: SWEEP for results/SWEEP/wandb."""
    whole = path.expanduser().resolve()
    parts = [part for part in whole.parts if part not in ("wandb", whole.anchor)]
    return (parts[-1] if parts else "wandb").removesuffix(".wandb")
