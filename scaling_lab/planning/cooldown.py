"""Specs of trunks and their cooldown branches, with step counts that match at the branch points.

A branch's spec describes a complete run of its own horizon under a WSD schedule; `parent` only names the run from which its
first steps can be taken. Trunk and branches share batch, LR, warmup steps, seeds and data order, so up to the branch point
they are the same computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from scaling_lab.core.counts import train_flops, whole_steps
from scaling_lab.core.errors import UserError
from scaling_lab.core.schedules import Constant, WarmupStableDecay
from scaling_lab.core.spec import OptimizerSpec, RunSpec
from scaling_lab.planning.designs.base import RunRequest
from scaling_lab.planning.recipes.base import Hyperparameters
from scaling_lab.planning.settings import SweepSettings


@dataclass(frozen=True)
class Horizon:
    """One horizon in steps."""

    steps: int
    branch_step: int
    """The step at which its cooldown begins."""


def horizon_in_steps(tokens: float, batch_tokens: int, decay_fraction: float) -> Horizon:
    """The horizon in whole steps; at least one step of cooldown and one before it."""
    steps = whole_steps(tokens, batch_tokens)
    cooldown = min(max(1, round(decay_fraction * steps)), steps - 1)
    return Horizon(steps, steps - cooldown)


def shared_warmup_steps(chosen: Hyperparameters, shortest: Horizon, longest_tokens: float) -> int:
    """Warmup steps shared by all horizons of a size: the recipe's fraction of the shortest horizon; or, if the recipe fixes
    the warmup in tokens, its fraction of the longest, for which `chosen` was decided."""
    if chosen.warmup_in_tokens:
        return max(1, round(chosen.warmup_fraction * longest_tokens / chosen.batch_tokens))
    return max(1, round(chosen.warmup_fraction * shortest.steps))


def truncate_warmup(optimizer: OptimizerSpec, warmup_steps: int, steps: int) -> tuple[OptimizerSpec, int]:
    """(optimizer, warmup steps) of a run whose constant-LR part has `steps` steps. If these end before the warmup does, the
    peak LR is the LR reached there, so that every step has the same LR as in the longer runs."""
    if warmup_steps <= steps:
        return optimizer, warmup_steps
    return replace(optimizer, peak_lr=optimizer.peak_lr * steps / warmup_steps), steps


def cooldown_spec(settings: SweepSettings, request: RunRequest, chosen: Hyperparameters) -> RunSpec:
    """The spec of the trunk or branch in `request`; `chosen` is the same for all runs of the size.

    Raises:
        UserError: the shortest horizon has fewer than 2 steps.
    """
    cooldown, shape, batch = request.cooldown, request.shape, chosen.batch_tokens
    assert cooldown is not None
    corpus = settings.corpus_tokens()
    # Do not extend the trunk for a horizon that make_plan drops for too many epochs.
    kept = [t for t in cooldown.horizons_tokens if t <= settings.max_epochs * corpus]
    horizons = [horizon_in_steps(t, batch, cooldown.decay_fraction) for t in kept or cooldown.horizons_tokens]
    if horizons[0].steps < 2:
        raise UserError(
            f"design.budgets_flops: width {shape.width}, depth {shape.depth} has {horizons[0].steps} steps of {batch} "
            "tokens at its smallest budget: a trunk and a cooldown need at least 2."
        )
    warmup_steps = shared_warmup_steps(chosen, horizons[0], max(cooldown.horizons_tokens))
    trunk_steps = max(h.branch_step for h in horizons)
    optimizer, trunk_warmup = truncate_warmup(chosen.optimizer, warmup_steps, trunk_steps)
    seed = settings.seed + request.seed
    per_token = shape.count().flops_per_token(settings.convention)
    trunk = RunSpec(
        sweep=settings.sweep, role="trunk", budget_flops=train_flops(per_token, trunk_steps * batch), shape=shape,
        data=settings.data, schedule=Constant(trunk_warmup / trunk_steps), optimizer=optimizer,
        batch_tokens=batch, train_tokens=trunk_steps * batch, eval=settings.eval, seed_init=seed, seed_data=seed,
        dtype=settings.dtype, convention=settings.convention, parametrization=settings.parametrization,
        keep_steps=tuple(sorted({h.branch_step for h in horizons})), noise=settings.noise,
        unique_tokens=None if settings.unique_tokens is None else corpus,
    )  # fmt: skip
    if request.role == "trunk":
        return trunk
    own = horizon_in_steps(request.tokens(settings.convention), batch, cooldown.decay_fraction)
    assert request.budget_flops is not None
    has_trunk = len(cooldown.horizons_tokens) > 1
    optimizer, own_warmup = truncate_warmup(chosen.optimizer, warmup_steps, own.branch_step)
    return replace(
        trunk,
        role=request.role,
        budget_flops=float(request.budget_flops),
        schedule=WarmupStableDecay(
            own_warmup / own.steps,
            (own.steps - own.branch_step) / own.steps,
            cooldown.shape,
        ),
        optimizer=optimizer,
        train_tokens=own.steps * batch,
        parent=trunk.run_id() if has_trunk else None,
        parent_step=own.branch_step if has_trunk else 0,
        keep_steps=(),
    )


def warmup_note(spec: RunSpec, chosen: Hyperparameters) -> tuple[str, ...]:
    """A note if a run's cooldown begins before the end of its warmup; empty otherwise and for runs of other designs."""
    reached = spec.optimizer.peak_lr / chosen.optimizer.peak_lr
    if spec.role == "trunk" or reached == 1:
        return ()
    return (
        f"{spec.run_id()} begins its cooldown during the recipe's warmup, at {reached:.0%} of its peak LR.",
    )


def saved_note(specs: Sequence[RunSpec]) -> tuple[str, ...]:
    """The compute saved by shared trunks, compared with separate runs; empty for a plan without trunks."""
    if not any(spec.parent for spec in specs):
        return ()
    spent = sum(spec.own_train_flops() for spec in specs)
    separate = sum(spec.train_flops() for spec in specs if spec.role != "trunk")
    return (
        f"sharing trunks takes {spent:.3g} FLOPs instead of {separate:.3g} for separate runs: "
        f"{1 - spent / separate:.0%} saved.",
    )
