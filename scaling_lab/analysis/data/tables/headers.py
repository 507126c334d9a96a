"""What a table's headers say: common names of our columns, and units written beside them (`Params (M)`, `tokens_B`).

Only names that leave no doubt are taken, and each is said in a note. Two columns that could be the same one of ours are left
to the user.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from scaling_lab.analysis.data.tables.units import BITS_PER_BYTE, PERPLEXITY, Unit, loss_unit, unit_in_words

# Names in lower case with everything but letters and digits removed: val/loss, Val loss and val_loss are one name.
_NAMES: dict[str, tuple[str, ...]] = {
    "run_id": ("runid", "run", "runname", "name"),
    "params": (
        "params", "n", "nparams", "numparams", "parameters", "nparameters", "numparameters", "modelsize", "modelparams",
        "totalparams", "paramstotal", "paramcount",
    ),
    "tokens": (
        "tokens", "d", "ntokens", "numtokens", "traintokens", "trainingtokens", "tokensseen", "tokenstrained", "totaltokens",
    ),
    "flops": ("flops", "c", "compute", "trainflops", "trainingflops", "totalflops", "computeflops", "trainingcompute", "flop"),
    "loss": (
        "loss", "l", "valloss", "evalloss", "validationloss", "finalloss", "finalvalloss", "testloss", "lossnats",
        "vallossnats", "valcrossentropy",
    ),
    "budget_flops": ("budgetflops", "flopsbudget", "flopbudget", "computebudget", "budget"),
    "seed": ("seed",),
}  # fmt: skip
_BY_NAME = {name: ours for ours, names in _NAMES.items() for name in names}
NON_EMBEDDING = (
    "nonembeddingparams", "nonembparams", "paramsnonembedding", "paramsnonemb", "paramsnoembed", "nnonembedding",
    "numnonembeddingparams", "nonembeddingparameters",
)  # fmt: skip
_LOSS_SPLITS = ("", "val", "eval", "validation", "test", "final", "finalval")
_OTHER_LOSSES = {
    PERPLEXITY: ("perplexity", "ppl"),
    BITS_PER_BYTE: ("bpb", "bitsperbyte", "bpc", "bitsperchar", "bitspercharacter"),
}
_LOSS_BY_NAME = {
    split + name: unit for unit, names in _OTHER_LOSSES.items() for name in names for split in _LOSS_SPLITS
}
# A unit after the name: in brackets, or as its last word.
_BRACKETS = re.compile(r"^(?P<name>.+?)\s*[(\[](?P<unit>[^()\[\]]+)[)\]]$")
_LAST_WORD = re.compile(r"^(?P<name>.+?)[\s_/.-]+(?:in[\s_])?(?P<unit>[^\s_/]+)$")
_FLOPS_PREFIX = re.compile(r"^(?P<rest>(?:.*[\s_/.-])?)(?P<unit>[kmgtpez])(?P<flops>flops?)$", re.IGNORECASE)
_PF_DAYS = re.compile(
    r"^(?:(?P<rest>.+?)[\s_-]+(?:in[\s_]+)?)?(?:pf|pflops?|petaflops?)(?:/s)?[\s_-]*days?$", re.IGNORECASE
)


@dataclass(frozen=True)
class Header:
    """One column's name, read."""

    column: str
    """The name in the table."""
    meaning: str | None
    """Our name for it; None for any other column."""
    unit: Unit | None = None
    non_embedding: bool = False
    """Whether it counts parameters without embeddings."""
    doubtful: bool = False
    """Whether it may be something else (`tflops` is a speed in many logs): the numbers must confirm it."""


@dataclass(frozen=True)
class Headers:
    """What the headers of a table say."""

    taken: Mapping[str, Header] = field(default_factory=dict)
    """By our name: the column that is used for it, though it is not called so."""
    unclear: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By our name: several columns that may be it."""
    units: Mapping[str, Unit] = field(default_factory=dict)
    """By our name: the unit in the header of its column."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """By our name: the column used, if there is one."""

    def column(self, ours: str) -> str:
        return self.columns.get(ours, ours)


def read_headers(names: Sequence[str], given: Mapping[str, str], *, needs_loss: bool = True) -> Headers:
    """The columns that can be recognized.

    Args:
        names: the columns of the table.
        given: our name -> column, as the user said; these, and columns with one of our names, are not searched.
        needs_loss: False where a metric takes the place of the loss.
    """
    read = {name: read_header(name) for name in names}
    taken: dict[str, Header] = {}
    unclear: dict[str, tuple[str, ...]] = {}
    units: dict[str, Unit] = {}
    used: dict[str, str] = {}
    for ours in _NAMES:
        column = given.get(ours, ours if ours in names else None)
        if column is not None:
            used[ours] = column
            unit = read[column].unit if column in read else None
            if unit is not None:
                units[ours] = unit
            continue
        if ours == "loss" and not needs_loss:
            continue
        found = [h for h in read.values() if h.meaning == ours and h.column not in given.values()]
        plain = [h for h in found if not h.non_embedding]
        # A count of all parameters goes before one without embeddings.
        found = plain or found
        if len(found) > 1:
            unclear[ours] = tuple(h.column for h in found)
        elif found:
            taken[ours] = found[0]
            used[ours] = found[0].column
            if found[0].unit is not None:
                units[ours] = found[0].unit
    return Headers(taken, unclear, units, used)


def read_header(column: str) -> Header:
    """The meaning and the unit of one column's name."""
    plain = _plain(column)
    # n, d and l are many things in lower case: samples, a dimension, layers.
    if len(plain) == 1 and not column.strip().isupper():
        return Header(column, None)
    if plain in _LOSS_BY_NAME:
        return Header(column, "loss", loss_unit(_LOSS_BY_NAME[plain]))
    if plain in NON_EMBEDDING:
        return Header(column, "params", None, True)
    if plain in _BY_NAME:
        return Header(column, _BY_NAME[plain], doubtful=plain == "budget")
    flops = _flops_header(column)
    if flops is not None:
        return flops
    for pattern in (_BRACKETS, _LAST_WORD):
        match = pattern.match(column.strip())
        if match is None or (
            pattern is _LAST_WORD and len(_plain(match["name"])) == 1
        ):  # d_k is no number of tokens
            continue
        name = read_header(match["name"]) if _plain(match["name"]) else None
        if name is None or name.meaning is None or name.unit is not None:
            continue
        unit = unit_in_words(name.meaning, match["unit"])
        if unit is not None:
            return Header(column, name.meaning, unit, name.non_embedding)
    return Header(column, None)


def _flops_header(column: str) -> Header | None:
    """`GFLOPs`, `train_EFLOPs`, `PF-days`, `compute_pf_days`."""
    match = _PF_DAYS.match(column.strip())
    if match is not None:
        rest = _plain(match["rest"] or "")
        meaning = _BY_NAME.get(rest, "flops" if rest in ("", "train", "training", "total") else None)
        unit = unit_in_words("flops", "PF-days") if meaning in ("flops", "budget_flops") else None
        return Header(column, meaning, unit) if unit is not None else None
    match = _FLOPS_PREFIX.match(column.strip())
    if match is None:
        return None
    meaning = _BY_NAME.get(_plain(match["rest"] + match["flops"]))
    if meaning is None:
        return None
    return Header(column, meaning, unit_in_words("flops", match["unit"]), doubtful=not match["rest"])


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
