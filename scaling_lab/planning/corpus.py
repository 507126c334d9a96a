"""Checks of a plan's corpora: every split has a window, and additional evaluation sets use the same vocabulary."""

from __future__ import annotations

from scaling_lab.core.errors import MissingCorpus, UserError
from scaling_lab.core.evaluation import EvalSpec
from scaling_lab.core.spec import TokenSource
from scaling_lab.planning.settings import SweepSettings


def check_corpus(settings: SweepSettings) -> None:
    """Check the training corpus, if it is there, and the additional evaluation sets.

    Raises:
        UserError: a split is shorter than one window of the context, or an evaluation set has a different vocabulary or
            tokenizer, so that a loss on it would be meaningless.
    """
    if not settings.corpus_is_missing():
        check_splits(settings.data, settings.model.context)
    check_evaluation_sets(settings.eval, settings.data, settings.vocab_size, settings.model.context)


def check_splits(data: TokenSource, context: int) -> None:
    """Raise `UserError` if a split of the training corpus is shorter than one window."""
    for split in ("train", "validation"):
        check_windows(f"data={data.kind}", data, split, context)


def check_evaluation_sets(evaluation: EvalSpec, data: TokenSource, vocab_size: int, context: int) -> None:
    """Raise `UserError` for an additional evaluation set with which `data`, of this vocabulary, cannot be compared."""
    for other in evaluation.sets:
        name = f"eval.sets: {other.name}"
        try:
            check_windows(name, other.source, "validation", context)
        except UserError as error:
            # A source names its options as data.X; here they belong to an evaluation set.
            text = str(error)
            raise UserError(f"{name}: {text[5:]}" if text.startswith("data.") else text) from None
        if other.source.vocab_size > vocab_size:
            raise UserError(
                f"{name} has a vocabulary of {other.source.vocab_size}, larger than the model's {vocab_size} (that of "
                f"data={data.kind})."
            )
        ours, theirs = tokenizer_of(data), tokenizer_of(other.source)
        if None not in (ours, theirs) and ours != theirs:
            raise UserError(
                f"{name} has a different tokenizer ({theirs}) than data={data.kind} ({ours}), so their tokens have "
                "different meanings. Prepare it with tokenizer=FOLDER/tokenizer.json of the data's folder."
            )


def check_windows(name: str, source: TokenSource, split: str, context: int) -> None:
    """Raise `UserError` if a split of a source, or of a component of a mixture, is shorter than one window plus target."""
    for part in getattr(source, "sources", ()):
        check_windows(f"{name}, {part.kind}", part, split, context)
    if (tokens := source.n_tokens(split)) <= context:
        raise UserError(
            f"{name}: the {split} split has {tokens:,} tokens, fewer than one window of model.context={context} plus a "
            "target."
        )


def tokenizer_of(source: TokenSource) -> str | None:
    """A description that identifies a source's tokenizer; None if unknown, or if the corpus is not there yet."""
    try:
        return getattr(source, "tokenizer", None)
    except MissingCorpus:
        return None
