"""Muennighoff et al. 2023: published values of the data-constrained law, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scaling_lab.analysis.estimate import Array
from scaling_lab.analysis.laws import get_law
from scaling_lab.analysis.reproduce import ComparisonRow, ComparisonTable, Publication, ReproduceSettings

# The release's example (huggingface/datablations, README): figure 1 (right), 25B unique tokens at 6 x 8.67e9 x 178e9 FLOPs.
_UNIQUE_TOKENS = 25e9
_CHINCHILLA_N, _CHINCHILLA_D = 8.67e9, 178e9
_VALUES = {
    "L(6.34B, 242B tokens, 25B unique)": (6.34e9, 242e9, "2.2256440889984477"),
    "L(8.67B, 178B tokens, 25B unique)": (_CHINCHILLA_N, _CHINCHILLA_D, "2.2269634075087867"),
}
# Result of the release's grid search for the optimum at that compute: tokens, epochs, parameters.
_BEST_TOKENS, _BEST_EPOCHS, _BEST_PARAMS = "227e9", "9.1", "6.8e9"


@dataclass(frozen=True)
class Muennighoff2023(Publication):
    """Values of the law with the C4 constants, its optimum for 25B unique tokens, and the value of repeated epochs."""

    kind = "muennighoff2023"
    title = "What repeated tokens are worth"
    reference = (
        "Muennighoff et al. 2023, Scaling Data-Constrained Language Models, arXiv 2305.16264, and its release"
    )
    data = "the published constants (C4)"

    def parts(self, settings: ReproduceSettings) -> Sequence[ComparisonTable]:
        return (
            ComparisonTable("the law's published values", _values()),
            ComparisonTable("the optimum at the same compute, 25B unique tokens", _optimum()),
            ComparisonTable("what follows for repeated tokens", _epochs()),
        )


def _loss(n: float | Array, d: float | Array, unique: float | Array) -> Array:
    law = get_law("muennighoff")
    columns: Mapping[str, float | Array] = {"n_params": n, "n_tokens": d, "unique_tokens": unique}
    return np.asarray(law.loss_nats(law.example, columns))


def _values() -> tuple[ComparisonRow, ...]:
    losses = {name: (float(_loss(n, d, _UNIQUE_TOKENS)), text) for name, (n, d, text) in _VALUES.items()}
    rows = [
        ComparisonRow(name, ours, text, source="release", remark="Rounding of the last digits.")
        for name, (ours, text) in losses.items()
    ]
    (better, better_text), (plain, plain_text) = losses.values()
    gain = f"{float(plain_text) - float(better_text):.5f}"
    remark = (
        "More epochs of a smaller model are better, as the paper predicted and confirmed by training both."
    )
    return (
        *rows,
        ComparisonRow(
            "the smaller model's gain, nats", plain - better, gain, source="release", remark=remark
        ),
    )


def _optimum() -> tuple[ComparisonRow, ...]:
    """N that minimizes the law at fixed N D, on a grid much finer than the two printed digits."""
    n = np.geomspace(_CHINCHILLA_N / 3, _CHINCHILLA_N * 3, 20_001)
    d = _CHINCHILLA_N * _CHINCHILLA_D / n
    best = int(np.argmin(_loss(n, d, _UNIQUE_TOKENS)))
    free = get_law("muennighoff").frontier(get_law("muennighoff").example)
    assert free is not None
    compute = 6 * _CHINCHILLA_N * _CHINCHILLA_D
    fresh_n = float(free.params_coefficient * compute**free.params_exponent)
    coarse = "The release searches a grid of 500 steps; near the optimum the loss is flat to 1e-6."
    return (
        ComparisonRow("parameters", float(n[best]), _BEST_PARAMS, source="release", remark=coarse),
        ComparisonRow("tokens", float(d[best]), _BEST_TOKENS, source="release", remark=coarse),
        ComparisonRow("epochs", float(d[best]) / _UNIQUE_TOKENS, _BEST_EPOCHS, source="release", remark=coarse),
        ComparisonRow(
            "parameters if every token were fresh", fresh_n, "8.67e9", source="release",
            remark="8.67B is the model they trained as the optimum for fresh tokens; the optimum of the law is 2% larger.",
        ),
    )  # fmt: skip


def _epochs() -> tuple[ComparisonRow, ...]:
    law = get_law("muennighoff")
    free = law.frontier(law.example)
    assert free is not None
    # What the paper says about this many epochs (its figure 1).
    claims = {
        4: "The paper: up to 4 epochs are almost as good as new data.",
        16: "The paper: rapidly diminishing returns; after R_D* = 15.4 repetitions the value of a token has fallen to 1/e.",
        40: "The paper: at 40 epochs repeating is worthless.",
    }
    rows = []
    for epochs, remark in claims.items():
        d = epochs * _UNIQUE_TOKENS
        compute = (d / free.tokens_coefficient) ** (1 / free.tokens_exponent)
        n = float(free.params_coefficient * compute**free.params_exponent)
        more = float(_loss(n, d, _UNIQUE_TOKENS) / _loss(n, d, d) - 1)
        next_token = (_fresh_epochs(epochs + 1e-3) - _fresh_epochs(epochs - 1e-3)) / 2e-3
        rows += [
            ComparisonRow(
                f"{epochs} epochs are worth, in fresh epochs", _fresh_epochs(epochs), remark=remark
            ),
            ComparisonRow(
                f"the next token after {epochs} epochs, in fresh tokens", next_token, remark=remark
            ),
            ComparisonRow(
                f"loss after {epochs} epochs over that of fresh tokens, less 1", more, remark=remark
            ),
        ]
    limit = "1 + R_D*: 25B tokens, repeated forever, are worth 410B fresh ones."
    return (
        *rows,
        ComparisonRow("infinitely many epochs are worth, in fresh epochs", _fresh_epochs(1e4), remark=limit),
    )


def _fresh_epochs(epochs: float) -> float:
    """Number of epochs of fresh tokens with the same loss as `epochs` epochs of the same tokens, from the law itself."""
    law = get_law("muennighoff")
    small = 1e8  # so small that excess parameters do not matter
    reducible = float(_loss(small, epochs * _UNIQUE_TOKENS, _UNIQUE_TOKENS) - _loss(small, 1e60, 1e60))
    return float((law.example["B"] / reducible) ** (1 / law.example["beta"]) / _UNIQUE_TOKENS)
