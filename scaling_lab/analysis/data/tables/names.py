"""Finding the column that a name probably refers to, for suggestions in errors."""

from __future__ import annotations

import difflib

# Common other names, suggested in errors. Those that leave no doubt are taken by themselves (headers.py).
_ALIASES: dict[str, tuple[str, ...]] = {
    "run_id": ("run", "id", "name", "run_name", "model"),
    "params": (
        "n",
        "n_params",
        "num_params",
        "parameters",
        "n_parameters",
        "model_size",
        "size",
        "params_total",
    ),
    "tokens": ("d", "n_tokens", "num_tokens", "train_tokens", "tokens_seen", "training_tokens"),
    "flops": ("c", "compute", "train_flops", "total_flops", "compute_flops", "training_flops", "flop"),
    "loss": (
        "l",
        "val_loss",
        "loss_nats",
        "final_loss",
        "eval_loss",
        "validation_loss",
        "val_loss_nats",
        "train_loss",
    ),
}


def nearest_column(name: str, names: list[str]) -> str | None:
    """The column that `name` probably refers to: a different case, a common synonym, or a similar name."""
    lowered = {n.lower(): n for n in names}
    for alias in (name.lower(), *_ALIASES.get(name, ())):
        if alias in lowered:
            return lowered[alias]
    close = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.5)
    if close:
        return lowered[close[0]]
    inside = [n for low, n in lowered.items() if len(name) > 2 and name.lower() in low]
    return inside[0] if inside else None


def listed(names: list[str], limit: int = 20) -> str:
    """The first names and the total number, for messages."""
    shown = ", ".join(names[:limit])
    return shown + (f", ... ({len(names)} in all)" if len(names) > limit else "")
