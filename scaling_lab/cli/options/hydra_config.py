"""Composing configs with Hydra: plain trees of values, a sweep's config with Hydra's own part, and `train -m`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling_lab.cli.options.configs import ConfigGroup, find_config, read_yaml
from scaling_lab.cli.options.scales import GROUP as SCALE_GROUP
from scaling_lab.core.errors import UserError
from scaling_lab.core.storage.serialization import to_dict
from scaling_lab.launching.hydra_jobs import (
    environment_variables,
    first_line,
    hydra_errors,
    refuse_references,
)

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader
    from omegaconf import DictConfig

CONFIG_DIR_VARIABLE = "SCALING_LAB_CONFIG_DIR"
GLOBAL_PACKAGE = "# @package _global_"


def check_experiment(path: Path) -> None:
    """Refuse an experiment, or a scale of one, that Hydra would put below `experiment:`, where nothing reads it."""
    read_yaml(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    if not any(line.strip() == GLOBAL_PACKAGE for line in lines[:5]):
        raise UserError(
            f"{path} must begin with the line {GLOBAL_PACKAGE!r}: without it Hydra ignores what it sets."
        )


def compose_groups(
    config_name: str, groups: Mapping[ConfigGroup, str], folders: Sequence[Path]
) -> dict[str, Any]:
    """The config `config_name` with these group choices, as plain values."""
    from hydra import compose
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for group, choice in groups.items():
        if group.name in ("experiment", SCALE_GROUP) and choice != "null":
            check_experiment(find_config(f"{group.name}/{choice}", folders))
    try:
        with hydra_initialized(folders):
            config = compose(config_name=config_name, overrides=group_overrides(groups))
            tree = OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"the configuration does not compose: {first_line(error)}") from error
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def group_overrides(groups: Mapping[ConfigGroup, str]) -> list[str]:
    return [f"{group.hydra_key}={choice}" for group, choice in groups.items()]


@contextmanager
def composed_for_launch(
    config_name: str, overrides: Sequence[str], values: Mapping[str, Any], folders: Sequence[Path]
) -> Iterator[tuple[DictConfig, ConfigLoader]]:
    """Within it Hydra is initialized; yields the config with Hydra's own part, and what loaded it.

    Args:
        overrides: choices of groups, and Hydra's own options (hydra/launcher=..., hydra.launcher.x=...).
        values: dotted key -> a value that is already read, put on top: launchers refer to some (`${workers}`).
        folders: where configs are searched, the built-in folder last.
    """
    from hydra import compose
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    with hydra_initialized(folders, config_name):
        with hydra_errors():
            config = compose(config_name, overrides=list(overrides), return_hydra_config=True)
            for key, value in values.items():
                refuse_references(key, value)
                OmegaConf.update(config, key, to_dict(value), merge=True, force_add=True)
        yield config, GlobalHydra.instance().config_loader()


def run_multirun(
    config_name: str, overrides: Sequence[str], job: Callable[[Any], Any], folders: Sequence[Path]
) -> None:
    """An ordinary Hydra multirun of `job`, by the sweeper and the launcher that its config chooses."""
    from hydra.core.global_hydra import GlobalHydra

    chosen = [o.partition("=")[2] for o in overrides if o.startswith("hydra/launcher=")]
    with hydra_initialized(folders, config_name), hydra_errors(*chosen):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        hydra.multirun(config_name, job, list(overrides))


@contextmanager
def hydra_initialized(folders: Sequence[Path], job_name: str = "scaling_lab") -> Iterator[None]:
    """Within it Hydra composes from `folders`: the user's own folder, if there is one, goes before the built-in one
    (hydra_plugins/scaling_lab/config_dir.py)."""
    from hydra import initialize_config_dir

    own = str(folders[0].absolute()) if len(folders) > 1 else None
    with environment_variables(**{CONFIG_DIR_VARIABLE: own}):
        initialized = initialize_config_dir(str(folders[-1]), job_name, version_base="1.3")
    with initialized:
        yield
