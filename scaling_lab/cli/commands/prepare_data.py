"""`scaling-lab prepare-data`: make token files from text, and verify existing ones."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling_lab.cli.display.console import Console
from scaling_lab.cli.display.prepare_display import PrepareDisplay
from scaling_lab.cli.options.arguments import Arguments
from scaling_lab.cli.options.compose import read_command
from scaling_lab.cli.options.forms import Form, build, options_of
from scaling_lab.core.errors import UserError
from scaling_lab.core.formatting import human_count

if TYPE_CHECKING:
    from scaling_lab.corpora.documents import HubText, LocalText


@dataclass(frozen=True)
class SourceOptions:
    """Where the text comes from and where the tokens go."""

    path: str | None = None
    """Your own text: a file, or a folder of .txt, .md, .py, .jsonl or .parquet files"""
    source: str | None = None
    """Instead of path, a dataset on the Hub: a preset, or OWNER/NAME[:CONFIGURATION]"""
    out: str | None = None
    """Output folder; default: prepared/NAME"""
    text_column: str | None = None
    """Column of JSON Lines and Parquet files that contains the text; default: text"""
    errors: str = "strict"
    """How to handle text that is not UTF-8: strict (an error) or replace"""
    verify: str | None = None
    """Only verify the token files in this folder against their checksums and vocabulary"""


def form(arguments: Arguments) -> Form:
    from scaling_lab.corpora.pipeline import PrepareSettings

    return Form(options_of(SourceOptions) | options_of(PrepareSettings))


def run(arguments: Arguments) -> int:
    from scaling_lab.corpora.pipeline import PrepareSettings, prepare

    command = read_command(arguments, None, lambda tree: form(arguments))
    names = set(options_of(SourceOptions))
    chosen: SourceOptions = build(SourceOptions, {k: v for k, v in command.tree.items() if k in names})
    console = Console.for_flags(arguments.flags)
    if chosen.verify is not None:
        return verify_folder(console, chosen.verify, command.tree)
    settings: PrepareSettings = build(
        PrepareSettings, {k: v for k, v in command.tree.items() if k not in names}
    )
    documents = open_documents(chosen)
    name = Path(documents.name.replace("/", "-")).stem
    out = Path(chosen.out or f"prepared/{name}").expanduser()
    _refuse_out_within_text(chosen, out)
    with PrepareDisplay.open(console, name) as display:
        meta = prepare(documents, out, settings, display.show)
    print_summary(console, out, meta)
    return 0


def _refuse_out_within_text(chosen: SourceOptions, out: Path) -> None:
    """Raise `UserError` if the output would be read as input text."""
    if chosen.path is None:
        return
    folder = Path(chosen.path).expanduser().resolve()
    if folder.is_dir() and out.resolve().is_relative_to(folder):
        raise UserError(
            f"out={str(out)!r} is inside path={chosen.path!r}, so its files would be read as text. Give another out=FOLDER."
        )


def verify_folder(console: Console, folder: str, given: Mapping[str, Any]) -> int:
    """Verify a prepared folder and print the result. Raises `UserError` if a file has changed."""
    from scaling_lab.core.sources.prepared import verify

    if others := sorted(key for key in given if key != "verify"):
        raise UserError(f"verify={folder!r} cannot be combined with {', '.join(others)}.")
    try:
        meta = verify(folder)
    except UserError as error:
        # The source names its folder data.path.
        raise UserError(str(error).replace("data.path=", "verify=", 1)) from None
    if console.json:
        print(json.dumps(meta, indent=1, allow_nan=False))
        return 0
    files = sum(len(split["shards"]) for split in meta["splits"].values())
    tokens = sum(split["tokens"] for split in meta["splits"].values())
    console.print(
        f"{folder}: {files} files, {human_count(tokens)} tokens, all checksums match, all tokens are below "
        f"{meta['vocab_size']:,}",
        markup=False,
    )
    console.next_step(next_command(Path(folder)))
    return 0


def next_command(out: Path) -> str:
    return f"scaling-lab plan sweep={out.resolve().name} data=prepared data.path={shlex.quote(str(out))}"


def open_documents(chosen: SourceOptions) -> LocalText | HubText:
    """The documents given by `path` or `source`. Raises `UserError` unless exactly one is given."""
    from scaling_lab.corpora.documents import PRESETS, LocalText, hub_text

    if (chosen.path is None) == (chosen.source is None):
        raise UserError(
            f"give exactly one of path=FILE_OR_FOLDER and source=NAME. Choices for source: {', '.join(PRESETS)}, or "
            "OWNER/NAME on the Hub."
        )
    if chosen.source is not None:
        return hub_text(chosen.source, chosen.text_column)
    assert chosen.path is not None
    return LocalText(Path(chosen.path).expanduser(), chosen.text_column or "text", chosen.errors)


def print_summary(console: Console, out: Path, meta: dict[str, Any]) -> None:
    """Print what was written and the next command."""
    if console.json:
        print(json.dumps(meta, indent=1, allow_nan=False))
        return
    for name, split in meta["splits"].items():
        ratio = split["bytes"] / split["tokens"]
        console.print(
            f"{name:<11} {split['documents']:>10,} documents  {human_count(split['tokens']):>7} tokens  {ratio:.2f} bytes per token",
            markup=False,
        )
    if meta["duplicates"]:
        console.print(f"{meta['duplicates']:,} duplicate validation documents were dropped", markup=False)
    if meta["without_text"]:
        console.print(f"{meta['without_text']:,} rows without text (null) were dropped", markup=False)
    console.print(
        f"{out}: vocabulary of {meta['vocab_size']:,}, {meta['dtype']}, {meta['tokenizer']['name']}",
        markup=False,
    )
    console.next_step(next_command(out))
