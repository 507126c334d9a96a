"""`scaling-lab doctor`: what this machine supports, with advice on what is missing."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from scaling_lab.cli.display.console import Console
from scaling_lab.cli.options.arguments import Arguments
from scaling_lab.cli.options.compose import read_command
from scaling_lab.cli.options.forms import Form, build, options_of
from scaling_lab.core.errors import UserError
from scaling_lab.core.installation import absent, analysis_requirements, install_hint, is_installed

LITTLE_DISK_BYTES = 2e9
TORCH = "torch"


@dataclass(frozen=True)
class DoctorCommand:
    """Options of `doctor`."""

    results_dir: str = "results"
    """Folder of the sweeps"""


@dataclass(frozen=True)
class CheckResult:
    """Result of one check."""

    what: str
    ok: bool
    found: str
    advice: str | None = None
    needed: bool = False
    """Whether nothing works without it."""


def form(arguments: Arguments) -> Form:
    return Form(options_of(DoctorCommand))


def run(arguments: Arguments) -> int:
    command = read_command(arguments, None, lambda tree: form(arguments))
    settings: DoctorCommand = build(DoctorCommand, command.tree)
    console = Console.for_flags(arguments.flags)
    checks: tuple[Callable[[], CheckResult], ...] = (
        _version, _python, _packages, _torch, _gpu, _gpu_sharing, _cores, _compiler, _wandb, lambda: _disk(settings.results_dir), _corpus,
    )  # fmt: skip
    findings = []
    for finding in _results(checks):
        findings.append(finding)
        if not console.json:
            mark = "ok     " if finding.ok else "missing" if finding.needed else "note   "
            console.print(f"{mark}  {finding.what:<18} {finding.found}", markup=False)
            if finding.advice:
                console.print(f"{'':9}{'':<18} -> {finding.advice}", markup=False)
    healthy = all(f.ok for f in findings if f.needed)
    can_train = healthy and all(f.ok for f in findings if f.what == TORCH)
    if console.json:
        found = {"ok": healthy, "can_train": can_train, "findings": [asdict(f) for f in findings]}
        print(json.dumps(found, indent=1))
    if healthy:
        console.next_step("scaling-lab quickstart" if can_train else "scaling-lab analyze runs=FILE")
    else:
        console.next_step("scaling-lab doctor, once everything missing is installed")
    return 0 if healthy else 1


def _results(checks: Iterable[Callable[[], CheckResult]]) -> Iterator[CheckResult]:
    """The results, one after another, each as soon as it is there; a GPU's features follow the GPU."""
    for check in checks:
        yield check()
        if check is _gpu and is_installed(TORCH):
            from scaling_lab.training.engine.cuda_features import cuda_features

            yield from (CheckResult(f.name, f.ok, f.found, f.advice) for f in cuda_features())


def _version() -> CheckResult:
    from scaling_lab.cli.main import version

    return CheckResult("scaling-lab", True, f"{version()} in {Path(__file__).resolve().parents[2]}")


def _python() -> CheckResult:
    ok = (3, 11) <= sys.version_info[:2] < (3, 14)
    advice = None if ok else "use Python 3.11, 3.12 or 3.13: Hydra does not support other versions."
    return CheckResult("python", ok, f"{platform.python_version()} ({sys.executable})", advice, needed=True)


def _packages() -> CheckResult:
    """Dependencies that are missing: those of analysis are needed; torch and wandb have checks of their own."""
    needed = analysis_requirements()[1]
    optional = {"datasets": "prepare-data source=", "tokenizers": "prepare-data tokenizer=bpe"}
    gone, extra = absent(needed), absent(optional)
    if gone:
        advice = f"nothing works without them: {install_hint(*gone)}"
        return CheckResult("packages", False, f"without {', '.join(gone)}", advice, needed=True)
    if extra:
        what = " and ".join(optional[name] for name in extra)
        advice = f"{what} need them: {install_hint(*extra)}"
        return CheckResult("packages", False, f"without {', '.join(extra)}", advice)
    return CheckResult("packages", True, "all dependencies of analysis and of data preparation")


def _torch() -> CheckResult:
    try:
        import torch
    except ImportError as error:
        return CheckResult(
            TORCH,
            False,
            str(error),
            f"training needs it, analysis and planning do not: {install_hint('torch')}",
        )
    threads = torch.get_num_threads()
    return CheckResult(TORCH, True, f"{torch.__version__}, {threads} thread{'s' * (threads != 1)} by default")


def _gpu() -> CheckResult:
    try:
        import torch
    except ImportError:
        return CheckResult("accelerator", False, "unknown without torch")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
        return CheckResult("accelerator", True, f"cuda: {', '.join(names)}, {memory:.0f} GB each")
    if torch.backends.mps.is_available():
        return CheckResult("accelerator", True, "mps (Apple GPU)")
    if Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi"):
        advice = f"an NVIDIA driver is installed, but torch {torch.__version__} cannot use it: install a CUDA build of torch."
        return CheckResult("accelerator", False, "none that torch can use", advice)
    return CheckResult("accelerator", True, "none: runs train on the CPU, which is enough for the quickstart")


def _gpu_sharing() -> CheckResult:
    from scaling_lab.launching.gpu_sharing import find_gpu_sharing
    from scaling_lab.launching.speeds import local_gpu

    if local_gpu() is None:
        return CheckResult("GPU sharing", True, "no CUDA")
    return CheckResult("GPU sharing", True, find_gpu_sharing().describe())


def _cores() -> CheckResult:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    set_threads = os.environ.get("OMP_NUM_THREADS")
    found = f"{cores}, for as many single-threaded runs in parallel"
    return CheckResult(
        "CPU cores", True, found + (f" (OMP_NUM_THREADS={set_threads} is set)" if set_threads else "")
    )


def _compiler() -> CheckResult:
    from scaling_lab.planning.execution import can_compile_on_cpu

    name = next((n for n in ("g++", "clang++", "c++") if shutil.which(n)), None)
    if can_compile_on_cpu():
        return CheckResult(
            "C++ compiler", True, f"{shutil.which(name or '')}: torch.compile works on the CPU"
        )
    advice = "install g++ (Debian: apt install g++): compiled CPU training is 2 to 3 times faster (not used by compile=false)."
    return CheckResult("C++ compiler", False, name or "none", advice)


def _wandb() -> CheckResult:
    if not is_installed("wandb"):
        return CheckResult(
            "Weights & Biases",
            False,
            "not installed",
            f"only tracker=wandb and the W&B commands need it: {install_hint('wandb')}",
        )
    from scaling_lab.tracking.sink.trackers import wandb_mode

    mode = wandb_mode("auto")
    if mode == "online":
        return CheckResult("Weights & Biases", True, "logged in: tracker=wandb is online")
    return CheckResult(
        "Weights & Biases",
        True,
        f"tracker=wandb would be {mode}",
        "run `wandb login` to see runs online; offline files can be synced later.",
    )


def _disk(results_dir: str) -> CheckResult:
    folder = Path(results_dir).expanduser().absolute()
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return CheckResult(
            "results folder", False, f"{folder} cannot be written", "give results_dir=FOLDER.", needed=True
        )
    ok = free > LITTLE_DISK_BYTES
    advice = None if ok else "checkpoints of large models need more: use results_dir=FOLDER on another disk."
    return CheckResult("results folder", ok, f"{folder}, {free / 1e9:.1f} GB free", advice)


def _corpus() -> CheckResult:
    from scaling_lab.core.sources.pysource import PySource

    source = PySource()
    try:
        tokens = source.n_tokens("train")
    except UserError as error:
        return CheckResult(
            "corpus pysource",
            False,
            str(error),
            "train on your own file with data=tokens data.path=FILE.",
            needed=True,
        )
    return CheckResult(
        "corpus pysource",
        True,
        f"{tokens / 1e6:.1f} M training tokens, fingerprint {source.fingerprint()[:12]}",
    )
