"""The plan of a sweep, made from one or several composed trees and compared with the plan on disk.

Once a run of a plan has started, the plan never changes: different options are refused, by name. Until then `plan` may
replace it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scaling_lab.cli.options.study import SweepOnly, sweep_settings
from scaling_lab.core.errors import UserError
from scaling_lab.core.spec import Plan, PlannedRun
from scaling_lab.core.storage.serialization import to_dict
from scaling_lab.core.storage.store import RunStore
from scaling_lab.planning.execution import plan_executions
from scaling_lab.planning.plan import make_plan
from scaling_lab.planning.settings import SweepSettings

# Options that do not change which runs a sweep has.
NOT_OF_THE_PLAN = frozenset(
    {"sweep", "results_dir", "config_dir", "workers", "tracker", "run_ids", "retry", "study", "gpu", "count"}
    | {"price_per_hour"}
)
EXECUTION = frozenset({"device", "compile", "threads", "deterministic", "stack", "memory_gb"})


def defines_plan(given: Collection[str]) -> bool:
    """Whether any of the given keys changes which runs a sweep has."""
    return any(key.partition(".")[0] not in NOT_OF_THE_PLAN for key in given)


def make_merged_plan(trees: Sequence[Mapping[str, Any]], device: str | None = None) -> Plan:
    """One plan of the runs of every tree (one tree per combination of a multirun), without duplicates."""
    settings = [sweep_settings(tree, (SweepOnly,), device=device) for tree in trees]
    names = sorted({s.sweep for s in settings})
    if len(names) > 1:
        raise UserError(f"sweep={','.join(names)}: one command plans one sweep; give `sweep` one name.")
    plans = [make_plan(s) for s in settings]
    if len(plans) == 1:
        return plans[0]
    if len({plan.data_fingerprint for plan in plans}) > 1:
        # A plan has one data fingerprint, and losses on different corpora do not share a law.
        raise UserError(
            f"sweep={names[0]}: its combinations train on different corpora ({_differing_data(settings)}), and a sweep "
            "has one. Plan a sweep for each corpus, with its own name."
        )
    runs = {run.run_id: run for plan in plans for run in plan.runs}
    if all(s.execution == settings[0].execution for s in settings):
        # Planned together: runs of several combinations may form a stack, or repay a compilation.
        specs = [run.spec for run in runs.values()]
        planned = zip(specs, plan_executions(specs, settings[0].execution), strict=True)
        runs = {spec.run_id(): PlannedRun(spec, execution) for spec, execution in planned}
    return replace(
        plans[0],
        runs=tuple(runs.values()),
        rounding=_once(line for plan in plans for line in plan.rounding),
        notes=_once(line for plan in plans for line in plan.notes),
        settings={"combinations": [plan.settings for plan in plans]},
    )


def _differing_data(settings: Sequence[SweepSettings]) -> str:
    """The data options in which combinations differ, with their values."""
    data = [to_dict(s.data) for s in settings]
    values = {key: _once(json.dumps(each.get(key)) for each in data) for key in data[0]}
    return "; ".join(f"data.{key}: {', '.join(found)}" for key, found in values.items() if len(found) > 1)


@dataclass(frozen=True)
class Settled:
    """The plan to use, and how plan.json changed."""

    plan: Plan
    new: bool = False
    """Whether it was just written."""
    replaced: tuple[str, ...] = ()
    """How it differs from the plan that it replaced."""


def settle_plan(
    store: RunStore,
    trees: Sequence[Mapping[str, Any]],
    given: Collection[str],
    *,
    replace_unstarted: bool = False,
) -> Settled:
    """The plan on disk; if there is none, the plan of `trees`, which is then written.

    Args:
        given: the keys that the user gave. If none of them defines a plan, the plan on disk is used as it is.
        replace_unstarted: whether another plan may replace one of which no run has started.

    Raises:
        UserError: there is no plan, or the plan on disk is a different one.
    """
    if not defines_plan(given):
        return Settled(store.read_plan())
    if not store.plan_path.exists():
        plan = make_merged_plan(trees)
        if store.create_plan(plan):
            return Settled(plan, new=True)
        # Another command wrote a plan first: it is compared like any other.
    old = store.read_plan()
    # The plan on disk decides the execution, on any machine, unless the user gave options of it.
    free = not EXECUTION & set(given)
    new = make_merged_plan(trees, device=old.runs[0].execution.device if free and old.runs else None)
    different = differences(old, new, ignore_execution=free)
    if not different:
        return Settled(old)
    started = has_started(store, old)
    if replace_unstarted and not started:
        store.write_plan(new)
        return Settled(new, new=True, replaced=tuple(different))
    name = store.folder.name
    what = "has started with another plan" if started else "has another plan"
    or_replace = (
        "" if started else ", or replace it (no run has started) with `scaling-lab plan` and these options"
    )
    raise UserError(
        f"sweep={name!r} {what}. Differences: {'; '.join(different)}. Give the new plan its own name (sweep=NAME), "
        f"or continue the old one: scaling-lab sweep sweep={name}{or_replace}."
    )


def has_started(store: RunStore, plan: Plan) -> bool:
    """Whether any run of the plan was ever started."""
    return any(state.state != "planned" for state in store.states(plan))


def differences(old: Plan, new: Plan, *, ignore_execution: bool) -> list[str]:
    """`option (on disk x, now y)` for each option in which two plans differ; empty if their runs, their execution and
    their data are the same, whatever other options say."""
    same_runs = {r.run_id: r.execution for r in old.runs}, {r.run_id: r.execution for r in new.runs}
    found = []
    if old.data_fingerprint != new.data_fingerprint:
        found.append(
            f"the content of data (on disk {old.data_fingerprint[:12]}, now {new.data_fingerprint[:12]})"
        )
    if same_runs[0].keys() == same_runs[1].keys() and (ignore_execution or same_runs[0] == same_runs[1]):
        return found
    before, after = _option_values(old), _option_values(new)
    changed = []
    for key in sorted(before.keys() | after.keys()):
        if ignore_execution and ".execution." in f".{key}.":
            continue
        if before.get(key) != after.get(key):
            changed.append(
                f"{_option(key)} (on disk {_shown(before.get(key))}, now {_shown(after.get(key))})"
            )
    if not changed and old.settings != new.settings:
        changed.append("how the options' values are combined")
    if not changed:
        changed.append(
            "the runs that the same options give (the plan is from another version of scaling-lab)"
        )
    return changed + found


def pending(store: RunStore, plan: Plan) -> list[str]:
    """Ids of the runs that have not finished, including those that other processes train."""
    finished = set(store.run_ids_with_record())
    return [run.run_id for run in plan.runs if run.run_id not in finished]


def _once(lines: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(lines))


def _option_values(plan: Plan) -> dict[str, list[str]]:
    """Settings path of each option of a plan -> its values (as JSON) in all combinations."""
    found: dict[str, list[str]] = {}
    for settings in plan.settings.get("combinations", [plan.settings]):
        for key, value in _flat(to_dict(settings)).items():
            values = found.setdefault(key, [])
            text = json.dumps(value)
            if text not in values:
                values.append(text)
    return found


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        found: dict[str, Any] = {}
        for key, item in value.items():
            found |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
        return found
    return {prefix: value}


def _option(key: str) -> str:
    """A settings path as the option that sets it."""
    key = key.removeprefix("execution.").replace("model.options.", "model.")
    return f"data.{key}" if key in ("max_epochs", "unique_tokens", "noise") else key.removesuffix(".kind")


def _shown(values: list[str] | None) -> str:
    text = ",".join(values or ["nothing"])
    return text if len(text) <= 60 else text[:57] + "..."
