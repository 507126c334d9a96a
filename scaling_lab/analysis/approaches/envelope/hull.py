"""Owns the lower convex hull of loss over compute, in (ln C, ln L): the envelope's `method=hull`, as publications did."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.data.observations import Curves
from scaling_lab.analysis.estimate import Array
from scaling_lab.analysis.frontiers import FrontierPoints


def hull_vertices(log_c: Array, log_loss: Array) -> NDArray[np.int64]:
    """Positions of the lower convex hull's vertices, ascending in C, up to the lowest loss."""
    order = np.lexsort((log_loss, log_c))
    # Only points below everything cheaper can lie on the falling part of the lower hull.
    falling = order[log_loss[order] <= np.minimum.accumulate(log_loss[order])]
    hull: list[int] = []
    for i in falling:
        while len(hull) >= 2 and _turns_right(log_c, log_loss, hull[-2], hull[-1], i):
            hull.pop()
        hull.append(int(i))
    return np.array(hull, dtype=np.int64)


def _turns_right(x: Array, y: Array, a: int, b: int, c: int) -> bool:
    return bool((x[b] - x[a]) * (y[c] - y[a]) - (y[b] - y[a]) * (x[c] - x[a]) <= 0)


def hull_points(curves: Curves, at: NDArray[np.int64]) -> FrontierPoints:
    """Frontier points of the curves' points at these positions."""
    return FrontierPoints(
        np.log(curves.compute_flops[at]),
        np.log(curves.n_params[at]),
        np.log(curves.n_tokens[at]),
        curves.loss_nats[at],
        np.ones(at.size),
    )
