"""Owns reading anybody's W&B runs for `import-wandb`: from the server through wandb's public API, or from run files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scaling_lab.core.errors import UserError
from scaling_lab.tracking.sink.wandb_client import base_url, require_wandb
from scaling_lab.tracking.wandb.mapping import ForeignRun
from scaling_lab.tracking.wandb.run_files import RunFile, find_run_files, foreign_run, read_run_file

API_TIMEOUT_S = 60
RUNS_PER_PAGE = 100


@dataclass(frozen=True)
class RunFilter:
    """Which runs are wanted; None: all."""

    group: str | None = None
    job_type: str | None = None
    tags: Sequence[str] = ()
    state: str | None = None
    config: Mapping[str, str] = field(default_factory=dict)
    """Config key (dots go inside) -> the value, as text."""

    def for_server(self) -> dict[str, Any]:
        """What the server can pick out itself."""
        found: dict[str, Any] = {}
        for key, value in (("group", self.group), ("jobType", self.job_type), ("state", self.state)):
            if value is not None:
                found[key] = value
        if self.tags:
            found["tags"] = {"$in": list(self.tags)}
        return found

    def keeps(self, run: ForeignRun) -> bool:
        if self.group not in (None, run.group) or self.job_type not in (None, run.job_type):
            return False
        if self.state not in (None, run.state) or (self.tags and not set(self.tags) & set(run.tags)):
            return False
        return all(_same(_inside(run.config, key), value) for key, value in self.config.items())


def runs_of_project(project: str, wanted: RunFilter) -> tuple[int, Iterator[ForeignRun]]:
    """How many runs of ENTITY/PROJECT pass the server's filters, and those that pass them all.

    Raises `UserError` where there is no such project, or the server cannot be asked.
    """
    wandb = require_wandb()
    try:
        api = wandb.Api(timeout=API_TIMEOUT_S)
        listed = api.runs(project, filters=wanted.for_server(), per_page=RUNS_PER_PAGE, lazy=False)
        count = len(listed)
    except Exception as error:
        raise _refused(project, error) from None
    return count, (run for run in _listed(project, listed) if wanted.keeps(run))


def runs_of_folder(folder: Path, wanted: RunFilter) -> tuple[int, Iterator[ForeignRun]]:
    """How many runs there are files of below a folder, and those that pass the filters."""
    require_wandb()
    attempts: dict[str, list[RunFile]] = {}
    for path in find_run_files(folder):
        file = read_run_file(path)
        if file.run_id:  # the file of a process that was killed at once holds nothing
            attempts.setdefault(file.run_id, []).append(file)
    runs = (foreign_run(files) for files in attempts.values())
    return len(attempts), (run for run in runs if wanted.keeps(run))


def _listed(project: str, listed: Iterable[Any]) -> Iterator[ForeignRun]:
    pages = iter(listed)
    while True:
        try:
            run = next(pages, None)
        except Exception as error:
            raise _refused(project, error) from None
        if run is None:
            return
        yield _of_api(project, run)


def _of_api(project: str, run: Any) -> ForeignRun:
    keys = (run._attrs.get("historyKeys") or {}).get("keys") or {}
    return ForeignRun(
        run_id=run.id,
        name=run.name,
        config=dict(run.config),
        summary=dict(run.summary._json_dict),
        history_keys={name: _count(about) for name, about in keys.items()} | {"_step": None},
        read_history=_reader(project, run),
        group=run.group,
        job_type=run.job_type,
        state=run.state,
        tags=list(run.tags),
    )


def _reader(project: str, run: Any) -> Callable[[Sequence[str]], list[dict[str, Any]]]:
    def read(keys: Sequence[str]) -> list[dict[str, Any]]:
        try:
            # Unsampled (`history()` samples); rows without any of the keys are not given back. Not from a cache, which
            # would hold what a run had when it was still on.
            return sorted(
                run.scan_history(keys=list(keys), use_cache=False), key=lambda row: row.get("_step", 0)
            )
        except Exception as error:
            raise _refused(project, error) from None

    return read


def _count(about: Any) -> int | None:
    """How many rows hold a metric, as the server counts them; rows of other types (NaN is text) count too."""
    types = about.get("typeCounts") if isinstance(about, Mapping) else None
    if not types:
        return None
    return sum(int(t.get("count", 0)) for t in types)


def _refused(project: str, error: BaseException) -> UserError:
    text = " ".join(f"{error}".split())[:300] or type(error).__name__
    if "find project" in text:
        return UserError(
            f"project={project}: there is no such project at {base_url()}, or you may not see it."
        )
    return UserError(f"project={project}: W&B at {base_url()} did not answer as wanted ({text}).")


def _inside(tree: Any, key: str) -> Any:
    for part in [key] if isinstance(tree, Mapping) and key in tree else key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def _same(value: Any, text: str) -> bool:
    if isinstance(value, bool):
        return str(value).lower() == text.lower()
    if isinstance(value, (int, float)):
        try:
            return float(text) == value
        except ValueError:
            return False
    return value is not None and str(value) == text
