#!/usr/bin/env python
"""Check that another revision and the working tree plan, analyze, train and resume to exactly the same values."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from compare_revision_rules import EXACT, RULES, Comparison, Failed, Rules, compare_documents
from compare_revision_trees import TIMEOUT_S, Side, git, in_threads, install, kill, log, on_both

USAGE = """Both trees are installed into environments of their own, which share this Python's dependencies, and run side by
side. Only command lines and files are used, so packages may be renamed in between. Exit status 1 if anything differs or
could not be run.

  scripts/compare_revision.py HEAD                                  # nine CPU minutes, five minutes on two idle cores
  scripts/compare_revision.py 883e3a6 --parts plans,tables
  scripts/compare_revision.py 883e3a6 --out results/compare_revision.txt
"""
# Differences of each row that are printed.
SHOWN = 3


# Each part yields (what was compared, comparison).
Rows = Iterable[tuple[str, Comparison]]

# fmt: off
VOCABULARY = 40_000  # times a batch of 1,024 tokens: more than 2^25 logits, above which the loss is computed in chunks
PLANS = {
    "kaplan": "recipe=kaplan",
    "chinchilla": "recipe=chinchilla model=gpt2 schedule=wsd",
    "porian": "recipe=porian schedule=constant",
    "step_law": "recipe=step_law schedule=inverse_sqrt",
    "deepseek": "recipe=deepseek schedule=multi_step convention=deepseek_m",
    "trunk": "design=trunk_cooldown design.cooldown=linear",
    "batches": "design=learning_rate design.budgets_flops=[5e10,2e11] design.batch_multipliers=[0.5,1.0,2.0] design.seeds=2",
    "families": "model=gpt,gpt2 parametrization=mup,completep seed=0,1",
    "swiglu": "model.mlp=swiglu model.tied_head=true convention=chinchilla_appendix_f",
    "bfloat16": "dtype=bfloat16 'eval.sets=[{name: other, kind: pysource, split_seed: 1}]'",
    "stacks": "compile=true design.noise_seeds=4",
    "cuda": "device=cuda memory_gb=80 design.noise_seeds=4",
    "micro": "memory_gb=1 recipe.batch_tokens=65536 design.budgets_flops=[2e13,8e13]",
    "large": "design.sizes.max_width=1024 design.n_opt_at_1e12=3e7 data.max_epochs=1e9 design.budgets_flops=[1e12,4e12]",
    "facts": "data=zipf_facts model.context=32 data.noise=0.1",
    "mixture": "data=mixture data.sources=[context_tree,zipf_facts] data.weights=[3,1]",
    "unique": "data.unique_tokens=1M data.max_epochs=100",
    "tokens": f"data=tokens data.path=tokens.npy data.vocab_size={VOCABULARY} design.budgets_flops=[2e11,8e11] data.max_epochs=1e6",
    "text": "data=prepared data.path=prepared/text data.max_epochs=1e6",
}
# With the options of the comparisons beside the published tables; `write_inputs` makes units.csv.
PORIAN = "porian_isoflop_refinedweb.csv where.experiment="
TABLES = {
    "besiroglu": "chinchilla_epoch245.csv where.dropped_by_besiroglu=0",
    "gadre": "chinchilla_epoch245.csv approach.parametric.law=gadre bootstrap.unit=run",
    "gemstones": "gemstones_curves.csv columns.flops=flops_authors approach.envelope.method=hull approach.envelope.edge=keep",
    "gemstones_100b": "gemstones_curves.csv columns.flops=flops_authors where.tokens.max=1.005e11",
    "gemstones_10b": "gemstones_10b.csv points=all approach.parametric.huber_delta=1e-4",
    "misfitting": "misfitting_final.csv points=all",
    "porian_akima": f"{PORIAN}rw_base_long_kaplan_kaplan_train approach.isoflop.minimum=akima",
    "porian_parabola": f"{PORIAN}rw_tuned_short_const_standard_val approach.isoflop.minimum=parabola",
    "porian_shared": f"{PORIAN}rw_tuned_short_const_standard_val",
    "units": "units.csv columns.loss=val_bits units.params=M units.tokens=B units.loss=bits metrics=[code] "
             "compare_laws=[kaplan_nd,gadre] weights=loss_sem",
}
NOT_RUNS = {"porian_isoflop_refinedweb_published.csv"}
TEXT = "data.max_mb=1 data.max_epochs=99 eval.tokens=1024 device=cpu"
LADDER = ("design.sizes.min_width=4 design.sizes.max_width=16 design.sizes.width_ratio=1.3 design.sizes.min_depth=1 "
          "recipe.batch_tokens=256 design.n_opt_at_1e12=200K compile=false")
FLOOR = (f"data=context_tree model.context=32 eval.tokens=1024 device=cpu {LADDER} design.budgets_flops=[1e8,3e8,9e8] "
         "'eval.sets=[{name: letters, kind: context_tree, seed: 1}]'")
SIZE = f"{TEXT} design=learning_rate design.widths=[16] design.depths=[2] recipe.batch_tokens=256"
ONE_RUN = "eval.tokens=1024 device=cpu compile=false design=learning_rate design.depths=[2] design.lr_multipliers=[1.0]"
# What to train, and how its plan must say that it is computed: (compiled, in micro-batches, runs of a stack).
ALONE, COMPILED = (False, False, 1), (True, False, 1)
SWEEPS = {
    "eager": (f"{FLOOR} design.sizes_per_budget=4", ALONE),
    "eager-lr": (f"{FLOOR} design=learning_rate design.grid_sizes=4 design.sizes_per_budget=2 design.lr_multipliers=[0.5,2.0]", ALONE),
    "families": (f"{SIZE} compile=false model=gpt,gpt2 parametrization=standard,completep design.horizons_tokens=[20000] "
                 "design.lr_multipliers=[1.0] data.noise=0.1", ALONE),
    "bfloat16": (f"{SIZE} compile=false dtype=bfloat16 design.horizons_tokens=[20000] design.lr_multipliers=[1.0]", ALONE),
    "trunk": (f"{TEXT} {LADDER} design=trunk_cooldown design.budgets_flops=[5e8,1e9] design.sizes_per_budget=4", ALONE),
    "micro-batches": (f"{ONE_RUN} data.max_mb=1 data.max_epochs=99 memory_gb=0.5 design.horizons_tokens=[12288] "
                      "design.widths=[32] recipe.batch_tokens=4096", (False, True, 1)),
    "chunked": (f"{ONE_RUN} data=tokens data.path=tokens.npy data.vocab_size={VOCABULARY} eval.points=1 "
                "design.horizons_tokens=[4096] design.widths=[8] recipe.batch_tokens=1024", ALONE),
    "compiled": (f"{SIZE} compile=true stack=false design.horizons_tokens=[20000] design.lr_multipliers=[1.0,2.0]", COMPILED),
    "stacked": (f"{SIZE} compile=true design.horizons_tokens=[20000,17000] design.lr_multipliers=[1.0,2.0]", (True, False, 4)),
}
# fmt: on
RESUMED_STEPS = 2500
RESUMED = f"train {TEXT} model.width=16 model.depth=2 recipe.batch_tokens=256 train_tokens={256 * RESUMED_STEPS} --quiet"


def write_inputs(sides: Sequence[Side]) -> None:
    """The same text (of the standard library), random tokens and tables (the old side's) for both sides."""
    draws = np.minimum(np.random.default_rng(0).zipf(1.2, 200_000), VOCABULARY - 1).astype(np.uint16)
    rows = ["run_id,params,tokens,val_bits,code,loss_sem"]
    for k, (budget, n) in enumerate((c, 2.0**i) for c in (1, 4, 16, 64) for i in range(2, 9)):
        d = 1000 / 6 * budget / n  # N in millions, D in billions: C = 6 N D = 1e18 times the budget
        loss = 1.7 + 400 / (n * 1e6) ** 0.34 + 410 / (d * 1e9) ** 0.28 + 0.003 * math.sin(k * k)
        rows.append(f"r{k},{n},{d},{loss / math.log(2)},{0.6 * loss + 0.1 * d**-0.2},{0.002 + 0.0001 * k}")
    for side in sides:
        shutil.copy(argparse.__file__, side.work / "text.txt")
        np.save(side.work / "tokens.npy", draws)
        (side.work / "tables").mkdir()
        (side.work / "tables/units.csv").write_text("\n".join(rows) + "\n")
        for name, content in published_tables(sides[0]).items():
            (side.work / "tables" / name).write_bytes(content)


def published_tables(side: Side) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in side.site.glob("scaling_lab/**/published/*.csv")}


def row(what: str, pair: Sequence[Mapping[str, Any]], rules: Rules = EXACT) -> tuple[str, Comparison]:
    found = compare_documents(pair[0], pair[1], rules)
    return f"{what}: {len(pair[0])} documents, {found.values:,} values", found


def plans(sides: Sequence[Side]) -> Rows:
    names = [{path.stem for path in side.site.glob("scaling_lab/conf/experiment/*.yaml")} for side in sides]
    yield row(
        "experiments by name", [dict.fromkeys(sorted(each), 1) for each in (names[0], names[0] & names[1])]
    )
    cases = {name: f"experiment={name}" for name in sorted(names[0] & names[1])} | PLANS

    def make(side: Side) -> tuple[dict[str, Any], dict[str, Any]]:
        side.lab("prepare-data path=text.txt tokenizer=bpe vocab_size=400 --quiet")
        for name, options in cases.items():
            device = "" if "device=" in options else "device=cpu"
            side.lab(f"plan sweep={name} {options} {device} --quiet")
        corpus = {path.name: path.read_bytes() for path in (side.work / "prepared/text").iterdir()}
        return corpus, {name: plan_document(side.work / f"results/{name}/plan.json") for name in cases}

    corpora, made = zip(*on_both(sides, make))
    yield row("prepared corpus, byte for byte", corpora)
    yield row("plan.json, byte for byte", made, RULES["plan.json"])
    yield row("run ids", [{name: plan["run_ids"] for name, plan in each.items()} for each in made])


def plan_document(path: Path) -> dict[str, Any]:
    """The bytes of a plan.json with its sentences blanked, the sentences, and the run ids."""
    text = path.read_text()
    plan = json.loads(text)
    for sentence in (*plan["notes"], *plan["rounding"]):
        text = text.replace(json.dumps(sentence), '""')
    ids = [run["run_id"] for run in plan["runs"]]
    return {"bytes": text.encode(), "notes": plan["notes"], "rounding": plan["rounding"], "run_ids": ids}


def tables(sides: Sequence[Side]) -> Rows:
    published = [published_tables(side) for side in sides]
    untried = published[0].keys() - NOT_RUNS - {options.split()[0] for options in TABLES.values()}
    if untried:
        raise Failed(f"no options are known for the tables {', '.join(sorted(untried))}")
    yield row("published tables, byte for byte", published)

    def analyze(side: Side) -> dict[str, Any]:
        for name, options in TABLES.items():
            side.lab(f"analyze runs=tables/{options} bootstrap.resamples=50 out=analyses/{name} --quiet")
        return {
            name: json.loads((side.work / f"analyses/{name}/analysis.json").read_text()) for name in TABLES
        }

    yield row("analysis.json of tables", on_both(sides, analyze), RULES["analysis.json"])
    predict = f"predict runs=tables/{TABLES['besiroglu']} compute_flops=[1e22,1e24] --json --quiet"
    yield row(
        "predict", on_both(sides, lambda s: {"predict": json.loads(s.lab(predict))}), RULES["analysis.json"]
    )
    reproduce = "reproduce published=all --json --quiet"
    found = on_both(sides, lambda s: {"all": json.loads(s.lab(reproduce))})
    yield row("reproduce published=all", found, RULES["reproduce"])


def training(sides: Sequence[Side]) -> Rows:
    for name, (options, wanted) in SWEEPS.items():
        command = f"sweep sweep={name} results_dir=trained {options} --quiet"
        in_threads(*(partial(side.lab, command + side.keep, core=side.core) for side in sides))
        for each in json.loads((sides[0].work / f"trained/{name}/plan.json").read_text())["runs"]:
            how = each["execution"]
            if (how["compile"], how["micro_batch_sequences"] is not None, how["stack_size"]) != wanted:
                raise Failed(f"{name} is not computed as it is meant: {how}")
        folders = [side.work / "trained" / name for side in sides]
        what = f"{name}, {run_counts(folders[0])}"
        yield row(what, [run_files(folder) for folder in folders], RULES["runs"])

    def analyze(side: Side) -> dict[str, Any]:
        options = "tuning=eager-lr metrics=[eval.letters] bootstrap.resamples=50"
        side.lab(f"analyze sweep=eager results_dir=trained {options} --quiet")
        return {"eager": json.loads((side.work / "trained/eager/report/analysis.json").read_text())}

    pair = on_both(sides, analyze)
    if missing := [key for key in ("tuning", "known_floor", "skills") if not pair[0]["eager"].get(key)]:
        raise Failed(f"the old side's analysis has no {', '.join(missing)}")
    yield row("analysis.json of the sweep", pair, RULES["analysis.json"])


def run_files(sweep: Path) -> dict[str, Any]:
    """What runs left on the disk, by path: bytes, parsed JSON, or digests of tensors. Claims (process, heartbeat) are left out."""
    found: dict[str, Any] = {}
    files = ("plan.json", "runs/*/*.json*", "runs/*/checkpoint/*")
    for path in sorted(path for pattern in files for path in sweep.glob(pattern)):
        name = str(path.relative_to(sweep))
        if path.name == "plan.json":
            found[name] = plan_document(path)
        elif path.name == "spec.json":
            found[name] = path.read_bytes()
        elif path.name == "curve.jsonl":
            found[name] = [json.loads(line) for line in path.read_text().splitlines()]
        elif path.suffix == ".pt":
            found[name] = tensor_digests(path)
        elif not path.name.startswith("claim-"):
            found[name] = json.loads(path.read_text())
    return found


def tensor_digests(path: Path) -> dict[str, str]:
    """SHA-256 of each tensor's bytes and of the pickle that names them. A checkpoint is a zip file; nothing is unpickled."""
    with zipfile.ZipFile(path) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    kept = {name: data for name, data in members.items() if re.fullmatch(r"data\.pkl|data/\d+", name)}
    return {name: hashlib.sha256(data).hexdigest() for name, data in kept.items()}


def run_counts(sweep: Path) -> str:
    """How many runs there are. Raises `Failed` unless every one was completed and left its spec, curve and checkpoint."""
    statuses = [json.loads(path.read_text())["status"] for path in sweep.glob("runs/*/record.json")]
    names = ("spec.json", "curve.jsonl", "checkpoint/step-*.pt")
    counts = [len(list(sweep.glob(f"runs/*/{name}"))) for name in names]
    if set(statuses) != {"completed"} or set(counts) != {len(statuses)}:
        raise Failed(f"{sweep.name}: records {statuses}; {counts} of {', '.join(names)}")
    return f"{len(statuses)} run{'s' * (len(statuses) > 1)}"


def resume(sides: Sequence[Side]) -> Rows:
    """A run of the old side, killed after a checkpoint, goes on in the new one."""
    old, new = sides
    for kind, compiled in (("eager", "false"), ("compiled", "true")):
        command = f"{RESUMED} sweep={kind} compile={compiled} results_dir="
        whole, killed = old.work / "whole" / kind, old.work / "killed" / kind
        kept = in_threads(
            partial(old.lab, f"{command}whole{old.keep}", core=old.core),
            partial(kill_after_checkpoint, old, f"{command}killed{old.keep}", killed, new.core),
        )[1]
        resumed = new.work / "killed" / kind
        shutil.copytree(killed, resumed)
        in_threads(partial(new.lab, f"{command}killed{new.keep}", core=new.core))
        what = f"{kind}, resumed at step {len(kept)}, {run_counts(whole)}"
        what, found = row(what, [run_files(whole), run_files(resumed)], RULES["runs"])
        # With their wall times: the new side did not compute these lines again.
        if curve_lines(resumed)[: len(kept)] != kept:
            found.differences.append(("curve up to the checkpoint", "kept", "computed again"))
        yield what, found


def kill_after_checkpoint(side: Side, command: str, sweep: Path, core: int | None) -> list[str]:
    """Stop a run by SIGTERM, which leaves a checkpoint; start it again and end it by SIGKILL some steps later. Returns the
    lines of the curve up to the checkpoint."""
    for _ in range(5):  # on a busy machine a run may end before the signal comes
        shutil.rmtree(sweep, ignore_errors=True)
        kept: list[str] = []
        for number, more in ((signal.SIGTERM, RESUMED_STEPS // 5), (signal.SIGKILL, RESUMED_STEPS // 10)):
            with open(side.folder / "killed.log", "a") as file:
                process = side.start(
                    "scaling-lab", *shlex.split(command), core=core, stdout=file, stderr=file
                )
                deadline = time.monotonic() + TIMEOUT_S
                while process.poll() is None and len(curve_lines(sweep)) < len(kept) + more:
                    time.sleep(0.02)
                    if time.monotonic() > deadline:
                        kill(process, signal.SIGKILL)
                kill(process, number)
                process.wait(TIMEOUT_S)
            saved = sweep.glob("runs/*/checkpoint/step-*.json")
            points = max((json.loads(path.read_text())["curve_points"] for path in saved), default=0)
            kept = curve_lines(sweep)[:points]
        if 0 < len(kept) < len(curve_lines(sweep)) and not list(sweep.glob("runs/*/record.json")):
            return kept
    raise Failed("the run could not be killed between its checkpoint and its end")


def curve_lines(sweep: Path) -> list[str]:
    """Whole lines of the curve of a sweep's only run."""
    text = "".join(path.read_text() for path in sweep.glob("runs/*/curve.jsonl"))
    return text[: text.rfind("\n") + 1].splitlines()


PARTS: dict[str, Callable[[Sequence[Side]], Rows]] = {
    "plans": plans, "tables": tables, "training": training, "resume": resume,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    part: str
    what: str
    found: Comparison
    seconds: float
    failure: str | None = None


def run_part(part: str, sides: Sequence[Side]) -> list[Row]:
    """The rows of a part. If it cannot be run to its end, the last row is a failure."""
    log(f"{part} ...")
    rows, began = [], time.monotonic()
    try:
        for what, found in PARTS[part](sides):
            rows.append(Row(part, what, found, time.monotonic() - began))
            began = time.monotonic()
    except (Failed, OSError, KeyError, ValueError, subprocess.TimeoutExpired) as error:
        failure = f"{type(error).__name__}: {error}"
        rows.append(Row(part, "could not be run", Comparison(), time.monotonic() - began, failure))
    return rows


def is_bad(row: Row) -> bool:
    return bool(row.failure or row.found.differences or not row.found.values)


def report(title: str, rows: Sequence[Row]) -> str:
    width = max(len(each.what) for each in rows)
    lines = [title, "", f"{'part':<9} {'compared':<{width}} {'differences':>12} {'seconds':>8}"]
    added: Counter[str] = Counter()
    reworded: Counter[str] = Counter()
    notes = []
    for each in rows:
        differences = each.found.differences
        count = "FAILED" if each.failure else f"{len(differences):,}"
        lines.append(f"{each.part:<9} {each.what:<{width}} {count:>12} {each.seconds:>8.1f}")
        if each.failure:
            notes.append(f"FAILED {each.part}: {each.failure}")
        for path, old, new in differences[:SHOWN]:
            where = f"{each.part}, {each.what.partition(':')[0]}, {path}"
            notes.append(f"DIFFERENT {where}: old {str(old)[:120]}, new {str(new)[:120]}")
        notes += [f"  and {len(differences) - SHOWN:,} more"] * (len(differences) > SHOWN)
        added += each.found.added
        reworded += each.found.reworded
    lines += ["", *notes]
    lines += [f"only in the new revision: {path} ({count})" for path, count in sorted(added.items())]
    lines += [f"reworded: {path} ({count})" for path, count in sorted(reworded.items())]
    for name, rules in RULES.items():
        exempt = ", ".join(rules.exempt) or "nothing"
        lines.append(f"not compared in {name}: {exempt}; may be reworded: {', '.join(rules.sentences)}")
    lines.append("NOT IDENTICAL" if any(map(is_bad, rows)) else "All values compared are identical.")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revision", metavar="REV", help="the old side; the new one is the working tree")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="also write the report to this file")
    parser.add_argument("--keep", action="store_true", help="keep the folder with both sides")
    options = parser.parse_args()
    chosen = options.parts.split(",")
    if unknown := sorted(set(chosen) - set(PARTS)):
        parser.error(f"--parts={','.join(unknown)}: choices are {', '.join(PARTS)}")
    revision, head = (
        git("rev-parse", "--short=10", f"{name}^{{commit}}") for name in (options.revision, "HEAD")
    )
    changed = " with uncommitted changes" if git("status", "--porcelain") else ""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "scipy"))
    title = f"compare_revision: old {revision}, new {head}{changed}; Python {platform.python_version()}, {libraries}"
    cores: list[Any] = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None]
    folder = Path(tempfile.mkdtemp(prefix="compare-revision-"))
    sides = (Side("old", folder / "old", cores[0]), Side("new", folder / "new", cores[-1]))
    try:
        log(title)
        install(sides[0], revision)
        install(sides[1], None)
        write_inputs(sides)
        rows = [each for part in PARTS if part in chosen for each in run_part(part, sides)]
    finally:
        if options.keep:
            log(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    text = report(title, rows).replace(str(folder), "FOLDER")
    print(text, end="")
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    return int(not rows or any(map(is_bad, rows)))


if __name__ == "__main__":
    sys.exit(main())
