"""Owns `scaling-lab import-wandb`: a table of observations from anybody's W&B runs, which `analyze runs=` reads."""

from __future__ import annotations

import shlex
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
from scaling_lab.tracking.wandb.mapping import NOT_COLUMNS, Incomplete, Missing, RunMapping, rows_of_run

if TYPE_CHECKING:
    from scaling_lab.tracking.wandb.mapping import ForeignRun

SUFFIXES = (".csv", ".parquet")
SHOWN_PROBLEMS = 5
FREE = {
    "mapping.extra.": "a further numeric column",
    "where.": "keep runs whose config has this value; dots go inside (where.model.kind=gpt)",
}


@dataclass(frozen=True)
class ImportWandb:
    """Options of `import-wandb`."""

    project: str | None = None
    """ENTITY/PROJECT on the server"""
    path: str | None = None
    """Or a folder with run files (results/SWEEP/wandb, a project's own wandb/), or one run-ID.wandb"""
    group: str | None = None
    """Runs of this group only"""
    job_type: str | None = None
    """Runs of this job type only"""
    tags: tuple[str, ...] = ()
    """Runs with one of these tags only"""
    state: Literal["finished", "failed", "crashed", "running", "any"] = "finished"
    """Runs that ended so; the last loss of the others is not a final loss"""
    out: str | None = None
    """The table, .csv or .parquet; default results/imports/NAME.csv"""
    results_dir: str = "results"
    """Folder that the default of out is in"""
    config_dir: str | None = None
    """A folder of your own configs: config_dir/wandb_mapping/NAME.yaml is mapping=NAME"""

    def __post_init__(self) -> None:
        if (self.project is None) == (self.path is None):
            raise UserError("give one of project=ENTITY/PROJECT and path=FOLDER.")
        if self.project is not None and len([p for p in self.project.split("/") if p]) != 2:
            raise UserError(
                f"project={self.project} must be ENTITY/PROJECT, as in the address wandb.ai/ENTITY/PROJECT."
            )
        if self.out is not None and Path(self.out).suffix.lower() not in SUFFIXES:
            raise UserError(f"out={self.out}: the table's name must end in {' or '.join(SUFFIXES)}.")

    @property
    def table(self) -> Path:
        if self.out is not None:
            return Path(self.out).expanduser()
        name = self.project.replace("/", "-") if self.project else _folder_name(Path(str(self.path)))
        return Path(self.results_dir) / "imports" / f"{name}.csv"


def form(arguments: Arguments) -> Form:
    config_dir = arguments.get("config_dir")
    folders = config_folders(None if config_dir is None else unquoted(config_dir))
    (slot,) = default_groups("import-wandb", folders)
    chosen = unquoted(arguments.get(slot.package) or "scaling_lab")
    tree, words = plain_tree("import-wandb", {slot.package: chosen}, folders)
    return form_of_tree(tree, words, GroupOption(
        slot.package, chosen, tuple(group_choices(slot.group, folders)), "which names are params, tokens, flops, loss"
    ))  # fmt: skip


def form_of_tree(
    tree: Mapping[str, Any], words: Mapping[str, str] | None = None, *groups: GroupOption
) -> Form:
    import dataclasses

    options = options_of(ImportWandb) | {
        key: dataclasses.replace(option, default=tree.get("mapping", {}).get(key.partition(".")[2]))
        for key, option in options_of(RunMapping, "mapping.", words=words).items()
    }
    return Form(options, groups=groups, free=FREE)


def run(arguments: Arguments) -> int:
    from scaling_lab.tracking.wandb.runs import RunFilter, runs_of_folder, runs_of_project

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
        count, runs = runs_of_project(options.project, wanted)
    else:
        count, runs = runs_of_folder(Path(str(options.path)).expanduser(), wanted)
    rows, taken, left_out = collect(progress(runs, count, console), mapping)
    if not rows:
        raise nothing_found(count, left_out, options)
    write_table(rows, options.table)
    console.print(f"{taken} runs, {len(rows)} points: {options.table}", highlight=False, markup=False)
    for run_id, reason in left_out[:SHOWN_PROBLEMS]:
        console.warn(f"{run_id} is left out: {reason}")
    if len(left_out) > SHOWN_PROBLEMS:
        console.warn(f"and {len(left_out) - SHOWN_PROBLEMS} more runs are left out")
    if len(rows) == taken:
        console.say(
            f"one point a run: approach 1 needs curves. Another loss may have them (mapping.loss=, now {mapping.loss})."
        )
    console.next_step(f"scaling-lab analyze runs={shlex.quote(str(options.table))}")
    return 0


def collect(
    runs: Iterator[ForeignRun], mapping: RunMapping
) -> tuple[list[dict[str, Any]], int, list[tuple[str, str]]]:
    """(rows, runs taken, (run, reason) of those left out). Raises `UserError` for curves that came back incomplete."""
    rows: list[dict[str, Any]] = []
    taken, left_out, incomplete = 0, [], []
    for run in runs:
        if mapping.not_job_type is not None and run.job_type == mapping.not_job_type:
            continue
        try:
            rows += rows_of_run(run, mapping)
            taken += 1
        except Incomplete as error:
            incomplete.append(f"{run.name} ({run.run_id}): {error}")
        except (Missing, ValueError) as error:
            left_out.append((f"{run.name} ({run.run_id})", str(error)))
    if incomplete:
        more = f"; and {len(incomplete) - 1} more such runs" if len(incomplete) > 1 else ""
        raise UserError(f"nothing is written, a curve is incomplete: {incomplete[0]}{more}.")
    return rows, taken, left_out


def progress(runs: Iterator[ForeignRun], count: int, console: Console) -> Iterator[ForeignRun]:
    """The runs, with a line now and then that says how far it is."""
    import time

    from scaling_lab.core.formatting import human_time

    began = last = time.monotonic()
    for done, item in enumerate(runs):
        now = time.monotonic()
        if done and now - last >= LINE_EVERY_S:
            last = now
            eta = human_time((now - began) / done * max(0, count - done))
            console.say(f"{done} of {count} runs read, ETA {eta}")
        yield item


LINE_EVERY_S = 5.0


def nothing_found(count: int, left_out: list[tuple[str, str]], options: ImportWandb) -> UserError:
    """Why there is not one row."""
    source = f"project={options.project}" if options.project else f"path={options.path}"
    if left_out:
        run_id, reason = left_out[0]
        return UserError(
            f"{source}: none of {len(left_out)} runs can be read with this mapping; the first, {run_id}: {reason}. "
            "Another mapping=NAME, or mapping.COLUMN=NAME, says what they call it."
        )
    kept = f" (state={options.state}; state=any keeps all)" if options.state != "any" else ""
    return UserError(f"{source}: none of its {count} runs passes the filters{kept}.")


def write_table(rows: list[dict[str, Any]], path: Path) -> None:
    """CSV with every digit, or Parquet; replaced in one step."""
    import pandas as pd

    first = ["run_id", "params", "tokens", "flops", "loss"]
    known = [f.name for f in fields(RunMapping) if f.name not in (*NOT_COLUMNS, *first)]
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
    """results/SWEEP/wandb is SWEEP's."""
    whole = path.expanduser().resolve()
    parts = [part for part in whole.parts if part not in ("wandb", whole.anchor)]
    return (parts[-1] if parts else "wandb").removesuffix(".wandb")
