"""The `default` recipe: our own rules where we measured, published rules where those were fitted, joined smoothly.

Up to 3.3e5 parameters and 6.6e6 tokens the rules are ours (results/published/recipe_default.txt, `scripts/recipe_evidence.py`:
at both ends of the quickstart's grid the best LR is within a factor of 2 of this rule's and the loss within 0.5% of the
best; results/LOG.md for the batch). From the smallest runs of Step Law's released grid on (2.15e8 parameters, 4e9 tokens)
they are published ones. In between, LR, weight decay and beta2 are joined log-linearly in compute, so that all sizes of one
budget have the same weight and the LR stays a power law of N along a valley; the batch is joined log-linearly in D.

Just beyond our range the LR is right with two layers and at least twice too high with four, where it has no dependence on depth
(results/published/recipe_join.txt: one size, one seed).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from scaling_lab.core.counts import Convention
from scaling_lab.core.errors import UserError
from scaling_lab.core.parametrization import Standard
from scaling_lab.core.schedules import Cosine
from scaling_lab.core.spec import OptimizerSpec, RunSpec
from scaling_lab.planning.recipes import deepseek, porian, step_law
from scaling_lab.planning.recipes.base import Hyperparameters, SweepHorizons, check_batch, round_batch

# Ranges in which our rules were measured: parameters (six_n_with_head) and horizons (results/published/
# recipe_default.txt; results/LOG.md, 2026-11-22: width 92, depth 3, and 145k tokens at width 64).
CALIBRATED_PARAMS = (6.6e3, 3.3e5)
CALIBRATED_TOKENS = (1.4e5, 6.6e6)
# Where the published rules take over: the smallest runs of the grid that Step Law was fitted to (Li et al. 2025, arXiv
# 2503.04715, released data).
PUBLISHED_PARAMS, PUBLISHED_TOKENS = 2.15e8, 4e9
# Compute, 6 N D, at which the join begins and ends.
JOIN_FLOPS = (6 * CALIBRATED_PARAMS[1] * CALIBRATED_TOKENS[1], 6 * PUBLISHED_PARAMS * PUBLISHED_TOKENS)
# Tokens per parameter that the published LR is used with: the range of the same grid, extended down to 1.
TOKENS_PER_PARAM = (1.0, 500.0)
# AdamW's timescale as a fraction of the run, B / (LR wd D) = 1.084 (D/N)^-0.527 (Bergsma et al. 2025, arXiv 2505.13738; as
# transcribed by others: it gives .22 at 20 tokens per parameter, where the paper's 610M models are best at about .21).
TIMESCALE_COEFFICIENT, TIMESCALE_EXPONENT = 1.084, -0.527
# The critical batch in tokens, 2048 * 0.0471 D^0.462 (same paper; the coefficient from secondary sources, not checked). Its D
# is what a small batch would need for the same loss: at an eighth of the critical batch 11% less than ours, 5% in the result.
CRITICAL_BATCH_COEFFICIENT, CRITICAL_BATCH_EXPONENT = 2048 * 0.0471, 0.462
CRITICAL_BATCH_FROM_TOKENS = 1e8
# Half-life of Adam's second moment in tokens: 0.95 at 5e5 tokens a step (Marek et al. 2025, arXiv 2507.07101); our choice:
# at most 1% of the run's steps.
BETA2_HALF_LIFE_TOKENS, BETA2_HALF_LIFE_FRACTION = 7e6, 0.01
# Warmup beyond the measured range: at most Step Law's 2,000 steps, at least 2 / (1 - beta2) steps (Ma & Yarats 2019, arXiv
# 1910.04209).
MAX_WARMUP_STEPS = 2000
# A GPU computes smaller batches no faster: batches are raised to this many tokens, but not above this fraction of the
# critical batch. The floor depends on compute, so that it has no step inside a valley: it is whole where the largest sizes
# of a valley (4 times N_opt = sqrt(C / 120)) have 1e7 parameters, and falls to nothing where our own measurements begin.
BATCH_FLOOR_TOKENS, BATCH_FLOOR_OF_CRITICAL = 65_536, 1 / 8
BATCH_FLOOR_FLOPS, BATCH_FLOOR_EXPONENT = 7.5e14, 1.05
# The square-root rule for a batch that is not the rule's holds near it (Malladi et al. 2022, arXiv 2205.10287).
MAX_LR_CORRECTION = 2.0
# Tokens per parameter at a budget's optimum (Hoffmann et al. 2022, arXiv 2203.15556).
OPTIMAL_TOKENS_PER_PARAM = 20
# A valley's horizons reach this factor below and above its optimum's.
VALLEY_HALF_WIDTH = 4


@dataclass(frozen=True)
class DefaultRecipe:
    """LR and batch of a size and horizon, from 1e4 to 1e9 parameters. Setting a field overrides its rule."""

    kind: ClassVar[str] = "default"

    peak_lr: float | None = None
    """None: `lr_at_width_64` * (64 / width)^`lr_width_exponent` where we measured, joined with Step Law's
    1.79 N^-0.713 D^0.307. muP's rule for hidden matrices (exponent 1, arXiv 2203.03466) was too steep from width 12 to 80:
    fitted to the best LR of six sizes (results/LOG.md, 2026-11-27)."""
    lr_at_width_64: float = 0.0075
    lr_width_exponent: float = 0.67
    embedding_lr_ratio: float = 1.0
    head_lr_ratio: float = 1.0
    batch_tokens: int | None = None
    """None: `batch_at_1m_tokens` * (D / 1e6)^`batch_exponent` where we measured (Bergsma et al. 2025, arXiv 2505.13738, find
    D^0.383), joined with Step Law's 0.58 D^0.571. The same batch for all sizes of a budget would be too large for the
    large ones and shift the valley."""
    batch_at_1m_tokens: float = 512.0
    batch_exponent: float = 0.4
    batch_floor: int | None = None
    """Smallest batch in tokens; None: on CUDA 65,536 from 1e7 parameters on, at most an eighth of the critical batch; 0: none"""
    warmup_fraction: float = 0.05
    final_fraction: float | None = None
    """None: the schedule's where we measured (a cosine to 10%), joined with Step Law's final LR of 1e-5, with which its peak LR
    was tuned: a cosine to 10% wants a lower peak (arXiv 2503.04715, section 3)."""
    weight_decay: float | None = None
    """None: 0.1 where we measured, joined with the published timescale 1.084 (D/N)^-0.527"""
    beta1: float = 0.9
    beta2: float | None = None
    """None: 0.95 where we measured, joined with a half-life of 7M tokens (at most 1% of the run)"""
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lr_at_width_64", "batch_at_1m_tokens"):
            if not getattr(self, name) > 0:
                raise UserError(f"recipe.{name}={getattr(self, name)!r} must be positive.")
        if self.final_fraction is not None and not 0 <= self.final_fraction <= 1:
            raise UserError(f"recipe.final_fraction={self.final_fraction!r} must be in [0, 1].")
        if self.batch_floor is not None and self.batch_floor < 0:
            raise UserError(
                f"recipe.batch_floor={self.batch_floor} must be 0 (no floor) or a number of tokens."
            )

    def decide(self, shape: Any, train_tokens: float, sweep: SweepHorizons) -> Hyperparameters:
        """Raises `UserError` for a batch that is not a multiple of the context."""
        batch, rule_batch = self._batch(shape, train_tokens, sweep.device)
        weight = join_weight(shape, train_tokens)
        steps = train_tokens / batch
        beta2 = self.beta2 if self.beta2 is not None else _beta2(weight, batch, steps)
        lr = self.peak_lr
        if lr is None:
            own = self.lr_at_width_64 * (64 / shape.width) ** self.lr_width_exponent
            lr = _joined(own, _published_lr(shape, train_tokens, weight), weight)
            if weight > 0:
                lr *= self._lr_correction(shape, train_tokens, sweep.device)
        decay = self.weight_decay
        if decay is None:
            decay = _joined(0.1, _published_decay(shape, train_tokens, batch, lr), weight)
        warmup = self.warmup_fraction
        if weight > 0:
            warmup = min(0.5, max(2 / (1 - beta2) / steps, min(warmup, MAX_WARMUP_STEPS / steps)))
        optimizer = OptimizerSpec(
            peak_lr=lr,
            embedding_lr_ratio=self.embedding_lr_ratio,
            head_lr_ratio=self.head_lr_ratio,
            beta1=self.beta1,
            beta2=beta2,
            weight_decay=decay,
            clip_norm=self.clip_norm,
        )
        final = self.final_fraction
        if final is None and weight > 0:
            final = _joined(Cosine().final_fraction, min(1.0, step_law.FINAL_LR / lr), weight)
        return Hyperparameters(batch, optimizer, warmup, (), rule_batch, final_fraction=final)

    def rule_batch_tokens(self, train_tokens: float) -> float:
        """The batch rule in tokens, before floor and rounding: ours up to 6.6e6 tokens, Step Law's from 4e9 on, a power law
        in between."""
        own = self.batch_at_1m_tokens * (min(train_tokens, CALIBRATED_TOKENS[1]) / 1e6) ** self.batch_exponent
        published = (
            step_law.BATCH_COEFFICIENT * max(train_tokens, PUBLISHED_TOKENS) ** step_law.BATCH_EXPONENT
        )
        return _joined(own, published, _position(train_tokens, CALIBRATED_TOKENS[1], PUBLISHED_TOKENS))

    def _batch(self, shape: Any, train_tokens: float, device: str) -> tuple[int, float | None]:
        """(batch in tokens, what it was rounded from; None if the user fixed it)."""
        if self.batch_tokens is not None:
            return check_batch(self.batch_tokens, shape.context), None
        floor = self.floor_tokens(_compute(shape, train_tokens), train_tokens, device)
        wanted = max(self.rule_batch_tokens(train_tokens), floor)
        return round_batch(wanted, shape.context), wanted

    def floor_tokens(self, compute_flops: float, train_tokens: float, device: str) -> float:
        """The smallest batch of a run in tokens; 0: none."""
        floor: float = self.batch_floor or 0
        if self.batch_floor is None and device == "cuda":
            floor = BATCH_FLOOR_TOKENS * min(1.0, compute_flops / BATCH_FLOOR_FLOPS) ** BATCH_FLOOR_EXPONENT
        return min(floor, BATCH_FLOOR_OF_CRITICAL * critical_batch_tokens(train_tokens))

    def _lr_correction(self, shape: Any, train_tokens: float, device: str) -> float:
        """The LR's factor where the batch is not the rule's: the square root of their ratio, within a factor of 2.

        A raised batch's factor would bend the LR within a valley. So it is a power law of the horizon for each budget, exact
        at the ends of a valley.
        """
        if self.batch_tokens is not None:
            return _sqrt_rule(self.batch_tokens / self.rule_batch_tokens(train_tokens))
        compute = _compute(shape, train_tokens)
        optimal = math.sqrt(OPTIMAL_TOKENS_PER_PARAM * compute / 6)
        ends = [optimal / VALLEY_HALF_WIDTH, optimal * VALLEY_HALF_WIDTH]
        rules = [self.rule_batch_tokens(d) for d in ends]
        raised = [
            max(rule, self.floor_tokens(compute, d, device), shape.context)
            for rule, d in zip(rules, ends, strict=True)
        ]
        short, long = (_sqrt_rule(batch / rule) for batch, rule in zip(raised, rules, strict=True))
        position = math.log(train_tokens / ends[0]) / math.log(ends[1] / ends[0])
        return min(MAX_LR_CORRECTION, max(1.0, _joined(short, long, position)))

    def overview(self, specs: Sequence[RunSpec]) -> tuple[str, ...]:
        """What a whole plan says of its hyperparameters: which were not measured here, and what raised batches cost."""
        return (*self._unmeasured(specs), *self._cost_of_raised_batches(specs))

    def _unmeasured(self, specs: Sequence[RunSpec]) -> Iterator[str]:
        """Notes on runs outside the range in which our rules were measured (by a factor of 2, where they are still ours)."""
        ruled = [
            name for name, fixed in (("LR", self.peak_lr), ("batch", self.batch_tokens)) if fixed is None
        ]
        published = [s for s in specs if join_weight(s.shape, s.train_tokens) > 0]
        beyond = sum(join_weight(s.shape, s.train_tokens) > 0 or is_beyond_measured(s) for s in specs)
        if beyond and ruled:
            what = f"{' and '.join(ruled)} {'is' if len(ruled) == 1 else 'are'}"
            yield (
                f"recipe=default: {beyond} of {len(specs)} runs are beyond 3.3e5 parameters or 6.6e6 tokens: {what} "
                f"{f'published, not measured here. {_spread(published)}' if published else 'extrapolated, not measured here.'} "
                "Check with design=learning_rate."
            )
        below = sum(
            s.n_params() < CALIBRATED_PARAMS[0] / 2 or s.train_tokens < CALIBRATED_TOKENS[0] / 2
            for s in specs
        )
        if below:
            yield (
                f"recipe=default: {below} of {len(specs)} runs are below {CALIBRATED_PARAMS[0]:.2g} parameters or "
                f"{CALIBRATED_TOKENS[0]:.2g} training tokens, where it was not measured: check LR and batch with design=learning_rate."
            )

    def _cost_of_raised_batches(self, specs: Sequence[RunSpec]) -> Iterator[str]:
        """A note on batches above the rule's, as far as the recipe raised them (a design may multiply them as well)."""
        raised = [
            (s.batch_tokens, self.rule_batch_tokens(s.train_tokens), s.train_tokens)
            for s in specs
            if self.batch_tokens is None
            and 1.3 * self.rule_batch_tokens(s.train_tokens)
            < s.batch_tokens
            <= self._batch(s.shape, s.train_tokens, "cuda")[0]
        ]
        if not raised:
            return
        largest = max(raised)[0]
        cost = max(batch_cost(b, rule, tokens) for b, rule, tokens in raised)
        extrapolated = any(tokens < CRITICAL_BATCH_FROM_TOKENS for *_, tokens in raised)
        yield (
            f"{len(raised)} of {len(specs)} runs have a larger batch than the rule's, up to {largest:,} tokens (recipe.batch_floor, at "
            "most an eighth of the critical batch; or one sequence): by the critical batch (arXiv 2505.13738"
            f"{', extrapolated below 1e8 tokens' if extrapolated else ''}) at most {cost:.0%} more tokens for the same loss."
        )


def is_beyond_measured(spec: RunSpec) -> bool:
    """Whether a run is larger or longer than twice what our rules were measured at."""
    return spec.n_params() > 2 * CALIBRATED_PARAMS[1] or spec.train_tokens > 2 * CALIBRATED_TOKENS[1]


def join_weight(shape: Any, train_tokens: float) -> float:
    """0 where our rules hold, 1 where the published ones do, linear in ln C in between; C = 6 N D."""
    return _position(_compute(shape, train_tokens), *JOIN_FLOPS)


def critical_batch_tokens(train_tokens: float) -> float:
    """The critical batch in tokens at a horizon (arXiv 2505.13738; its models had 1e8 parameters or more, so that it is
    extrapolated below 1e8 tokens)."""
    return CRITICAL_BATCH_COEFFICIENT * train_tokens**CRITICAL_BATCH_EXPONENT


def batch_cost(batch: float, rule_batch: float, train_tokens: float) -> float:
    """Extra tokens, as a fraction, that `batch` needs for the loss that `rule_batch` reaches: E = E_min (1 + B / B_crit)
    (McCandlish et al. 2018, arXiv 1812.06162)."""
    critical = critical_batch_tokens(train_tokens)
    return (1 + batch / critical) / (1 + rule_batch / critical) - 1


def _compute(shape: Any, train_tokens: float) -> float:
    """6 N D in FLOPs, N with the head."""
    return float(6 * shape.count().n_params(Convention.SIX_N_WITH_HEAD) * train_tokens)


def _position(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, math.log(value / low) / math.log(high / low)))


def _joined(own: float, published: float, weight: float) -> float:
    """Geometric interpolation; exactly `own` at weight 0."""
    return own if weight == 0 else own ** (1 - weight) * published**weight


def _published_lr(shape: Any, train_tokens: float, weight: float) -> float:
    """Step Law's LR; its N is without the vocabulary, ours with the head: joined like everything else."""
    count = shape.count()
    with_head = count.n_params(Convention.SIX_N_WITH_HEAD)
    n = _joined(with_head, count.n_params(Convention.SIX_N_NON_EMBEDDING), weight)
    low, high = TOKENS_PER_PARAM
    tokens = min(max(train_tokens, low * n), high * n)
    return step_law.LR_COEFFICIENT * n**step_law.LR_N_EXPONENT * tokens**step_law.LR_D_EXPONENT


def _sqrt_rule(ratio: float) -> float:
    """The LR's factor for a batch `ratio` times as large."""
    return min(MAX_LR_CORRECTION, max(1 / MAX_LR_CORRECTION, math.sqrt(ratio)))


def _published_decay(shape: Any, train_tokens: float, batch: float, lr: float) -> float:
    """The weight decay of the published AdamW timescale."""
    n = shape.count().n_params(Convention.SIX_N_NON_EMBEDDING)
    timescale = TIMESCALE_COEFFICIENT * (train_tokens / n) ** TIMESCALE_EXPONENT
    return batch / (lr * timescale * train_tokens)


def _beta2(weight: float, batch: float, steps: float) -> float:
    """Second-moment decay from a half-life in steps; exactly 0.95 where we measured."""
    own = math.log(0.5) / math.log(0.95)
    published = max(own, min(BETA2_HALF_LIFE_TOKENS / batch, BETA2_HALF_LIFE_FRACTION * steps))
    return 0.95 if weight == 0 else 0.5 ** (1 / _joined(own, published, weight))


def _spread(specs: Sequence[RunSpec]) -> str:
    """The published rules at one run, with ours: how far apart they are. The run is the one of the largest budget that is nearest
    to 20 tokens per parameter, and of its learning rates and batches the middle ones."""

    def off_optimum(spec: RunSpec) -> float:
        return abs(math.log(spec.train_tokens / spec.n_params() / OPTIMAL_TOKENS_PER_PARAM))

    budget = max(s.budget_flops for s in specs)
    central = min((s for s in specs if s.budget_flops > 0.9 * budget), key=off_optimum)
    alike = [
        s for s in specs if s.shape == central.shape and abs(s.train_tokens / central.train_tokens - 1) < 0.1
    ]
    spec = sorted(alike, key=lambda s: (s.optimizer.peak_lr, s.batch_tokens))[len(alike) // 2]
    horizons = SweepHorizons(spec.train_tokens, spec.train_tokens)
    rules = (step_law.StepLawRecipe(), porian.PorianRecipe(), deepseek.DeepSeekRecipe())
    chosen = {rule.kind: rule.decide(spec.shape, spec.train_tokens, horizons) for rule in rules}
    rates = sorted((c.optimizer.peak_lr, kind) for kind, c in chosen.items())
    batches = sorted((c.batch_tokens, kind) for kind, c in chosen.items())
    ours = f"LR {spec.optimizer.peak_lr:.2g}, " if spec.parametrization == Standard() else ""
    return (
        f"At N = {spec.n_params():.2g}, D = {spec.train_tokens:.2g}: {ours}batch {spec.batch_tokens:,}; published rules give LR "
        f"{rates[0][0]:.2g} ({rates[0][1]}) to {rates[-1][0]:.2g} ({rates[-1][1]}) and batches {batches[0][0]:,} "
        f"({batches[0][1]}) to {batches[-1][0]:,} ({batches[-1][1]})."
    )
