#!/usr/bin/env python3
"""Kill a training run at random times with SIGKILL, resume it, and compare it with an undisturbed run.

    scripts/kill_resume.py                              # 100 kills: about eight minutes on one core
    scripts/kill_resume.py --kills 20                   # as in CI
    scripts/kill_resume.py --out results/benchmarks/kill_resume.txt

Some kills come at a uniformly random time; others aim at a training step, at a checkpoint or a record being written, or at
a resumed run rewriting its curve. Where a kill landed is recorded, not guessed: the process announces the start and the
end of each stage in a pipe, and the stage that it had started and not ended when it died is where it was. While it writes
files it pauses at each fsync, rename and link, so that kills fall on both sides of every one.

Every run must end with the final loss, curve and weights of the undisturbed run bit for bit, and with nothing left over in
its checkpoint folder. The exit status is 1 if one does not, or if a stage was never hit.

Each attempt is a process of its own (a real worker's `train_pending`, with real claims), forked from this one after torch
is imported, so that 250 of them take minutes.
"""

from __future__ import annotations

# ruff: noqa: E402 (the thread settings must precede the import of torch)
import os

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"

import argparse
import datetime
import platform
import random
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # imported once here, otherwise by the first step of every attempt

from scaling_lab.core.record import RunRecord, RunStatus
from scaling_lab.core.schedules import Cosine
from scaling_lab.core.shapes.gpt import GPTShape
from scaling_lab.core.sources.pysource import PySource
from scaling_lab.core.spec import EvalSpec, Execution, OptimizerSpec, Plan, PlannedRun, RunSpec
from scaling_lab.core.storage.store import RunStore
from scaling_lab.launching.worker import train_pending
from scaling_lab.training.engine import step
from scaling_lab.training.run import checkpoint

STEP, CHECKPOINT, RECORD, RESUME = "training step", "checkpoint write", "record write", "resume: the curve"
STAGES = (STEP, CHECKPOINT, RECORD, RESUME)
# The stages that the kills of one run aim at, in order; drawn with these weights. Only a resumed run rewrites its curve.
ANY_TIME = "any time"
AIMS = {
    (ANY_TIME,): 3,
    (STEP,): 2,
    (CHECKPOINT,): 3,
    (RECORD,): 2,
    (CHECKPOINT, RESUME): 1,
    (ANY_TIME, STEP): 1,
}
PAUSE_S = 0.003
# One run in this many is compiled: compiling takes seconds, even from a warm cache.
COMPILED_EVERY = 20


@dataclass
class Attempt:
    """One process that trained until it was killed or finished."""

    killed: bool
    status: int
    announced: list[str] = field(repr=False)
    """Its announcements: `+STAGE`, `-STAGE`, and `.before CALL FILE`, `.after CALL FILE` inside."""
    seconds: float

    def stage(self) -> str:
        """The stage that it had started and not ended. A checkpoint is written while steps go on: then it is the write."""
        open_stages: Counter[str] = Counter()
        for line in self.announced:
            if line[0] in "+-":
                open_stages[line[1:]] += 1 if line[0] == "+" else -1
        return next((s for s in (CHECKPOINT, RECORD, RESUME, STEP) if open_stages[s]), "elsewhere")

    def place(self) -> str:
        """The last file operation that it announced in its stage."""
        lines = [line for line in self.announced if line[1:] != STEP]
        return lines[-1][1:] if lines and lines[-1].startswith(".") else "first call not reached"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=400, help="length of the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="kill_resume-") as folder:
        test = Test(Path(folder), options.steps, random.Random(options.seed))
        lines, good = test.run(options.kills)
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")
    return 0 if good else 1


class Test:
    """The undisturbed runs, the killed runs, and their comparison."""

    def __init__(self, folder: Path, steps: int, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        self.spec = RunSpec(
            sweep="kill", role="single", budget_flops=1e9, shape=GPTShape(width=16, depth=1, heads=1), data=PySource(),
            schedule=Cosine(), optimizer=OptimizerSpec(peak_lr=0.02), batch_tokens=256, train_tokens=256 * steps,
            eval=EvalSpec(tokens=4096, points=4, max_cost_fraction=1.0),
        )  # fmt: skip
        self.fingerprint = self.spec.data.fingerprint()  # read once: the attempts inherit it
        self.stages: Counter[str] = Counter()
        self.places: Counter[str] = Counter()
        self.different: list[str] = []
        self.runs = self.kills = self.compiled = 0

    def run(self, kills: int) -> tuple[list[str], bool]:
        """Kill `kills` times; returns the lines of the report and whether all checks passed."""
        began = time.monotonic()
        whole = {compiled: self.undisturbed(compiled) for compiled in (False, True)}
        while self.kills < kills:
            compiled = self.runs % COMPILED_EVERY == COMPILED_EVERY // 2
            self.point(whole[compiled], compiled, kills)
            progress(f"{self.kills} of {kills} kills, {self.runs} runs", self.kills / kills, began)
        missed = [stage for stage in STAGES if not self.stages[stage]]
        lines = self.report(whole[False], time.monotonic() - began, missed)
        return lines, not missed and not self.different

    def store(self, name: str, compiled: bool) -> RunStore:
        store = RunStore(self.folder / name)
        planned = PlannedRun(self.spec, Execution(compile=compiled))
        store.write_plan(Plan("kill", (planned,), self.spec.convention, self.fingerprint))
        return store

    def undisturbed(self, compiled: bool) -> Whole:
        """Train once without intermediate checkpoints, and once with announcements, to time each stage."""
        plain, announced = (
            self.store(f"plain-{compiled}", compiled),
            self.store(f"announced-{compiled}", compiled),
        )
        finished(attempt(plain, checkpoint_every_s=1e9))
        timed = finished(attempt(announced))
        whole = Whole.of(plain, self.spec, timed)
        assert not whole.difference(announced, self.spec), "two undisturbed runs differ"
        return whole

    def point(self, whole: Whole, compiled: bool, kills: int) -> None:
        """One run: killed at its aims, resumed to its end, compared."""
        store = self.store(f"point-{self.runs}", compiled)
        aims = self.rng.choices(list(AIMS), list(AIMS.values()))[0]
        self.runs += 1
        self.compiled += compiled
        for aim in aims[: kills - self.kills]:
            done = attempt(store, self.aim(aim, whole))
            if not done.killed:
                finished(done)
                break  # it finished before the kill
            self.kills += 1
            stage = done.stage()
            self.stages[stage] += 1
            if stage in (CHECKPOINT, RECORD, RESUME):
                self.places[f"{stage}, {done.place()}"] += 1
        if (store.run_folder(self.spec.run_id()) / "record.json").exists():
            pass  # killed after the record was written: the run has finished
        else:
            finished(attempt(store))
        difference = whole.difference(store, self.spec)
        if difference:
            self.different.append(f"run {self.runs} ({', '.join(aims)}): {difference}")

    def aim(self, at: str, whole: Whole) -> Aim:
        if at == ANY_TIME:
            return Aim(self.rng.uniform(0, whole.seconds))
        # Blocks of steps grow with their speed: a resumed or a slower attempt may make fewer checkpoints than the first.
        ordinal = self.rng.randint(1, max(1, int(0.8 * whole.counts[at])))
        return Aim(self.rng.uniform(0, whole.lengths_s[at]), at, ordinal)

    def report(self, whole: Whole, seconds: float, missed: list[str]) -> list[str]:
        same = self.runs - len(self.different)
        lines = [
            f"kill_resume: {self.kills} SIGKILLs in {self.runs} runs ({self.compiled} of them compiled), each resumed to its end",
            f"{datetime.date.today()}  revision {revision()}  Python {platform.python_version()}, torch {torch.__version__}, "
            f"{seconds / 60:.1f} min",
            "",
            f"the run: {self.spec.steps} steps of {self.spec.batch_tokens} tokens, {whole.counts[CHECKPOINT]} checkpoints; "
            f"undisturbed it ends at {whole.record.final_val_loss_nats!r} nats",
            "where the kills landed, as announced by the killed processes:",
        ]  # fmt: skip
        for stage in (*STAGES, *sorted(set(self.stages) - set(STAGES))):
            lines.append(f"  {stage:<24}{self.stages[stage]:>4}")
            for place, count in sorted(self.places.items()):
                if place.startswith(f"{stage}, "):
                    lines.append(f"    {place.removeprefix(f'{stage}, '):<34}{count:>4}")
        lines += [
            "",
            f"same final loss, curve and weights bit for bit, nothing left over: {same} of {self.runs} runs",
            *self.different,
        ]
        return lines + [f"FAILED: no kill landed in: {', '.join(missed)}"] * bool(missed)


@dataclass
class Whole:
    """The results of an undisturbed run."""

    record: RunRecord
    weights: dict[str, torch.Tensor]
    counts: Counter[str]
    lengths_s: dict[str, float]
    seconds: float

    @staticmethod
    def of(store: RunStore, spec: RunSpec, timed: Attempt) -> Whole:
        counts = Counter(line[1:] for line in timed.announced if line[0] == "+")
        counts[RESUME] = 1
        # Calls in a stage pause twice each; a step's length is the run's share.
        calls = {s: Counter[str]() for s in STAGES}
        stage = ""
        for line in timed.announced:
            if line[0] == "+" and line[1:] != STEP:
                stage = line[1:]
            elif line[0] == "." and stage in calls:
                calls[stage]["calls"] += 1
        lengths = {s: 1.5 * PAUSE_S * (1 + calls[s]["calls"] / max(1, counts[s])) for s in STAGES}
        lengths[STEP] = 0.5 * timed.seconds / counts[STEP]
        lengths[RESUME] = lengths[RECORD]
        return Whole(store.read_record(spec.run_id()), weights(store, spec), counts, lengths, timed.seconds)

    def difference(self, store: RunStore, spec: RunSpec) -> str | None:
        """How the run of a store differs from this one; None if only in its times."""
        record = store.read_record(spec.run_id())
        if record.status is not RunStatus.COMPLETED:
            return f"it is {record.status}: {record.reason}"
        if results_of(record) != results_of(self.record):
            return f"final loss {record.final_val_loss_nats!r}, or its curve, differs"
        theirs = weights(store, spec)
        if any(not torch.equal(theirs[name], mine) for name, mine in self.weights.items()):
            return "its weights differ"
        left = sorted(p.name for p in (store.run_folder(spec.run_id()) / "checkpoint").iterdir())
        if left != [f"step-{spec.steps}.json", f"step-{spec.steps}.pt"]:
            return f"its checkpoint folder holds {left}"
        return None


def results_of(record: RunRecord) -> list[tuple[Any, ...]]:
    """Everything in a record except its times, exactly."""
    points = [
        (p.step, p.tokens, p.train_flops, p.lr, p.train_loss_nats, p.val_loss_nats, p.val_loss_sem_nats)
        for p in record.curve
    ]
    return [*points, (record.final_val_loss_nats, record.final_val_loss_sem_nats, record.reason)]


def weights(store: RunStore, spec: RunSpec) -> dict[str, torch.Tensor]:
    path = store.run_folder(spec.run_id()) / "checkpoint" / f"step-{spec.steps}.pt"
    return checkpoint.read_checkpoint(path, spec.run_id()).tensors


@dataclass(frozen=True)
class Aim:
    """When to kill: `delay_s` after the process started, or after it announced a stage for the n-th time."""

    delay_s: float
    stage: str | None = None
    ordinal: int = 0


def attempt(store: RunStore, aim: Aim | None = None, checkpoint_every_s: float = 0.0) -> Attempt:
    """Train in a new process until it finishes or is killed."""
    reading, writing = os.pipe()
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        child(store, writing, checkpoint_every_s)
    os.close(writing)
    chunks, seen = [], 0
    kill_at = began + aim.delay_s if aim and aim.stage is None else None
    while True:
        wait_s = None if kill_at is None else max(0.0, kill_at - time.monotonic())
        if select.select([reading], [], [], wait_s)[0]:
            chunk = os.read(reading, 1 << 16)
            if not chunk:
                break  # the process is gone
            chunks.append(chunk)
            if aim and aim.stage and seen < aim.ordinal:
                seen += chunk.count(f"+{aim.stage}\n".encode())
                if seen >= aim.ordinal:
                    kill_at = time.monotonic() + aim.delay_s
        if kill_at is not None and time.monotonic() >= kill_at:
            os.kill(pid, signal.SIGKILL)
            aim = kill_at = None
    os.close(reading)
    _, status = os.waitpid(pid, 0)
    by_kill = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return Attempt(by_kill, status, b"".join(chunks).decode().splitlines(), time.monotonic() - began)


def finished(done: Attempt) -> Attempt:
    if done.status != 0:
        raise SystemExit(f"an undisturbed attempt ended with status {done.status}")
    return done


def child(store: RunStore, pipe: int, checkpoint_every_s: float) -> None:
    """The process that is killed; never returns."""
    try:
        announce(lambda line: os.write(pipe, line.encode() + b"\n"))
        train_pending(store, store.read_plan(), checkpoint_every_s=checkpoint_every_s)
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def announce(say: Callable[[str], Any]) -> None:
    """Wrap the stages that kills aim at. Done here and not in the package, so that it costs an ordinary run nothing."""
    here = threading.local()  # checkpoints are written by a thread of their own

    def staged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            outer, here.stage = getattr(here, "stage", None), name
            say(f"+{name}")
            out = function(*args, **options)
            say(f"-{name}")
            here.stage = outer
            return out

        return wrapped

    def paused(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            if getattr(here, "stage", None) in (None, STEP):
                return function(*args, **options)
            what = kind_of(args[-1])
            say(f".before {name} {what}")
            time.sleep(PAUSE_S)
            out = function(*args, **options)
            say(f".after {name} {what}")
            time.sleep(PAUSE_S)
            return out

        return wrapped

    step.TrainStep.__call__ = staged(STEP, step.TrainStep.__call__)  # type: ignore[method-assign]
    saving = staged(CHECKPOINT, checkpoint.save_checkpoint)
    for module in list(sys.modules.values()):  # wherever it was imported by name
        if vars(module).get("save_checkpoint") is checkpoint.save_checkpoint and module is not checkpoint:
            module.save_checkpoint = saving  # type: ignore[attr-defined]
    RunStore.write_record = staged(RECORD, RunStore.write_record)  # type: ignore[method-assign]
    RunStore.start_curve = staged(RESUME, RunStore.start_curve)  # type: ignore[method-assign]
    for name in ("fsync", "replace", "link"):
        setattr(os, name, paused(name, getattr(os, name)))


def kind_of(file: int | str | Path) -> str:
    """The kind of file of a path or descriptor: step.pt for step-12.pt and for its temporary file."""
    link = f"/proc/self/fd/{file}"
    if isinstance(file, int):
        file = os.readlink(link) if os.path.exists(link) else "file"
    stem, _, rest = Path(file).name.lstrip(".").partition(".")
    return f"{stem.partition('-')[0]}.{rest.partition('.')[0]}"


def progress(text: str, fraction: float, began: float) -> None:
    left = (time.monotonic() - began) * (1 - fraction) / max(fraction, 1e-9)
    end = "\n" if fraction >= 1 else ""
    print(f"\r{text}, {left / 60:.1f} min to go ", end=end, file=sys.stderr, flush=True)


def revision() -> str:
    """The git revision, marked if the working tree differs from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.check_output(command, cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL).strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
