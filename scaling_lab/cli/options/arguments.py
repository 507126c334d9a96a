"""Parsing of the command line into a command, flags in any position, and `key=value` assignments.

Only the form of each argument is checked here; `forms` checks keys, and `values` parses values.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scaling_lab.core.errors import UserError

FLAGS = {
    "--help": "help",
    "-h": "help",
    "--version": "version",
    "--json": "json",
    "--watch": "watch",
    "--quiet": "quiet",
    "-q": "quiet",
    "--verbose": "verbose",
    "-v": "verbose",
    "--multirun": "multirun",
    "-m": "multirun",
}


# Command -> the option that may be written without its key: `scaling-lab worker FOLDER`.
POSITIONAL = {"worker": "folder"}


@dataclass(frozen=True)
class Assignment:
    """One `key=value` as the user wrote it, without Hydra's `+` or `++` before the key."""

    key: str
    value: str
    plus: str = ""
    """The removed prefix. Hydra's own options need it to add keys (+hydra.launcher.ray.init.x=1)."""

    @property
    def text(self) -> str:
        return f"{self.plus}{self.key}={self.value}"


@dataclass(frozen=True)
class Arguments:
    """A parsed command line."""

    command: str | None
    flags: frozenset[str]
    assignments: tuple[Assignment, ...]

    def get(self, key: str) -> str | None:
        """The text given for `key`; None if it was not given."""
        return next((a.value for a in self.assignments if a.key == key), None)


def parse(argv: Sequence[str]) -> Arguments:
    """Parse `argv` (without the program's name). Raises `UserError` unless each is a flag, the command or key=value."""
    command: str | None = None
    flags: set[str] = set()
    assignments: list[Assignment] = []
    for text in argv:
        if any(ord(c) < 32 or ord(c) == 127 for c in text):
            raise UserError(f"the argument {text!r} contains a control character.")
        if text in FLAGS:
            flags.add(FLAGS[text])
        elif text.startswith("-") and not _is_assignment(text):
            raise _unknown_flag(text)
        elif command is None and "=" not in text and text:
            command = text
        elif command in POSITIONAL and "=" not in text:
            assignments.append(Assignment(POSITIONAL[command], text))
        elif _is_assignment(text):
            assignments.append(_assignment(text))
        else:
            raise UserError(
                f"{text!r} is not an option: options are written key=value, without spaces around the '='."
            )
    if command is None and assignments:
        raise UserError(
            f"{assignments[0].text!r} is given without a command. `scaling-lab --help` lists the commands."
        )
    _refuse_repeats(assignments)
    return Arguments(command, frozenset(flags), tuple(assignments))


def nearest(name: str, names: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The name most similar to `name`, also comparing the last parts of dotted keys, so `widht` finds `model.width`."""
    known = sorted(set(names))
    close = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    tails: dict[str, str] = {}
    for key in known:
        tails.setdefault(key.rpartition(".")[2], key)
    tail = name.rpartition(".")[2]
    close_tail = difflib.get_close_matches(tail, list(tails), n=1, cutoff=max(cutoff, 0.75))
    if tail in tails or (close_tail and not close):
        return tails[close_tail[0]]
    if close and close_tail:
        by_key = difflib.SequenceMatcher(None, name, close[0]).ratio()
        by_tail = difflib.SequenceMatcher(None, tail, close_tail[0]).ratio()
        return tails[close_tail[0]] if by_tail > by_key else close[0]
    return close[0] if close else None


def _is_assignment(text: str) -> bool:
    return text.find("=") > 0 and not text.startswith("--")


def _assignment(text: str) -> Assignment:
    key, _, value = text.partition("=")
    if key.startswith("~"):
        raise UserError(f"{text!r}: options cannot be removed; set a different value instead.")
    plus = "++" if key.startswith("++") else "+" if key.startswith("+") else ""
    bare = key.removeprefix(plus).strip()
    if not bare:
        raise UserError(f"{text!r} is not of the form key=value.")
    if not value.strip():
        raise UserError(f"{bare}= has no value: write {bare}=VALUE, without spaces around the '='.")
    return Assignment(bare, value, plus)


def _unknown_flag(text: str) -> UserError:
    name = text.partition("=")[0]
    shown = [*sorted(flag for flag in FLAGS if flag.startswith("--")), "-m"]
    near = difflib.get_close_matches(name, shown, n=1, cutoff=0.6)
    if near:
        hint = f" Did you mean {near[0]}?"
    elif name.startswith("--") and len(name) > 2:
        value = text.partition("=")[2] or "VALUE"
        hint = f" Options are written without dashes: {name[2:]}={value}."
    else:
        hint = ""
    return UserError(f"{text!r} is not a flag.{hint} Flags: {', '.join(shown)}.")


def _refuse_repeats(assignments: Sequence[Assignment]) -> None:
    seen: dict[str, str] = {}
    for assignment in assignments:
        if assignment.key in seen:
            raise UserError(
                f"{assignment.key} is given twice ({seen[assignment.key]!r} and {assignment.value!r}): give it once."
            )
        seen[assignment.key] = assignment.value
