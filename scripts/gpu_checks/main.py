"""The command line of gpu_check: one part after another, and a summary that is rewritten after each."""

from __future__ import annotations

import datetime
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_checks.runner import DONE, FAILED, SCRIPT, SKIPPED, TIMED_OUT, Part, child, run_part
from gpu_checks.targets import MISSED, judge, target_line
from scaling_lab.core.errors import UserError, unknown
from scaling_lab.core.storage.files import write_atomic

HELP = """\
Measures on a GPU what the CPU tests cannot: correctness, speed against a plain PyTorch loop, a sweep and its analysis.

    scripts/gpu_check                          everything on the first GPU: under 9 minutes
    scripts/gpu_check device=cpu size=tiny     every part on a CPU, tiny: under 3 minutes (continuous integration)
    scripts/gpu_check only=shapes,sweep        some parts

Options
    device=auto|cuda|cpu   auto: the first GPU if torch finds one, else the CPU
    size=full|tiny         full needs a GPU and is the default there; numbers of tiny mean nothing
    out=FOLDER             default: gpu_check-DATE-TIME in the current folder; must not exist or be empty
    only=PART,PART         default: all parts

Parts, each in its own process with its own time limit
    gpu_tests   the tests marked `gpu` (needs pytest, not its plugins)
    shapes      tokens/s and MFU of five shapes, 7k to 350M parameters, against the plain loop, eager and compiled
    sweep       24 small models against the compiled plain loop, one run after another
    isoflop     an IsoFLOP sweep and its analysis (needs SciPy)

Needs Python 3.11 to 3.13, torch 2.6 or later and NumPy; Hydra, W&B and datasets are not used. The folder gets environment.json,
one JSON file a part, targets.json, summary.txt and logs/. What was finished stays readable whenever the script is killed.
Exit status: 0; 1 if a part failed or ran out of time, a test failed, or a target was missed; 2 for a bad option."""

# The limits of the full size add up to less than 9 minutes, with what starting takes. Those of the tiny one are for a busy
# machine: on two quiet cores all of it takes about a minute and a half.
PARTS = (
    Part("gpu_tests", "tests marked gpu", {"full": 125.0, "tiny": 300.0}),
    Part("shapes", "five shapes against the plain loop", {"full": 150.0, "tiny": 300.0}),
    Part("sweep", "24 small models against the plain loop", {"full": 140.0, "tiny": 300.0}),
    Part("isoflop", "an IsoFLOP sweep and its analysis", {"full": 110.0, "tiny": 300.0}),
)
SIZES, DEVICES = ("full", "tiny"), ("auto", "cpu", "cuda")
MIN_TORCH = (2, 6)
# Of the log of a worker whose part did not come to its end.
LOG_CHARACTERS = 20_000


@dataclass(frozen=True)
class Options:
    """What was asked for."""

    device: str
    size: str
    out: Path
    parts: tuple[Part, ...]


def main(arguments: Sequence[str]) -> int:
    if any(a in ("-h", "--help", "help") for a in arguments):
        print(HELP)
        return 0
    if arguments[:1] == ["--environment"]:
        from gpu_checks.environment import environment

        print(json.dumps(environment(arguments[1])))
        return 0
    if arguments[:1] == ["--part"]:
        return child(json.loads(arguments[1]))
    try:
        options = read_options(arguments)
        options.out.mkdir(parents=True, exist_ok=True)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return run(options)


def read_options(arguments: Sequence[str]) -> Options:
    """Raises `UserError` naming the option, the value and the choices."""
    given: dict[str, str] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or not value:
            raise UserError(
                f"{argument!r} is not of the form key=value: scripts/gpu_check device=cpu size=tiny."
            )
        if name not in ("device", "size", "out", "only"):
            raise unknown("option", name, ("device", "size", "out", "only"))
        given[name] = value
    if given.get("size", "full") not in SIZES:
        raise unknown("size", given["size"], SIZES)
    by_name = {part.name: part for part in PARTS}
    wanted = given.get("only", ",".join(by_name)).split(",")
    for name in wanted:
        if name not in by_name:
            raise unknown("only", name, by_name)
    device = find_device(given.get("device", "auto"))
    size = given.get("size", "full" if device == "cuda" else "tiny")
    if size == "full" and device == "cpu":
        raise UserError("size=full requires device=cuda: scripts/gpu_check device=cpu size=tiny.")
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    out = Path(given.get("out", f"gpu_check-{stamp}")).expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"out={given.get('out')!r} exists and is not an empty folder: out={out.name}-2 would be new."
        )
    return Options(device, size, out, tuple(part for part in PARTS if part.name in wanted))


def find_device(name: str) -> str:
    """Raises `UserError` for a device or a torch that is not there."""
    if name not in DEVICES:
        raise unknown("device", name, DEVICES)
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"{sys.executable} has no torch: PYTHON scripts/gpu_check with a Python that has it.")
    import torch

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MIN_TORCH:
        raise UserError(f"torch {torch.__version__} is too old: 2.6 or later is needed.")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError(
            "device=cuda: torch finds no CUDA device here: scripts/gpu_check device=cpu size=tiny."
        )
    return ("cuda" if available else "cpu") if name == "auto" else name


def run(options: Options) -> int:
    found = ask_environment(options.device)
    write_json(
        options.out / "environment.json",
        {**found, "size": options.size, "parts": [p.name for p in options.parts]},
    )
    limit = sum(part.limit_s[options.size] for part in options.parts)
    say = lambda line: print(line, flush=True)  # noqa: E731
    say(
        f"{found['device_name']}, torch {found['packages']['torch']}, Python {found['python']}, size={options.size}"
    )
    say(f"{len(options.parts)} parts, at most {limit / 60:.1f} minutes; results: {options.out}")
    parts: dict[str, Mapping[str, Any]] = {}
    for part in options.parts:
        left = sum(p.limit_s[options.size] for p in options.parts if p.name not in parts)
        say(
            f"{part.name}: {part.title} (at most {part.limit_s[options.size]:.0f} s; at most {left / 60:.1f} minutes left)"
        )
        parts[part.name] = run_part(part, options.device, options.size, options.out)
        remove_work(options.out, parts[part.name])
        say("  " + part_line(parts[part.name]))
        summarize(options, found, parts)
    targets = judge(parts, options.device, options.size)
    for row in targets:
        say(target_line(row))
    say(f"summary: {options.out / 'summary.txt'}")
    bad = [p for p in parts.values() if p["status"] in (FAILED, TIMED_OUT) or p["result"].get("failed")]
    return 1 if bad or any(row["verdict"] == MISSED for row in targets) else 0


def ask_environment(device: str) -> dict[str, Any]:
    """From another process: this one must not hold the GPU, which parts may need for themselves."""
    command = [sys.executable, str(SCRIPT), "--environment", device]
    found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return found


def summarize(options: Options, found: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Rewrite targets.json and summary.txt from the parts that have ended."""
    targets = judge(parts, options.device, options.size)
    write_json(options.out / "targets.json", targets)
    lines = [
        f"gpu_check {found['date']}, revision {found['revision']}, size={options.size}",
        f"{found['device_name']}, torch {found['packages']['torch']}, Python {found['python']}, {found['platform']}",
        *(["numbers of size=tiny mean nothing"] if options.size == "tiny" else []),
        "",
    ]
    for part in options.parts:
        known = parts.get(part.name)
        lines.append(f"{part.name}: not run yet" if known is None else part_line(known))
        lines += [] if known is None else [f"  {line}" for line in detail_lines(known)]
    lines += ["", "targets", *(target_line(row) for row in targets)]
    write_atomic(options.out / "summary.txt", "\n".join(lines) + "\n")


def part_line(part: Mapping[str, Any]) -> str:
    reason = f": {part['reason']}" if part.get("reason") else ""
    return f"{part['part']} {part['status']} in {part['seconds']:.0f} s{reason}"


def detail_lines(part: Mapping[str, Any]) -> list[str]:
    """What a part found, as far as it came."""
    found = part["result"]
    if part["part"] == "gpu_tests" and "tests" in found:
        shown = [t for t in found["tests"] if t["outcome"] == "failed"]
        skipped = sorted({t["message"] for t in found["tests"] if t["outcome"] == "skipped"})
        return [
            f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped",
            *(f"FAILED {t['test']}: {t['message']}" for t in shown),
            *(f"skipped: {message}" for message in skipped),
        ]
    if part["part"] == "shapes":
        return [shape_line(row) for row in found.get("rows", [])]
    if part["part"] == "sweep" and "ours_cold_s" in found:
        lines = [f"{found['cold_steps']} steps of each run, cold compile cache: {found['ours_cold_s']:.1f} s"]
        if "ours_warm_s" in found:
            kind = "compiled" if found["plain_compiled"] else "eager"
            what = f"{found['runs']} runs of {found['steps']:,} steps, {found['stacks']} stacks"
            times = f"ours {found['ours_warm_s']:.1f} s, {kind} plain loop {found['plain']['seconds']:.1f} s"
            lines.append(f"{what}: {times} ({found['times_faster']:.2f}x)")
        return lines
    if part["part"] == "isoflop" and "train_s" in found:
        lines = [f"{found['runs']} runs, {found['total_flops']:.3g} FLOPs in {found['train_s']:.1f} s"]
        return lines + [f"{e['approach']}: {e['status']}" for e in found.get("estimates", [])]
    return []


def shape_line(row: Mapping[str, Any]) -> str:
    cells = []
    for way in ("ours", "eager", "compiled"):
        each = row[way]
        if "error" in each:
            cells.append(f"{way} {each['error']}")
        else:
            mfu = "" if each["mfu"] is None else f" ({each['mfu']:.1%} MFU)"
            cells.append(f"{way} {each['tokens_per_s']:,.0f} tokens/s{mfu}")
    ratio = "" if row["over_compiled"] is None else f"; {row['over_compiled']:.2f}x the compiled loop"
    return f"{row['shape']}, N {row['n_params']:,.0f}: {', '.join(cells)}{ratio}"


def remove_work(out: Path, part: Mapping[str, Any]) -> None:
    """Remove the sweeps of a part: checkpoints are large. Of a part that did not end well the workers' logs are kept."""
    work = out / "work"
    if part["status"] not in (DONE, SKIPPED):
        for log in sorted(work.glob("**/logs/*.log")):
            name = "-".join(log.relative_to(work).with_suffix("").parts)
            text = log.read_text(encoding="utf-8", errors="replace")[-LOG_CHARACTERS:]
            (out / "logs" / f"{name}.txt").write_text(text, encoding="utf-8")
    shutil.rmtree(work, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    write_atomic(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
