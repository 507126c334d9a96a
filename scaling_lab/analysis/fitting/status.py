"""The status of a fit and the sentence that explains it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.estimate import Array, FitStatus
from scaling_lab.analysis.fitting.newton import Minima
from scaling_lab.analysis.fitting.objective import Objective

# If an eigenvalue of the correlation matrix of the Jacobian's columns is smaller, the data do not determine all parameters.
_SMALLEST_EIGENVALUE = 1e-12


def assess_minima(
    problem: Objective,
    minima: Minima,
    index: NDArray[np.intp],
    rows: NDArray[np.intp],
    starts_tried: int,
    agreeing: NDArray[np.intp],
) -> tuple[NDArray[np.str_], list[str]]:
    """Status (k,) of each of the minima `index` of problems `rows`, and a sentence that explains it."""
    law, names = problem.law, problem.law.parameters
    observed = np.count_nonzero(problem.weights, axis=1)
    used = np.broadcast_to(observed, rows.shape) if len(observed) == 1 else observed[rows]
    degenerate, moved = _degenerate_directions(minima.gram[index], minima.at_bound[index])
    held = minima.at_bound[index]
    too_few, not_converged = used < len(names), ~minima.converged[index]
    isolated = (agreeing < 2) & (starts_tried > 1)
    status = np.select(
        [too_few | degenerate, not_converged, held.any(axis=1), isolated],
        [FitStatus.NOT_IDENTIFIED, FitStatus.MAX_STEPS, FitStatus.AT_BOUND, FitStatus.STARTS_DISAGREE],
        FitStatus.CONVERGED,
    ).astype("U16")
    messages = [f"{a} of {starts_tried} starts agree to 1e-6." for a in agreeing]
    _, upper = law.bounds(problem.inputs)
    constant = [c for c, z in zip(law.columns, problem.inputs.log_columns) if not z.any()]
    verb = "has" if len(constant) == 1 else "have"
    same = f" ({' and '.join(constant)} {verb} only one value)" if constant else ""
    for i in np.flatnonzero(status != FitStatus.CONVERGED.value):
        if too_few[i]:
            messages[i] = f"{used[i]} observations cannot determine {len(names)} parameters of {law.name}."
        elif degenerate[i]:
            listed = ", ".join(names[j] for j in np.flatnonzero(moved[i]))
            messages[i] = (
                f"The observations do not determine {listed}: a range of values fits equally well{same}."
            )
        elif not_converged[i]:
            messages[i] = f"Not converged: the scaled gradient is {minima.scaled_gradient[index[i]]:.1e}."
        elif held[i].any():
            at_upper = minima.theta[index[i]] >= upper
            reasons = "; ".join(
                law.bound_sentence(names[j], bool(at_upper[j])) for j in np.flatnonzero(held[i])
            )
            messages[i] = f"{reasons[0].upper() + reasons[1:]}."
        else:
            messages[i] = (
                f"Only 1 of {starts_tried} starts reached the lowest objective, so it may not be the global minimum."
            )
    return status, messages


def _degenerate_directions(
    gram: Array, held: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether some direction of the free parameters changes no prediction (k,), and which parameters it involves (k, p).

    Such directions are eigenvectors, with eigenvalue 0, of the correlation matrix of the Jacobian's columns, which does
    not depend on the scaling of the parameters.
    """
    diagonal = np.arange(gram.shape[1])
    gram = np.where(np.isfinite(gram), gram, 0.0)
    size = np.sqrt(gram[:, diagonal, diagonal])
    safe = np.where(size > 0, size, 1.0)
    correlation = gram / (safe[:, :, None] * safe[:, None, :])
    correlation = np.where(held[:, :, None] | held[:, None, :], 0.0, correlation)
    correlation[:, diagonal, diagonal] += held
    values, vectors = np.linalg.eigh(correlation)
    flat = values <= _SMALLEST_EIGENVALUE
    moved = np.sqrt(np.einsum("kij,kj->ki", vectors**2, flat.astype(np.float64)))
    return np.asarray(flat.any(axis=1)), np.asarray(moved > 0.1)
