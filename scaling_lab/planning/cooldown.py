"""Owns trunks and branches: from a request with a `Cooldown` to a spec, in whole steps that fit each other.

A branch is the run of its own horizon under a WSD schedule, and says so: `parent` only says from where its first steps can
be taken. Trunk and branches share batch, LR, warm-up in steps, seeds and data order, so up to the branch point they are the
same computation.
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
class Stretch:
    """One horizon in steps."""

    steps: int
    branch_step: int
    """Where its cooldown begins."""


def stretch(tokens: float, batch_tokens: int, decay_fraction: float) -> Stretch:
    """The horizon in whole steps; the cooldown takes at least one, and leaves at least one before it."""
    steps = whole_steps(tokens, batch_tokens)
    cooldown = min(max(1, round(decay_fraction * steps)), steps - 1)
    return Stretch(steps, steps - cooldown)


def warmup(chosen: Hyperparameters, shortest: Stretch, longest_tokens: float) -> int:
    """Steps of warm-up that all horizons of a size share: the recipe's share of the shortest, or the recipe's tokens, of
    which `chosen` for the longest knows the share."""
    if chosen.warmup_in_tokens:
        return max(1, round(chosen.warmup_fraction * longest_tokens / chosen.batch_tokens))
    return max(1, round(chosen.warmup_fraction * shortest.steps))


def warmed_up(optimizer: OptimizerSpec, warmup_steps: int, steps: int) -> tuple[OptimizerSpec, int]:
    """(the optimiser, steps of warm-up) of a run that warms up for at most `steps`: where this is before the end of the
    warm-up, its peak is the LR that is reached there, so that every step has the LR of the longer run."""
    if warmup_steps <= steps:
        return optimizer, warmup_steps
    return replace(optimizer, peak_lr=optimizer.peak_lr * steps / warmup_steps), steps


def cooldown_spec(settings: SweepSettings, request: RunRequest, chosen: Hyperparameters) -> RunSpec:
    """The trunk or the branch that `request` asks for; `chosen` is the same for all runs of the size.

    Raises:
        UserError: the shortest horizon has fewer than 2 steps.
    """
    cooldown, shape, batch = request.cooldown, request.shape, chosen.batch_tokens
    assert cooldown is not None
    corpus = settings.corpus_tokens()
    # A horizon that is not planned (make_plan says so) is no reason to train the trunk that far.
    fitting = [t for t in cooldown.horizons_tokens if t <= settings.max_epochs * corpus]
    stretches = [stretch(t, batch, cooldown.decay_fraction) for t in fitting or cooldown.horizons_tokens]
    if stretches[0].steps < 2:
        raise UserError(
            f"design.budgets_flops: width {shape.width}, depth {shape.depth} has {stretches[0].steps} steps of {batch} "
            "tokens at its smallest budget: a trunk and a cooldown need 2."
        )
    warmup_steps = warmup(chosen, stretches[0], max(cooldown.horizons_tokens))
    trunk_steps = max(s.branch_step for s in stretches)
    optimizer, warm_steps = warmed_up(chosen.optimizer, warmup_steps, trunk_steps)
    seed = settings.seed + request.seed
    per_token = shape.count().flops_per_token(settings.convention)
    trunk = RunSpec(
        sweep=settings.sweep, role="trunk", budget_flops=train_flops(per_token, trunk_steps * batch), shape=shape,
        data=settings.data, schedule=Constant(warm_steps / trunk_steps), optimizer=optimizer,
        batch_tokens=batch, train_tokens=trunk_steps * batch, eval=settings.eval, seed_init=seed, seed_data=seed,
        dtype=settings.dtype, convention=settings.convention, parametrization=settings.parametrization,
        keep_steps=tuple(sorted({s.branch_step for s in stretches})), noise=settings.noise,
        unique_tokens=None if settings.unique_tokens is None else corpus,
    )  # fmt: skip
    if request.role == "trunk":
        return trunk
    own = stretch(request.tokens(settings.convention), batch, cooldown.decay_fraction)
    assert request.budget_flops is not None
    alone = len(cooldown.horizons_tokens) == 1
    optimizer, warm_steps = warmed_up(chosen.optimizer, warmup_steps, own.branch_step)
    return replace(
        trunk,
        role=request.role,
        budget_flops=float(request.budget_flops),
        schedule=WarmupStableDecay(
            warm_steps / own.steps,
            (own.steps - own.branch_step) / own.steps,
            cooldown.shape,
        ),
        optimizer=optimizer,
        train_tokens=own.steps * batch,
        parent=None if alone else trunk.run_id(),
        parent_step=0 if alone else own.branch_step,
        keep_steps=(),
    )


def warmup_note(spec: RunSpec, chosen: Hyperparameters) -> tuple[str, ...]:
    """That a cooldown begins before the end of the warm-up; nothing where it does not, or for runs of other designs."""
    reached = spec.optimizer.peak_lr / chosen.optimizer.peak_lr
    if spec.role == "trunk" or reached == 1:
        return ()
    return (
        f"{spec.run_id()} begins its cooldown within the recipe's warm-up, at {reached:.0%} of its peak LR.",
    )


def saved_note(specs: Sequence[RunSpec]) -> tuple[str, ...]:
    """What the trunks save against the same runs trained one by one; nothing for a plan without trunks."""
    if not any(spec.parent for spec in specs):
        return ()
    spent = sum(spec.own_train_flops() for spec in specs)
    alone = sum(spec.train_flops() for spec in specs if spec.role != "trunk")
    return (
        f"trunks are trained once: {spent:.3g} FLOPs for what would take {alone:.3g} run by run, "
        f"{1 - spent / alone:.0%} saved.",
    )
