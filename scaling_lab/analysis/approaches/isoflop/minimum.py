"""The minimum of one IsoFLOP valley, for many samples at once: a least-squares parabola or cubic in ln N, or Akima's
interpolant (as in Porian et al. 2024, arXiv 2406.19146).

Arrays are (samples, points) with points ascending in N; weight 0 leaves a point out of a sample. Losses are not in
logarithms: see isoflop.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.estimate import Array, BudgetStatus

STATUS_CODES = (
    BudgetStatus.OK,
    BudgetStatus.EDGE,
    BudgetStatus.CONCAVE,
    BudgetStatus.OUTSIDE,
    BudgetStatus.TOO_FEW,
)
MINIMUM_SIZES = {"shared": 3, "parabola": 3, "akima": 3, "cubic": 4}
# A local window has at least this many sizes: a parabola through three would fit their noise exactly.
WINDOW_SIZES = 5


@dataclass(frozen=True)
class ValleyMinima:
    """(samples,) each; log_n, loss and curvature are NaN if there is no minimum."""

    status: NDArray[np.int64]
    """Index into `STATUS_CODES`."""
    log_n: Array
    loss: Array
    curvature: Array


@dataclass(frozen=True)
class _SizeMeans:
    """Weight and mean loss of each distinct size, per sample."""

    log_n: Array
    weight: Array
    loss: Array

    @property
    def present(self) -> NDArray[np.bool_]:
        return self.weight > 0


@dataclass(frozen=True)
class WindowedValley:
    """One valley for many samples, with weight 0 outside a local window."""

    loss: Array
    weight: Array
    enough: NDArray[np.bool_]
    """(samples,) whether there are enough sizes for the method."""
    at_edge: NDArray[np.bool_]
    """(samples,) whether the best sampled size is the smallest or largest one."""
    opens_down: NDArray[np.bool_]
    """(samples,) whether a parabola through the losses opens downward (only computed if the best size is at the edge)."""
    lowest: Array
    highest: Array

    def status(self, log_n: Array) -> NDArray[np.int64]:
        """(samples,) codes. If several reasons apply, the first of these is given: too few sizes; a valley that opens downward;
        the best size at the edge; a fitted curve without a minimum; a minimum outside the sampled sizes."""
        status = np.full(self.enough.shape, STATUS_CODES.index(BudgetStatus.OK))
        with np.errstate(invalid="ignore"):
            status[(log_n < self.lowest) | (log_n > self.highest)] = STATUS_CODES.index(BudgetStatus.OUTSIDE)
        status[~np.isfinite(log_n)] = STATUS_CODES.index(BudgetStatus.CONCAVE)
        status[self.at_edge] = STATUS_CODES.index(BudgetStatus.EDGE)
        status[self.at_edge & self.opens_down] = STATUS_CODES.index(BudgetStatus.CONCAVE)
        status[~self.enough] = STATUS_CODES.index(BudgetStatus.TOO_FEW)
        return status


def apply_window(
    method: str, log_n: Array, size: NDArray[Any], loss: Array, weight: Array, window: float | None
) -> WindowedValley:
    """Apply the local window to one valley, and compute what all methods need.

    Args:
        method: parabola, cubic, akima or shared.
        log_n: (points,) ascending. size: (points,) index of each point's distinct size.
        loss, weight: broadcast to (samples, points).
        window: half-width in ln N around the best sampled size; None uses all sizes.
    """
    loss, weight = np.broadcast_arrays(np.atleast_2d(loss), np.atleast_2d(weight))
    sizes = _by_size(log_n, size, loss, weight)
    lowest, highest, best = _range_and_best(sizes)
    used = sizes.present
    if window is not None:
        used = _window(sizes, window)
        weight = np.where(used[:, size], weight, 0.0)
    enough = (used & sizes.present).sum(axis=1) >= MINIMUM_SIZES[method]
    at_edge = (best <= lowest) | (best >= highest)
    opens_down = np.zeros(at_edge.shape, dtype=bool)
    checked = at_edge & enough
    if checked.any():
        opens_down[checked] = _polynomials(log_n, loss[checked], weight[checked], 2)[0][:, 2] <= 0
    return WindowedValley(loss, weight, enough, at_edge, opens_down, lowest, highest)


def find_minima(method: str, log_n: Array, size: NDArray[Any], p: WindowedValley) -> ValleyMinima:
    """The minimum of the valley in each sample and its status, by a method that fits each budget separately."""
    if method == "akima":
        x, y, curvature = _akima_minima(_by_size(log_n, size, p.loss, p.weight), p.enough)
        return ValleyMinima(p.status(x), x, y, curvature)
    degree = 2 if method == "parabola" else 3
    x, y, curvature = _polynomial_minima(log_n, p.loss, p.weight, p.enough, degree)
    return ValleyMinima(p.status(x), x, y, curvature)


def fitted_curve(method: str, log_n: Array, size: NDArray[Any], p: WindowedValley, x: Array) -> Array:
    """The fitted loss of the first sample at ln N = x: a polynomial, or Akima's interpolant of the mean losses."""
    if method == "akima":
        sizes = _by_size(log_n, size, p.loss[:1], p.weight[:1])
        kept = sizes.present[0]
        nodes, values = sizes.log_n[kept], sizes.loss[0, kept]
        pieces = _akima_cubics(nodes[None], values[None])
        piece = np.clip(np.searchsorted(nodes, x, side="right") - 1, 0, nodes.size - 2)
        t = x - nodes[piece]
        c0, c1, c2, c3 = (c[0, piece] for c in pieces)
        return c0 + t * (c1 + t * (c2 + t * c3))
    degree = 2 if method == "parabola" else 3
    coefficients, center, scale = _polynomials(log_n, p.loss[:1], p.weight[:1], degree)
    return np.polynomial.polynomial.polyval((x - center[0]) / scale[0], coefficients[0])


def _by_size(log_n: Array, size: NDArray[Any], loss: Array, weight: Array) -> _SizeMeans:
    n_sizes = int(size[-1]) + 1
    member = (size[:, None] == np.arange(n_sizes)).astype(np.float64)
    total = weight @ member
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = (weight * loss) @ member / total
    first = np.searchsorted(size, np.arange(n_sizes))
    return _SizeMeans(log_n[first], total, mean)


def _range_and_best(sizes: _SizeMeans) -> tuple[Array, Array, Array]:
    there = sizes.present
    x = np.broadcast_to(sizes.log_n, there.shape)
    lowest = np.where(there, x, np.inf).min(axis=1)
    highest = np.where(there, x, -np.inf).max(axis=1)
    best = sizes.log_n[np.argmin(np.where(there, sizes.loss, np.inf), axis=1)]
    return lowest, highest, best


def _window(sizes: _SizeMeans, window: float) -> NDArray[np.bool_]:
    _, _, best = _range_and_best(sizes)
    distance = np.where(sizes.present, np.abs(sizes.log_n - best[:, None]), np.inf)
    ranked = np.sort(distance, axis=1)
    nearest = ranked[:, min(WINDOW_SIZES, ranked.shape[1]) - 1]
    limit = np.maximum(window, np.where(np.isfinite(nearest), nearest, window))
    return distance <= limit[:, None] * (1 + 1e-12)


def _polynomials(log_n: Array, loss: Array, weight: Array, degree: int) -> tuple[Array, Array, Array]:
    """Weighted least squares in u = (ln N - center) / scale: (samples, degree + 1) coefficients, center, scale.

    QR of the weighted Vandermonde matrix instead of normal equations keeps a cubic over a wide valley accurate.
    """
    total = np.maximum(weight.sum(axis=1), 1e-300)
    center = (weight * log_n).sum(axis=1) / total
    dx = np.where(weight > 0, log_n - center[:, None], 0.0)
    scale = np.maximum(np.sqrt((weight * dx**2).sum(axis=1) / total), 1e-12)
    u = dx / scale[:, None]
    root = np.sqrt(weight)
    design = root[:, :, None] * u[:, :, None] ** np.arange(degree + 1)
    q, r = np.linalg.qr(design)
    target = np.einsum("spk,sp->sk", q, root * np.where(weight > 0, loss, 0.0))
    return np.linalg.solve(r, target[:, :, None])[:, :, 0], center, scale


def _polynomial_minima(
    log_n: Array, loss: Array, weight: Array, enough: NDArray[np.bool_], degree: int
) -> tuple[Array, Array, Array]:
    x_min, y_min, curvature = (np.full(loss.shape[0], np.nan) for _ in range(3))
    if not enough.any() or log_n.size <= degree:
        return x_min, y_min, curvature
    coefficients, center, scale = _polynomials(log_n, loss[enough], weight[enough], degree)
    c1, c2 = coefficients[:, 1], coefficients[:, 2]
    with np.errstate(invalid="ignore", divide="ignore"):
        if degree == 2:
            u = np.where(c2 > 0, -c1 / (2 * c2), np.nan)
            second = 2 * c2
        else:
            c3 = coefficients[:, 3]
            # The root of c1 + 2 c2 u + 3 c3 u^2 with a positive second derivative, in a form that is stable for c3 -> 0.
            root = np.sqrt(c2**2 - 3 * c1 * c3)
            u = np.where(c2 >= 0, -c1 / (c2 + root), (root - c2) / (3 * c3))
            second = 2 * c2 + 6 * c3 * u
            u = np.where(second > 0, u, np.nan)
        powers = u[:, None] ** np.arange(degree + 1)
        x_min[enough] = center + scale * u
        y_min[enough] = (coefficients * powers).sum(axis=1)
        curvature[enough] = np.where(np.isfinite(u), second / scale**2, np.nan)
    return x_min, y_min, curvature


def _akima_minima(sizes: _SizeMeans, enough: NDArray[np.bool_]) -> tuple[Array, Array, Array]:
    x_min, y_min, curvature = (np.full(enough.size, np.nan) for _ in range(3))
    counts = sizes.present.sum(axis=1)
    for k in np.unique(counts[enough]):
        rows = np.flatnonzero(enough & (counts == k))
        # Gather the k sizes that are present in these samples, in order, into a dense array.
        columns = np.nonzero(sizes.present[rows])[1].reshape(rows.size, k)
        x = sizes.log_n[columns]
        y = np.take_along_axis(sizes.loss[rows], columns, axis=1)
        x_min[rows], y_min[rows], curvature[rows] = _cubic_pieces_minimum(x, *_akima_cubics(x, y))
    return x_min, y_min, curvature


def _akima_cubics(x: Array, y: Array) -> tuple[Array, Array, Array, Array]:
    """(samples, pieces) coefficients of y = c0 + c1 t + c2 t^2 + c3 t^3, t = x - x_left, of Akima's 1970 interpolant."""
    h = np.diff(x, axis=1)
    m = np.diff(y, axis=1) / h
    # Two slopes beyond each end continue the parabola through the last three points (as Akima defined it).
    left1 = 2 * m[:, :1] - m[:, 1:2]
    left2 = 2 * left1 - m[:, :1]
    right1 = 2 * m[:, -1:] - m[:, -2:-1]
    right2 = 2 * right1 - m[:, -1:]
    s = np.concatenate([left2, left1, m, right1, right2], axis=1)
    w1 = np.abs(s[:, 3:] - s[:, 2:-1])
    w2 = np.abs(s[:, 1:-2] - s[:, :-3])
    total = w1 + w2
    flat = total <= 1e-9 * np.maximum(total.max(axis=1, keepdims=True), 1e-300)
    with np.errstate(invalid="ignore", divide="ignore"):
        slope = np.where(flat, 0.5 * (s[:, 1:-2] + s[:, 2:-1]), (w1 * s[:, 1:-2] + w2 * s[:, 2:-1]) / total)
    c2 = (3 * m - 2 * slope[:, :-1] - slope[:, 1:]) / h
    c3 = (slope[:, :-1] + slope[:, 1:] - 2 * m) / h**2
    return y[:, :-1], slope[:, :-1], c2, c3


def _cubic_pieces_minimum(x: Array, c0: Array, c1: Array, c2: Array, c3: Array) -> tuple[Array, Array, Array]:
    """(samples,) the lowest interior local minimum; NaN if the lowest point is an end of the range."""
    h = np.diff(x, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        root = np.sqrt(c2**2 - 3 * c1 * c3)
        t = np.where(c2 >= 0, -c1 / (c2 + root), (root - c2) / (3 * c3))
        inside = np.isfinite(t) & (t >= 0) & (t <= h) & (2 * c2 + 6 * c3 * t >= 0)
        value = np.where(inside, c0 + t * (c1 + t * (c2 + t * c3)), np.inf)
    piece = np.argmin(value, axis=1)
    rows = np.arange(x.shape[0])
    last = c0[:, -1] + h[:, -1] * (c1[:, -1] + h[:, -1] * (c2[:, -1] + h[:, -1] * c3[:, -1]))
    lowest = value[rows, piece]
    interior = np.isfinite(lowest) & (lowest < c0[:, 0]) & (lowest < last)
    t_best = np.where(interior, t[rows, piece], np.nan)
    return (
        np.where(interior, x[rows, piece] + t_best, np.nan),
        np.where(interior, lowest, np.nan),
        np.where(interior, 2 * c2[rows, piece] + 6 * c3[rows, piece] * t_best, np.nan),
    )
