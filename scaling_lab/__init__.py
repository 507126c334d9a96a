"""scaling_lab measures scaling laws: plan a sweep, train it, and rebuild Kaplan's and Chinchilla's laws.

Importing the package loads neither torch, hydra, wandb nor datasets: its parts do so when they are used.
"""

from __future__ import annotations

__version__ = "0.1.0"
