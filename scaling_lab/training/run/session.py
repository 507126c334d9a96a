"""Everything needed to train: data checked and on the device, models built, and the program that runs their steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scaling_lab.core.errors import UserError
from scaling_lab.core.spec import Execution, RunSpec
from scaling_lab.planning.memory import BLOCK_STEPS
from scaling_lab.training.data.feed import Feed, copy_to, open_feed
from scaling_lab.training.data.order import WindowOrder
from scaling_lab.training.engine.devices import apply_execution, peak_flops_per_s
from scaling_lab.training.engine.optimizer import control_rows
from scaling_lab.training.engine.shared_programs import shares_programs
from scaling_lab.training.engine.step import (
    GRADIENT_SQUARE,
    LOSS,
    MICRO_GRADIENT_SQUARE,
    StackSlot,
    TrainStep,
)
from scaling_lab.training.measure.evaluation import (
    EvaluationResult,
    EvaluationSuite,
    ValidationSet,
    evaluation_steps,
)
from scaling_lab.training.measure.noise_scale import (
    MIN_STEP_PARTS,
    PROBE_SEQUENCES,
    NoiseMeasurement,
    NoiseProbe,
    measured_steps,
    noise_from_norms,
)
from scaling_lab.training.measure.utilization import UtilizationMeter
from scaling_lab.training.models import build_model
from scaling_lab.training.parallel.data_parallel import DataParallelStep
from scaling_lab.training.parallel.team import Team, current_team


@dataclass
class TrainingSession:
    """What one run is trained with. For a member of a stack, `step` is its slot. Made by `open_session`/`open_program`."""

    spec: RunSpec
    device: torch.device
    step: TrainStep | StackSlot
    feed: Feed
    slot: int
    """Index of the run in the feed."""
    evaluation: EvaluationSuite
    fingerprint: str
    utilization: UtilizationMeter
    """Shared by all sessions of a program."""

    @property
    def order(self) -> WindowOrder:
        """Which window of the corpus the run sees at which position."""
        return self.feed.order(self.slot)

    def evaluate(self) -> EvaluationResult:
        """The validation set and the other evaluation sets at the current parameters."""
        with self.utilization.paused():
            return self.evaluation.evaluate(self._mean_loss, self._scores)

    def _mean_loss(self, name: str | None) -> tuple[float, float | None]:
        windows, team = self.evaluation.set(name), current_team()
        if team is not None:
            team.broadcast_command("window_losses", self.slot, name)
            losses = self.window_losses(team, name)
            assert losses is not None
            return windows.summary(losses)
        return windows.loss(
            self.step.model,
            self.step.parameters(),
            dtype=self.spec.dtype,
            vocab_size=self.spec.shape.vocab_size,
        )

    def window_losses(self, team: Team, name: str | None) -> Tensor | None:
        """Losses on the windows of an evaluation set, computed by all processes; None in all but the first."""
        return team.window_losses(self.evaluation.set(name), self.step.logits, self.spec)

    def _scores(self, windows: ValidationSet) -> dict[str, float]:
        # Sharded parameters would have to be gathered for this.
        if not self.step.holds_all_parameters:
            return {}
        return windows.fact_scores(
            self.step.model,
            self.step.parameters(),
            dtype=self.spec.dtype,
            vocab_size=self.spec.shape.vocab_size,
        )

    def measure_noise(self, step: int, metrics: Tensor, micro: int) -> NoiseMeasurement | None:
        """The gradient noise after `step` steps, whose last one had these metrics (3,); None if it is not measured there."""
        spec = self.spec
        if step not in measured_steps(spec, evaluation_steps(spec)) or not isinstance(
            self.step, (TrainStep, StackSlot)
        ):
            return None
        if spec.batch_sequences // micro >= MIN_STEP_PARTS:
            part, whole = metrics[MICRO_GRADIENT_SQUARE].item(), metrics[GRADIENT_SQUARE].item()
            return noise_from_norms(part, whole, micro * spec.shape.context, spec.batch_tokens)
        windows = self.feed.windows(self.slot, step * spec.batch_sequences, PROBE_SEQUENCES)
        return NoiseProbe(self.step.model, self.step.layout, spec).measure(self.step.flat, windows)


@dataclass
class Program:
    """One step program and the sessions of its slots, in the order of the plan: a single one, or a stack's."""

    step: TrainStep
    sessions: list[TrainingSession]
    _prepared: tuple[dict[int, int], Tensor, Tensor] | None = None
    """First steps, window starts and controls of the next block."""

    @property
    def max_block_steps(self) -> int:
        """Maximum number of steps per call of `run_block`."""
        return self.sessions[0].feed.max_block_steps

    @property
    def overlaps(self) -> bool:
        """Whether the host works while the device computes a block: a GPU executes what it is given in order. Processes of a
        team go through a block together, and a CPU computes on the threads that the host would use."""
        return self.sessions[0].device.type == "cuda" and current_team() is None

    def run_block(
        self, first_steps: Mapping[int, int], count: int, meanwhile: Callable[[], None] | None = None
    ) -> Tensor:
        """Run `count` steps of the members in the slots `first_steps`, each from its own first step (counted from 0).

        Returns the step metrics, (count, slots, 3) float64 on the CPU, read back at once; see `TrainStep.run`. `meanwhile` is
        called while the device computes.
        """
        starts, controls = self._inputs(first_steps, count)
        if not self.step.stacked:
            starts, controls = starts[:, 0], controls[:, 0]
        on_device = self.step.run(starts, controls)
        if meanwhile is not None:
            meanwhile()
        # Moved to the CPU first: not every device has float64 (MPS).
        metrics = on_device.cpu().double()
        self.sessions[0].utilization.add(count * len(first_steps))
        return metrics if self.step.stacked else metrics[:, None]

    def prepare_block(self, first_steps: Mapping[int, int], most: int) -> None:
        """Move the inputs of the next block, of up to `most` steps, to the device: queued behind what it computes now."""
        if first_steps:
            self._prepared = (dict(first_steps), *self._make_inputs(first_steps, most))

    def _inputs(self, first_steps: Mapping[int, int], count: int) -> tuple[Tensor, Tensor]:
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared[0] == first_steps and len(prepared[1]) >= count:
            return prepared[1][:count], prepared[2][:count]
        return self._make_inputs(first_steps, count)

    def _make_inputs(self, first_steps: Mapping[int, int], count: int) -> tuple[Tensor, Tensor]:
        rows = [
            inputs(session, first_steps[k], count) if k in first_steps else idle_inputs(session, count)
            for k, session in enumerate(self.sessions)
        ]
        device = self.sessions[0].device
        starts, controls = (copy_to(torch.stack(each, 1), device) for each in zip(*rows, strict=True))
        return starts, controls


def inputs(session: TrainingSession, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Window starts (count, batch) and controls (count, 3) of a run's steps first .. first + count - 1."""
    spec = session.spec
    team = current_team()
    if team is not None and not session.feed.is_whole:
        team.broadcast_command("load", session.slot, first, count)
    starts = session.feed.starts(session.slot, first, count)
    rates = [spec.learning_rate(step) for step in range(first, first + count)]
    return starts, control_rows(rates, first, spec.optimizer)


def idle_inputs(session: TrainingSession, count: int) -> tuple[Tensor, Tensor]:
    """Inputs that leave a slot unchanged."""
    return torch.zeros(count, session.spec.batch_sequences, dtype=torch.int64), torch.zeros(count, 3)


def train_block(session: TrainingSession, first: int, last: int) -> list[float]:
    """Train steps first .. last - 1 (from 0) of a run that is not in a stack; returns their losses."""
    assert isinstance(session.step, TrainStep)
    metrics = Program(session.step, [session]).run_block({0: first}, last - first)
    losses: list[float] = metrics[:, 0, LOSS].tolist()
    return losses


def check_data(spec: RunSpec, expected_fingerprint: str | None = None) -> str:
    """The fingerprint of the run's data. Raises `UserError` if they differ from the plan's."""
    fingerprint: str = spec.data.fingerprint()
    if expected_fingerprint not in (None, fingerprint):
        raise UserError(
            f"data={spec.data.kind} on this machine (content {fingerprint[:12]}) differs from the plan's "
            f"({str(expected_fingerprint)[:12]}), so losses would not be comparable. Use the same Python version and "
            "files, or make a new sweep."
        )
    return fingerprint


def open_session(
    spec: RunSpec, execution: Execution, expected_fingerprint: str | None = None
) -> TrainingSession:
    """Build the model of a single run, load its data and check that they are the plan's."""
    return open_program([spec], execution, expected_fingerprint, stacked=False).sessions[0]


def open_program(
    specs: Sequence[RunSpec],
    execution: Execution,
    expected_fingerprint: str | None = None,
    *,
    stacked: bool,
) -> Program:
    """The program of one run, or of a stack of runs with the same shape, batch and corpus; in a team, of all processes."""
    team = current_team()
    if team is None:
        return build_program(specs, execution, expected_fingerprint, stacked=stacked)
    strategy = team.strategy(specs[0], execution, stacked)
    arguments = (specs, execution, expected_fingerprint, stacked, strategy, team.run_folder)
    team.broadcast_command("open", *arguments)
    return open_in_team(team, *arguments)


def open_in_team(
    team: Team,
    specs: Sequence[RunSpec],
    execution: Execution,
    fingerprint: str | None,
    stacked: bool,
    strategy: str,
    run_folder: Path | None,
) -> Program:
    """This process's program in a team; executed by all of its processes."""
    from scaling_lab.training.parallel.sharded import (
        ShardedStep,  # its imports take time, and few runs need it
    )

    step_class: Any = ShardedStep if strategy == "fsdp" else DataParallelStep
    team.run_folder = run_folder
    with team.shared_errors():
        return build_program(
            specs,
            execution,
            fingerprint,
            stacked=stacked,
            make_step=partial(step_class, team=team),
            whole_models=strategy != "fsdp",
        )


def build_program(
    specs: Sequence[RunSpec],
    execution: Execution,
    expected_fingerprint: str | None = None,
    *,
    stacked: bool,
    make_step: Callable[..., Any] = TrainStep,
    whole_models: bool = True,
) -> Program:
    """This process's program. Without `whole_models`, `make_step` moves the models to the device, part by part."""
    spec = specs[0]
    device = apply_execution(execution, spec.dtype)
    fingerprint = check_data(spec, expected_fingerprint)
    if execution.compile and not shares_programs(device):
        # Dynamo keeps a limited number of programs (8) per place in the source, and this place is the same for every run:
        # beyond the limit a worker's later runs would silently be eager. A process computes one program at a time.
        torch.compiler.reset()
    feed = open_feed(specs, device, BLOCK_STEPS)

    def models() -> Iterator[Any]:
        for each in specs:
            torch.manual_seed(each.seed_init)
            model = build_model(each.shape, each.parametrization)
            yield model.to(device) if whole_models else model

    # A stack's models are built one by one, and none is kept.
    built = models() if stacked else next(models())
    step = make_step(built, feed.tokens, specs if stacked else spec, execution)
    evaluation = EvaluationSuite(spec, device)
    utilization = UtilizationMeter(spec, peak_flops_per_s(device, spec.dtype))
    sessions = [
        TrainingSession(
            spec=each,
            device=device,
            step=StackSlot(step, k) if stacked else step,
            feed=feed,
            slot=k,
            evaluation=evaluation,
            fingerprint=fingerprint,
            utilization=utilization,
        )
        for k, each in enumerate(specs)
    ]
    return Program(step, sessions)
