"""Trunks and cooldown branches: planned in steps that fit, trained from the trunk's checkpoint, equal to runs alone."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from scaling_lab.analysis.analysis import observations_of_sweep
from scaling_lab.core.errors import UserError
from scaling_lab.core.record import RunStatus
from scaling_lab.core.schedules import Constant, Cosine, WarmupStableDecay
from scaling_lab.core.sources.pysource import PySource
from scaling_lab.core.spec import EvalSpec, Plan, PlannedRun, RunSpec
from scaling_lab.core.storage.store import RunStore
from scaling_lab.launching.worker import failed_record, train_pending
from scaling_lab.planning.cooldown import horizon_in_steps
from scaling_lab.planning.designs.isoflop import IsoFlopDesign
from scaling_lab.planning.designs.trunk_cooldown import TrunkCooldownDesign
from scaling_lab.planning.plan import make_plan
from scaling_lab.planning.recipes.base import SweepHorizons
from scaling_lab.planning.recipes.chinchilla import ChinchillaRecipe
from scaling_lab.planning.recipes.default import DefaultRecipe
from scaling_lab.planning.recipes.kaplan import KaplanRecipe
from scaling_lab.planning.recipes.porian import PorianRecipe
from scaling_lab.planning.settings import ExecutionSettings, ModelSettings, SweepSettings
from scaling_lab.planning.sizes import SizeLadder
from scaling_lab.training.run.checkpoint import kept_path, read_checkpoint, steps_saved


def settings(design: TrunkCooldownDesign | None = None, **changes) -> SweepSettings:
    base = SweepSettings(
        sweep="t",
        design=design or TrunkCooldownDesign(),
        recipe=DefaultRecipe(),
        model=ModelSettings(),
        data=PySource(),
        schedule=Cosine(),
        execution=ExecutionSettings(compile="false"),
    )
    return replace(base, **changes)


def tiny_plan() -> Plan:
    """Four sizes of 1.3k to 4k parameters at two budgets: trunks of up to about 200 steps."""
    design = TrunkCooldownDesign(
        budgets_flops=(8e7, 1.6e8),
        sizes_per_budget=4,
        sizes=SizeLadder(min_width=4, max_width=12, width_multiple=2, min_depth=1, width_ratio=1.26),
    )
    return make_plan(
        settings(
            design,
            model=ModelSettings(context=16, head_dim=4),
            data=PySource(max_mb=1),
            recipe=DefaultRecipe(batch_tokens=128),
            execution=ExecutionSettings(keep="resume"),
            eval=EvalSpec(tokens=1024, points=2),
        )
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Plan, RunStore]:
    plan = tiny_plan()
    store = RunStore(tmp_path_factory.mktemp("trunks") / "t")
    store.write_plan(plan)
    records = train_pending(store, plan)
    assert len(records) == len(plan.runs)
    return plan, store


def branches(plan: Plan) -> list[PlannedRun]:
    return [r for r in plan.runs if r.spec.parent is not None]


def test_horizons_in_whole_steps_by_hand():
    """1000 tokens in steps of 10 are 100 steps, of which 20 cool down; 3 steps leave one for the cooldown."""
    found = [horizon_in_steps(t, 10, 0.2) for t in (1000.0, 30.0, 20.0)]
    assert [(s.steps, s.branch_step) for s in found] == [(100, 80), (3, 2), (2, 1)]


def test_the_plan_holds_an_isoflop_grid_and_its_trunks():
    plan = make_plan(settings())
    grid = make_plan(settings(design=IsoFlopDesign(TrunkCooldownDesign().budgets_flops, noise_seeds=1)))
    of_grid = [(r.spec.budget_flops, r.spec.shape) for r in grid.runs]
    points = [r.spec for r in plan.runs if r.spec.role == "isoflop"]
    assert [(s.budget_flops, s.shape) for s in points] == of_grid
    for s in points:
        assert s.train_flops() == pytest.approx(s.budget_flops, rel=0.01)
        assert s.schedule.kind == "wsd"
    trunks = {r.run_id: r.spec for r in plan.runs if r.spec.role == "trunk"}
    for run in branches(plan):
        trunk = trunks[run.spec.parent]
        assert run.spec.parent_step in trunk.keep_steps
        assert (trunk.shape, trunk.batch_tokens, trunk.optimizer) == (
            run.spec.shape, run.spec.batch_tokens, run.spec.optimizer,
        )  # fmt: skip
        assert run.spec.schedule.decay_fraction == pytest.approx(0.2, abs=2 / run.spec.steps)
        # Half of the cosine's peak.
        assert trunk.optimizer.peak_lr == pytest.approx(0.0075 * (64 / trunk.shape.width) ** 0.67 / 2)


def test_a_size_with_one_budget_is_one_run_without_a_trunk():
    plan = make_plan(settings(TrunkCooldownDesign((1e11, 1.6e12), sizes=SizeLadder(width_multiple=2))))
    specs = [r.spec for r in plan.runs if r.spec.role == "isoflop"]
    once = [s for s in specs if sum(p.shape == s.shape for p in specs) == 1]
    assert once
    assert all(s.parent is None for s in once)
    assert len(specs) == 12
    assert len({s.shape for s in specs} - {s.shape for s in once}) == sum(
        r.spec.role == "trunk" for r in plan.runs
    )


def test_flops_are_counted_once_and_the_saving_is_reported():
    plan = make_plan(settings())
    points = [r.spec for r in plan.runs if r.spec.role == "isoflop"]
    trunks = [r.spec for r in plan.runs if r.spec.role == "trunk"]
    own = sum(6 * s.n_params() * (s.train_tokens - s.parent_step * s.batch_tokens) for s in points)
    spent = own + sum(6 * s.n_params() * s.train_tokens for s in trunks)
    assert plan.total_flops == pytest.approx(spent)
    alone = sum(s.train_flops() for s in points)
    saved = 1 - spent / alone
    assert 0.4 < saved < 0.6
    assert any(f"{saved:.0%} saved" in note for note in plan.notes)


def test_learning_rates_of_trunk_and_branch_are_the_same_up_to_the_branch_point():
    plan = make_plan(settings())
    specs = {r.run_id: r.spec for r in plan.runs}
    for run in branches(plan):
        branch, trunk = run.spec, specs[run.spec.parent]
        steps = [*range(0, branch.parent_step, 37), branch.parent_step - 1]
        ours = np.float32([branch.learning_rate(s) for s in steps])
        theirs = np.float32([trunk.learning_rate(s) for s in steps])
        np.testing.assert_array_equal(ours, theirs)
        assert branch.learning_rate(branch.parent_step) < trunk.optimizer.peak_lr
        assert branch.learning_rate(branch.steps - 1) < 1e-15


@pytest.mark.parametrize("recipe", [KaplanRecipe(), ChinchillaRecipe(), PorianRecipe()], ids=lambda r: r.kind)
def test_a_warmup_in_tokens_has_the_recipes_length(recipe):
    """A trunk warms up as its recipe's runs do, and a cooldown that starts before the end starts at the LR of that point."""
    plan = make_plan(settings(recipe=recipe))
    specs = {r.run_id: r.spec for r in plan.runs}
    smallest = [s for s in specs.values() if s.budget_flops == 1e11]
    mean_tokens = math.exp(statistics.fmean(math.log(s.train_tokens) for s in smallest))
    trunks = [s for s in specs.values() if s.role == "trunk"]
    assert len(trunks) > 3
    for trunk in trunks:
        tokens = {
            "kaplan": 3000 / 6200 * mean_tokens,
            "chinchilla": mean_tokens / 12,
            "porian": trunk.n_params(),
        }[recipe.kind]
        warm = trunk.schedule.warmup_fraction * trunk.train_tokens
        assert warm == pytest.approx(tokens, abs=trunk.batch_tokens, rel=0.01)
        # The recipe's own LR, for a run that is longer than its warm-up.
        own = recipe.decide(trunk.shape, 1e9, SweepHorizons(mean_tokens, 1e9)).optimizer.peak_lr
        assert trunk.optimizer.peak_lr == pytest.approx(0.5 * own)
    within = 0
    for run in branches(plan):
        branch, trunk = run.spec, specs[run.spec.parent]
        steps = range(branch.parent_step)
        ours = np.float32([branch.learning_rate(s) for s in steps])
        theirs = np.float32([trunk.learning_rate(s) for s in steps])
        np.testing.assert_allclose(ours, theirs, rtol=2e-7)
        said = [note for note in plan.notes if run.run_id in note and "during the recipe's warmup" in note]
        early = branch.optimizer.peak_lr < trunk.optimizer.peak_lr
        assert len(said) == early
        within += early
    assert (within > 0) == (recipe.kind == "kaplan")


def test_trunks_and_branches_are_trained_on_what_the_sweep_asks_for():
    """Noise and a limited corpus are the data's, whatever the design."""
    plan = make_plan(settings(noise=0.25, unique_tokens=2_000_000, max_epochs=4.0))
    assert {(r.spec.noise, r.spec.unique_tokens) for r in plan.runs} == {(0.25, 2_000_000)}
    assert max(r.spec.train_tokens for r in plan.runs) <= 4 * 2_000_000
    assert {r.spec.role for r in plan.runs} == {"trunk", "isoflop"}


def test_a_horizon_beyond_the_corpus_does_not_lengthen_the_trunk():
    plan = make_plan(settings(max_epochs=0.2))
    corpus = PySource().n_tokens("train")
    assert any(note.startswith("not planned") for note in plan.notes)
    assert max(r.spec.train_tokens for r in plan.runs) <= 0.2 * corpus
    ids = {r.run_id for r in plan.runs}
    assert all(r.spec.parent in ids for r in branches(plan))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: TrunkCooldownDesign(decay_fraction=1.0), "design.decay_fraction=1.0"),
        (lambda: TrunkCooldownDesign(cooldown="cosine"), "design.cooldown='cosine'"),
        (lambda: TrunkCooldownDesign(lr_ratio=0), "design.lr_ratio=0"),
        (lambda: TrunkCooldownDesign(budgets_flops=()), "design.budgets_flops"),
        (
            lambda: make_plan(settings(TrunkCooldownDesign((1e7, 2e7)))),
            "a trunk and a cooldown need at least 2",
        ),
    ],
)
def test_an_impossible_plan_is_one_clear_error(make, named):
    with pytest.raises(UserError, match=named) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_spec_refuses_a_parent_without_a_branch_step():
    spec = branches(tiny_plan())[0].spec
    for changes in ({"parent_step": 0}, {"parent": None}, {"parent_step": spec.steps}, {"keep_steps": (0,)}):
        with pytest.raises(UserError, match="must be within the run's"):
            replace(spec, **changes)
    assert RunSpec.from_dict(spec.to_dict()) == spec


def test_a_branch_is_bit_for_bit_the_run_of_its_horizon_trained_alone(trained, tmp_path):
    plan, store = trained
    for run in branches(plan)[:3]:
        spec = replace(run.spec, parent=None, parent_step=0)
        assert isinstance(spec.schedule, WarmupStableDecay)
        alone = PlannedRun(spec, run.execution)
        other = RunStore(tmp_path / run.run_id)
        train_pending(other, Plan("t", (alone,), plan.convention, plan.data_fingerprint))
        ours, theirs = store.read_record(run.run_id), other.read_record(alone.run_id)
        assert ours.final_val_loss_nats == theirs.final_val_loss_nats
        # The branch's curve begins where it left the trunk, with the FLOPs that were spent by then.
        assert ours.curve[0].step == run.spec.parent_step + 1
        assert ours.curve[0].train_flops == pytest.approx(
            spec.flops_per_token() * (run.spec.parent_step + 1) * spec.batch_tokens
        )
        later = [p for p in theirs.curve if p.step > run.spec.parent_step]
        assert [(p.step, p.train_loss_nats, p.lr) for p in ours.curve] == [
            (p.step, p.train_loss_nats, p.lr) for p in later
        ]
        one, two = (
            read_checkpoint(s.run_folder(i) / "checkpoint" / f"step-{spec.steps}.pt", i).tensors
            for s, i in ((store, run.run_id), (other, alone.run_id))
        )
        for name in one:
            assert torch.equal(one[name], two[name])


def test_the_trunk_keeps_the_checkpoints_of_its_branches(trained):
    plan, store = trained
    trunks = [r for r in plan.runs if r.spec.role == "trunk"]
    assert trunks
    for run in trunks:
        assert isinstance(run.spec.schedule, Constant)
        folder = store.run_folder(run.run_id) / "checkpoint"
        for step in run.spec.keep_steps:
            assert read_checkpoint(kept_path(folder, step), run.run_id).step == step
        # Pruning took the others, and validation was visited at the branch points.
        assert steps_saved(folder) == [run.spec.steps]
        visited = {p.step for p in store.read_curve(run.run_id) if p.val_loss_nats is not None}
        assert set(run.spec.keep_steps) <= visited


def test_the_analysis_counts_the_whole_cost_of_branches(trained):
    plan, store = trained
    records, problems = store.load_records()
    assert not problems
    observations = observations_of_sweep(records)
    points = {r.run_id: r.spec for r in plan.runs if r.spec.role != "trunk"}
    assert set(observations.run_names) == set(points)
    for name, d, c in zip(
        observations.run_id, observations.n_tokens, observations.compute_flops, strict=True
    ):
        assert d == points[name].train_tokens
        assert c == pytest.approx(points[name].train_flops())
    assert {d.reason.split(":")[0] for d in observations.dropped} == {"a trunk run"}


def test_a_worker_given_only_a_branch_trains_the_trunk_first(tmp_path):
    plan, store = tiny_plan(), RunStore(tmp_path / "t")
    branch = branches(plan)[0]
    made = train_pending(store, plan, [branch.run_id])
    assert [r.run_id for r in made] == [branch.spec.parent, branch.run_id]
    assert all(r.status is RunStatus.COMPLETED for r in made)


def test_a_branch_without_its_trunks_checkpoint_fails_with_a_reason(tmp_path):
    plan, store = tiny_plan(), RunStore(tmp_path / "t")
    branch = branches(plan)[0]
    trunk = next(r for r in plan.runs if r.run_id == branch.spec.parent)
    store.run_folder(trunk.run_id).mkdir(parents=True)
    store.write_record(failed_record(trunk, store, "", "it broke"))
    assert train_pending(store, plan, [branch.run_id]) == []
    state = store.state(branch.run_id)
    assert state.state == "failed"
    assert "finished without a checkpoint at step" in state.reason


def test_a_trunk_whose_owner_is_gone_is_taken_over(tmp_path):
    """Another process holds the trunk, and releases it without a record while this one waits for the branch point."""
    plan, store = tiny_plan(), RunStore(tmp_path / "t")
    branch = branches(plan)[0]
    trunk = next(r for r in plan.runs if r.run_id == branch.spec.parent)
    claim = store.claim(trunk.spec)
    threading.Timer(1.5, claim.release).start()
    made = train_pending(store, plan, [branch.run_id])
    assert [r.run_id for r in made] == [trunk.run_id, branch.run_id]


@pytest.mark.slow
def test_workers_share_trunks_and_branches(tmp_path, trained):
    """Two concurrent processes: one that finds only branches of a running trunk waits for it. The losses equal those of one process."""
    plan, alone = trained
    store = RunStore(tmp_path / "t")
    store.write_plan(plan)
    command = [sys.executable, "-m", "scaling_lab.worker", str(store.folder)]
    workers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for worker in workers:
        _, said = worker.communicate(timeout=120)
        assert worker.returncode == 0, said
    for run in plan.runs:
        ours, theirs = (s.read_record(run.run_id, curve=False) for s in (store, alone))
        assert ours.final_val_loss_nats == theirs.final_val_loss_nats
    assert not list(Path(store.folder).glob("runs/*/record-failed-*"))
