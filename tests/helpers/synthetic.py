"""Synthetic sweeps: real `RunRecord` values, with curves, from a known law with noise.

The curves depend on the learning-rate schedule: in the middle of a run the loss lies above the law's by a share of the
data term that vanishes as the LR reaches its end (annealing), so a run's last point is exactly the law plus its seed's
noise, and the envelope's points come from the ends of runs, as in Hoffmann et al. 2022.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from scaling_lab.core.counts import Convention, ModelCount, tokens_for_budget, whole_steps
from scaling_lab.core.record import Environment, EvalPoint, RunRecord, RunStatus
from scaling_lab.core.schedules import Cosine
from scaling_lab.core.shapes.gpt import GPTShape
from scaling_lab.core.sources.pysource import PySource
from scaling_lab.core.spec import EvalSpec, Execution, OptimizerSpec, Plan, PlannedRun, RunSpec

# Loss of an untrained model over 256 bytes, nats: a curve never starts above it.
UNTRAINED_LOSS_NATS = math.log(256)


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta, nats per token."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss_nats(self, n_params: float, n_tokens: float) -> float:
        return self.E + self.A * n_params**-self.alpha + self.B * n_tokens**-self.beta

    @property
    def params_exponent(self) -> float:
        """a of N_opt ~ C^a under C = 6 N D."""
        return self.beta / (self.alpha + self.beta)

    def params_opt(self, compute_flops: float) -> float:
        """Compute-optimal N under C = 6 N D."""
        g = (self.alpha * self.A / (self.beta * self.B)) ** (1.0 / (self.alpha + self.beta))
        return g * (compute_flops / 6.0) ** self.params_exponent


# Fits the losses measured on the standard library's source text: minima near 17k parameters and 1.88 nats at
# 1e11 FLOPs, 1.63 at 4e11, 1.46 at 1.6e12.
QUICKSTART_LAW = Law(E=1.08, A=55.3, B=965.0, alpha=0.50, beta=0.57)
QUICKSTART_BUDGETS = (1e11, 4e11, 1.6e12)

FAKE_ENVIRONMENT = Environment(
    scaling_lab="0.1.0",
    python="3.11.2",
    torch="2.13.0",
    git_revision="0123456789abcdef0123456789abcdef01234567",
    device="cpu",
    device_name="synthetic",
    host="nowhere",
    platform="Linux-x86_64",
    data_fingerprint="5eed" * 16,
)


def shape_near(n_params: float, convention: Convention = Convention.SIX_N_WITH_HEAD) -> GPTShape:
    """The GPT shape (width a multiple of 4, depth about width / 24) whose N is nearest to `n_params`."""
    candidates = [GPTShape(width=w, depth=max(1, round(w / 24)), heads=2) for w in range(8, 257, 4)]
    return min(candidates, key=lambda s: abs(math.log(s.count().n_params(convention) / n_params)))


def centered_shapes(
    law: Law, budget_flops: float, n_sizes: int, span: float, convention: Convention
) -> list[GPTShape]:
    """`n_sizes` distinct shapes, geometrically spaced over a factor of `span`, centered on the law's optimum."""
    offsets = np.linspace(-0.5, 0.5, n_sizes) * math.log(span)
    shapes = [shape_near(law.params_opt(budget_flops) * math.exp(o), convention) for o in offsets]
    return list(dict.fromkeys(shapes))


def synthetic_records(
    law: Law = QUICKSTART_LAW,
    budgets: Sequence[float] = QUICKSTART_BUDGETS,
    sizes: int | Mapping[float, Sequence[tuple[int, int]]] = 6,
    noise: float = 0.005,
    seed: int = 0,
    *,
    span: float = 16.0,
    noise_budget: float | None = None,
    batch_tokens: int = 512,
    convention: Convention = Convention.SIX_N_WITH_HEAD,
    curve_points: int = 200,
    annealing: float = 0.35,
    step_noise: float = 0.04,
    sweep: str = "synthetic",
) -> list[RunRecord]:
    """An IsoFLOP sweep's records, in plan order: runs of every size at every budget, as `train` would write them.

    Args:
        law: the truth, of N and D under `convention`.
        budgets: training FLOPs.
        sizes: how many sizes a budget has (spread over a factor of `span`, centered on the optimum), or for each budget
            its (width, depth) pairs.
        noise: standard deviation of a run's final loss over seeds, nats.
        seed: of the noise; nothing else is random.
        noise_budget: the budget that is run with a second seed (default: the second one, if any).
        curve_points: points of each curve (real records have one for each step).
        annealing: how far above its law's data term a run's loss lies at peak LR, as a share of that term.
        step_noise: standard deviation of one step's training loss, nats.
    """
    if noise_budget is None:
        noise_budget = budgets[min(1, len(budgets) - 1)]
    records = []
    for budget in budgets:
        if isinstance(sizes, int):
            shapes = centered_shapes(law, budget, sizes, span, convention)
        else:
            shapes = [GPTShape(width=w, depth=d, heads=2) for w, d in sizes[budget]]
        for shape in shapes:
            for run_seed in (0, 1) if budget == noise_budget else (0,):
                spec = make_spec(shape, budget, run_seed, batch_tokens, convention, sweep)
                rng = np.random.default_rng(
                    [seed, run_seed, shape.width, shape.depth, int(math.log2(budget) * 1e6)]
                )
                records.append(make_record(spec, law, rng, noise, curve_points, annealing, step_noise))
    return records


def make_spec(
    shape: GPTShape, budget_flops: float, seed: int, batch_tokens: int, convention: Convention, sweep: str
) -> RunSpec:
    """The spec of one IsoFLOP run: as many whole steps as the budget buys."""
    per_token = shape.count().flops_per_token(convention)
    steps = max(1, whole_steps(tokens_for_budget(budget_flops, per_token), batch_tokens))
    return RunSpec(
        sweep=sweep,
        role="noise" if seed else "isoflop",
        budget_flops=budget_flops,
        shape=shape,
        data=PySource(),
        schedule=Cosine(),
        optimizer=OptimizerSpec(peak_lr=0.01 * 64 / shape.width),
        batch_tokens=batch_tokens,
        train_tokens=steps * batch_tokens,
        eval=EvalSpec(),
        seed_init=seed,
        seed_data=seed,
        convention=convention,
    )


def make_record(
    spec: RunSpec,
    law: Law,
    rng: np.random.Generator,
    noise: float = 0.005,
    curve_points: int = 200,
    annealing: float = 0.35,
    step_noise: float = 0.04,
) -> RunRecord:
    """The completed run of `spec`: its final loss is the law's plus one draw of the seeds' noise."""
    count: ModelCount = spec.count()
    sem = 0.006
    offset = float(rng.normal(0.0, noise)) if noise else 0.0
    visits = {max(1, spec.steps // 2**k) for k in range(spec.eval.points)}
    block = max(1, spec.steps // curve_points)
    points = []
    for step in sorted(visits | set(range(block, spec.steps + 1, block)) | {spec.steps}):
        loss = _loss_at(spec, law, step, annealing) + offset
        train = loss + float(rng.normal(0.0, step_noise)) / math.sqrt(block) if step_noise else loss
        points.append(
            EvalPoint(
                step=step,
                tokens=step * spec.batch_tokens,
                train_flops=spec.flops_per_token() * step * spec.batch_tokens,
                lr=spec.learning_rate(step - 1),
                train_loss_nats=train,
                val_loss_nats=loss if step in visits else None,
                val_loss_sem_nats=sem if step in visits else None,
                wall_time_s=step * 1e-3 * (spec.shape.width / 16),
            )
        )
    return RunRecord(
        run_id=spec.run_id(),
        spec=spec,
        execution=Execution(),
        params=count.params,
        flops=count.flops,
        status=RunStatus.COMPLETED,
        reason=None,
        final_val_loss_nats=points[-1].val_loss_nats,
        final_val_loss_sem_nats=sem,
        wall_time_s=points[-1].wall_time_s,
        environment=FAKE_ENVIRONMENT,
        curve_points=len(points),
        curve=tuple(points),
    )


def _loss_at(spec: RunSpec, law: Law, step: int, annealing: float) -> float:
    """Loss after `step` steps, nats: the law at the tokens seen, plus the annealing still to come."""
    tokens = step * spec.batch_tokens
    data_term = law.B * tokens**-law.beta
    end = spec.schedule.multiplier(1.0)
    to_come = max(0.0, (spec.schedule.multiplier(step / spec.steps) - end) / (1.0 - end))
    return min(UNTRAINED_LOSS_NATS, law.loss_nats(spec.n_params(), tokens) + annealing * data_term * to_come)


def diverged(record: RunRecord, at_fraction: float = 0.3) -> RunRecord:
    """The same run, ended early because its loss was no longer finite."""
    kept = record.curve[: max(1, int(len(record.curve) * at_fraction))]
    return replace(
        record,
        status=RunStatus.DIVERGED,
        reason=f"the training loss was not finite at step {kept[-1].step + 1}",
        final_val_loss_nats=None,
        final_val_loss_sem_nats=None,
        wall_time_s=kept[-1].wall_time_s,
        curve=kept,
        curve_points=len(kept),
    )


def plan_of(records: Sequence[RunRecord], sweep: str = "synthetic") -> Plan:
    """The plan that these records carry out."""
    return Plan(
        sweep=sweep,
        runs=tuple(PlannedRun(r.spec, r.execution) for r in records),
        convention=records[0].spec.convention,
        data_fingerprint=records[0].environment.data_fingerprint,
        notes=("synthetic",),
    )
