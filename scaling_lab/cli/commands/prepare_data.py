"""Owns `scaling-lab prepare-data`: text in, token files out, with a progress line."""

from __future__ import annotations

import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling_lab.cli.arguments import Arguments
from scaling_lab.cli.compose import read_command
from scaling_lab.cli.console import Console, human_count, human_time
from scaling_lab.cli.forms import Form, build, options_of
from scaling_lab.core.errors import UserError

if TYPE_CHECKING:
    from scaling_lab.prepare.documents import HubText, LocalText
    from scaling_lab.prepare.writer import Counts


@dataclass(frozen=True)
class From:
    """Where the text comes from and where the tokens go."""

    path: str | None = None
    """Text of your own: a file, or a folder of .txt, .md, .py, .jsonl or .parquet files"""
    source: str | None = None
    """A data set of the hub instead: a preset, or OWNER/NAME[:CONFIGURATION]"""
    out: str | None = None
    """Folder to write; default: prepared/NAME"""
    text_column: str | None = None
    """Column of JSON lines and Parquet that holds the text; default: text"""
    errors: str = "strict"
    """What to do with text that is not UTF-8: strict (refuse) or replace"""


def form(arguments: Arguments) -> Form:
    from scaling_lab.prepare.pipeline import PrepareSettings

    return Form(options_of(From) | options_of(PrepareSettings))


def run(arguments: Arguments) -> int:
    from scaling_lab.prepare.pipeline import PrepareSettings, prepare

    command = read_command(arguments, None, lambda tree: form(arguments))
    names = set(options_of(From))
    chosen: From = build(From, {k: v for k, v in command.tree.items() if k in names})
    settings: PrepareSettings = build(
        PrepareSettings, {k: v for k, v in command.tree.items() if k not in names}
    )
    documents = open_documents(chosen)
    name = Path(documents.name.replace("/", "-")).stem
    out = Path(chosen.out or f"prepared/{name}").expanduser()
    console = Console.for_flags(arguments.flags)
    line = ProgressLine(console, documents.size_bytes(), settings.max_tokens)
    meta = prepare(documents, out, settings, line.show)
    line.close()
    tell(console, out, meta)
    return 0


def open_documents(chosen: From) -> LocalText | HubText:
    """The documents that `path` or `source` name. Raises `UserError` where it is not exactly one of them."""
    from scaling_lab.prepare.documents import PRESETS, LocalText, hub_text

    if (chosen.path is None) == (chosen.source is None):
        raise UserError(
            f"give path=FILE_OR_FOLDER or source=NAME, one of the two. Choices for source: {', '.join(PRESETS)}, or "
            "OWNER/NAME of the hub."
        )
    if chosen.source is not None:
        return hub_text(chosen.source, chosen.text_column)
    assert chosen.path is not None
    return LocalText(Path(chosen.path).expanduser(), chosen.text_column or "text", chosen.errors)


class ProgressLine:
    """One line on stderr: how much of the text is done, how fast, and how long it will take."""

    def __init__(self, console: Console, size_bytes: int | None, max_tokens: int | None) -> None:
        self._console, self._size_bytes, self._max_tokens = console, size_bytes, max_tokens
        self._began: tuple[float, int] | None = None
        self._live = sys.stderr.isatty() and not console.quiet

    def show(self, counts: Counts) -> None:
        tokens = counts.train.tokens + counts.validation.tokens
        now = time.monotonic()
        if self._began is None:
            self._began = (now, tokens)
        speed = (tokens - self._began[1]) / max(1e-9, now - self._began[0])
        share = self._share(counts)
        left = "" if share is None or not speed else f", ETA {human_time(tokens / speed * (1 / share - 1))}"
        of = "" if share is None else f" ({share:.0%})"
        text = f"{human_count(tokens)} tokens{of}, {human_count(speed)} tokens/s{left}"
        if self._live:
            sys.stderr.write(f"\r\x1b[K  {text}")
            sys.stderr.flush()
        elif not self._console.quiet:
            self._console.note(text)

    def _share(self, counts: Counts) -> float | None:
        if self._max_tokens:
            return min(1.0, max(1e-9, counts.train.tokens / self._max_tokens))
        if self._size_bytes:
            return min(1.0, max(1e-9, (counts.train.bytes + counts.validation.bytes) / self._size_bytes))
        return None

    def close(self) -> None:
        if self._live:
            sys.stderr.write("\r\x1b[K")


def tell(console: Console, out: Path, meta: dict[str, Any]) -> None:
    """What was written, and what to do with it."""
    if console.json:
        print(json.dumps(meta, indent=1, allow_nan=False))
        return
    for name, split in meta["splits"].items():
        ratio = split["bytes"] / split["tokens"]
        console.print(
            f"{name:<11} {split['documents']:>10,} documents  {human_count(split['tokens']):>7} tokens  {ratio:.2f} bytes a token",
            markup=False,
        )
    if meta["duplicates"]:
        console.print(
            f"{meta['duplicates']:,} validation documents came again and were left out", markup=False
        )
    console.print(
        f"{out}: vocabulary of {meta['vocab_size']:,}, {meta['dtype']}, {meta['tokenizer']['name']}",
        markup=False,
    )
    where = shlex.quote(str(out))
    console.next_step(f"scaling-lab plan sweep={Path(out).name} data=prepared data.path={where}")
