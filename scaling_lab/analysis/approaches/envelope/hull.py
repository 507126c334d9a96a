"""The lower convex hull of loss over compute in (ln C, ln L): `method=hull` of the envelope, as in some publications."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.data.observations import Curves
from scaling_lab.analysis.estimate import Array
from scaling_lab.analysis.frontiers import FrontierPoints


def hull_vertices(log_c: Array, log_loss: Array) -> NDArray[np.int64]:
    """Indices of the vertices of the lower convex hull, ascending in C, up to the lowest loss."""
    order = np.lexsort((log_loss, log_c))
    # Only points below all cheaper points can lie on the falling part of the lower hull.
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
    """The points of the curves at these indices, as frontier points."""
    return FrontierPoints(
        np.log(curves.compute_flops[at]),
        np.log(curves.n_params[at]),
        np.log(curves.n_tokens[at]),
        curves.loss_nats[at],
        np.ones(at.size),
    )


def resampled_hulls(curves: Curves, drawn: NDArray[np.bool_], keep_edges: bool) -> list[FrontierPoints]:
    """The frontier points of each resample of runs; `drawn`: (resamples, runs) which runs are in it."""
    x, y = np.log(curves.compute_flops), np.log(curves.loss_nats)
    # A vertex of the hull of several runs is a vertex of the hull of its own run: only those need to be considered.
    order = np.argsort(curves.run_index, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(curves.run_index[order])) + 1)
    near = np.concatenate([part[hull_vertices(x[part], y[part])] for part in parts])
    out = []
    for present in drawn:
        at = near[present[curves.run_index[near]]]
        vertices = at[hull_vertices(x[at], y[at])]
        n = curves.n_params[at]
        inside = (curves.n_params[vertices] > n.min()) & (curves.n_params[vertices] < n.max())
        out.append(hull_points(curves, vertices if keep_edges else vertices[inside]))
    return out
