"""Owns the first look at the command line: the command, the flags in any position, and the `key=value` texts.

Nothing is interpreted here but the shape of each argument; values are read in `values`, keys are known in `forms`.
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
    """One `key=value` as the user wrote it, Hydra's `+` and `++` taken off the key."""

    key: str
    value: str
    plus: str = ""
    """What was taken off. Hydra's own options need it where they add something (+hydra.launcher.ray.init.x=1)."""

    @property
    def text(self) -> str:
        return f"{self.plus}{self.key}={self.value}"


@dataclass(frozen=True)
class Arguments:
    """A command line taken apart."""

    command: str | None
    flags: frozenset[str]
    assignments: tuple[Assignment, ...]

    def get(self, key: str) -> str | None:
        """The text given for `key`, None where it was not given."""
        return next((a.value for a in self.assignments if a.key == key), None)


def parse(argv: Sequence[str]) -> Arguments:
    """Take `argv` (without the program's name) apart. Raises `UserError` for what is no flag, command or key=value."""
    command: str | None = None
    flags: set[str] = set()
    assignments: list[Assignment] = []
    for text in argv:
        if any(ord(c) < 32 or ord(c) == 127 for c in text):
            raise UserError(f"the argument {text!r} holds a control character.")
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
                f"{text!r} is no option: options are written key=value, without spaces around the '='."
            )
    if command is None and assignments:
        raise UserError(
            f"{assignments[0].text!r} comes without a command. `scaling-lab --help` lists the commands."
        )
    _refuse_repeats(assignments)
    return Arguments(command, frozenset(flags), tuple(assignments))


def nearest(name: str, names: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The name most like `name`; the last part of a dotted key counts too, so `widht` finds `model.width`."""
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
        raise UserError(f"{text!r}: options cannot be removed; give the option another value instead.")
    plus = "++" if key.startswith("++") else "+" if key.startswith("+") else ""
    bare = key.removeprefix(plus).strip()
    if not bare:
        raise UserError(f"{text!r} names no option: options are written key=value.")
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
    return UserError(f"{text!r} is no flag.{hint} Flags: {', '.join(shown)}.")


def _refuse_repeats(assignments: Sequence[Assignment]) -> None:
    seen: dict[str, str] = {}
    for assignment in assignments:
        if assignment.key in seen:
            raise UserError(
                f"{assignment.key} is given twice ({seen[assignment.key]!r} and {assignment.value!r}): give it once."
            )
        seen[assignment.key] = assignment.value
