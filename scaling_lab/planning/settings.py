"""The user's choices for a sweep as frozen dataclasses: filled by the CLI, read by `make_plan`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from scaling_lab.core.counts import Convention
from scaling_lab.core.errors import MissingCorpus, UserError, unknown
from scaling_lab.core.parametrization import Standard
from scaling_lab.core.spec import DTYPES, KEEP, EvalSpec, shape_class

# Tokens of a corpus that is prepared as large as its plan needs.
ANY_NUMBER = 2**62
COMPILE_CHOICES = ("auto", "true", "false")


@dataclass(frozen=True)
class ModelSettings:
    """A model family and the fields of its shape that are not set by a design; a single run also sets width and depth."""

    kind: str = "gpt"
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    """None: decided by `head_dim`."""
    head_dim: int | None = None
    """Head dimension to aim for; None: by device, see `default_heads`."""
    context: int = 64
    vocab_multiple: int | None = None
    """The corpus's vocabulary is padded to a multiple of this; None: 128 on CUDA, not padded elsewhere."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields specific to the family, such as mlp or tied_head."""

    def __post_init__(self) -> None:
        if self.vocab_multiple is not None and self.vocab_multiple < 1:
            raise UserError(f"model.vocab_multiple={self.vocab_multiple} must be at least 1.")

    def shape(self, width: int, depth: int, vocab_size: int, device: str = "cpu") -> Any:
        """The family's shape at a size. Raises `UserError` for inconsistent sizes and unknown options.

        Args:
            vocab_size: the corpus's. Ids that padding adds never occur: the model learns to give them no probability.
        """
        cls = shape_class(self.kind)
        known = {f.name for f in fields(cls)} - {"width", "depth", "heads", "context", "vocab_size"}
        for name in self.options:
            if name not in known:
                raise unknown(f"model.{name}", self.options[name], sorted(known))
        multiple = self.vocab_multiple or (VOCAB_MULTIPLE_CUDA if device == "cuda" else 1)
        return cls(
            width=width,
            depth=depth,
            heads=self.heads_at(width, device),
            context=self.context,
            vocab_size=-(-vocab_size // multiple) * multiple,
            **dict(self.options),
        )

    def heads_at(self, width: int, device: str = "cpu") -> int:
        """Number of heads at a width."""
        if self.heads is not None:
            return self.heads
        return heads_for(
            width, width / default_heads(width, device) if self.head_dim is None else self.head_dim
        )

    def has_exact_heads(self, width: int, device: str = "cpu") -> bool:
        """Whether a ladder may use a width: with the intended number of heads, so that heads never jump in a valley."""
        if self.heads is None and self.head_dim is not None:
            return width % 2 == 0
        heads = default_heads(width, device) if self.heads is None else self.heads
        if self.heads is None and device == "cuda" and heads > HEADS_CUDA_NARROW:
            return width == heads * HEAD_DIM_CUDA
        return width % (2 * heads) == 0


# Heads of models on a CPU, whatever their width: results/published/heads_study.txt.
HEADS_CPU = 1
# On CUDA, head dimension 64 from width 256 on, for which attention kernels are fast, and below as many heads as there.
HEAD_DIM_CUDA, HEADS_CUDA_NARROW = 64, 4
# Matrix products on tensor cores want dimensions that are multiples of 64 or 128 (NVIDIA's guide to matrix multiplication).
VOCAB_MULTIPLE_CUDA = 128


def default_heads(width: int, device: str) -> int:
    """The intended number of heads: fixed for small models, a fixed head dimension for large ones on CUDA."""
    if device != "cuda":
        return HEADS_CPU
    return max(HEADS_CUDA_NARROW, round(width / HEAD_DIM_CUDA))


def heads_for(width: int, head_dim: float) -> int:
    """The number of heads that divides `width` into even head dimensions closest to `head_dim` in ratio."""
    if width < 1 or not head_dim > 0:
        raise UserError(f"model.width={width} and model.head_dim={head_dim:g} must be at least 1.")
    choices = [heads for heads in range(1, width + 1) if width % heads == 0 and (width // heads) % 2 == 0]
    if not choices:
        raise UserError(
            f"model.width={width} is odd, but head dimensions must be even. Choices: {width - 1} or {width + 1}."
        )
    return min(choices, key=lambda heads: (abs(math.log(width / heads / head_dim)), heads))


@dataclass(frozen=True)
class ExecutionSettings:
    """How runs should be computed; `make_plan` derives each run's `Execution` from it by a fixed rule."""

    device: str = "cpu"
    """Already resolved (cpu, cuda or mps): planning does not import torch."""
    compile: str = "auto"
    """auto: compile if the plan trains a shape for long enough that it pays off."""
    threads: int | None = None
    """CPU threads per run; None: one for small models, all cores for large ones."""
    deterministic: bool = True
    stack: str = "auto"
    """auto: train runs of the same shape, batch and horizon (seeds, learning rates) as one program if that is faster."""
    memory_gb: float | None = None
    """Memory that one run may use on its device, GB. None: on a CPU the machine's memory, shared by the runs in parallel;
    on other devices unknown, and batches are not split."""
    cores: int | None = None
    """Number of cores of the machine that trains; None: of this machine."""
    keep: str = "weights"
    """What a completed run leaves behind, one of `KEEP`."""

    def __post_init__(self) -> None:
        if self.keep not in KEEP:
            raise unknown("keep", self.keep, KEEP)
        if self.stack not in ("auto", "false"):
            raise unknown("stack", self.stack, ("auto", "false"))
        if self.memory_gb is not None and not self.memory_gb > 0:
            raise UserError(f"memory_gb={self.memory_gb!r} must be positive.")
        if self.threads is not None and self.threads < 1:
            raise UserError(f"threads={self.threads!r} must be at least 1.")
        if self.compile not in COMPILE_CHOICES:
            raise unknown("compile", self.compile, COMPILE_CHOICES)


@dataclass(frozen=True)
class CorpusUse:
    """How any corpus is used for training."""

    max_epochs: float = 4.0
    """Runs that would need more epochs over the corpus are not planned"""
    unique_tokens: int | None = None
    """Train repeatedly on only this many tokens of the corpus; null: on all of it"""
    noise: float = 0.0
    """Fraction of the training tokens that are replaced by random ones; validation stays clean"""
    expected_tokens: int | None = None
    """Training tokens of a corpus that is not prepared yet; null: as many as max_epochs of the longest run need"""
    expected_vocab_size: int | None = None
    """Vocabulary of a corpus that is not prepared yet, with which a plan is possible"""
    expected_source: str | None = None
    """What to prepare it from: source= of prepare-data, or a file or folder of text"""

    def __post_init__(self) -> None:
        if not self.max_epochs > 0:
            raise UserError(f"data.max_epochs={self.max_epochs!r} must be positive.")
        if not 0 <= self.noise <= 1:
            raise UserError(f"data.noise={self.noise!r} must be in [0, 1].")
        if self.unique_tokens is not None and self.unique_tokens < 1:
            raise UserError(f"data.unique_tokens={self.unique_tokens} must be at least 1.")
        if self.expected_tokens is not None and self.expected_tokens < 1:
            raise UserError(f"data.expected_tokens={self.expected_tokens} must be at least 1.")
        if self.expected_vocab_size is not None and self.expected_vocab_size < 2:
            raise UserError(f"data.expected_vocab_size={self.expected_vocab_size} must be at least 2.")


@dataclass(frozen=True)
class SweepSettings:
    """All inputs of a plan."""

    sweep: str
    design: Any
    recipe: Any
    model: ModelSettings
    data: Any
    schedule: Any
    eval: EvalSpec = field(default_factory=EvalSpec)
    max_epochs: float = 4.0
    """Runs that would need more epochs over the corpus are not planned."""
    convention: Convention = Convention.SIX_N_WITH_HEAD
    """The convention of FLOP budgets."""
    seed: int = 0
    dtype: str = "float32"
    execution: ExecutionSettings = field(default_factory=ExecutionSettings)
    parametrization: Any = field(default_factory=Standard)
    unique_tokens: int | None = None
    """Train repeatedly on only this many tokens of the corpus; None: on all of it."""
    noise: float = 0.0
    """Fraction of the training tokens that are replaced by random ones."""
    expected_tokens: int | None = None
    """Training tokens of a corpus that is not there yet; None: as many as the runs need."""
    expected_vocab_size: int | None = None
    """Its vocabulary; None: a corpus must be there."""
    expected_source: str | None = None
    """What `prepare-data` makes it from."""
    scale: str | None = None
    """The experiment's scale that was chosen; None: it has none."""

    def __post_init__(self) -> None:
        CorpusUse(
            self.max_epochs, self.unique_tokens, self.noise, self.expected_tokens, self.expected_vocab_size
        )
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.dtype == "tf32" and self.execution.device != "cuda":
            raise UserError(
                f"dtype=tf32 requires device=cuda, not {self.execution.device}. Choices: float32, bfloat16."
            )

    def corpus_is_missing(self) -> bool:
        """Whether the corpus is not there but the settings say what to expect. Raises `MissingCorpus` if they do not."""
        try:
            self.data.n_tokens("train")
        except MissingCorpus as error:
            if self.expected_vocab_size is None and self.expected_tokens is None:
                raise
            if self.expected_vocab_size is None and self.data.kind == "prepared":
                raise MissingCorpus(
                    f"{error} To plan before it is there give its vocabulary too: data.expected_vocab_size=16384."
                ) from None
            return True
        return False

    @property
    def vocab_size(self) -> int:
        """Vocabulary of the corpus, or the expected one while it is not there."""
        missing = self.corpus_is_missing() and self.expected_vocab_size is not None
        return int(self.expected_vocab_size if missing else self.data.vocab_size)  # type: ignore[arg-type]

    def corpus_tokens(self) -> int:
        """Number of distinct training tokens available to a run. Raises `UserError` if the corpus has too few."""
        if self.corpus_is_missing():
            available = ANY_NUMBER if self.expected_tokens is None else self.expected_tokens
        else:
            available = int(self.data.n_tokens("train"))
        if self.unique_tokens is None:
            return available
        if self.unique_tokens > available:
            raise UserError(
                f"data.unique_tokens={self.unique_tokens:,} exceeds the {available:,} tokens of data={self.data.kind} by "
                f"{self.unique_tokens - available:,}."
            )
        return self.unique_windows() * self.model.context

    def unique_windows(self) -> int:
        """`unique_tokens` as a number of windows of the context, rounded to nearest and at least one."""
        return max(1, round((self.unique_tokens or 0) / self.model.context))
