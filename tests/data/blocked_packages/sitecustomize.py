"""First on PYTHONPATH, this makes every Python of a test one without these packages."""

import sys

BLOCKED = {
    "hydra",
    "omegaconf",
    "wandb",
    "datasets",
    "pandas",
    "pyarrow",
    "rich",
    "hypothesis",
    "pytest_timeout",
    "xdist",
}


class Blocker:
    """A finder that has none of them."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


sys.meta_path.insert(0, Blocker())
