"""First on PYTHONPATH, this makes every Python of a test one without these packages."""

from importlib.machinery import PathFinder

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

find_spec = PathFinder.find_spec


def find_unblocked(_, name, path=None, target=None):
    """Nothing for a blocked package, as where it is not installed."""
    return None if name.partition(".")[0] in BLOCKED else find_spec(name, path, target)


PathFinder.find_spec = classmethod(find_unblocked)
