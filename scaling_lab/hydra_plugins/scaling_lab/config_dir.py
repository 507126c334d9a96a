"""Owns where Hydra finds a user's own configs: `config_dir=DIR` puts DIR before the built-in conf/.

Hydra's own --config-dir comes after it, so that a file of the same name would not be found.
"""

import os

from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.plugins.search_path_plugin import SearchPathPlugin

VARIABLE = "SCALING_LAB_CONFIG_DIR"


class ConfigDirPlugin(SearchPathPlugin):
    """Reads the folder from the environment, which `scaling_lab.cli.compose.own_configs` sets around a command."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        folder = os.environ.get(VARIABLE)
        if folder:
            search_path.prepend(
                provider="config_dir", path=f"file://{folder}", anchor=SearchPathQuery(provider="main")
            )
