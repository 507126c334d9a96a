"""README and docs: links lead somewhere, commands and their options exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from scaling_lab.cli.options.arguments import parse
from scaling_lab.cli.table import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    local = [t for t in targets if not re.match(r"[a-z]+://", t)]
    missing = [t for t in local if not (page.parent / t).exists()]
    assert not missing, f"{page.name}: {missing}"
    if page.name == "README.md":
        assert len(local) > 10
        assert {f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")} <= set(local)


def command_lines() -> Iterator[tuple[str, str]]:
    """(page, command line) of every `scaling-lab` line in a bash block, comments and other programs cut off."""
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.splitlines():
                if found := re.search(
                    r"(?:^|[\s/(])scaling-lab\)? (?=[a-z])(.*)", re.sub(r"\s+#.*", "", line)
                ):
                    yield page.name, found[1]


@pytest.mark.parametrize(("page", "line"), sorted(set(command_lines())))
def test_commands_and_options_exist(page: str, line: str) -> None:
    words = [word for word in shlex.split(line) if word != "..."]
    arguments = parse([word for word in words if word.isidentifier() or "=" in word or "-" in word])
    assert arguments.command in COMMANDS
    entry = COMMANDS[arguments.command]
    assert arguments.flags <= entry.flags | {"quiet", "verbose", "help"}
    # What an experiment or a group's choice adds to the form needs the name of a real one, not the page's placeholder.
    plain = parse(
        [
            arguments.command,
            *(a.text for a in arguments.assignments if a.key not in ("experiment", "mapping")),
        ]
    )
    form = entry.load().form(plain)
    for assignment in arguments.assignments:
        if not assignment.key.startswith("hydra"):
            form.check(assignment.key)


def test_readme_fits_one_screen_and_names_every_command() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) < 700
    assert [name for name in COMMANDS if f"`{name}" not in text and f" {name} " not in text] == []
