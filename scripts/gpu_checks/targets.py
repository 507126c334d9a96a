"""The targets, and whether what was measured meets them: met, missed, or not run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpu_checks.runner import DONE

MET, MISSED, NOT_RUN = "met", "missed", "not run"
# Parameters from which a shape is the large one of the MFU target.
LARGE_PARAMS = 3e8
N_SHAPES = 5
MAX_SECONDS = 540.0
PARTS = ("gpu_tests", "shapes", "sweep", "isoflop")
Parts = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Target:
    """A number to reach on a GPU."""

    name: str
    measured: Callable[[Parts], float | None]
    """None: not measured, or not completely."""
    target: float
    unit: str = ""
    at_least: bool = True
    goal: float | None = None


def result_of(parts: Parts, name: str) -> Mapping[str, Any] | None:
    """What a part found, if it came to its end."""
    part = parts.get(name, {})
    return part["result"] if part.get("status") == DONE else None


def sweep_ratio(parts: Parts) -> float | None:
    found = result_of(parts, "sweep")
    return None if found is None or not found.get("plain_compiled") else found.get("times_faster")


def large_mfu(parts: Parts) -> float | None:
    """Of the largest shape; it counts also if the part ended before smaller shapes were measured."""
    rows = parts.get("shapes", {}).get("result", {}).get("rows", [])
    return next((row.get("ours_mfu") for row in rows if row["n_params"] >= LARGE_PARAMS), None)


def smallest_ratio(parts: Parts) -> float | None:
    """Only if all shapes were measured both ways."""
    found = result_of(parts, "shapes")
    ratios = [row.get("over_compiled") for row in (found or {}).get("rows", [])]
    return min(ratios) if len(ratios) >= N_SHAPES and None not in ratios else None


def failed_tests(parts: Parts) -> float | None:
    """Only if the tests came to their end and at least one of them ran."""
    found = result_of(parts, "gpu_tests")
    if found is None or not found["passed"] + found["failed"]:
        return None
    return float(found["failed"])


def total_seconds(parts: Parts) -> float | None:
    """Only if no part was left out or ended early."""
    if not set(PARTS) <= set(parts) or any(part.get("status") != DONE for part in parts.values()):
        return None
    return sum(part["seconds"] for part in parts.values())


TARGETS = (
    Target("gpu tests that fail", failed_tests, 0.0, at_least=False),
    Target("24 small models, over the compiled plain loop in sequence", sweep_ratio, 8.0, "x"),
    Target("MFU at 350M parameters, bfloat16, context 1,024", large_mfu, 0.40, goal=0.50),
    Target("slowest of five shapes over the compiled plain loop", smallest_ratio, 1.0, "x"),
    Target("time of all parts", total_seconds, MAX_SECONDS, " s", at_least=False),
)


def judge(parts: Parts, device: str, size: str, targets: Sequence[Target] = TARGETS) -> list[dict[str, Any]]:
    """Each target with its measured value. Targets are for GPUs: a CPU or the tiny size measures none of them."""
    rows = []
    for target in targets:
        value = target.measured(parts) if device == "cuda" and size == "full" else None
        if value is None:
            verdict = NOT_RUN
        else:
            good = value >= target.target if target.at_least else value <= target.target
            verdict = MET if good else MISSED
        rows.append(
            {
                "name": target.name,
                "measured": value,
                "target": target.target,
                "at_least": target.at_least,
                "goal": target.goal,
                "unit": target.unit,
                "verdict": verdict,
            }
        )
    return rows


def target_line(row: Mapping[str, Any]) -> str:
    """One line of the summary."""
    sign = ">=" if row["at_least"] else "<="
    measured = "-" if row["measured"] is None else f"{row['measured']:.3g}{row['unit']}"
    goal = "" if row["goal"] is None else f", goal {row['goal']:g}{row['unit']}"
    return (
        f"{row['verdict']:<8} {row['name']}: {measured} (target {sign} {row['target']:g}{row['unit']}{goal})"
    )
