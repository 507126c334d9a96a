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
from scaling_lab.core.spec import RunSpec
from scaling_lab.plan.designs.base import RunRequest
from scaling_lab.plan.recipes.base import Hyperparameters
from scaling_lab.plan.settings import SweepSettings


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


def cooldown_spec(settings: SweepSettings, request: RunRequest, chosen: Hyperparameters) -> RunSpec:
    """The trunk or the branch that `request` asks for; `chosen` is the same for all runs of the size.

    Raises:
        UserError: the shortest horizon has fewer than 2 steps.
    """
    cooldown, shape, batch = request.cooldown, request.shape, chosen.batch_tokens
    assert cooldown is not None
    corpus = settings.data.n_tokens("train")
    # A horizon that is not planned (make_plan says so) is no reason to train the trunk that far.
    fitting = [t for t in cooldown.horizons_tokens if t <= settings.max_epochs * corpus]
    stretches = [stretch(t, batch, cooldown.decay_fraction) for t in fitting or cooldown.horizons_tokens]
    if stretches[0].steps < 2:
        raise UserError(
            f"design.budgets_flops: width {shape.width}, depth {shape.depth} has {stretches[0].steps} steps of {batch} "
            "tokens at its smallest budget: a trunk and a cooldown need 2."
        )
    warmup_steps = max(1, round(chosen.warmup_fraction * stretches[0].steps))
    trunk_steps = max(s.branch_step for s in stretches)
    seed = settings.seed + request.seed
    per_token = shape.count().flops_per_token(settings.convention)
    trunk = RunSpec(
        sweep=settings.sweep, role="trunk", budget_flops=train_flops(per_token, trunk_steps * batch), shape=shape,
        data=settings.data, schedule=Constant(min(1.0, warmup_steps / trunk_steps)), optimizer=chosen.optimizer,
        batch_tokens=batch, train_tokens=trunk_steps * batch, eval=settings.eval, seed_init=seed, seed_data=seed,
        dtype=settings.dtype, convention=settings.convention, parametrization=settings.parametrization,
        keep_steps=tuple(sorted({s.branch_step for s in stretches})),
    )  # fmt: skip
    if request.role == "trunk":
        return trunk
    own = stretch(request.tokens(settings.convention), batch, cooldown.decay_fraction)
    assert request.budget_flops is not None
    alone = len(cooldown.horizons_tokens) == 1
    return replace(
        trunk,
        role=request.role,
        budget_flops=float(request.budget_flops),
        schedule=WarmupStableDecay(
            min(warmup_steps, own.branch_step) / own.steps,
            (own.steps - own.branch_step) / own.steps,
            cooldown.shape,
        ),
        train_tokens=own.steps * batch,
        parent=None if alone else trunk.run_id(),
        parent_step=0 if alone else own.branch_step,
        keep_steps=(),
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
