"""Owns the list of commands: what each does in one line, an example, and the module that is imported when it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """One command of the table."""

    name: str
    summary: str
    example: str
    section: str
    flags: frozenset[str] = frozenset()
    """Flags that it takes beside --quiet, --verbose and --help."""
    about: str = ""
    """A paragraph for its own help."""

    def load(self) -> Any:
        """Its module, with `run(arguments) -> int` and `form(arguments) -> Form`."""
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
        "Plans, trains, analyses and reports experiment=quickstart. Safe to interrupt and to repeat: what is done is "
        "not done again.",
    ),
    Command(
        "plan",
        "print a sweep's grid and its cost; train nothing",
        "scaling-lab plan experiment=quickstart",
        STUDY,
        frozenset({"json"}),
        "Writes results/SWEEP/plan.json, with every rounding that was made.",
    ),
    Command(
        "sweep",
        "train what of a plan is not done yet",
        "scaling-lab sweep experiment=quickstart",
        STUDY,
        frozenset({"multirun"}),
        "Safe to repeat, to kill and to start twice. `scaling-lab sweep sweep=NAME` goes on with a sweep that has a "
        "plan. A list such as seed=0,1,2 multiplies the plan. hydra/launcher=NAME runs it elsewhere.",
    ),
    Command(
        "status",
        "what of a sweep is done, running, failed",
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
        "runs=FILE is CSV, Parquet, JSON records or JSON lines with columns run_id, params, tokens, flops, loss. "
        "where.COLUMN=VALUE, where.COLUMN.min= and where.COLUMN.max= keep rows; columns.NAME=COLUMN renames; "
        "units.params=M units.tokens=B units.loss=bits say what a table counts in. "
        "Names and paths with spaces, '=', '/' or parentheses need no quotes beyond the shell's.",
    ),
    Command(
        "predict",
        "the best model size and its loss at a compute budget",
        "scaling-lab predict sweep=quickstart compute_flops=1e14",
        STUDY,
        frozenset({"json"}),
    ),
    Command(
        "report",
        "write a sweep's report again, also of a half-done sweep",
        "scaling-lab report sweep=quickstart",
        STUDY,
    ),
    Command(
        "reproduce",
        "published results from published data, beside what the paper says",
        "scaling-lab reproduce published=porian2024",
        STUDY,
        frozenset({"json"}),
        "Prints the paper's number, ours, the difference and its reason. The data travel with the package; published=all "
        "runs every publication in under a minute. Nothing is written.",
    ),
    Command(
        "prepare-data",
        "token files from text: a file, a folder, or a data set of the hub",
        "scaling-lab prepare-data path=books.txt out=books tokenizer=bpe vocab_size=4096",
        STUDY,
        frozenset({"json"}),
        "path=FILE or FOLDER of text, JSON lines or Parquet; or source=PRESET (fineweb_edu, fineweb, c4, openwebtext, "
        "tinystories, wikitext103) or OWNER/NAME[:CONFIGURATION] of the Hugging Face hub, streamed. Documents are split into "
        "train and validation by their content. Safe to interrupt: the same command goes on. Then: data=prepared data.path=OUT.",
    ),
    Command(
        "train",
        "train one model; with -m, one for each value of a list",
        "scaling-lab train model.width=64 model.depth=2 train_tokens=2M",
        SINGLE,
        frozenset({"multirun"}),
        "-m makes it an ordinary Hydra multirun: `scaling-lab train -m model.width=32,64 train_tokens=200_000`. "
        "Runs are stored under results/train/runs/.",
    ),
    Command(
        "worker",
        "train the pending runs of a plan in this process, also below torchrun",
        "scaling-lab worker results/quickstart",
        SINGLE,
        frozenset(),
        "Any number of workers may share a sweep's folder, on one machine or several; `sweep` starts its own. Below torchrun "
        "each run is trained by all processes: torchrun --nproc_per_node=8 -m scaling_lab.worker FOLDER.",
    ),
    Command(
        "doctor",
        "what this machine can do, and what is missing",
        "scaling-lab doctor",
        SINGLE,
        frozenset({"json"}),
    ),
    Command(
        "upload-wandb",
        "bring a sweep's runs, ledger and report up to Weights & Biases",
        "scaling-lab upload-wandb sweep=quickstart",
        WANDB,
        frozenset(),
        "From the records on disk, so it works after offline runs, an outage or a kill; what W&B has whole is not sent "
        "again. Needs `wandb login`.",
    ),
    Command(
        "wandb-workspace",
        "make the W&B workspace of a sweep: loss against FLOPs by size, valleys",
        "scaling-lab wandb-workspace sweep=quickstart",
        WANDB,
        frozenset(),
        "Saves a new view in the project and prints its address; needs pip install 'scaling-lab[wandb]' and `wandb login`.",
    ),
    Command(
        "import-wandb",
        "a table of observations from anybody's W&B runs",
        "scaling-lab import-wandb project=team/llm mapping=nanogpt mapping.loss=val/loss",
        WANDB,
        frozenset(),
        "Writes a CSV or Parquet table that `analyze runs=` reads. project=ENTITY/PROJECT asks the server; path=FOLDER "
        "reads offline run files. mapping=NAME says which config keys and metrics are params, tokens, flops and loss; "
        "each may be arithmetic over them. Histories are read unsampled: a curve that comes back incomplete is an error.",
    ),
)

COMMANDS: dict[str, Command] = {command.name: command for command in _ALL}
