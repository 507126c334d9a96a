"""Owns what training needs at hand: data checked and on the device, models built, and the program that steps them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scaling_lab.core.errors import UserError
from scaling_lab.core.spec import Execution, RunSpec
from scaling_lab.training.data.feed import BLOCK_STEPS, Feed, device_tokens, open_feed
from scaling_lab.training.data.order import WindowOrder
from scaling_lab.training.engine.devices import apply_execution
from scaling_lab.training.engine.optimizer import control_rows
from scaling_lab.training.engine.step import LOSS, MEAN_PART_SQUARE, SQUARE, Slot, TrainStep
from scaling_lab.training.measure.evaluation import Evaluation, ValidationSet, Visit, evaluation_steps
from scaling_lab.training.measure.noise_scale import (
    ENOUGH_PARTS,
    PARTS,
    Noise,
    NoiseProbe,
    noise,
    visits_measured,
)
from scaling_lab.training.models import build_model
from scaling_lab.training.parallel.distributed import current_team

__all__ = ["Program", "Session", "check_data", "device_tokens", "open_program", "open_session", "train_block"]


@dataclass
class Session:
    """What one run is trained with; of a stack's member `step` is its slot. Made by `open_session` or `open_program`."""

    spec: RunSpec
    device: torch.device
    step: TrainStep | Slot
    feed: Feed
    slot: int
    """Which of the feed's runs this is."""
    evaluation: Evaluation
    fingerprint: str

    @property
    def order(self) -> WindowOrder:
        """Which window of the corpus the run sees at which position."""
        return self.feed.order(self.slot)

    def visit(self) -> Visit:
        """The validation set, and the other evaluation sets, at the current parameters."""
        return self.evaluation.visit(self._mean_loss, self._scores)

    def _mean_loss(self, name: str | None) -> tuple[float, float | None]:
        team = current_team()
        if team is not None:
            return team.validation_loss(self, self.slot, name)
        return self.evaluation.set(name).loss(
            self.step.model,
            self.step.parameters(),
            dtype=self.spec.dtype,
            vocab_size=self.spec.shape.vocab_size,
        )

    def _scores(self, which: ValidationSet) -> dict[str, float]:
        # Parameters that are spread over processes would have to be gathered for it.
        if not self.step.holds_all_parameters:
            return {}
        return which.fact_scores(
            self.step.model,
            self.step.parameters(),
            dtype=self.spec.dtype,
            vocab_size=self.spec.shape.vocab_size,
        )

    def noise_at(self, step: int, told: Tensor, micro: int) -> Noise | None:
        """The gradient noise after `step` steps, of which the last one told `told` (3,); None where none is measured."""
        spec = self.spec
        if step not in visits_measured(spec, evaluation_steps(spec)) or not isinstance(
            self.step, (TrainStep, Slot)
        ):
            return None
        if spec.batch_sequences // micro >= ENOUGH_PARTS:
            part, whole = told[MEAN_PART_SQUARE].item(), told[SQUARE].item()
            return noise(part, whole, micro * spec.shape.context, spec.batch_tokens)
        windows = self.feed.windows(self.slot, step * spec.batch_sequences, PARTS)
        return NoiseProbe(self.step.model, self.step.layout, spec).measure(self.step.flat, windows)


@dataclass
class Program:
    """One step program and the sessions of its slots: one, or a stack's, in the order of the plan."""

    step: TrainStep
    sessions: list[Session]

    @property
    def max_block_steps(self) -> int:
        """How many steps `run_block` can do at once."""
        return self.sessions[0].feed.max_block_steps

    def run_block(self, places: Mapping[int, int], count: int) -> Tensor:
        """`count` steps of the members in the slots `places`, each from the step (counted from 0) that is given there.

        Returns what each step told, (count, slots, 3) float64 on the CPU, in one read; see `TrainStep.run`.
        """
        rows = [
            inputs(session, places[k], count) if k in places else nothing(session, count)
            for k, session in enumerate(self.sessions)
        ]
        device = self.sessions[0].device
        starts, controls = (torch.stack(each, 1).to(device) for each in zip(*rows, strict=True))
        if not self.step.stacked:
            starts, controls = starts[:, 0], controls[:, 0]
        # Read back first: not every device has float64 (MPS).
        told = self.step.run(starts, controls).cpu().double()
        return told if self.step.stacked else told[:, None]


def inputs(session: Session, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Window starts (count, batch) and controls (count, 3) of a run's steps first .. first + count - 1."""
    spec = session.spec
    team = current_team()
    if team is not None and not session.feed.is_whole:
        team.tell("load", session.slot, first, count)
    starts = session.feed.starts(session.slot, first, count)
    rates = [spec.learning_rate(step) for step in range(first, first + count)]
    return starts, control_rows(rates, first, spec.optimizer)


def nothing(session: Session, count: int) -> tuple[Tensor, Tensor]:
    """The inputs under which a slot rests."""
    return torch.zeros(count, session.spec.batch_sequences, dtype=torch.int64), torch.zeros(count, 3)


def train_block(session: Session, first: int, last: int) -> list[float]:
    """Steps first .. last - 1 (from 0) of a run alone; their losses."""
    assert isinstance(session.step, TrainStep)
    told = Program(session.step, [session]).run_block({0: first}, last - first)
    losses: list[float] = told[:, 0, LOSS].tolist()
    return losses


def check_data(spec: RunSpec, expected_fingerprint: str | None = None) -> str:
    """The fingerprint of the run's data. Raises `UserError` where they are not the plan's."""
    fingerprint: str = spec.data.fingerprint()
    if expected_fingerprint not in (None, fingerprint):
        raise UserError(
            f"data={spec.data.kind} on this machine (content {fingerprint[:12]}) is not the plan's "
            f"({str(expected_fingerprint)[:12]}): losses would not compare. Use the same Python version and files, "
            "or make a new sweep."
        )
    return fingerprint


def open_session(spec: RunSpec, execution: Execution, expected_fingerprint: str | None = None) -> Session:
    """Build the model of a run that is trained alone, load the data and check that they are the plan's."""
    return open_program([spec], execution, expected_fingerprint, stacked=False).sessions[0]


def open_program(
    specs: Sequence[RunSpec],
    execution: Execution,
    expected_fingerprint: str | None = None,
    *,
    stacked: bool,
) -> Program:
    """The program of one run, or of a stack of runs of one shape, batch and corpus; in a team, of all its processes."""
    team = current_team()
    if team is not None:
        return team.open(specs, execution, expected_fingerprint, stacked)
    return build_program(specs, execution, expected_fingerprint, stacked=stacked)


def build_program(
    specs: Sequence[RunSpec],
    execution: Execution,
    expected_fingerprint: str | None = None,
    *,
    stacked: bool,
    make_step: Callable[..., Any] = TrainStep,
    whole_models: bool = True,
) -> Program:
    """This process's program. Without `whole_models` the step brings the models to the device, part by part."""
    spec = specs[0]
    device = apply_execution(execution, spec.dtype)
    fingerprint = check_data(spec, expected_fingerprint)
    if execution.compile:
        # Dynamo keeps a few programs for each place in the source, and this one is the same for every run: beyond its limit
        # (8) a worker's later runs would silently be computed eagerly. One process computes one program at a time.
        torch.compiler.reset()
    feed = open_feed(specs, device, BLOCK_STEPS)
    models = []
    for each in specs:
        torch.manual_seed(each.seed_init)
        model = build_model(each.shape, each.parametrization)
        models.append(model.to(device) if whole_models else model)
    step = make_step(models if stacked else models[0], feed.tokens, specs if stacked else spec, execution)
    evaluation = Evaluation(spec, device)
    sessions = [
        Session(
            spec=each,
            device=device,
            step=Slot(step, k) if stacked else step,
            feed=feed,
            slot=k,
            evaluation=evaluation,
            fingerprint=fingerprint,
        )
        for k, each in enumerate(specs)
    ]
    return Program(step, sessions)
