"""Owns how we talk to the wandb client: whether anybody is logged in, how a run is opened, and what may go wrong.

Nothing here waits longer than its time limits, and a server that fails once is not asked again by this process:
`scaling-lab upload-wandb` brings everything up later from the records.
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
# What the mirror of a sweep is called on W&B, kept beside its files.
TARGET_NAME = "tracker.json"

# Why this process no longer asks the server; empty while it does.
_failed: list[str] = []
_opening = threading.Lock()


@dataclass(frozen=True)
class Target:
    """Where on W&B a sweep's runs go."""

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
        """The target of the sweep whose W&B files are in `folder`; None where its runs were never mirrored."""
        try:
            data = json.loads((folder / TARGET_NAME).read_text(encoding="utf-8"))
            return Target(str(data["project"]), data.get("entity"), str(data.get("mode", "auto")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


@dataclass(frozen=True)
class RunCard:
    """What a W&B run is called and where it stands."""

    id: str
    name: str
    group: str
    job_type: str
    tags: Sequence[str]
    config: dict[str, Any]


def wandb_folder(sweep_folder: Path) -> Path:
    """Where a sweep keeps its W&B files."""
    return sweep_folder / "wandb"


def wandb_mode(mode: str) -> str:
    """`auto`: what WANDB_MODE says, else online where a key is known, else offline. Asks nobody anything."""
    if mode != "auto":
        return mode
    given = os.environ.get("WANDB_MODE")
    if given:
        return {"dryrun": "offline", "run": "online"}.get(given, given)
    return "online" if logged_in() else "offline"


def logged_in() -> bool:
    """Whether a key is known for the server that the client would ask: from the environment, or from `wandb login`."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(base_url()).hostname or DEFAULT_HOST
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return host in netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def base_url() -> str:
    """The server's address: WANDB_BASE_URL, else what `wandb login --host` wrote down, else W&B's own."""
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
    """The server did not take something; it is not asked again by this process."""


def open_run(
    card: RunCard, target: Target, folder: Path, mode: str, finish_timeout_s: float | None = None
) -> Any:
    """A wandb run in its own right. The id is stable: the same training run is the same W&B run however often it starts.

    Raises `ServerFailed` at once where the server failed before, and what wandb raises (SystemExit among it).
    """
    import wandb

    if mode == "online" and not logged_in():
        log.warning("tracker=wandb goes on offline: nobody is logged in at %s (`wandb login`).", base_url())
        mode = "offline"
    if mode != "online":
        run = _init(wandb, card, target, folder, mode)
        if mode == "offline":
            remove_superseded(folder, card.id, keep=Path(run.dir).parent)
        return run
    with _opening:  # one after the other: when the first finds the server dead, the others need not
        if _failed:
            raise ServerFailed(_failed[0])
        try:
            return _init(wandb, card, target, folder, mode, finish_timeout_s)
        except BaseException as error:
            # (Not tried again offline: wandb-core holds the id of a run that it could not open.)
            raise server_failed(error) from None


def server_failed(error: BaseException) -> ServerFailed:
    """Remember that the server failed; the exception to raise."""
    _failed.append(" ".join(f"{type(error).__name__}: {error}".split())[:300])
    return ServerFailed(_failed[-1])


def has_failed() -> bool:
    """Whether the server failed in this process."""
    return bool(_failed)


def ask_again() -> None:
    """Forget that the server failed: a new attempt of the user's."""
    _failed.clear()


def _init(
    wandb: Any, card: RunCard, target: Target, folder: Path, mode: str, finish_timeout_s: float | None = None
) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    return wandb.init(
        project=target.project,
        entity=target.entity,
        dir=str(folder),
        mode=mode,
        id=card.id,
        name=card.name,
        group=card.group,
        job_type=card.job_type,
        tags=list(card.tags),
        config=card.config,
        resume="allow",
        # A run that hangs or failed may still be open in this process: never log into it.
        reinit="create_new",
        settings=client_settings(wandb, finish_timeout_s),
    )


def client_settings(wandb: Any, finish_timeout_s: float | None = None) -> Any:
    """Quiet, and bounded in time; of these the ones that the installed version knows."""
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
    """The wandb package. Raises `UserError` where it is not installed."""
    require("wandb", "W&B")
    import wandb

    return wandb


# -- offline files
def offline_folders(folder: Path, run_id: str | None = None) -> list[Path]:
    """The folders of offline runs below a sweep's W&B folder that were not uploaded, oldest first; of one id, or of all."""
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*")):
        parts = path.name.split("-", 3)  # offline-run-20261124_170204-<id>
        if len(parts) < 4 or run_id not in (None, parts[3]):
            continue
        if not any(path.glob("*.wandb.synced")):
            found.append(path)
    return found


def remove_superseded(folder: Path, run_id: str, keep: Path | None = None) -> None:
    """Remove the offline files of a run's former attempts.

    A newer attempt holds the kept curve from the first point. `wandb sync` does not join files with one id, and gives up
    the whole run at a killed attempt's file, which lacks its end (wandb 0.31; github.com/wandb/wandb/issues/5865).
    """
    for path in offline_folders(folder, run_id):
        if keep is None or path.name != keep.name:
            shutil.rmtree(path, ignore_errors=True)
