"""scaling_lab measures scaling laws: plan a sweep, train it, and rebuild Kaplan's and Chinchilla's laws.

    import scaling_lab as sl

    analysis = sl.analyze("my_runs.csv", loss="val_loss")
    analysis.isoflop.exponent.interval
    analysis.predict(1e21).isoflop.params_opt

Importing the package loads nothing else: what a name needs is imported when it is used, torch only to train.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from scaling_lab import _moved as _moved  # old module paths raise ImportError that names the new one

if TYPE_CHECKING:
    from scaling_lab.api.analyze import analyze, load, predict, report
    from scaling_lab.api.fit import fit
    from scaling_lab.api.plan import plan
    from scaling_lab.api.reproduce import reproduce
    from scaling_lab.api.sweep import Sweep
    from scaling_lab.api.tables import read_table
    from scaling_lab.api.train import load_model, train
    from scaling_lab.core.errors import UserError

__version__ = "0.1.0"

# Where each public name is defined.
_PUBLIC = {
    "Sweep": "api.sweep",
    "UserError": "core.errors",
    "analyze": "api.analyze",
    "fit": "api.fit",
    "load": "api.analyze",
    "load_model": "api.train",
    "plan": "api.plan",
    "predict": "api.analyze",
    "read_table": "api.tables",
    "report": "api.analyze",
    "reproduce": "api.reproduce",
    "train": "api.train",
}

__all__ = [
    "Sweep",
    "UserError",
    "analyze",
    "fit",
    "load",
    "load_model",
    "plan",
    "predict",
    "read_table",
    "report",
    "reproduce",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
