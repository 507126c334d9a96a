"""The table of commands: a summary, an example and the module of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """One command."""

    name: str
    summary: str
    example: str
    section: str
    flags: frozenset[str] = frozenset()
    """Flags besides --quiet, --verbose and --help."""
    about: str = ""
    """A paragraph for its --help."""

    def load(self) -> Any:
        """Import its module, which has `run(arguments) -> int` and `form(arguments) -> Form`."""
        from importlib import import_module

        return import_module(f"scaling_lab.cli.commands.{self.name.replace('-', '_')}")


START, STUDY, SINGLE = "Start here", "A study, step by step", "Single runs and this machine"
WANDB = "Weights & Biases"

_ALL = (
    Command(
        "quickstart",
        "train a small real sweep and print its scaling laws",
        "scaling-lab quickstart",
        START,
        frozenset({"json"}),
        "Plans, trains, analyzes and reports experiment=quickstart. Safe to interrupt and to repeat: finished work is not "
        "repeated.",
    ),
    Command(
        "plan",
        "print a sweep's grid and its cost without training",
        "scaling-lab plan experiment=quickstart",
        STUDY,
        frozenset({"json"}),
        "Writes results/SWEEP/plan.json, which lists every rounding.",
    ),
    Command(
        "sweep",
        "train the unfinished runs of a plan",
        "scaling-lab sweep experiment=quickstart",
        STUDY,
        frozenset({"multirun"}),
        "Safe to repeat, to kill and to start twice. `scaling-lab sweep sweep=NAME` resumes a sweep that has a plan. A list "
        "such as seed=0,1,2 multiplies the plan. hydra/launcher=NAME runs it elsewhere.",
    ),
    Command(
        "status",
        "show which runs of a sweep are done, running or failed",
        "scaling-lab status sweep=quickstart --watch",
        STUDY,
        frozenset({"json", "watch"}),
    ),
    Command(
        "analyze",
        "fit the three Chinchilla approaches, to a sweep or to any table",
        "scaling-lab analyze runs=my_runs.csv columns.loss=val_loss",
        STUDY,
        frozenset({"json"}),
        "runs=FILE is CSV, Parquet, JSON records or JSON Lines with columns run_id, params, tokens, flops, loss. "
        "where.COLUMN=VALUE, where.COLUMN.min= and where.COLUMN.max= select rows; columns.NAME=COLUMN maps column names; "
        "units.params=M units.tokens=B units.loss=bits give the table's units. "
        "Names and paths with spaces, '=', '/' or parentheses need no quotes beyond the shell's.",
    ),
    Command(
        "predict",
        "predict the best model size and its loss at a compute budget",
        "scaling-lab predict sweep=quickstart compute_flops=1e14",
        STUDY,
        frozenset({"json"}),
    ),
    Command(
        "report",
        "write a sweep's report, even if the sweep is not finished",
        "scaling-lab report sweep=quickstart",
        STUDY,
    ),
    Command(
        "reproduce",
        "reproduce published results from published data",
        "scaling-lab reproduce published=porian2024",
        STUDY,
        frozenset({"json"}),
        "Prints the paper's number, ours, the difference and its reason. The data are part of the package; published=all "
        "runs every publication in under a minute. Writes no files.",
    ),
    Command(
        "prepare-data",
        "make token files from text: a file, a folder, or a dataset on the Hub",
        "scaling-lab prepare-data path=books.txt out=books tokenizer=bpe vocab_size=4096",
        STUDY,
        frozenset({"json"}),
        "path=FILE or FOLDER of text, JSON Lines or Parquet; or source=PRESET (fineweb_edu, fineweb, c4, openwebtext, "
        "tinystories, wikitext103) or OWNER/NAME[:CONFIGURATION] on the Hugging Face Hub, streamed. A document's content "
        "decides whether it is used for training or validation. Safe to interrupt: the same command resumes. To train on the "
        "result: data=prepared data.path=OUT.",
    ),
    Command(
        "train",
        "train one model; with -m, one for each value of a list",
        "scaling-lab train model.width=64 model.depth=2 train_tokens=2M",
        SINGLE,
        frozenset({"multirun"}),
        "-m makes it a standard Hydra multirun: `scaling-lab train -m model.width=32,64 train_tokens=200_000`. "
        "Runs are stored under results/train/runs/.",
    ),
    Command(
        "worker",
        "train the pending runs of a plan in this process, also under torchrun",
        "scaling-lab worker results/quickstart",
        SINGLE,
        frozenset(),
        "Any number of workers may share a sweep's folder, on one machine or several; `sweep` starts its own. Under torchrun "
        "all processes train each run together: torchrun --nproc_per_node=8 -m scaling_lab.worker FOLDER.",
    ),
    Command(
        "doctor",
        "show what this machine supports and what is missing",
        "scaling-lab doctor",
        SINGLE,
        frozenset({"json"}),
    ),
    Command(
        "upload-wandb",
        "upload a sweep's runs, ledger and report to Weights & Biases",
        "scaling-lab upload-wandb sweep=quickstart",
        WANDB,
        frozenset(),
        "Uploads from the records on disk, so it works after offline runs, an outage or a kill; runs that are already "
        "complete on W&B are skipped. Requires `wandb login`.",
    ),
    Command(
        "wandb-workspace",
        "create a W&B workspace for a sweep: loss against FLOPs by size, IsoFLOP valleys",
        "scaling-lab wandb-workspace sweep=quickstart",
        WANDB,
        frozenset(),
        "Saves a new view in the project and prints its URL. Requires the package wandb-workspaces and `wandb login`.",
    ),
    Command(
        "import-wandb",
        "make a table of observations from any W&B runs",
        "scaling-lab import-wandb project=team/llm mapping=nanogpt mapping.loss=val/loss",
        WANDB,
        frozenset(),
        "Writes a CSV or Parquet table for `analyze runs=FILE`. project=ENTITY/PROJECT reads from the server, path=FOLDER "
        "reads offline run files. mapping=NAME selects the config keys and metrics for params, tokens, flops and loss; each "
        "may be arithmetic over them. Histories are not sampled: an incomplete curve is an error.",
    ),
)

COMMANDS: dict[str, Command] = {command.name: command for command in _ALL}
