"""Owns the text of `--help`: the overview, and one page a command made from its form. No Hydra, no torch."""

from __future__ import annotations

import shutil
import textwrap
from enum import Enum
from typing import Any

from scaling_lab.cli.options.arguments import POSITIONAL, Arguments
from scaling_lab.cli.table import COMMANDS, Command

INTRO = """scaling-lab measures scaling laws: it plans a sweep of small GPTs, trains them, and rebuilds the laws of
Kaplan et al. (2020) and Hoffmann et al. (2022) from the curves, or from any table of yours."""

FLAG_MEANINGS = {
    "help": "--help, -h        this page; with a command, its options",
    "json": "--json            machine-readable output on stdout, and nothing else there",
    "watch": "--watch           repeat until the sweep is over",
    "multirun": "-m                one run for each value of a list",
    "quiet": "--quiet, -q       only the result",
    "verbose": "--verbose, -v     more lines about what is going on",
    "version": "--version         the installed version",
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
    lines.append("Flags, anywhere on the line:")
    lines += [f"  {FLAG_MEANINGS[name]}" for name in ("help", "json", "quiet", "verbose", "version")]
    lines += [
        "",
        "Numbers may be written 1e9, 2.5B, 200_000; times 30m, 1.5h. `scaling-lab COMMAND --help` lists the options of",
        "a command with their defaults; `scaling-lab plan --help model=gpt2` those of another choice.",
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
        lines.append("Groups (a choice brings its own options):")
        for group in form.groups:
            chosen = group.chosen or "none chosen"
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
        lines += _entry(f"{prefix}COLUMN=...", meaning, "", width)
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
    """`  name   meaning (kind)`, the text wrapped in its own column."""
    column = 36
    text = meaning[:1] + meaning[1:]
    if kind:
        text = f"{text} [{kind}]" if text else f"[{kind}]"
    wrapped = textwrap.wrap(text, max(30, width - column - 2)) or [""]
    head = f"  {name}"
    lines = [head] if len(head) > column - 2 else [f"{head:<{column}}{wrapped.pop(0)}"]
    return lines + [" " * column + line for line in wrapped]


def _kind(option: Any) -> str:
    """What may be given, in a few words."""
    if option.choices:
        return ", ".join(option.choices)
    return type_words(option.wanted)


def type_words(wanted: Any) -> str:
    """A type in a word: number, whole number, true or false, list, text."""
    import types
    from typing import Union, get_args, get_origin

    if get_origin(wanted) in (Union, types.UnionType):
        return " or ".join(type_words(a) for a in get_args(wanted) if a is not type(None))
    if get_origin(wanted) is not None and get_args(wanted):
        return f"list of {type_words(get_args(wanted)[0])}" if get_origin(wanted) in (tuple, list) else "list"
    return {int: "whole number", float: "number", bool: "true or false", str: "text"}.get(wanted, "text")


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
