"""Where Hydra finds a user's own configs: `config_dir=DIR` puts DIR before the built-in conf/.

Hydra's own --config-dir comes after it, so that a file of the same name would not be found. And that a launcher of
conf/hydra/launcher/ is ours where an installed plugin registers one of the same name.
"""

import os

from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.plugins.search_path_plugin import SearchPathPlugin

VARIABLE = "SCALING_LAB_CONFIG_DIR"


class ConfigDirPlugin(SearchPathPlugin):
    """Reads the folder from the environment, which `scaling_lab.cli.options.hydra_config.hydra_initialized` sets."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        _forget_registered_launchers()
        folder = os.environ.get(VARIABLE)
        if folder:
            search_path.prepend(
                provider="config_dir", path=f"file://{folder}", anchor=SearchPathQuery(provider="main")
            )


def _forget_registered_launchers() -> None:
    """Hydra merges a YAML into the schema that is registered under its name, if there is one (automatic schema matching),
    and refuses what the schema does not have: hydra-submitit-launcher's knows none of our options."""
    from hydra.core.config_store import ConfigStore

    from scaling_lab.cli.options.configs import builtin_folder, group_choices

    registered = ConfigStore.instance().repo.get("hydra", {}).get("launcher", {})
    for name in group_choices("hydra/launcher", [builtin_folder()]):
        registered.pop(f"{name}.yaml", None)
