"""Owns the plan of a sweep as the command line sees it: made from one or several trees, and settled with the one on disk.

A plan on disk is never changed under runs that were made from it: what differs is refused, by name.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from scaling_lab.cli.study import SweepOnly, sweep_settings
from scaling_lab.core.errors import UserError
from scaling_lab.core.serial import dumps
from scaling_lab.core.spec import Plan
from scaling_lab.core.store import RunStore
from scaling_lab.plan.design import make_plan

# Options that say where, with what and for whom a sweep runs, not which runs it has.
NOT_OF_THE_PLAN = frozenset({"sweep", "results_dir", "config_dir", "workers", "tracker", "run_ids", "retry"})
EXECUTION = frozenset({"device", "compile", "threads", "deterministic"})


def defines_plan(given: Collection[str]) -> bool:
    """Whether any of the keys that the user gave says which runs there are."""
    return any(key.partition(".")[0] not in NOT_OF_THE_PLAN for key in given)


def make_merged_plan(trees: Sequence[Mapping[str, Any]], device: str | None = None) -> Plan:
    """The plan of every tree (one for each combination of a multirun) as one; a run that several have is there once."""
    settings = [sweep_settings(tree, (SweepOnly,), device=device) for tree in trees]
    names = sorted({s.sweep for s in settings})
    if len(names) > 1:
        raise UserError(f"sweep={','.join(names)}: one command plans one sweep; leave `sweep` one name.")
    plans = [make_plan(s) for s in settings]
    if len(plans) == 1:
        return plans[0]
    runs = {run.run_id: run for plan in plans for run in plan.runs}
    return replace(
        plans[0],
        runs=tuple(runs.values()),
        rounding=_once(line for plan in plans for line in plan.rounding),
        notes=_once(line for plan in plans for line in plan.notes),
        settings={"combinations": [plan.settings for plan in plans]},
    )


def settle_plan(
    store: RunStore, trees: Sequence[Mapping[str, Any]], given: Collection[str]
) -> tuple[Plan, bool]:
    """The plan to work on, and whether it is new and still to be written.

    Without anything that defines a plan the one on disk goes on. Raises `UserError` where there is none, or where the
    one on disk is another plan that has already begun.
    """
    on_disk = store.plan_path.exists()
    if not defines_plan(given):
        return store.read_plan(), False
    if not on_disk:
        return make_merged_plan(trees), True
    old = store.read_plan()
    # An execution that was not asked for stays what the plan fixed, on whichever machine it goes on.
    free = not EXECUTION & set(given)
    new = make_merged_plan(trees, device=old.runs[0].execution.device if free and old.runs else None)
    different = differences(old, new, ignore_execution=free)
    if not different:
        return old, False
    if not begun(store, old):
        return new, True
    raise UserError(
        f"sweep={store.folder.name!r} has begun with another plan, different in {'; '.join(different)}. "
        f"Give the new plan a name of its own (sweep=NAME), or go on with the old one: scaling-lab sweep sweep={store.folder.name}."
    )


def begun(store: RunStore, plan: Plan) -> bool:
    """Whether any run of the plan was ever started."""
    return any(state.state != "planned" for state in store.states(plan))


def differences(old: Plan, new: Plan, *, ignore_execution: bool) -> list[str]:
    """`field (on disk: x, now: y)` for each field in which two plans differ; empty for the same plan."""
    before, after = _flat(json.loads(dumps(old.settings))), _flat(json.loads(dumps(new.settings)))
    found = []
    same_runs = {r.run_id for r in old.runs} == {r.run_id for r in new.runs}
    for key in sorted(before.keys() | after.keys()):
        if same_runs and key not in before:
            continue  # an option that the version which made the plan did not have yet, at its default
        if ignore_execution and ".execution." in f".{key}.":
            continue
        if before.get(key) != after.get(key):
            found.append(f"{_option(key)} (on disk {_shown(before.get(key))}, now {_shown(after.get(key))})")
    if old.data_fingerprint != new.data_fingerprint:
        found.append(
            f"the content of data (on disk {old.data_fingerprint[:12]}, now {new.data_fingerprint[:12]})"
        )
    if not found and not same_runs:
        found.append(
            "the runs that follow from the same options (the plan is by another version of scaling-lab)"
        )
    return found


def pending(store: RunStore, plan: Plan) -> list[str]:
    """Ids of the runs that are not over, whoever may be computing them."""
    over = set(store.run_ids_with_record())
    return [run.run_id for run in plan.runs if run.run_id not in over]


def _once(lines: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(lines))


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
    return "data.max_epochs" if key == "max_epochs" else key.removesuffix(".kind")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
