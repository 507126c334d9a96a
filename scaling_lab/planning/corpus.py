"""Owns what a plan asks of its corpora: windows in every split, and other evaluation sets that the model can read."""

from __future__ import annotations

from typing import Any

from scaling_lab.core.errors import UserError
from scaling_lab.planning.settings import SweepSettings


def check_corpus(settings: SweepSettings) -> None:
    """Refuse corpora in which a split is shorter than one window of the context, and evaluation sets whose tokens are
    not the corpus's: a loss on them would be a number without a meaning."""
    for split in ("train", "validation"):
        check_windows(f"data={settings.data.kind}", settings.data, split, settings.model.context)
    for other in settings.eval.sets:
        name = f"eval.sets: {other.name}"
        try:
            check_windows(name, other.source, "validation", settings.model.context)
        except UserError as error:
            # A source names its options as data.X; here they are an evaluation set's.
            text = str(error)
            raise UserError(f"{name}: {text[5:]}" if text.startswith("data.") else text) from None
        if other.source.vocab_size > settings.data.vocab_size:
            raise UserError(
                f"{name} has a vocabulary of {other.source.vocab_size}, larger than the model's "
                f"{settings.data.vocab_size} (that of data={settings.data.kind})."
            )
        ours, theirs = tokenizer_of(settings.data), tokenizer_of(other.source)
        if None not in (ours, theirs) and ours != theirs:
            raise UserError(
                f"{name} has another tokenizer ({theirs}) than data={settings.data.kind} ({ours}): their tokens mean "
                "different things. Prepare it with tokenizer=FOLDER/tokenizer.json of the data's folder."
            )


def check_windows(name: str, source: Any, split: str, context: int) -> None:
    """Raises `UserError` where a split of a source, or of a part of a mixture, has no window and its last target."""
    for part in getattr(source, "sources", ()):
        check_windows(f"{name}, {part.kind}", part, split, context)
    if (tokens := source.n_tokens(split)) <= context:
        raise UserError(
            f"{name}: the {split} split has {tokens:,} tokens, less than one window of model.context={context} and a target."
        )


def tokenizer_of(source: Any) -> str | None:
    """What decides the meaning of a source's tokens, in words; None where nobody knows."""
    return getattr(source, "tokenizer", None)
