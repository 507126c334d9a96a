"""Measured speeds of planned steps (`plan probe=true`), kept on disk for each device and used for the times of later plans.

    <cache folder>/probes/<device>.json     the measured steps of one kind of device, the newest of each program

Only shown times and job limits come from here; compilation, stacks, threads and run ids never do.
"""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from scaling_lab.core.counts import Convention
from scaling_lab.core.sources.files.shard_check import cache_folder
from scaling_lab.core.spec import PlannedRun
from scaling_lab.core.storage.files import write_atomic
from scaling_lab.planning.devices import Device, device_of_label

# Beyond the smallest and largest measured step by up to this factor in FLOPs, the speed of the nearest one is taken.
MAX_EXTRAPOLATION = 4.0


@dataclass(frozen=True)
class StepTime:
    """One measured step program: of a run, or of a whole stack."""

    program: str
    """What it depends on, as text."""
    dtype: str
    compiled: bool
    threads: int
    step_flops: float
    """6 N with head, of all members."""
    seconds: float
    torch: str
    date: str


@dataclass(frozen=True)
class Probe:
    """The measured steps of one kind of device."""

    device: str
    """As the driver, or the operating system, calls it."""
    steps: tuple[StepTime, ...] = ()

    def run_seconds(self, run: PlannedRun) -> float | None:
        """Seconds of one run, its share of a stack's where it is in one; None if nothing similar was measured."""
        step = self.step_seconds(run)
        steps = run.spec.steps - run.spec.parent_step
        return None if step is None else steps * step / run.execution.stack_size

    def step_seconds(self, run: PlannedRun) -> float | None:
        """Seconds of a step (of all members of a stack): as measured, or FLOP/s interpolated in ln FLOPs."""
        execution = run.execution
        for step in self.steps:
            if step.program == program_text(run):
                return step.seconds
        similar = sorted(
            (math.log(s.step_flops), math.log(s.step_flops / s.seconds))
            for s in self.steps
            if (s.dtype, s.compiled, s.threads) == (run.spec.dtype, execution.compile, execution.threads)
        )
        flops = step_flops(run)
        x, reach = math.log(flops), math.log(MAX_EXTRAPOLATION)
        if not similar or not similar[0][0] - reach <= x <= similar[-1][0] + reach:
            return None
        return flops / math.exp(_interpolated(x, similar))

    def merged(self, measured: Iterable[StepTime]) -> Probe:
        """With newer measurements in place of those of the same programs."""
        steps = {step.program: step for step in (*self.steps, *measured)}
        return Probe(self.device, tuple(steps.values()))


def _interpolated(x: float, points: Sequence[tuple[float, float]]) -> float:
    """Linear between the points (sorted by x), constant outside them."""
    x = min(max(x, points[0][0]), points[-1][0])
    for (a, y_a), (b, y_b) in pairwise(points):
        if x <= b:
            return y_a if b == a else y_a + (x - a) / (b - a) * (y_b - y_a)
    return points[-1][1]


def step_flops(run: PlannedRun) -> float:
    """FLOPs of one training step of a run, or of its whole stack."""
    per_token = run.spec.count().flops_per_token(Convention.SIX_N_WITH_HEAD)
    return per_token * run.spec.batch_tokens * run.execution.stack_size


def program_text(run: PlannedRun) -> str:
    """What the time of a step depends on, apart from the device."""
    spec, execution = run.spec, run.execution
    parts = [repr(spec.shape), f"batch {spec.batch_tokens}", spec.dtype, f"threads {execution.threads}"]
    parts += ["compiled"] if execution.compile else []
    parts += [f"micro-batch {execution.micro_batch_sequences}"] if execution.micro_batch_sequences else []
    parts += [f"stack {execution.stack_size}"] if execution.stack_size > 1 else []
    return ", ".join(parts)


def steps_to_measure(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """One run of each step program, in an order in which the first few cover the range of sizes: largest, smallest, middle."""
    distinct = {program_text(run): run for run in runs}
    ordered = sorted(distinct.values(), key=step_flops, reverse=True)
    places: list[int] = []
    ends = [(0, len(ordered) - 1)]
    while ends:
        first, last = ends.pop(0)
        middle = (first + last) // 2
        for place in (first, last, middle):
            if place not in places:
                places.append(place)
        if last - first > 2:
            ends += [(first, middle), (middle, last)]
    return [ordered[k] for k in places]


def processor_name() -> str:
    """Name of this machine's processor."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def probes_folder() -> Path:
    return cache_folder() / "probes"


def load_probe(device: str) -> Probe:
    """The measurements of a device by its exact name; without steps if there are none, or if their file is damaged."""
    return _read(_path(device)) or Probe(device)


def probe_of(gpu: Device) -> Probe | None:
    """The measurements of a kind of GPU, whichever machine made them; None if there are none."""
    probes = [_read(path) for path in sorted(probes_folder().glob("*.json"))]
    return next((p for p in probes if p is not None and device_of_label(p.device) is gpu), None)


def save_probe(probe: Probe) -> Path:
    """Keep the measurements for later plans. Raises OSError."""
    path = _path(probe.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps({"schema_version": 1, **asdict(probe)}, indent=1))
    return path


def _path(device: str) -> Path:
    return probes_folder() / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def _read(path: Path) -> Probe | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Probe(str(found["device"]), tuple(StepTime(**step) for step in found["steps"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
