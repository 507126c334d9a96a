"""The interface to the wandb client: login state, opening runs, failures and offline files.

Nothing here waits longer than its time limits. After one failure of the server this process does not contact it again:
`scaling-lab upload-wandb` uploads everything later from the records.
"""

from __future__ import annotations

import configparser
import json
import logging
import netrc
import os
import shutil
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from scaling_lab.core.installation import require
from scaling_lab.core.storage.files import write_atomic

log = logging.getLogger(__name__)

WANDB_MODES = ("auto", "online", "offline", "disabled")
DEFAULT_PROJECT = "scaling_lab"
DEFAULT_HOST = "api.wandb.ai"
INIT_TIMEOUT_S = 20.0
FINISH_TIMEOUT_S = 15.0
# The file in a sweep's W&B folder that holds its target.
TARGET_NAME = "tracker.json"

# Why this process no longer contacts the server; empty while it does.
_failures: list[str] = []
_opening = threading.Lock()


@dataclass(frozen=True)
class Target:
    """The W&B project that a sweep's runs go to."""

    project: str = DEFAULT_PROJECT
    entity: str | None = None
    mode: str = "auto"

    @property
    def path(self) -> str:
        """ENTITY/PROJECT, or PROJECT of the default entity."""
        return f"{self.entity}/{self.project}" if self.entity else self.project

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / TARGET_NAME, json.dumps(asdict(self)) + "\n", durable=False)

    @staticmethod
    def load(folder: Path) -> Target | None:
        """The target of the sweep whose W&B files are in `folder`; None if its runs were never mirrored."""
        try:
            data = json.loads((folder / TARGET_NAME).read_text(encoding="utf-8"))
            return Target(str(data["project"]), data.get("entity"), str(data.get("mode", "auto")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


@dataclass(frozen=True)
class RunInfo:
    """The name, group, tags and configuration of a W&B run."""

    id: str
    name: str
    group: str
    job_type: str
    tags: Sequence[str]
    config: dict[str, Any]


def wandb_folder(sweep_folder: Path) -> Path:
    """The folder of a sweep's W&B files."""
    return sweep_folder / "wandb"


def wandb_mode(mode: str) -> str:
    """`auto`: the value of WANDB_MODE, else online if an API key is known, else offline. Contacts no server."""
    if mode != "auto":
        return mode
    given = os.environ.get("WANDB_MODE")
    if given:
        return {"dryrun": "offline", "run": "online"}.get(given, given)
    return "online" if logged_in() else "offline"


def logged_in() -> bool:
    """Whether an API key for the client's server is known, from the environment or from `wandb login`."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(base_url()).hostname or DEFAULT_HOST
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return host in netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def base_url() -> str:
    """The server's address: WANDB_BASE_URL, else the one saved by `wandb login --host`, else W&B's own."""
    given = os.environ.get("WANDB_BASE_URL")
    if given:
        return given
    folder = Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser()
    settings = configparser.ConfigParser(interpolation=None)
    try:
        settings.read(folder / "settings", encoding="utf-8")
    except (OSError, UnicodeDecodeError, configparser.Error):
        return f"https://{DEFAULT_HOST}"
    return settings.get("default", "base_url", fallback=f"https://{DEFAULT_HOST}")


class ServerFailed(Exception):
    """The server did not accept a request; this process does not contact it again."""


def open_run(
    info: RunInfo, target: Target, folder: Path, mode: str, finish_timeout_s: float | None = None
) -> Any:
    """Open a new wandb run. Its id is stable: the same training run is the same W&B run however often it starts.

    Raises `ServerFailed` at once if the server failed before, and whatever wandb raises (which may be SystemExit).
    """
    import wandb

    if mode == "online" and not logged_in():
        log.warning("tracker=wandb continues offline: not logged in at %s (`wandb login`).", base_url())
        mode = "offline"
    if mode != "online":
        run = _init(wandb, info, target, folder, mode)
        if mode == "offline":
            remove_superseded(folder, info.id, keep=Path(run.dir).parent)
        return run
    with _opening:  # one at a time: if the first finds the server down, the others do not have to wait for it
        if _failures:
            raise ServerFailed(_failures[0])
        try:
            return _init(wandb, info, target, folder, mode, finish_timeout_s)
        except BaseException as error:
            # Not retried offline: wandb-core still holds the id of a run that it could not open.
            raise remember_failure(error) from None


def remember_failure(error: BaseException) -> ServerFailed:
    """Remember that the server failed; returns the exception to raise."""
    _failures.append(" ".join(f"{type(error).__name__}: {error}".split())[:300])
    return ServerFailed(_failures[-1])


def server_has_failed() -> bool:
    """Whether the server has failed in this process."""
    return bool(_failures)


def forget_failures() -> None:
    """Contact the server again, for a new attempt by the user."""
    _failures.clear()


def _init(
    wandb: Any, info: RunInfo, target: Target, folder: Path, mode: str, finish_timeout_s: float | None = None
) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    return wandb.init(
        project=target.project,
        entity=target.entity,
        dir=str(folder),
        mode=mode,
        id=info.id,
        name=info.name,
        group=info.group,
        job_type=info.job_type,
        tags=list(info.tags),
        config=info.config,
        resume="allow",
        # A run that hangs or has failed may still be open in this process; never log to that one.
        reinit="create_new",
        settings=client_settings(wandb, finish_timeout_s),
    )


def client_settings(wandb: Any, finish_timeout_s: float | None = None) -> Any:
    """Settings for a quiet client with time limits, as far as the installed version supports them."""
    wanted = {
        "silent": True,
        "console": "off",
        "disable_git": True,
        "x_disable_stats": True,
        "init_timeout": INIT_TIMEOUT_S,
        "finish_timeout": FINISH_TIMEOUT_S if finish_timeout_s is None else finish_timeout_s,
        "finish_timeout_raises": True,
    }
    known = wandb.Settings.model_fields
    return wandb.Settings(**{name: value for name, value in wanted.items() if name in known})


def require_wandb() -> Any:
    """The wandb package. Raises `UserError` if it is not installed."""
    require("wandb", "W&B")
    import wandb

    return wandb


# -- offline files
def offline_folders(folder: Path, run_id: str | None = None) -> list[Path]:
    """Folders of offline runs in a sweep's W&B folder that are not uploaded yet, oldest first; of one id, or of all."""
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*")):
        parts = path.name.split("-", 3)  # offline-run-20261124_170204-<id>
        if len(parts) < 4 or run_id not in (None, parts[3]):
            continue
        if not any(path.glob("*.wandb.synced")):
            found.append(path)
    return found


def remove_superseded(folder: Path, run_id: str, keep: Path | None = None) -> None:
    """Delete the offline files of a run's earlier attempts.

    Each attempt's file holds the whole curve. `wandb sync` does not merge files with the same id, and skips the whole run
    if the file of a killed attempt has no proper end (wandb 0.31; github.com/wandb/wandb/issues/5865).
    """
    for path in offline_folders(folder, run_id):
        if keep is None or path.name != keep.name:
            shutil.rmtree(path, ignore_errors=True)
