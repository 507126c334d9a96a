"""Checks of a plan's corpora: every split has a window, and additional evaluation sets use the same vocabulary."""

from __future__ import annotations

from scaling_lab.core.errors import MissingCorpus, UserError
from scaling_lab.core.spec import TokenSource
from scaling_lab.planning.settings import SweepSettings


def check_corpus(settings: SweepSettings) -> None:
    """Check the training corpus and the additional evaluation sets.

    Raises:
        UserError: a split is shorter than one window of the context, or an evaluation set has a different vocabulary or
            tokenizer, so that a loss on it would be meaningless.
    """
    for split in () if settings.corpus_is_missing() else ("train", "validation"):
        check_windows(f"data={settings.data.kind}", settings.data, split, settings.model.context)
    for other in settings.eval.sets:
        name = f"eval.sets: {other.name}"
        try:
            check_windows(name, other.source, "validation", settings.model.context)
        except UserError as error:
            # A source names its options as data.X; here they belong to an evaluation set.
            text = str(error)
            raise UserError(f"{name}: {text[5:]}" if text.startswith("data.") else text) from None
        if other.source.vocab_size > settings.vocab_size:
            raise UserError(
                f"{name} has a vocabulary of {other.source.vocab_size}, larger than the model's "
                f"{settings.vocab_size} (that of data={settings.data.kind})."
            )
        ours, theirs = tokenizer_of(settings.data), tokenizer_of(other.source)
        if None not in (ours, theirs) and ours != theirs:
            raise UserError(
                f"{name} has a different tokenizer ({theirs}) than data={settings.data.kind} ({ours}), so their tokens have "
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
