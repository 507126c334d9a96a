"""The plan of a sweep, made from one or several composed trees and compared with the plan on disk.

Only the options that the user gives are compared, never defaults or rules, which may have changed since: a sweep that an
earlier version planned continues as planned. Once a run of a plan has started, the plan never changes: different options are
refused, by name. Until then `plan` may replace it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from itertools import count
from typing import Any

from scaling_lab.cli.options.machine import ASSUMED_BFLOAT16, has_bfloat16
from scaling_lab.cli.options.scales import GROUP as SCALE_GROUP
from scaling_lab.cli.options.study import SweepOnly, sweep_settings
from scaling_lab.core.errors import MissingCorpus, UserError
from scaling_lab.core.spec import Plan, PlannedRun
from scaling_lab.core.storage.serialization import to_dict
from scaling_lab.core.storage.store import RunStore
from scaling_lab.planning.devices import AUTO
from scaling_lab.planning.execution import plan_executions
from scaling_lab.planning.plan import make_plan
from scaling_lab.planning.preparation import NOT_PREPARED, corpus_mismatch, with_corpus
from scaling_lab.planning.replan import OPTIONS
from scaling_lab.planning.settings import CorpusUse, SweepSettings

# Options that do not change which runs a sweep has.
NOT_OF_THE_PLAN = frozenset(
    {"sweep", "results_dir", "config_dir", "workers", "tracker", "run_ids", "retry", "study", "gpu", "count"}
    | {"price_per_hour", "probe", "keep", SCALE_GROUP}
)
CORPUS_OPTIONS = frozenset(f.name for f in fields(CorpusUse))
EXECUTION = frozenset({"device", "compile", "threads", "deterministic", "stack", "memory_gb"})


def defines_plan(given: Collection[str]) -> bool:
    """Whether any of the given keys changes which runs a sweep has."""
    return bool(plan_keys(given))


def plan_keys(given: Collection[str]) -> tuple[str, ...]:
    """The keys among `given` that say which runs there are, sorted."""
    return tuple(sorted(key for key in given if key.partition(".")[0] not in NOT_OF_THE_PLAN))


def make_merged_plan(
    trees: Sequence[Mapping[str, Any]], device: str | None = None, given: Mapping[str, str] | None = None
) -> Plan:
    """One plan of the runs of every tree (one tree per combination of a multirun), without duplicates; it records the
    options that the user gave, `given`."""
    settings = [sweep_settings(tree, (SweepOnly,), device=device) for tree in trees]
    names = sorted({s.sweep for s in settings})
    if len(names) > 1:
        raise UserError(f"sweep={','.join(names)}: one command plans one sweep; give `sweep` one name.")
    given = given or {}
    recorded = {OPTIONS: {k: v for k, v in given.items() if k == "config_dir" or k in plan_keys(given)}}
    notes = _once(note for tree, s in zip(trees, settings, strict=True) for note in precision_notes(tree, s))
    plans = [replace(make_plan(s), given=plan_keys(given)) for s in settings]
    if len(plans) == 1:
        plan = plans[0]
        return replace(plan, notes=(*notes, *plan.notes), settings={**plan.settings, **recorded})
    unprepared = plans[0].data_fingerprint == NOT_PREPARED
    if len({repr(s.data) if unprepared else p.data_fingerprint for s, p in zip(settings, plans)}) > 1:
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
        notes=_once([*notes, *(line for plan in plans for line in plan.notes)]),
        settings={"combinations": [plan.settings for plan in plans], **recorded},
    )


def precision_notes(tree: Mapping[str, Any], settings: SweepSettings) -> tuple[str, ...]:
    """A note if the precision was chosen for a GPU that is unknown."""
    unknown = tree.get("dtype", AUTO) == AUTO and settings.execution.device == "cuda"
    return (ASSUMED_BFLOAT16,) if unknown and has_bfloat16(tree.get("gpu")) is None else ()


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
    rules_changed: bool = False
    """Whether the same options would give other runs today, since an earlier version planned it."""


RULES_CHANGED = "planned by an earlier version and continues as planned; a new sweep with these options would be planned differently."


def settle_plan(
    store: RunStore,
    trees: Sequence[Mapping[str, Any]],
    given: Mapping[str, str],
    *,
    replace_unstarted: bool = False,
) -> Settled:
    """The plan on disk; if there is none, the plan of `trees`, which is then written.

    Args:
        given: the options that the user gave, as text. If none of them defines a plan, the plan on disk is used as it is.
        replace_unstarted: whether another plan may replace one of which no run has started.

    Raises:
        UserError: there is no plan, or an option that the user gave has another value in the plan on disk.
    """
    settled = _settled(store, trees, given, replace_unstarted=replace_unstarted)
    return replace(settled, plan=keep_as_given(store, settled.plan, trees, given))


def keep_as_given(
    store: RunStore, plan: Plan, trees: Sequence[Mapping[str, Any]], given: Mapping[str, str]
) -> Plan:
    """The plan with the `keep` that the user gave, which may change at any time: it is no part of what runs compute."""
    if "keep" not in given:
        return plan
    keep = str(trees[0]["keep"])
    if all(run.execution.keep == keep for run in plan.runs):
        return plan
    runs = tuple(replace(run, execution=replace(run.execution, keep=keep)) for run in plan.runs)
    store.write_plan(replace(plan, runs=runs))
    return store.read_plan()


def _settled(
    store: RunStore, trees: Sequence[Mapping[str, Any]], given: Mapping[str, str], *, replace_unstarted: bool
) -> Settled:
    if not defines_plan(given):
        return Settled(add_corpus(store, store.read_plan()))
    recorded = plan_keys(given)
    if not store.plan_path.exists():
        plan = make_merged_plan(trees, given=given)
        if store.create_plan(plan):
            return Settled(plan, new=True)
        # Another command wrote a plan first: it is compared like any other.
    old = store.read_plan()
    # The plan on disk decides the execution, on any machine, unless the user gave options of it.
    free = not EXECUTION & set(given)
    device = old.runs[0].execution.device if free and old.runs else None
    different = given_differences(old, trees, given, device)
    started = has_started(store, old)
    if replace_unstarted and not started:
        no_longer = [
            f"{key} (no longer given)" for key in old.given or () if key not in recorded and key != "scale"
        ]
        if different or no_longer:
            store.write_plan(make_merged_plan(trees, device=device, given=given))
            return Settled(store.read_plan(), new=True, replaced=(*different, *no_longer))
    elif different:
        name = store.folder.name
        what = "has started with another plan" if started else "has another plan"
        or_replace = (
            ""
            if started
            else ", or replace it (no run has started) with `scaling-lab plan` and these options"
        )
        raise UserError(
            f"sweep={name!r} {what}. Differences: {'; '.join(different)}. Give the new plan its own name "
            f"(sweep={free_name(store)}), or continue the old one: scaling-lab sweep sweep={name}{or_replace}."
        )
    old = add_corpus(store, old)
    return Settled(old, rules_changed=not same_runs(old, trees, device, ignore_execution=free))


def add_corpus(store: RunStore, plan: Plan) -> Plan:
    """The plan on disk, with the fingerprint of its corpus once that is prepared. Raises `UserError` for another corpus."""
    if plan.data_fingerprint != NOT_PREPARED:
        return plan
    try:
        corpus_mismatch(plan)
    except MissingCorpus:
        return plan
    complete = with_corpus(plan, store.folder)
    store.write_plan(complete)
    return complete


def free_name(store: RunStore) -> str:
    """The first of NAME-2, NAME-3, ... that is not a sweep yet."""
    taken = set(store.other_sweeps())
    return next(n for k in count(2) if (n := f"{store.folder.name}-{k}") not in taken)


def given_differences(
    old: Plan, trees: Sequence[Mapping[str, Any]], given: Collection[str], device: str | None
) -> list[str]:
    """`option (on disk x, now y)` for each option that the user gave and that has another value in the plan on disk.

    A group's choice (`recipe=kaplan`) is compared by its kind, an experiment by the kinds of all its groups.
    """
    found = [changed] if (changed := _changed_data(old)) else []
    before = _option_values([*old.settings.get("combinations", [old.settings])])
    after = _option_values([to_dict(sweep_settings(tree, (SweepOnly,), device=device)) for tree in trees])
    described = []
    for path in sorted(before.keys() | after.keys()):
        if _was_given(path, given) and before.get(path) != after.get(path):
            described.append(
                f"{_option(path)} (on disk {_shown(before.get(path))}, now {_shown(after.get(path))})"
            )
    several = "combinations" in old.settings or len(trees) > 1
    if not described and several and not _same_combinations(old, trees, given, device):
        described.append("which of the options' values go together")
    return described + found


def _changed_data(old: Plan) -> str | None:
    """How the plan's corpus differs from what it was planned with or for; None if it does not, or is not there yet."""
    if not old.runs:
        return None
    if old.data_fingerprint == NOT_PREPARED:
        with suppress(MissingCorpus):
            return corpus_mismatch(old)
        return None
    if (now := old.runs[0].spec.data.fingerprint()) == old.data_fingerprint:
        return None
    return f"the content of data (on disk {old.data_fingerprint[:12]}, now {now[:12]})"


def _was_given(path: str, given: Collection[str]) -> bool:
    """Whether one of the user's keys sets this settings path."""
    option = _option(path)
    if option.partition(".")[0] in NOT_OF_THE_PLAN:
        return False
    if path.endswith(".kind"):
        return option in given or ("experiment" in given and option.count(".") == 0)
    return option in given or any(option.startswith(f"{key}.") for key in given if "." in key)


def _same_combinations(
    old: Plan, trees: Sequence[Mapping[str, Any]], given: Collection[str], device: str | None
) -> bool:
    """Whether the values of the given options occur together in the same combinations."""

    def combinations(settings: Iterable[Any]) -> set[str]:
        return {
            json.dumps(
                {k: v for k, v in _flat(to_dict(each)).items() if _was_given(k, given)}, sort_keys=True
            )
            for each in settings
        }

    now = [to_dict(sweep_settings(tree, (SweepOnly,), device=device)) for tree in trees]
    return combinations(old.settings.get("combinations", [old.settings])) == combinations(now)


def same_runs(
    old: Plan, trees: Sequence[Mapping[str, Any]], device: str | None, *, ignore_execution: bool
) -> bool:
    """Whether these options give the plan's runs under today's rules."""
    try:
        new = make_merged_plan(trees, device=device)
    except UserError:
        return False
    before, after = (
        {r.run_id: replace(r.execution, keep="resume") for r in plan.runs} for plan in (old, new)
    )
    return before.keys() == after.keys() and (ignore_execution or before == after)


def has_started(store: RunStore, plan: Plan) -> bool:
    """Whether any run of the plan was ever started."""
    return any(state.state != "planned" for state in store.states(plan))


def pending(store: RunStore, plan: Plan) -> list[str]:
    """Ids of the runs that have not finished, including those that other processes train."""
    finished = set(store.run_ids_with_record())
    return [run.run_id for run in plan.runs if run.run_id not in finished]


def _once(lines: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(lines))


def _option_values(combinations: Iterable[Any]) -> dict[str, list[str]]:
    """Every option by its settings path, with each value (as JSON) that it has in some combination."""
    found: dict[str, list[str]] = {}
    for settings in combinations:
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
    return f"data.{key}" if key in CORPUS_OPTIONS else key.removesuffix(".kind")


def _shown(values: list[str] | None) -> str:
    text = ",".join(values or ["nothing"])
    return text if len(text) <= 60 else text[:57] + "..."
