#!/usr/bin/env python
"""Kill the processes of a sweep at random times with SIGKILL until it is done, and compare it with an undisturbed sweep.

    scripts/kill_sweep.py                              # 200 kills: about twelve minutes on two cores
    scripts/kill_sweep.py --kills 40                   # as in CI
    scripts/kill_sweep.py --out results/benchmarks/kill_sweep.txt

Two `scaling-lab sweep` commands, each with one worker, share a folder of 20 tiny runs. A kill hits a worker, a command
(which orphans its worker), or one of each at once; dead commands are started again. Half of the kills come at a random
time, the others a few random milliseconds after some worker announced that it trains, writes a checkpoint, or writes a
record. When a sweep finishes before the kills are used up, another one starts in a new folder.

Where a kill landed is recorded, not guessed: workers append the start and the end of each phase to a file. A
sitecustomize.py that only this script puts on their path does this; it also writes a checkpoint every quarter of a second
and pauses briefly around each fsync, rename and link, so that kills fall on both sides of them.

Checked for every sweep: all runs are completed; no record was written twice or changed; no run was trained by two
processes at once or after its record; every curve is complete and, like the losses, bit for bit that of the undisturbed
sweep; `analyze` prints the same numbers. The exit status is 1 if a check fails, or if no kill hit training,
checkpointing or record writing.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from scaling_lab.core.record import RunRecord, RunStatus
from scaling_lab.core.storage.store import RunStore

T = TypeVar("T")
TRAINING, CHECKPOINTING, RECORDING = PHASES = ("training", "checkpointing", "recording")
STUDY = (
    "data.max_mb=1 data.max_epochs=99 eval.tokens=1024 device=cpu compile=false design.budgets_flops=[3e8,6e8,1e9,1.5e9,2.2e9] "
    "design.sizes_per_budget=4 design.noise_seeds=1 design.n_opt_at_1e12=200K design.sizes.min_width=4 design.sizes.max_width=16 "
    "design.sizes.width_ratio=1.3 design.sizes.min_depth=1 recipe.batch_tokens=64"
)
COMMANDS = 2
# What a kill hits, and which phase it waits for, drawn with these weights.
VICTIMS = {"worker": 6, "command": 2, "both": 2}
AIMS = {None: 5, TRAINING: 1, CHECKPOINTING: 2, RECORDING: 2}
# Mean time between kills, as a multiple of the time from a worker's start to its first step (seconds, more on a busy
# machine): some attempts must make progress.
MEAN_WAIT_STARTS, MEAN_WAIT_S = 0.5, (2.0, 10.0)
AIM_TIMEOUT_S = 30.0
ANALYSIS = ("bootstrap.resamples=100", "--json", "--quiet")
# Parts of an analysis that are not about the runs.
NOT_COMPARED = ("command", "versions", "source")
STUCK_S = 600.0

SITECUSTOMIZE = '''
"""Announces the phases of a worker; see scripts/kill_sweep.py."""
import os, random, sys, threading, time
if "scaling_lab.worker" in sys.orig_argv:
    out = os.open(os.environ["KILL_SWEEP_PHASES"], os.O_WRONLY | os.O_APPEND)
    def say(sign, phase, run_id):
        os.write(out, f"{time.time_ns()} {os.getpid()} {sign}{phase} {run_id}\\n".encode())
    say("+", "starting", "-")
    from scaling_lab.core.storage.store import RunStore
    from scaling_lab.training.run import loop, member
    from scaling_lab.training.run.session import Program
    here = threading.local()  # checkpoints are written by a thread of their own
    def announced(phase, function, run_of, writes=True):
        def wrapped(*args, **options):
            run_id = run_of(*args)
            say("+", phase, run_id)
            here.writing = writes
            try:
                return function(*args, **options)
            finally:
                here.writing = False
                say("-", phase, run_id)
        return wrapped
    def slow(function):
        def wrapped(*args, **options):
            if getattr(here, "writing", False): time.sleep(random.uniform(0, 0.004))
            try:
                return function(*args, **options)
            finally:
                if getattr(here, "writing", False): time.sleep(random.uniform(0, 0.004))
        return wrapped
    for name in ("fsync", "replace", "link"):
        setattr(os, name, slow(getattr(os, name)))
    def run_of(program, done, *_):
        return program.sessions[min(done)].spec.run_id()
    Program.run_block = announced("training", Program.run_block, run_of, False)
    member.save_checkpoint = announced("checkpointing", member.save_checkpoint, lambda folder, saved: saved.run_id)
    member.write_weights = announced("checkpointing", member.write_weights, lambda folder, spec, tensors: spec.run_id())
    RunStore.write_record = announced("recording", RunStore.write_record, lambda store, record: record.run_id)
    loop.CHECKPOINT_EVERY_S = 0.25
    say("-", "starting", "-")
'''


@dataclass(frozen=True)
class Event:
    """One line written by a worker."""

    at_ns: int
    pid: int
    begins: bool
    phase: str
    run_id: str


@dataclass
class Announcements:
    """What the workers of one sweep have announced so far."""

    path: Path
    events: list[Event] = field(default_factory=list)
    _read: int = 0

    def read_new(self) -> list[Event]:
        """The lines written since the last call."""
        with open(self.path, "rb") as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        new = []
        for line in whole.decode().splitlines():
            at_ns, pid, phase, run_id = line.split()
            new.append(Event(int(at_ns), int(pid), phase[0] == "+", phase[1:], run_id))
        self.events += new
        return new

    def workers(self) -> list[int]:
        """Live processes that have announced anything."""
        return [pid for pid in dict.fromkeys(event.pid for event in self.events) if is_alive(pid)]

    def start_s(self) -> float:
        """Median seconds from a worker's first announcement to its first training."""
        first: dict[int, int] = {}
        took: dict[int, float] = {}
        for event in self.events:
            first.setdefault(event.pid, event.at_ns)
            if event.phase == TRAINING:
                took.setdefault(event.pid, (event.at_ns - first[event.pid]) / 1e9)
        return statistics.median(took.values()) if took else 0.0

    def phase_of(self, pid: int) -> str:
        """The phase that a process had started and not ended at its last line. A checkpoint is written while steps go on: then
        it is the write."""
        self.read_new()
        open_phases: list[str] = []
        for event in self.events:
            if event.pid == pid and event.begins:
                open_phases.append(event.phase)
            elif event.pid == pid and event.phase in open_phases:
                open_phases.remove(event.phase)
        if CHECKPOINTING in open_phases:
            return CHECKPOINTING
        return open_phases[-1] if open_phases else "between"


@dataclass
class Sweep:
    """Two commands that share one folder."""

    folder: Path
    results: Path
    """The folder of sweeps."""
    rng: random.Random
    landed: Counter[str] = field(default_factory=Counter)
    victims: Counter[str] = field(default_factory=Counter)
    commands: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = RunStore(self.folder)
        (self.results / "inject").mkdir(exist_ok=True)
        (self.results / "inject/sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")
        phases = self.results / f"{self.folder.name}.phases"
        phases.touch()
        self.announced = Announcements(phases)
        self.log = self.results / f"{self.folder.name}.log"
        self.records: dict[str, int] = {}

    def done(self) -> bool:
        """Whether every run has a record; also notes each record's inode when it is first seen."""
        for run_id in self.store.run_ids_with_record():
            inode = (self.store.run_folder(run_id) / "record.json").stat().st_ino
            if self.records.setdefault(run_id, inode) != inode:
                raise SystemExit(f"FAILED: the record of {run_id} was written twice")
        return self.store.plan_path.exists() and len(self.records) == len(self.store.read_plan().runs)

    def start_commands(self) -> None:
        """Start the commands that are not running."""
        self.commands = [command for command in self.commands if command.poll() is None]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(self.results / "inject"), os.environ.get("PYTHONPATH")))),
            "KILL_SWEEP_PHASES": str(self.announced.path),
        }  # fmt: skip
        for _ in range(COMMANDS - len(self.commands)):
            with open(self.log, "ab") as log:
                self.commands.append(
                    subprocess.Popen(
                        [sys.executable, "-P", "-m", "scaling_lab.cli.main", "sweep", f"sweep={self.folder.name}",
                         f"results_dir={self.results}", *STUDY.split(), "workers=1", "hydra.launcher.max_attempts=1000"],
                        env=environment, stdout=log, stderr=log, start_new_session=True,
                    )
                )  # fmt: skip

    def kill_once(self) -> bool:
        """Wait for a random time or for the phase that the kill aims at, then kill; False if there was no process to kill."""
        what = draw(self.rng, VICTIMS)
        victim = self._wait(draw(self.rng, AIMS))
        pids = []
        if what in ("worker", "both") and victim is not None:
            pids.append(victim)
        alive = [command.pid for command in self.commands if command.poll() is None]
        if what in ("command", "both") and alive:
            pids.append(self.rng.choice(alive))
        if len(pids) < (2 if what == "both" else 1):
            return False
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.victims[what] += 1
        if what != "command" and victim is not None:
            while is_alive(victim):
                time.sleep(0.001)
            self.landed[self.announced.phase_of(victim)] += 1
        return True

    def _wait(self, aim: str | None) -> int | None:
        """A live worker, after a random time; with an aim, one that started that phase some milliseconds ago."""
        mean = min(MEAN_WAIT_S[1], max(MEAN_WAIT_S[0], MEAN_WAIT_STARTS * self.announced.start_s()))
        time.sleep(self.rng.expovariate(1 / mean) / (1 if aim is None else 2))
        self.announced.read_new()
        end = time.monotonic() + AIM_TIMEOUT_S
        while aim is not None and time.monotonic() < end:
            started = [
                event.pid for event in self.announced.read_new() if event.begins and event.phase == aim
            ]
            if started:
                time.sleep(self.rng.uniform(0, 0.02))
                return started[-1] if is_alive(started[-1]) else None
            time.sleep(0.001)
        workers = self.announced.workers()
        return self.rng.choice(workers) if workers else None

    def problems(self, whole: dict[str, RunRecord]) -> list[str]:
        """The checks that fail, compared with the records of the undisturbed sweep."""
        found = []
        records, unreadable = self.store.load_records()
        found += [f"{run_id}: {reason}" for run_id, reason in unreadable]
        if {r.run_id for r in records} != set(whole):
            found.append("other runs than the undisturbed sweep's")
        for record in records:
            found += different(record, whole[record.run_id])
        self.announced.read_new()
        for run_id in whole:
            mine = [event for event in self.announced.events if event.run_id == run_id]
            order = [pid for i, pid in enumerate(e.pid for e in mine) if i == 0 or mine[i - 1].pid != pid]
            if len(order) != len(set(order)):
                found.append(f"{run_id}: two processes worked on it at once")
            written_ns = (self.store.run_folder(run_id) / "record.json").stat().st_mtime_ns
            if any(e.phase == TRAINING and e.begins and e.at_ns > written_ns + 50_000_000 for e in mine):
                found.append(f"{run_id}: trained after its record was written")
        return found


def different(record: RunRecord, whole: RunRecord) -> list[str]:
    """How a run differs from the undisturbed one, apart from times and machines."""
    found = []
    if record.status is not RunStatus.COMPLETED:
        found.append(f"{record.run_id}: {record.status} ({record.reason})")
    if record.final_val_loss_nats != whole.final_val_loss_nats:
        found.append(
            f"{record.run_id}: final loss {record.final_val_loss_nats}, undisturbed {whole.final_val_loss_nats}"
        )
    timeless = [[replace(p, wall_time_s=0.0) for p in r.curve] for r in (record, whole)]
    if timeless[0] != timeless[1]:
        found.append(f"{record.run_id}: a different curve")
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def draw(rng: random.Random, weights: Mapping[T, int]) -> T:
    return rng.choices(list(weights), list(weights.values()))[0]


def analysis_of(results: Path, sweep: str) -> dict[str, object]:
    """What `scaling-lab analyze` prints about the runs of a sweep."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "scaling_lab.cli.main", "analyze", f"sweep={sweep}", f"results_dir={results}", *ANALYSIS],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"analyze sweep={sweep} ended with {done.returncode}: {done.stderr}")
    return {key: value for key, value in json.loads(done.stdout).items() if key not in NOT_COMPARED}


def undisturbed(results: Path) -> dict[str, RunRecord]:
    """The records of the same sweep without kills."""
    argv = ["sweep", "sweep=whole", f"results_dir={results}", *STUDY.split(), "workers=2", "--quiet"]
    subprocess.run([sys.executable, "-P", "-m", "scaling_lab.cli.main", *argv], check=True)
    records, problems = RunStore(results / "whole").load_records()
    assert not problems
    return {record.run_id: record for record in records}


def disturbed(
    results: Path, name: str, kills: int, rng: random.Random, say_progress: bool
) -> tuple[Sweep, int]:
    """Run one sweep to its end with at most `kills` kills; returns the sweep and the number of kills."""
    sweep, made, last_made = Sweep(results / name, results, rng), 0, time.monotonic()
    try:
        while not sweep.done():
            sweep.start_commands()
            if made < kills and sweep.kill_once():
                made, last_made = made + 1, time.monotonic()
                if say_progress and made % 10 == 0:
                    print(
                        f"  {name}: {made} kills, {len(sweep.records)} runs done", file=sys.stderr, flush=True
                    )
            elif made >= kills:
                time.sleep(0.2)
            if time.monotonic() - last_made > STUCK_S:
                raise SystemExit(f"FAILED: {name} makes no progress: see {sweep.log}")
        for command in sweep.commands:
            command.wait(timeout=60)
    finally:
        for command in sweep.commands:
            if command.poll() is None:
                command.terminate()
                command.wait()
    return sweep, made


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, help="where the sweeps are written (default: a temporary folder)"
    )
    parser.add_argument("--out", type=Path, help="also write the report here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-sweep-") as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        report, good = run(folder, options.kills, options.seed)
    print(report)
    if options.out:
        options.out.write_text(report + "\n", encoding="utf-8")
    return 0 if good else 1


def run(results: Path, kills: int, seed: int) -> tuple[str, bool]:
    """The report, and whether every check passed."""
    for old in results.glob("*"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    began, rng = time.monotonic(), random.Random(seed)
    whole = undisturbed(results)
    expected = analysis_of(results, "whole")
    landed: Counter[str] = Counter()
    victims: Counter[str] = Counter()
    problems: list[str] = []
    made = sweeps = attempts = 0
    while made < kills:
        sweeps += 1
        sweep, n = disturbed(results, f"killed-{sweeps}", kills - made, rng, say_progress=True)
        made += n
        landed += sweep.landed
        victims += sweep.victims
        attempts += len(list(sweep.folder.glob("runs/*/claim-*.json")))
        found = sweep.problems(whole)
        if analysis_of(results, sweep.folder.name) != expected:
            found.append("the analysis differs from the undisturbed sweep's")
        problems += [f"{sweep.folder.name}: {problem}" for problem in found]
    missed = [phase for phase in PHASES if not landed[phase]]
    minutes = (time.monotonic() - began) / 60
    lines = [
        f"kill_sweep: {made} SIGKILLs over {sweeps} sweeps of {len(whole)} runs, {attempts} attempts at runs; "
        f"{datetime.date.today()}, revision {revision()}, Python {platform.python_version()}, {minutes:.1f} minutes",
        f"killed: {', '.join(f'{n} {name}' for name, n in victims.most_common())} (both: a worker and a command at once)",
        f"the workers killed were: {', '.join(f'{n} {name}' for name, n in landed.most_common())}",
        *(f"FAILED {problem}" for problem in problems),
        *(f"FAILED no kill hit {phase}" for phase in missed),
    ]
    if not problems and not missed:
        lines.append(
            "OK every run completed exactly once; every curve is complete and bit for bit that of the undisturbed sweep; "
            "the analysis is the same"
        )
    return "\n".join(lines), not problems and not missed


def revision() -> str:
    """The tested commit."""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
