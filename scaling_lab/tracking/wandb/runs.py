"""Read W&B runs for `import-wandb`: from the server through wandb's public API, or from run files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scaling_lab.core.errors import UserError
from scaling_lab.tracking.sink.wandb_client import base_url, require_wandb
from scaling_lab.tracking.wandb.mapping import ExternalRun
from scaling_lab.tracking.wandb.run_files import RunFile, find_run_files, merge_attempts, read_run_file

API_TIMEOUT_S = 60
RUNS_PER_PAGE = 100


@dataclass(frozen=True)
class RunFilter:
    """Which runs to import; None: all."""

    group: str | None = None
    job_type: str | None = None
    tags: Sequence[str] = ()
    state: str | None = None
    config: Mapping[str, str] = field(default_factory=dict)
    """Config key (nested keys joined by dots) -> the value, as text."""

    def server_filters(self) -> dict[str, Any]:
        """The filters that the server can apply."""
        found: dict[str, Any] = {}
        for key, value in (("group", self.group), ("jobType", self.job_type), ("state", self.state)):
            if value is not None:
                found[key] = value
        if self.tags:
            found["tags"] = {"$in": list(self.tags)}
        return found

    def matches(self, run: ExternalRun) -> bool:
        if self.group not in (None, run.group) or self.job_type not in (None, run.job_type):
            return False
        if self.state not in (None, run.state) or (self.tags and not set(self.tags) & set(run.tags)):
            return False
        return all(_equals_text(_nested_value(run.config, key), value) for key, value in self.config.items())


def project_runs(project: str, wanted: RunFilter) -> tuple[int, Iterator[ExternalRun]]:
    """(number of runs in ENTITY/PROJECT that pass the server's filters, the runs that pass all filters).

    Raises `UserError` if there is no such project or the server does not respond.
    """
    wandb = require_wandb()
    try:
        api = wandb.Api(timeout=API_TIMEOUT_S)
        listed = api.runs(project, filters=wanted.server_filters(), per_page=RUNS_PER_PAGE, lazy=False)
        count = len(listed)
    except Exception as error:
        raise _api_error(project, error) from None
    return count, (run for run in _iterate_pages(project, listed) if wanted.matches(run))


def folder_runs(folder: Path, wanted: RunFilter) -> tuple[int, Iterator[ExternalRun]]:
    """(number of runs with files below a folder, the runs that pass the filters)."""
    require_wandb()
    attempts: dict[str, list[RunFile]] = {}
    for path in find_run_files(folder):
        file = read_run_file(path)
        if file.run_id:  # a process that was killed immediately leaves an empty file
            attempts.setdefault(file.run_id, []).append(file)
    runs = (merge_attempts(files) for files in attempts.values())
    return len(attempts), (run for run in runs if wanted.matches(run))


def _iterate_pages(project: str, listed: Iterable[Any]) -> Iterator[ExternalRun]:
    pages = iter(listed)
    while True:
        try:
            run = next(pages, None)
        except Exception as error:
            raise _api_error(project, error) from None
        if run is None:
            return
        yield _external_run(project, run)


def _external_run(project: str, run: Any) -> ExternalRun:
    keys = (run._attrs.get("historyKeys") or {}).get("keys") or {}
    return ExternalRun(
        run_id=run.id,
        name=run.name,
        config=dict(run.config),
        summary=dict(run.summary._json_dict),
        history_keys={name: _row_count(about) for name, about in keys.items()} | {"_step": None},
        read_history=_reader(project, run),
        group=run.group,
        job_type=run.job_type,
        state=run.state,
        tags=list(run.tags),
    )


def _reader(project: str, run: Any) -> Callable[[Sequence[str]], list[dict[str, Any]]]:
    def read(keys: Sequence[str]) -> list[dict[str, Any]]:
        try:
            # scan_history is unsampled, unlike history(); it returns only rows with all of the keys. Not from the cache,
            # which may be from when the run was still in progress.
            return sorted(
                run.scan_history(keys=list(keys), use_cache=False), key=lambda row: row.get("_step", 0)
            )
        except Exception as error:
            raise _api_error(project, error) from None

    return read


def _row_count(about: Any) -> int | None:
    """The server's count of rows with a metric, of any type (NaN is stored as text); None if it does not say."""
    types = about.get("typeCounts") if isinstance(about, Mapping) else None
    if not types:
        return None
    return sum(int(t.get("count", 0)) for t in types)


def _api_error(project: str, error: BaseException) -> UserError:
    text = " ".join(f"{error}".split())[:300] or type(error).__name__
    if "find project" in text:
        return UserError(
            f"project={project}: there is no such project at {base_url()}, or you do not have access to it."
        )
    return UserError(f"project={project}: unexpected response from W&B at {base_url()} ({text}).")


def _nested_value(tree: Any, key: str) -> Any:
    for part in [key] if isinstance(tree, Mapping) and key in tree else key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def _equals_text(value: Any, text: str) -> bool:
    if isinstance(value, bool):
        return str(value).lower() == text.lower()
    if isinstance(value, (int, float)):
        try:
            return float(text) == value
        except ValueError:
            return False
    return value is not None and str(value) == text
