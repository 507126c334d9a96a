"""The command line as plain trees of values, one for each combination of a multirun.

Hydra composes groups and experiments; values given on the command line are read by the form's types and put on top, so
that no value of the user's passes through Hydra's grammar. Only `train -m` gives them to Hydra again, as overrides that
are already read and quoted (`hydra_overrides`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scaling_lab.cli.options.arguments import Arguments, Assignment
from scaling_lab.cli.options.configs import (
    ConfigGroup,
    config_folders,
    default_groups,
    find_config,
    group_choices,
    merge,
    nested,
    read_yaml,
)
from scaling_lab.cli.options.forms import Form
from scaling_lab.cli.options.hydra_config import compose_groups
from scaling_lab.cli.options.scales import GROUP as SCALE_GROUP
from scaling_lab.cli.options.values import read_value, show, split_list, unquoted
from scaling_lab.cli.options.values import text as as_text
from scaling_lab.core.errors import UserError, unknown
from scaling_lab.launching.hydra_jobs import hydra_text

FormOf = Callable[[Mapping[str, Any]], Form]
# A typing error such as seed=range(0,1e9) must not plan for hours.
MAX_COMBINATIONS = 10_000
FUNCTION = re.compile(r"\s*(range|choice)\((.*)\)\s*", re.DOTALL)


@dataclass(frozen=True)
class Combination:
    """One complete setting of a command."""

    tree: dict[str, Any]
    """Composed config with the command line's values put on top: plain values, not yet dataclasses."""
    groups: Mapping[ConfigGroup, str]
    """Choices given on the command line."""
    values: dict[str, Any]
    """Values given on the command line, read."""


@dataclass(frozen=True)
class CommandLine:
    """A command line that is known to be good: every key known, every value of its type."""

    combinations: tuple[Combination, ...]
    hydra: tuple[Assignment, ...]
    """What is meant for Hydra itself (hydra/launcher=..., hydra.launcher.x=...)."""
    config_dir: str | None

    @property
    def tree(self) -> dict[str, Any]:
        return self.combinations[0].tree

    given: Mapping[str, str]
    """What the user gave, and the command's own choice of an experiment: key -> values as read, as text."""


def read_command(
    arguments: Arguments,
    config_name: str | None,
    form_of: FormOf,
    *,
    multirun: bool = False,
    launches: bool = False,
    groups: Mapping[str, str] | None = None,
) -> CommandLine:
    """Read the assignments of a command line.

    Args:
        config_name: the primary config in conf/; None for a command without config groups.
        form_of: composed tree -> form, called once for each combination of groups.
        multirun: whether lists such as `seed=0,1,2` are combinations.
        launches: whether options of Hydra's own (hydra/launcher=...) make sense.
        groups: choices to make where the user makes none (`experiment`).

    Raises:
        UserError: an unknown key or choice, or a value of the wrong type.
    """
    config_dir = arguments.get("config_dir")
    config_dir = None if config_dir is None else unquoted(config_dir)
    folders = config_folders(config_dir)
    if multirun:
        arguments = with_lists(arguments, folders, groups)
    slots = {slot.package: slot for slot in (default_groups(config_name, folders) if config_name else {})}
    chosen: dict[ConfigGroup, list[str]] = {slots[key]: [choice] for key, choice in (groups or {}).items()}
    values: list[Assignment] = []
    hydra: list[Assignment] = []
    for assignment in arguments.assignments:
        if assignment.key.startswith(("hydra.", "hydra/")):
            if len(split_list(assignment.value)) > 1:
                raise UserError(
                    f"{assignment.text}: an option of Hydra's takes one value; a list is written [A,B]."
                )
            hydra.append(assignment)
        elif assignment.key == SCALE_GROUP:
            raise UserError(f"{assignment.key} cannot be set: choose with scale=NAME.")
        elif assignment.key in slots:
            chosen[slots[assignment.key]] = _group_values(
                slots[assignment.key], assignment, folders, multirun
            )
        elif (group := assignment.key.removesuffix(".kind")) != assignment.key and group in slots:
            choices = group_choices(slots[group].name, folders)
            raise UserError(
                f"{assignment.key} cannot be set: choose with {group}=NAME. Choices: {', '.join(choices)}."
            )
        else:
            values.append(assignment)
    if hydra and not launches:
        raise UserError(f"{hydra[0].key} is an option of sweep and of train -m: nothing is launched here.")
    combinations: list[Combination] = []
    for choice in itertools.product(*chosen.values()):
        pairs = dict(zip(chosen, choice))
        tree = compose_groups(config_name, pairs, folders) if config_name else {}
        combinations += _value_combinations(tree, form_of(tree), pairs, values, multirun)
        if len(combinations) > MAX_COMBINATIONS:
            raise UserError(f"the lists on the command line make more than {MAX_COMBINATIONS} combinations.")
    return CommandLine(tuple(combinations), tuple(hydra), config_dir, given_texts(combinations))


def with_lists(
    arguments: Arguments, folders: Sequence[Path], groups: Mapping[str, str] | None = None
) -> Arguments:
    """The command line with the lists of its experiment (`hydra.sweeper.params`, as in any Hydra multirun), as if the user
    had given them; what the user gave goes before. Raises `UserError` for a list that is not understood."""
    name = unquoted(arguments.get("experiment") or (groups or {}).get("experiment", "null"))
    if name == "null" or "," in name:
        return arguments
    path = find_config(f"experiment/{name}", folders)
    params: Any = read_yaml(path)
    for key in ("hydra", "sweeper", "params"):
        params = params.get(key) if isinstance(params, Mapping) else None
    if params is None:
        return arguments
    if not isinstance(params, Mapping) or not all(isinstance(v, (str, int, float)) for v in params.values()):
        raise UserError(f"{path}: hydra.sweeper.params must hold lines `KEY: a,b,c`.")
    lists = [Assignment(str(k), str(v)) for k, v in params.items() if arguments.get(str(k)) is None]
    return replace(arguments, assignments=(*arguments.assignments, *lists))


def hydra_overrides(line: CommandLine) -> list[str]:
    """The combinations as overrides of a Hydra multirun: values already read, text quoted."""
    groups: dict[ConfigGroup, list[str]] = {}
    values: dict[str, list[str]] = {}
    for combination in line.combinations:
        for slot, choice in combination.groups.items():
            _add(groups.setdefault(slot, []), choice)
        for key, value in combination.values.items():
            _add(values.setdefault(key, []), hydra_text(key, value))
    overrides = [f"{group.hydra_key}={','.join(choices)}" for group, choices in groups.items()]
    overrides += [f"++{key}={','.join(texts)}" for key, texts in values.items()]
    return overrides + [a.text for a in line.hydra]


def given_texts(combinations: Sequence[Combination]) -> dict[str, str]:
    """Key -> the values given for it, as the user may write them."""
    given: dict[str, list[str]] = {}
    for combination in combinations:
        for slot, choice in combination.groups.items():
            _add(given.setdefault(slot.package, []), choice)
        for key, value in combination.values.items():
            try:
                written = as_text(value)
            except UserError:  # both kinds of quotes: no text is read back as this value
                written = str(value)
            _add(given.setdefault(key, []), written)
    return {key: ",".join(texts) for key, texts in given.items()}


def _add(items: list[str], item: str) -> None:
    if item not in items:
        items.append(item)


def _group_values(
    slot: ConfigGroup, assignment: Assignment, folders: Sequence[Path], multirun: bool
) -> list[str]:
    choices = group_choices(slot.name, folders)
    names = [
        unquoted(part.strip()) for part in (_sweep_parts(assignment) if multirun else [assignment.value])
    ]
    for name in names:
        if name not in choices:
            raise unknown(slot.package, name, choices)
    return names


def _value_combinations(
    tree: dict[str, Any],
    form: Form,
    groups: Mapping[ConfigGroup, str],
    assignments: Sequence[Assignment],
    multirun: bool,
) -> list[Combination]:
    columns: list[list[tuple[str, Any]]] = []
    for assignment in assignments:
        key = assignment.key
        form.check(key)
        if form.is_free(key):
            columns.append([(key, form.read_free(key, assignment.value))])
            continue
        if any(group.key == key for group in form.groups):
            raise UserError(f"{key}={show(assignment.value)} cannot be chosen here.")
        texts = _sweep_values(assignment, form, multirun)
        columns.append([(key, form.read(key, text)) for text in texts])
    count = 1
    for column in columns:
        count *= len(column)
    if count > MAX_COMBINATIONS:
        raise UserError(
            f"the lists on the command line make {count} combinations, more than {MAX_COMBINATIONS}."
        )
    found = []
    for values in itertools.product(*columns):
        complete = _copy(tree)
        for key, value in values:
            merge(complete, _placed(form, key, value))
        found.append(Combination(complete, groups, dict(values)))
    return found


def _placed(form: Form, key: str, value: Any) -> dict[str, Any]:
    """The value at its place; a free key's column name stays whole (it may hold dots)."""
    prefix = next((p for p in form.free if key.startswith(p)), None)
    if prefix is not None and form.is_free(key):
        return nested(prefix.rstrip("."), {key[len(prefix) :]: value})
    return nested(key, value)


def _copy(tree: Any) -> Any:
    return {key: _copy(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree


def _sweep_values(assignment: Assignment, form: Form, multirun: bool) -> list[str]:
    """The texts of a multirun's list; a list-valued option is swept by [..],[..] only."""
    if not multirun:
        return [assignment.value]
    parts = _sweep_parts(assignment)
    expected = form.options[assignment.key].value_type
    if "tuple[" in str(expected) or "list[" in str(expected):
        return (
            parts if len(parts) > 1 and all(p.strip().startswith("[") for p in parts) else [assignment.value]
        )
    return parts


def _sweep_parts(assignment: Assignment) -> list[str]:
    """`a,b`, `choice(a,b)` and `range(0,3)` as texts."""
    key, text = assignment.key, assignment.value
    function = FUNCTION.fullmatch(text)
    if function and function[1] == "range":
        numbers = [read_value(key, part.strip(), int) for part in split_list(function[2])]
        if not 1 <= len(numbers) <= 3 or (len(numbers) == 3 and numbers[2] == 0):
            raise UserError(
                f"{key}={show(text)}: write range(STOP), range(START,STOP) or range(START,STOP,STEP)."
            )
        steps = range(*numbers)
        if not 0 < len(steps) <= MAX_COMBINATIONS:
            raise UserError(f"{key}={show(text)} has {len(steps)} values; wanted 1 to {MAX_COMBINATIONS}.")
        return [str(n) for n in steps]
    parts = split_list(function[2] if function else text)
    if any(not part.strip() for part in parts):
        raise UserError(f"{key}={show(text)} has an empty place between its commas.")
    return parts
