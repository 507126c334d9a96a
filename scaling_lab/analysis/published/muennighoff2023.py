"""Owns the comparison with Muennighoff et al. 2023: the data-constrained law's published values, and what follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scaling_lab.analysis.estimate import Array
from scaling_lab.analysis.laws import get_law
from scaling_lab.analysis.reproduce import Part, Publication, ReproduceSettings, Row

# The release's example (huggingface/datablations, README): figure 1 (right), 25B unique tokens at 6 x 8.67e9 x 178e9 FLOPs.
_UNIQUE_TOKENS = 25e9
_CHINCHILLA_N, _CHINCHILLA_D = 8.67e9, 178e9
_VALUES = {
    "L(6.34B, 242B tokens, 25B unique)": (6.34e9, 242e9, "2.2256440889984477"),
    "L(8.67B, 178B tokens, 25B unique)": (_CHINCHILLA_N, _CHINCHILLA_D, "2.2269634075087867"),
}
# The release's grid search for the optimum at that compute: tokens, epochs, parameters.
_BEST_TOKENS, _BEST_EPOCHS, _BEST_PARAMS = "227e9", "9.1", "6.8e9"


@dataclass(frozen=True)
class Muennighoff2023(Publication):
    """Values of the law with the C4 constants, its optimum for 25B unique tokens, and what an epoch is worth."""

    kind = "muennighoff2023"
    title = "What repeated tokens are worth"
    reference = (
        "Muennighoff et al. 2023, Scaling Data-Constrained Language Models, arXiv 2305.16264, and its release"
    )
    data = "the published constants (C4)"

    def parts(self, settings: ReproduceSettings) -> Sequence[Part]:
        return (
            Part("the law's published values", _values()),
            Part("the optimum at the same compute, 25B unique tokens", _optimum()),
            Part("what follows: repeated tokens", _epochs()),
        )


def _loss(n: float | Array, d: float | Array, unique: float | Array) -> Array:
    law = get_law("muennighoff")
    columns: Mapping[str, float | Array] = {"n_params": n, "n_tokens": d, "unique_tokens": unique}
    return np.asarray(law.loss_nats(law.example, columns))


def _values() -> tuple[Row, ...]:
    losses = {name: (float(_loss(n, d, _UNIQUE_TOKENS)), text) for name, (n, d, text) in _VALUES.items()}
    rows = [
        Row(name, ours, text, source="release", remark="Rounding of the last bits.")
        for name, (ours, text) in losses.items()
    ]
    (better, better_text), (plain, plain_text) = losses.values()
    gain = f"{float(plain_text) - float(better_text):.5f}"
    remark = "More epochs of a smaller model: as the paper, which then trained both, predicted."
    return (
        *rows,
        Row("the smaller model's gain, nats", plain - better, gain, source="release", remark=remark),
    )


def _optimum() -> tuple[Row, ...]:
    """N that minimises the law at fixed N D, on a grid a thousand times finer than rounding to two digits."""
    n = np.geomspace(_CHINCHILLA_N / 3, _CHINCHILLA_N * 3, 20_001)
    d = _CHINCHILLA_N * _CHINCHILLA_D / n
    best = int(np.argmin(_loss(n, d, _UNIQUE_TOKENS)))
    free = get_law("muennighoff").frontier(get_law("muennighoff").example)
    assert free is not None
    compute = 6 * _CHINCHILLA_N * _CHINCHILLA_D
    fresh_n = float(free.params_coefficient * compute**free.params_exponent)
    coarse = "The release searches a grid of 500 steps; the loss is flat there to 1e-6."
    return (
        Row("parameters", float(n[best]), _BEST_PARAMS, source="release", remark=coarse),
        Row("tokens", float(d[best]), _BEST_TOKENS, source="release", remark=coarse),
        Row("epochs", float(d[best]) / _UNIQUE_TOKENS, _BEST_EPOCHS, source="release", remark=coarse),
        Row(
            "parameters if every token were fresh", fresh_n, "8.67e9", source="release",
            remark="8.67B is the model that they trained as the optimum for fresh tokens; the law's own is 2% larger.",
        ),
    )  # fmt: skip


def _epochs() -> tuple[Row, ...]:
    law = get_law("muennighoff")
    free = law.frontier(law.example)
    assert free is not None
    # What the paper says of so many epochs (its figure 1).
    said = {
        4: "The paper: up to 4 epochs are almost as good as new data.",
        16: "The paper: rapidly diminishing returns; R_D* = 15.4 repetitions is where 1/e of a token's worth is left.",
        40: "The paper: at 40 epochs repeating is worthless.",
    }
    rows = []
    for epochs, remark in said.items():
        d = epochs * _UNIQUE_TOKENS
        compute = (d / free.tokens_coefficient) ** (1 / free.tokens_exponent)
        n = float(free.params_coefficient * compute**free.params_exponent)
        more = float(_loss(n, d, _UNIQUE_TOKENS) / _loss(n, d, d) - 1)
        next_token = (_fresh_epochs(epochs + 1e-3) - _fresh_epochs(epochs - 1e-3)) / 2e-3
        rows += [
            Row(f"{epochs} epochs are worth, in fresh epochs", _fresh_epochs(epochs), remark=remark),
            Row(f"the next token after {epochs} epochs, in fresh tokens", next_token, remark=remark),
            Row(f"loss after {epochs} epochs over that of fresh tokens, less 1", more, remark=remark),
        ]
    limit = "1 + R_D*: 25B tokens, repeated for ever, are worth 410B fresh ones."
    return (*rows, Row("epochs without end are worth, in fresh epochs", _fresh_epochs(1e4), remark=limit))


def _fresh_epochs(epochs: float) -> float:
    """Epochs of fresh tokens that give the same loss as so many epochs of the same tokens, from the law itself."""
    law = get_law("muennighoff")
    small = 1e8  # too small for the law's decay of excess parameters to matter
    reducible = float(_loss(small, epochs * _UNIQUE_TOKENS, _UNIQUE_TOKENS) - _loss(small, 1e60, 1e60))
    return float((law.example["B"] / reducible) ** (1 / law.example["beta"]) / _UNIQUE_TOKENS)
