"""Two source trees installed side by side, and the commands that run in them."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from compare_revision_rules import Failed

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class Side:
    """An installed tree, the folder that its commands run in, and the core that it trains on."""

    name: str
    folder: Path
    core: int | None

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def site(self) -> Path:
        return next((self.folder / "environment").glob("lib/python*/site-packages"))

    @property
    def keep(self) -> str:
        """The option with which runs keep their last checkpoint, to be compared; revisions before it always did."""
        known = "\nKEEP = " in (self.site / "scaling_lab/core/spec.py").read_text()
        return " keep=resume" if known else ""

    def start(self, *argv: str, core: int | None = None, **options: Any) -> subprocess.Popen[str]:
        """Start a program of this side's environment. With `core`, call it in a thread of its own."""
        if core is not None:
            os.sched_setaffinity(0, {core})  # of this thread; the process inherits it
        foreign = ("PYTHON", "SCALING_LAB_", "WANDB_", "VIRTUAL_ENV")
        env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | {
            "PYTHONSAFEPATH": "1", "PYTHONNOUSERSITE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
            "WANDB_MODE": "disabled", "SCALING_LAB_STRICT": "1", "SCALING_LAB_CACHE_DIR": str(self.folder / "cache"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "compiled"),
        }  # fmt: skip
        program = str(self.folder / "environment/bin" / argv[0])
        return subprocess.Popen(
            [program, *argv[1:]], cwd=self.work, env=env, stdin=subprocess.DEVNULL, text=True, start_new_session=True, **options
        )  # fmt: skip

    def run(self, *argv: str, core: int | None = None) -> str:
        """What a program prints on stdout. Raises `Failed` if it fails."""
        began = time.monotonic()
        process = self.start(*argv, core=core, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            out, err = process.communicate(timeout=TIMEOUT_S)
        finally:
            kill(process, signal.SIGKILL)
        command = shlex.join(argv)
        log(f"  {self.name} {time.monotonic() - began:6.1f} s  {command[:140]}")
        if process.returncode:
            last_lines = " | ".join((err or out).strip().splitlines()[-3:])
            raise Failed(f"{self.name}: `{command}` ended with status {process.returncode}: {last_lines}")
        return out

    def lab(self, options: str, *more: str, core: int | None = None) -> str:
        return self.run("scaling-lab", *shlex.split(options), *more, core=core)


def kill(process: subprocess.Popen[str], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def git(*arguments: str) -> str:
    return subprocess.check_output(["git", *arguments], cwd=ROOT, text=True).strip()


def export(revision: str | None, tree: Path) -> None:
    """Write the files of a revision into `tree`; None: of the working tree, uncommitted changes included."""
    tree.mkdir(parents=True)
    if revision is not None:
        archive = subprocess.check_output(["git", "archive", revision], cwd=ROOT)
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(tree, filter="data")
        return
    for name in git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        if (ROOT / name).is_file():  # a deleted file is still listed
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)


def install(side: Side, revision: str | None) -> None:
    """Install a tree without its dependencies, and check that no other installation of it is imported."""
    export(revision, side.folder / "tree")
    side.work.mkdir()
    environment = side.folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    # A .pth file inside a folder that a .pth file names is not read: an editable installation there is not seen.
    dependencies = {sysconfig.get_paths()[name] for name in ("purelib", "platlib")}
    (side.site / "dependencies.pth").write_text("\n".join(sorted(dependencies)) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin/python"), "install", "--quiet"]
    pip += ["--disable-pip-version-check", "--no-deps", "--no-build-isolation", str(side.folder / "tree")]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side.name}: the installation failed: {done.stderr.strip()[-800:]}")
    for name in ("scaling_lab", "scaling_lab.conf", "hydra_plugins.scaling_lab"):
        file = side.run("python", "-c", f"import {name} as m; print(m.__file__)").strip()
        if not Path(file).is_relative_to(side.site):
            raise SystemExit(f"{side.name}: {name} is imported from another installation: {file}")


def in_threads(*jobs: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [job.result() for job in [pool.submit(job) for job in jobs]]


def on_both(sides: Sequence[Side], job: Callable[[Side], Any]) -> list[Any]:
    return in_threads(*(partial(job, side) for side in sides))
