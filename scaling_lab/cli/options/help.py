"""The text of `--help`: the overview, and a page per command made from its form. Loads neither Hydra nor torch."""

from __future__ import annotations

import shutil
import textwrap
from enum import Enum
from typing import Any

from scaling_lab.cli.options.arguments import POSITIONAL, Arguments
from scaling_lab.cli.table import COMMANDS, Command

INTRO = """scaling-lab measures scaling laws: it plans a sweep of small GPTs, trains them, and fits the laws of
Kaplan et al. (2020) and Hoffmann et al. (2022) to the curves, or to a table of your own runs."""

FLAG_MEANINGS = {
    "help": "--help, -h        show this page; with a command, its options",
    "json": "--json            print only machine-readable output to stdout",
    "watch": "--watch           repeat until the sweep is finished",
    "multirun": "-m                one run for each value of a list",
    "quiet": "--quiet, -q       print only the result",
    "verbose": "--verbose, -v     print more details",
    "version": "--version         show the installed version",
}


def overview() -> str:
    """`scaling-lab --help`."""
    lines = ["usage: scaling-lab COMMAND [key=value ...] [flags]", "", INTRO, ""]
    width = max(map(len, COMMANDS))
    sections = list(dict.fromkeys(command.section for command in COMMANDS.values()))
    for section in sections:
        lines.append(f"{section}:")
        for command in COMMANDS.values():
            if command.section == section:
                lines.append(f"  {command.name:<{width}} {command.summary}")
                lines.append(f"  {'':<{width}}   $ {command.example}")
        lines.append("")
    lines.append("Flags, in any position:")
    lines += [f"  {FLAG_MEANINGS[name]}" for name in ("help", "json", "quiet", "verbose", "version")]
    lines += [
        "",
        "Numbers may be written 1e9, 2.5B, 200_000; times 30m, 1.5h. `scaling-lab COMMAND --help` lists a command's",
        "options with their defaults; `scaling-lab plan --help model=gpt2` lists them for another choice.",
    ]
    return "\n".join(lines)


def command_help(command: Command, arguments: Arguments) -> str:
    """`scaling-lab COMMAND --help`, for the groups chosen in `arguments`."""
    width = max(80, min(shutil.get_terminal_size((110, 24)).columns, 130))
    form = command.load().form(arguments)
    positional = f" {POSITIONAL[command.name].upper()}" if command.name in POSITIONAL else ""
    lines = [
        f"usage: scaling-lab {command.name}{positional} [key=value ...]",
        "",
        command.summary[0].upper() + command.summary[1:] + ".",
    ]
    if command.about:
        lines += textwrap.wrap(command.about, width)
    lines += ["", f"  $ {command.example}", ""]
    if form.groups:
        lines.append("Groups (each choice has its own options):")
        for group in form.groups:
            chosen = group.chosen or "null"
            lines += _entry(f"{group.key}={chosen}", group.meaning, ", ".join(group.choices) or "none", width)
        lines.append("")
    sections: dict[str, list[Any]] = {}
    for option in form.options.values():
        sections.setdefault(option.key.rpartition(".")[0], []).append(option)
    for prefix, options in sorted(sections.items(), key=lambda item: item[0] != ""):
        lines.append(f"Options of {prefix}:" if prefix else "Options:")
        for option in options:
            name = f"{option.key}={_shown(option.default)}" if option.has_default else f"{option.key}=..."
            lines += _entry(name, option.meaning, _kind(option), width)
        lines.append("")
    for prefix, meaning in form.free.items():
        name = "OPTION" if prefix.endswith("_options.") else "COLUMN"
        lines += _entry(f"{prefix}{name}=...", meaning, "", width)
    if form.free:
        lines.append("")
    lines.append("Flags:")
    lines += [
        f"  {text}"
        for name, text in FLAG_MEANINGS.items()
        if name in command.flags | {"help", "quiet", "verbose"}
    ]
    return "\n".join(lines)


def _entry(name: str, meaning: str, kind: str, width: int) -> list[str]:
    """`  name   meaning [kind]`, with the text wrapped in its own column."""
    column = 36
    text = meaning
    if kind:
        text = f"{text} [{kind}]" if text else f"[{kind}]"
    wrapped = textwrap.wrap(text, max(30, width - column - 2)) or [""]
    head = f"  {name}"
    lines = [head] if len(head) > column - 2 else [f"{head:<{column}}{wrapped.pop(0)}"]
    return lines + [" " * column + line for line in wrapped]


def _kind(option: Any) -> str:
    """The valid values, briefly."""
    if option.choices:
        return ", ".join(option.choices)
    return type_name(option.value_type)


def type_name(value_type: Any) -> str:
    """A type in plain words: number, integer, true or false, list, text."""
    import types
    from typing import Literal, Union, get_args, get_origin

    if get_origin(value_type) is Literal:
        return "text"
    if get_origin(value_type) in (Union, types.UnionType):
        return " or ".join(type_name(a) for a in get_args(value_type) if a is not type(None))
    if get_origin(value_type) is not None and get_args(value_type):
        if get_origin(value_type) not in (tuple, list):
            return "list"
        item = type_name(get_args(value_type)[0])
        return f"list of {item}s" if item in ("integer", "number") else f"list of {item}"
    return {int: "integer", float: "number", bool: "true or false", str: "text"}.get(value_type, "text")


def _shown(value: Any) -> str:
    """A default as the user would write it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(_shown(v) for v in value)}]"
    return str(value) if str(value) else "''"
