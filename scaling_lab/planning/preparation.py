"""A corpus that is planned for before it is prepared: what it must hold, how it is prepared, and the check once it is there.

Run ids do not depend on a corpus's content, so a plan keeps its runs when its corpus arrives; only the fingerprint is added.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from scaling_lab.core.errors import MissingCorpus, UserError
from scaling_lab.core.formatting import human_count, human_time
from scaling_lab.core.spec import Plan
from scaling_lab.planning.corpus import check_evaluation_sets, check_splits
from scaling_lab.planning.replan import plan_command
from scaling_lab.planning.settings import SweepSettings

# The fingerprint of a corpus that is not there, and the beginning of the plan's note on it.
NOT_PREPARED = "not prepared"
NOTE = "corpus not prepared: "
# Of `prepare-data`, on two cores: 12 MB of Python source in a BPE of 4,096 tokens (results/benchmarks/bench_loader.txt,
# 2026-11-24), and the bytes of separators alone.
TOKENS_PER_S = {"bpe": 1.35e6, "bytes": 76e6}
# Compressed GB that are downloaded for 1e9 tokens: FineWeb-Edu's sample-10BT is 28.5 GB of Parquet for 1e10 tokens of GPT-2
# (its page on the Hub; a smaller vocabulary makes a few percent more tokens of the same text).
DOWNLOAD_GB_PER_1E9_TOKENS = {"fineweb_edu": 2.85}
# Default of `prepare-data validation_fraction=`.
VALIDATION_FRACTION = 0.01
# `prepare-data tokenizer=bytes` has one token for each byte, and a separator.
BYTES_VOCABULARY = 257


def needed_tokens(plan: Plan) -> int:
    """Training tokens that the corpus must have: `data.expected_tokens`, else what the longest run needs at
    `data.max_epochs` epochs and the evaluation needs in the validation split, rounded up to two digits."""
    settings = first_settings(plan)
    if settings.get("expected_tokens") is not None:
        return int(settings["expected_tokens"])
    longest = max(run.spec.unique_tokens or run.spec.train_tokens for run in plan.runs)
    epochs = 1.0 if plan.runs[0].spec.unique_tokens else float(settings.get("max_epochs", 1.0))
    exact = math.ceil(max(longest / epochs, plan.runs[0].spec.eval.tokens / VALIDATION_FRACTION))
    unit: int = 10 ** max(0, len(str(exact)) - 2)
    return -(-exact // unit) * unit


def first_settings(plan: Plan) -> dict[str, Any]:
    """The settings of a plan, or of its first combination."""
    found: dict[str, Any] = plan.settings.get("combinations", [plan.settings])[0]
    return found


def prepare_command(plan: Plan) -> str | None:
    """The command that prepares the plan's corpus; None for files that prepare-data does not write, or an unknown text."""
    settings = first_settings(plan)
    text, data = settings.get("expected_source"), plan.runs[0].spec.data
    if text is None or data.kind != "prepared":
        return None
    vocab_size = settings["expected_vocab_size"]
    words = [
        f"path={text}" if Path(text).expanduser().exists() else f"source={text}",
        *(["tokenizer=bytes"] if _is_bytes(vocab_size) else ["tokenizer=bpe", f"vocab_size={vocab_size}"]),
        f"max_tokens={needed_tokens(plan)}",
        f"out={data.path}",
    ]
    return " ".join(["scaling-lab prepare-data", *map(shlex.quote, words)])


def preparation_note(plan: Plan) -> str:
    """What a plan without its corpus says: what it assumes, and the command, time, download and disk of preparing it."""
    settings, tokens = first_settings(plan), needed_tokens(plan)
    vocab_size = settings.get("expected_vocab_size") or plan.runs[0].spec.data.vocab_size
    data = plan.runs[0].spec.data
    where = f"data.path={data.path!r}" if hasattr(data, "path") else f"the corpus of data={data.kind}"
    why = (
        "" if settings.get("expected_tokens") else f" ({settings['max_epochs']:g} epochs of the longest run)"
    )
    note = (
        f"{NOTE}{where} is not there. The plan assumes {human_count(tokens)} training tokens{why} in a vocabulary "
        f"of {vocab_size:,}."
    )
    if (command := prepare_command(plan)) is None:
        return note
    rate = TOKENS_PER_S["bytes" if _is_bytes(vocab_size) else "bpe"]
    download = DOWNLOAD_GB_PER_1E9_TOKENS.get(settings["expected_source"])
    loaded = "" if download is None else f", {tokens / 1e9 * download:.2g} GB of download"
    disk_gb = tokens / 1e9 * (2 if vocab_size <= 1 << 16 else 4)
    return (
        f"{note} Prepare it: {command} (about {human_time(tokens / rate)} of tokenizing on two cores, as measured{loaded}, "
        f"{disk_gb:.2g} GB on disk)"
    )


def corpus_mismatch(plan: Plan) -> str | None:
    """How a corpus that has been prepared differs from what its plan assumed; None if the plan can be trained on it.

    Raises `MissingCorpus` while it is not there.
    """
    data, settings = plan.runs[0].spec.data, first_settings(plan)
    expected = settings.get("expected_vocab_size") or data.vocab_size
    tokens, longest = data.n_tokens("train"), max(run.spec.train_tokens for run in plan.runs)
    unique = plan.runs[0].spec.unique_tokens
    if data.vocab_size != expected:
        return f"the corpus's vocabulary (planned for {expected:,}, it has {data.vocab_size:,})"
    if unique is not None and tokens < unique:
        return f"the corpus's size (planned for {unique:,} unique tokens, it has {tokens:,})"
    if unique is None and longest > settings["max_epochs"] * tokens:
        return f"the corpus's size (planned for {needed_tokens(plan):,} training tokens, it has {tokens:,})"
    return None


def with_corpus(plan: Plan, folder: Path) -> Plan:
    """The plan with the fingerprint of its corpus, ready to train; the same plan if it has one.

    Args:
        folder: the sweep's folder.

    Raises:
        UserError: the corpus is not there, with the command that prepares it, or it is another one than was planned for.
    """
    if plan.data_fingerprint != NOT_PREPARED:
        return plan
    try:
        different = corpus_mismatch(plan)
    except MissingCorpus as error:
        command = prepare_command(plan)
        then = "" if command is None else f" Prepare it, then repeat this command: {command}"
        raise UserError(f"the corpus of sweep {plan.sweep} is not prepared: {error}{then}") from None
    if different:
        raise UserError(
            f"sweep {plan.sweep} was planned before its corpus was there, and differs in {different}. Plan it again: "
            f"{plan_command(plan, folder)}"
        )
    spec = plan.runs[0].spec
    check_splits(spec.data, spec.shape.context)
    check_evaluation_sets(spec.eval, spec.data, spec.data.vocab_size, spec.shape.context)
    notes = tuple(note for note in plan.notes if not note.startswith(NOTE))
    return replace(plan, notes=notes, data_fingerprint=spec.data.fingerprint())


def marked_unprepared(plan: Plan, settings: SweepSettings) -> Plan:
    """The plan with a note on its corpus if that is not there."""
    return (
        replace(plan, notes=(preparation_note(plan), *plan.notes)) if settings.corpus_is_missing() else plan
    )


def _is_bytes(vocab_size: int) -> bool:
    return vocab_size == BYTES_VOCABULARY
