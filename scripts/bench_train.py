#!/usr/bin/env python
"""Benchmark the training engine against a plain PyTorch loop on the same machine.

The plain loop is nanoGPT's: the same module, autograd, `clip_grad_norm_`, fused AdamW, batches from a host array, all
threads, one run at a time; eager, and with `torch.compile(model)`. Two comparisons:

  shapes   tokens/s and MFU (matrix and attention FLOPs over the device's measured matrix peak) from tiny to large models.
           Ours uses the planner's configuration: parallel one-thread workers on a CPU, one process on a GPU.
  sweep    wall time of the quickstart's whole IsoFLOP sweep, including process startup, compilation and validation: ours in
           full, with a cold and with a warm compile cache; the plain loop from --sample of each run's steps, with validation
           and compilation (warm cache) measured and the rest extrapolated (for the compiled loop, from six runs, the others
           at the speed of the closest in size). Ours also writes curves, checkpoints and records; the plain loop does not.

    scripts/bench_train.py                 about 12 minutes on two cores
    scripts/bench_train.py --quick         a twentieth of the budgets; ratios are meaningless (CI: checks that it runs)
    scripts/bench_train.py --only shapes|sweep  --out FILE (text)  --json FILE

Needs only torch and NumPy, so that it also runs on a CUDA machine without Hydra or W&B, where it prints the GPU targets.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scaling_lab.core.counts import Convention
from scaling_lab.core.schedules import Cosine
from scaling_lab.core.shapes.gpt import GPTShape
from scaling_lab.core.sources.pysource import PySource
from scaling_lab.core.spec import EvalSpec, Execution, OptimizerSpec, Plan, PlannedRun, RunSpec
from scaling_lab.core.storage.store import RunStore
from scaling_lab.planning.designs.isoflop import IsoFlopDesign
from scaling_lab.planning.execution import usable_cores
from scaling_lab.planning.plan import make_plan
from scaling_lab.planning.recipes.default import DefaultRecipe
from scaling_lab.planning.settings import ExecutionSettings, ModelSettings, SweepSettings
from scaling_lab.planning.sizes import SizeLadder

# (width, depth, heads, context, vocabulary, sequences a step, micro-batch, dtype)
CPU_SHAPES = [
    (16, 2, 1, 64, 256, 8, None, "float32"),
    (32, 2, 2, 64, 256, 8, None, "float32"),
    (64, 2, 4, 64, 256, 8, None, "float32"),
    (128, 3, 8, 64, 256, 8, None, "float32"),
    (256, 6, 8, 128, 256, 8, None, "float32"),
]
GPU_SHAPES = [
    (16, 1, 1, 64, 256, 32, None, "float32"),
    (64, 2, 4, 64, 256, 32, None, "float32"),
    (256, 6, 4, 256, 256, 64, None, "bfloat16"),
    (512, 8, 8, 512, 50_304, 32, None, "bfloat16"),
    (1024, 24, 16, 1024, 50_304, 64, 16, "bfloat16"),
]
# On a CPU the sweep is compared with both plain loops; on a GPU (all runs below 10M parameters) with the compiled one.
CPU_TARGETS = {"warm / eager": 2.5, "warm / compiled": 1.8, "cold / eager": 1.9}
GPU_SWEEP_TARGET, GPU_MFU_TARGET = 8.0, 0.5
COMPILED_RUNS = 6
LINES: list[str] = []


def say(line: str = "") -> None:
    print(line, flush=True)
    LINES.append(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=("shapes", "sweep"))
    parser.add_argument(
        "--sample", type=float, default=0.1, help="fraction of each run's steps done by the plain loop"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of each measurement of a shape")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(json.loads(options.child))
        return
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{usable_cores()} CPU cores"
    say(
        f"{datetime.date.today()}, {platform.machine()}, {name}, torch {torch.__version__}{', quick' * options.quick}"
    )
    found: dict[str, Any] = {"device": name, "date": str(datetime.date.today()), "torch": torch.__version__}
    if options.only != "sweep":
        found["shapes"] = bench_shapes(device, 0.5 if options.quick else options.seconds, options.quick)
    if options.only != "shapes":
        found["sweep"] = bench_sweep(device, options.sample, options.quick)
    if options.out:
        options.out.write_text("\n".join(LINES) + "\n")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


# -- child processes: one measurement each


def call(task: dict[str, Any], threads: int, cache: Path | None = None) -> dict[str, Any]:
    """Run a measurement in its own process."""
    return finish(begin(task, threads, cache))


def begin(task: dict[str, Any], threads: int, cache: Path | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__, "--child", json.dumps(task)], env=child_environment(threads, cache),
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = process.communicate()
    if process.returncode:
        return {"error": f"exit status {process.returncode}"}
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def child_environment(threads: int, cache: Path | None) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    env = {**os.environ, **dict.fromkeys(names, str(threads))}
    root = str(Path(__file__).resolve().parent.parent)
    env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [env.get("PYTHONPATH")])])
    if cache is not None:
        env["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    return env


def child(task: dict[str, Any]) -> None:
    kinds = {
        "peak": child_peak,
        "ours": child_ours,
        "plain": child_plain,
        "sweep": child_sweep,
        "sequence": child_sequence,
    }
    print(json.dumps(kinds[task["kind"]](task)))


def child_peak(task: dict[str, Any]) -> dict[str, Any]:
    """Peak FLOP/s of square matrix products over several sizes."""
    import torch

    device, dtype = task["device"], getattr(torch, task["dtype"])
    torch.set_num_threads(usable_cores())
    best = 0.0
    for n in (1024, 2048, 4096, 8192) if device == "cuda" else (1024, 2048):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        for _ in range(3):
            a @ b
        for _ in range(5):
            wait(device)
            began = time.perf_counter()
            for _ in range(4):
                a @ b
            wait(device)
            best = max(best, 4 * 2 * n**3 / (time.perf_counter() - began))
    return {"flops_per_s": best}


def wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def child_ours(task: dict[str, Any]) -> dict[str, Any]:
    """Our training step, in blocks as in the training loop."""
    from scaling_lab.training.run.session import open_session, train_block

    spec = RunSpec.from_dict(task["spec"])
    session, count = open_session(spec, Execution(**task["execution"])), block_steps(spec)
    train_block(session, 0, 1)
    wait_for_go(task)
    return timed(lambda k: train_block(session, 1 + count * k, 1 + count * (k + 1)), count, spec, task)


def child_plain(task: dict[str, Any]) -> dict[str, Any]:
    spec = RunSpec.from_dict(task["spec"])
    loop, count = PlainLoop(spec, task["device"], task["compile"]), block_steps(spec)
    loop.steps(2)
    wait_for_go(task)
    return timed(lambda k: loop.steps(count), count, spec, task)


def block_steps(spec: RunSpec) -> int:
    """Steps of a timed block: few of a large model, whose steps take long."""
    return 8 if spec.n_params() < 1e8 else 2


def wait_for_go(task: dict[str, Any]) -> None:
    """With `wait`: say that everything is compiled, and start to measure when told to (`gpu_checks/shapes.py`)."""
    import torch

    if not task.get("wait"):
        return
    wait(task["device"])
    if task["device"] == "cuda":
        torch.cuda.empty_cache()  # other measurements are prepared on the same GPU
    print("ready", flush=True)
    sys.stdin.readline()


def timed(work: Any, steps: int, spec: RunSpec, task: dict[str, Any]) -> dict[str, Any]:
    """Tokens/s of the median block within the given time."""
    seconds: list[float] = []
    end = time.perf_counter() + task["seconds"]
    while time.perf_counter() < end or len(seconds) < 3:
        wait(task["device"])
        began = time.perf_counter()
        work(len(seconds))
        wait(task["device"])
        seconds.append(time.perf_counter() - began)
    return {"tokens_per_s": steps * spec.batch_tokens / sorted(seconds)[len(seconds) // 2]}


class PlainLoop:
    """nanoGPT's training loop around our module."""

    def __init__(self, spec: RunSpec, device: str, compiled: bool) -> None:
        import numpy as np
        import torch

        from scaling_lab.training.models import build_model

        self.spec, self.device = spec, device
        self.data = spec.data.tokens("train")
        torch.manual_seed(spec.seed_init)
        self.random = np.random.default_rng(0)
        self.plain = build_model(spec.shape, spec.parametrization).to(device)
        self.model: Any = torch.compile(self.plain) if compiled else self.plain
        decay = [p for p in self.plain.parameters() if p.ndim >= 2]
        rest = [p for p in self.plain.parameters() if p.ndim < 2]
        o = spec.optimizer
        groups = [{"params": decay, "weight_decay": o.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=o.peak_lr, betas=(o.beta1, o.beta2), fused=True)
        self.done = 0

    def steps(self, count: int, micro: int = 16) -> None:
        import numpy as np
        import torch

        spec, context = self.spec, self.spec.shape.context
        parts = max(1, spec.batch_sequences // micro) if spec.batch_tokens > 32_768 else 1
        for _ in range(count):
            for group in self.optimizer.param_groups:
                group["lr"] = spec.learning_rate(min(self.done, spec.steps - 1))
            for _ in range(parts):
                starts = self.random.integers(0, self.data.size - context - 1, spec.batch_sequences // parts)
                rows = [torch.from_numpy(self.data[s : s + context + 1].astype(np.int64)) for s in starts]
                batch = torch.stack(rows)
                if self.device == "cuda":
                    batch = batch.pin_memory().to("cuda", non_blocking=True)
                with torch.autocast(self.device, torch.bfloat16, enabled=spec.dtype == "bfloat16"):
                    logits = self.model(batch[:, :-1])
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
                (loss / parts).backward()
            torch.nn.utils.clip_grad_norm_(self.plain.parameters(), spec.optimizer.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.done % 10 == 0:
                loss.item()
            self.done += 1


def child_sweep(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each run, trained one at a time in this process, with the steps beyond the sample extrapolated."""
    import torch

    from scaling_lab.training.measure.evaluation import ValidationSet, evaluation_steps

    device, seconds = task["device"], []
    for spec in map(RunSpec.from_dict, task["specs"]):
        began = time.perf_counter()
        loop = PlainLoop(spec, device, task["compile"])
        held_out = ValidationSet(spec.data, spec.shape.context, spec.eval, torch.device(device))
        loop.steps(2)
        wait(device)
        first = time.perf_counter() - began
        count = min(max(20, int(task["sample"] * spec.steps)), max(1, spec.steps - 2))
        began = time.perf_counter()
        loop.steps(count)
        wait(device)
        per_step = (time.perf_counter() - began) / count
        began = time.perf_counter()
        held_out.loss(loop.plain, dict(loop.plain.named_parameters()), dtype=spec.dtype)
        visit = time.perf_counter() - began
        seconds.append(first + per_step * (spec.steps - 2) + visit * len(evaluation_steps(spec)))
    return {"seconds": seconds}


def child_sequence(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a step and of an evaluation of each run, all built and compiled beforehand (`gpu_checks/sweep.py`)."""
    import torch

    from scaling_lab.training.measure.evaluation import ValidationSet

    device, runs = task["device"], []
    for spec in map(RunSpec.from_dict, task["specs"]):
        loop = PlainLoop(spec, device, task["compile"])
        held_out = ValidationSet(spec.data, spec.shape.context, spec.eval, torch.device(device))
        loop.steps(2)
        runs.append((loop, held_out))
    wait_for_go(task)
    found = []
    for loop, held_out in runs:
        loop.steps(task["sample_steps"] // 4)
        wait(device)
        began = time.perf_counter()
        loop.steps(task["sample_steps"])
        wait(device)
        step = (time.perf_counter() - began) / task["sample_steps"]
        began = time.perf_counter()
        held_out.loss(loop.plain, dict(loop.plain.named_parameters()), dtype=loop.spec.dtype)
        found.append({"step_s": step, "evaluation_s": time.perf_counter() - began})
    return {"runs": found}


# -- shapes


def bench_shapes(device: str, seconds: float, quick: bool) -> list[dict[str, Any]]:
    shapes = GPU_SHAPES if device == "cuda" else CPU_SHAPES
    cores = usable_cores()
    peaks = {
        dtype: call({"kind": "peak", "device": device, "dtype": dtype}, cores)["flops_per_s"]
        for dtype in sorted({s[-1] for s in shapes})
    }
    say("measured matrix peak: " + ", ".join(f"{d} {p / 1e12:.3g} TFLOP/s" for d, p in peaks.items()))
    say(
        f"{'shape':<28}{'N':>10}  {'ours':>9} {'MFU':>6}  {'eager':>9} {'MFU':>6}  {'compiled':>9} {'MFU':>6}  over compiled"
    )
    rows = []
    for numbers in shapes[:2] if quick else shapes:
        row = bench_shape(device, numbers, seconds, peaks[numbers[-1]])
        rows.append(row)
        cells = "  ".join(f"{row[k]:>9,.0f} {row[k + ' mfu']:>6.1%}" for k in ("ours", "eager", "compiled"))
        behind = row["ours"] < row["compiled"]
        say(f"{row['shape']:<28}{row['n_params']:>10,.0f}  {cells}  {row['ours'] / max(1, row['compiled']):.2f} "
            f"{'MISSED' if behind else 'OK'}")  # fmt: skip
    if device == "cuda" and not quick:
        mfu = rows[-1]["ours mfu"]
        say(
            f"MFU at {rows[-1]['n_params']:,.0f} parameters: {mfu:.1%}, target {GPU_MFU_TARGET:.0%}: {verdict(mfu, GPU_MFU_TARGET)}"
        )
    return rows


def shape_task(device: str, numbers: tuple[Any, ...], seconds: float) -> tuple[RunSpec, dict[str, Any]]:
    """The run of one shape, and what its measurements have in common."""
    width, depth, heads, context, vocab, sequences, micro, dtype = numbers
    shape = GPTShape(width=width, depth=depth, heads=heads, context=context, vocab_size=vocab)
    tokens = sequences * context
    spec = RunSpec(
        sweep="bench", role="single", budget_flops=1.0, shape=shape, data=PySource(), schedule=Cosine(),
        optimizer=OptimizerSpec(peak_lr=0.448 / width), batch_tokens=tokens, train_tokens=tokens * 10**6,
        eval=EvalSpec(tokens=context), dtype=dtype,
    )  # fmt: skip
    small = device == "cpu" and spec.n_params() < 1e7
    execution = {
        "device": device, "compile": True, "threads": 1 if device == "cuda" or small else usable_cores(),
        "deterministic": device == "cpu", "micro_batch_sequences": micro,
    }  # fmt: skip
    return spec, {"spec": spec.to_dict(), "device": device, "seconds": seconds, "execution": execution}


def shape_label(spec: RunSpec) -> str:
    shape = spec.shape
    return f"{shape.width} x {shape.depth}, context {shape.context}, {spec.dtype.replace('float', 'fp')[:4]}"


def bench_shape(device: str, numbers: tuple[Any, ...], seconds: float, peak: float) -> dict[str, Any]:
    spec, task = shape_task(device, numbers, seconds)
    cores = usable_cores()
    execution = task["execution"]
    workers = cores if device == "cpu" and spec.n_params() < 1e7 else 1
    begun = [begin({**task, "kind": "ours"}, execution["threads"]) for _ in range(workers)]
    found = {"ours": sum(finish(p).get("tokens_per_s", 0.0) for p in begun)}
    for name in ("eager", "compiled"):
        plain = {**task, "kind": "plain", "compile": name == "compiled"}
        found[name] = call(plain, cores).get("tokens_per_s", 0.0)
    per_token = spec.count().flops_per_token(Convention.MATMUL_PLUS_ATTENTION)
    mfu = {f"{name} mfu": rate * per_token / peak for name, rate in found.items()}
    sizes = {"n_params": spec.n_params(), "tokens_per_step": spec.batch_tokens}
    return {"shape": shape_label(spec), **sizes, **found, **mfu}


# -- the sweep


def sweep_plan(device: str, quick: bool) -> Plan:
    """The quickstart's plan (the code's defaults but for widths, conf/experiment/quickstart.yaml)."""
    design = IsoFlopDesign(sizes=SizeLadder(width_multiple=2 if device == "cpu" else None))
    if quick:
        design = replace(design, budgets_flops=tuple(b / 20 for b in design.budgets_flops[:1]), noise_seeds=1)
    settings = SweepSettings(
        sweep="bench", design=design, recipe=DefaultRecipe(), model=ModelSettings(), data=PySource(),
        schedule=Cosine(), execution=ExecutionSettings(device=device, deterministic=device == "cpu"),
    )  # fmt: skip
    return make_plan(settings)


def ours_seconds(plan: Plan, folder: Path, cache: Path) -> float:
    """Wall time of worker processes, started as by the local launcher, until every run has a record."""
    store = RunStore(folder)
    store.write_plan(plan)
    execution = plan.runs[0].execution
    workers = 4 if execution.device == "cuda" else max(1, usable_cores() // execution.threads)
    began = time.perf_counter()
    begun = [
        subprocess.Popen(
            [sys.executable, "-P", "-m", "scaling_lab.worker", str(folder)],
            env=child_environment(execution.threads, cache),
            stderr=subprocess.DEVNULL,
        )
        for _ in range(workers)
    ]
    for process in begun:
        process.wait()
    seconds = time.perf_counter() - began
    states = {store.state(run.run_id).state for run in plan.runs}
    if states != {"completed"}:
        raise SystemExit(f"not all runs of the sweep completed: {states}")
    return seconds


def plain_seconds(plan: Plan, compiled: bool, sample: float, cache: Path) -> float:
    """Wall time of the same runs, one at a time in one process; the module's docstring says what is extrapolated."""
    runs = measured_runs(plan) if compiled else list(plan.runs)
    task = {
        "kind": "sweep", "device": plan.runs[0].execution.device, "compile": compiled, "sample": sample,
        "specs": [run.spec.to_dict() for run in runs],
    }  # fmt: skip
    if compiled:
        call({**task, "sample": 0.0}, usable_cores(), cache)  # warms the cache
    found = call(task, usable_cores(), cache)
    if "error" in found:
        raise SystemExit(f"the plain loop failed: {found['error']}")
    speed = {
        run.run_id: (run.spec, seconds / run.spec.train_flops())
        for run, seconds in zip(runs, found["seconds"], strict=True)
    }
    return sum(run.spec.train_flops() * nearest(run.spec, list(speed.values())) for run in plan.runs)


def measured_runs(plan: Plan) -> list[PlannedRun]:
    """Two intermediate sizes of each budget."""
    out = []
    for budget in plan.budgets_flops:
        of = sorted(
            (r for r in plan.runs if r.spec.budget_flops == budget and r.spec.seed_init == 0),
            key=lambda r: r.spec.n_params(),
        )
        out += [of[k] for k in sorted({len(of) // 5, len(of) - 1 - len(of) // 5})]
    return out[:COMPILED_RUNS]


def nearest(spec: RunSpec, measured: list[tuple[RunSpec, float]]) -> float:
    """Seconds per FLOP of the measured run of the same budget that is closest in size."""
    of = [m for m in measured if m[0].budget_flops == spec.budget_flops] or measured
    return min(of, key=lambda m: abs(m[0].n_params() / spec.n_params() - 1))[1]


def bench_sweep(device: str, sample: float, quick: bool) -> dict[str, Any]:
    plan = sweep_plan(device, quick)
    compiled = sum(run.execution.compile for run in plan.runs)
    say(f"sweep: {len(plan.runs)} runs, {plan.total_flops:.3g} FLOPs, {compiled} of ours compiled")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds = {"cold": ours_seconds(plan, folder / "cold", folder / "cache")}
        say(f"  ours, cold compile cache      {seconds['cold']:8.1f} s")
        seconds["eager"] = plain_seconds(plan, False, sample, folder / "plain")
        say(f"  plain loop, eager             {seconds['eager']:8.1f} s  (from {sample:.0%} of the steps)")
        seconds["warm"] = ours_seconds(plan, folder / "warm", folder / "cache")
        say(f"  ours, warm compile cache      {seconds['warm']:8.1f} s")
        seconds["compiled"] = plain_seconds(plan, True, sample, folder / "plain")
        say(
            f"  plain loop, compiled, warm    {seconds['compiled']:8.1f} s  (from {sample:.0%} of the steps of {COMPILED_RUNS} runs)"
        )
    targets = {"warm / compiled": GPU_SWEEP_TARGET} if device == "cuda" else CPU_TARGETS
    for pair, target in targets.items():
        mine, theirs = pair.split(" / ")
        ratio = seconds[theirs] / seconds[mine]
        say(
            f"  {mine} against the {theirs} plain loop: {ratio:.2f} times faster, target {target:g}: {verdict(ratio, target)}"
        )
    return seconds


def verdict(value: float, target: float) -> str:
    return "OK" if value >= target else "MISSED"


if __name__ == "__main__":
    main()
