"""Parametrizations: the rules at hand-computed points, the roles, initial values and forward pass of every family, and how
they interact with recipes."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import replace

import pytest
import torch

from scaling_lab.cli.main import main
from scaling_lab.core.errors import UserError
from scaling_lab.core.parametrization import (
    CLASSES,
    STANDARD,
    CompleteP,
    MuP,
    Role,
    parametrization_class,
    role_of,
)
from scaling_lab.core.registry import members
from scaling_lab.core.schedules import Cosine
from scaling_lab.core.shapes.gpt import GPTShape
from scaling_lab.core.shapes.gpt2 import GPT2Shape
from scaling_lab.core.sources.pysource import PySource
from scaling_lab.core.spec import Execution, OptimizerSpec, PlannedRun, RunSpec
from scaling_lab.core.storage.serialization import dumps
from scaling_lab.core.storage.store import RunStore
from scaling_lab.planning.recipes.base import SweepHorizons, decide
from scaling_lab.planning.recipes.default import DefaultRecipe
from scaling_lab.training.engine.optimizer import FlatLayout, adamw_update, control_rows, group_vectors
from scaling_lab.training.models import build_model
from scaling_lab.training.run.loop import train_run

# All families with their default options; a new one is included automatically.
FAMILIES = [cls() for cls in members("scaling_lab.core.shapes").values()]
SHAPES = [*FAMILIES, GPTShape(tied_head=True), GPTShape(mlp="swiglu", mlp_ratio=8 / 3)]
KINDS = [cls() for cls in CLASSES.values()]
BASE = {"width": 64, "depth": 2, "heads": 4}


def name_of(value: object) -> str:
    return repr(value).replace(" ", "")


def sized(shape, width: int, depth: int, heads: int):
    return replace(shape, width=width, depth=depth, heads=heads)


# -- the rules


def test_scaling_rules_at_a_hand_computed_point():
    """Four times the base width, eight times the base depth, twice the base head dimension: Dey et al. 2025, table 1."""
    shape = GPTShape(width=256, depth=16, heads=8)
    mup, full, half = MuP(), CompleteP(), CompleteP(alpha=0.5)
    assert [p.multipliers(shape).head for p in (STANDARD, mup, full)] == [1.0, 0.25, 0.25]
    assert [p.multipliers(shape).residual for p in (STANDARD, mup, full)] == [1.0, 1.0, 0.125]
    assert half.multipliers(shape).residual == pytest.approx(8**-0.5)
    assert [p.multipliers(shape).hidden_init for p in (STANDARD, mup, full)] == [1.0, 0.5, 0.5]
    # 1/d instead of 1/sqrt(d), equal at a head dimension of 16.
    assert STANDARD.multipliers(shape).attention is None
    assert mup.multipliers(shape).attention == pytest.approx(4 / 32)
    factors = {
        (p.kind, role.value): dataclasses.astuple(p.factors(role, shape))
        for p in (mup, full)
        for role in Role
    }
    assert factors == {
        ("mup", "input"): (1, 1, 0.25),
        ("mup", "hidden"): (0.25, 4, 0.25),
        ("mup", "block_vector"): (1, 1, 0.25),
        ("mup", "vector"): (1, 1, 0.25),
        ("mup", "output"): (1, 1, 0.25),
        ("completep", "input"): (1, 1, 0.25),
        ("completep", "hidden"): (0.25, 4, 0.25 / 8),
        ("completep", "block_vector"): (1, 1, 0.25 / 8),
        ("completep", "vector"): (1, 1, 0.25),
        ("completep", "output"): (1, 1, 0.25),
    }
    assert half.factors(Role.HIDDEN, shape).lr == pytest.approx(0.25 * 8**-0.5)
    assert half.factors(Role.BLOCK_VECTOR, shape).lr == pytest.approx(8**-0.5)
    assert half.factors(Role.INPUT, shape).lr == 1
    assert half.factors(Role.HIDDEN, shape).eps == pytest.approx(0.25 * 8**-0.5)


def test_base_shapes():
    shape = GPTShape(width=256, depth=16, heads=8, context=32, vocab_size=300, mlp="gelu")
    assert STANDARD.base_shape(shape) == shape
    assert MuP().base_shape(shape) == replace(shape, width=64, heads=4)
    assert CompleteP(base_width=32, base_head_dim=8).base_shape(shape) == replace(
        shape, width=32, heads=4, depth=2
    )


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: MuP(base_width=0), "parametrization.base_width=0"),
        (lambda: MuP(base_width=24), "parametrization.base_head_dim=16"),
        (lambda: MuP(base_width=15, base_head_dim=5), "must be even"),
        (lambda: CompleteP(base_depth=0), "parametrization.base_depth=0"),
        (lambda: CompleteP(alpha=1.5), "parametrization.alpha=1.5"),
        (lambda: parametrization_class("nup"), "parametrization='nup'.*mup"),
    ],
)
def test_impossible_parametrizations_are_refused(make, named):
    with pytest.raises(UserError, match=named):
        make()


# -- every family


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_roles_follow_from_the_sides_that_grow_with_the_width(shape):
    """Both sides of a hidden matrix grow, one of an embedding or a head, and the only one of a vector."""
    model = {w: dict(build_model(sized(shape, w, 2, 2)).named_parameters()) for w in (32, 64)}
    growing = {Role.HIDDEN: 2, Role.INPUT: 1, Role.OUTPUT: 1, Role.VECTOR: 1, Role.BLOCK_VECTOR: 1}
    seen = set()
    for name, p in model[32].items():
        role = role_of(name, p.ndim)
        seen.add(role)
        wide = model[64][name]
        assert sum(b > a for a, b in zip(p.shape, wide.shape, strict=True)) == growing[role], name
    assert {Role.INPUT, Role.HIDDEN, Role.BLOCK_VECTOR, Role.VECTOR} <= seen


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_at_the_base_shape_all_equal_standard(shape, kind):
    shape = sized(shape, **BASE)
    torch.manual_seed(0)
    expected = build_model(shape)
    torch.manual_seed(0)
    model = build_model(shape, kind)
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q), name
    tokens = torch.randint(0, 256, (2, 64))
    torch.testing.assert_close(model(tokens), expected(tokens))
    ours = group_vectors(FlatLayout.of(model), OptimizerSpec(peak_lr=1.0), kind, shape)
    theirs = group_vectors(FlatLayout.of(model), OptimizerSpec(peak_lr=1.0))
    assert ours.lr_ratio == theirs.lr_ratio == 1.0
    assert torch.equal(ours.weight_decay, theirs.weight_decay)
    assert ours.eps == theirs.eps == 1e-8


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("kind", [MuP(), CompleteP()], ids=name_of)
def test_initial_values_follow_the_base_shape(shape, kind):
    """At four times the base width and depth, matrices in blocks have (base std) / 2, everything else the base's std."""
    torch.manual_seed(0)
    big, depth = sized(shape, 256, 8, 16), 2 if kind.kind == "completep" else 8
    base = dict(build_model(sized(shape, 64, depth, 4)).named_parameters())
    for name, p in build_model(big, kind).named_parameters():
        if p.ndim < 2:
            assert p.unique().numel() == 1, name
            continue
        role = role_of(name, p.ndim)
        expected = base.get(name)  # None for blocks beyond the base's depth
        if expected is not None:
            factor = 0.5 if role is Role.HIDDEN else 1.0
            # The samples have at least 4,096 elements, so the standard error of their std is 1.1%.
            assert p.std().item() == pytest.approx(factor * expected.std().item(), rel=0.05), name


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_multipliers_equal_scaled_weights(shape):
    """The forward pass of a completep model equals that of a standard model whose weights carry the multipliers."""
    kind = CompleteP(base_width=16, base_head_dim=8, base_depth=1)
    shape = sized(shape, 32, 4, 4)  # head dimension 8: attention as in standard
    torch.manual_seed(0)
    model, plain = build_model(shape, kind).double(), build_model(shape).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        plain.load_state_dict(model.state_dict())
        for name, p in plain.named_parameters():
            if ".attention_out." in name or ".mlp_out." in name:
                p.mul_(1 / 4)
        for name, p in plain.named_parameters():
            if name.startswith("final_norm."):  # the head's input; a tied head must keep its embedding
                p.mul_(1 / 2)
    tokens = torch.randint(0, 256, (2, 64))
    torch.testing.assert_close(model(tokens), plain(tokens))
    assert not torch.allclose(build_model(shape, STANDARD).double()(tokens), plain(tokens))


def test_attention_is_divided_by_the_head_dimension():
    """Compared with a gpt2 model whose queries are scaled, at head dimension 32 and a base of 8."""
    shape = GPT2Shape(width=64, depth=1, heads=2)
    torch.manual_seed(0)
    model = build_model(shape, MuP(base_width=64, base_head_dim=8)).double()
    plain = build_model(shape).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        plain.load_state_dict(model.state_dict())
        for p in (plain.blocks[0].qkv.weight, plain.blocks[0].qkv.bias):
            p[:64] *= (8**0.5 / 32) / 32**-0.5
    tokens = torch.randint(0, 256, (2, 64))
    torch.testing.assert_close(model(tokens), plain(tokens))


@pytest.mark.parametrize("shape", FAMILIES, ids=name_of)
def test_multipliers_are_plain_numbers_to_stacks_and_compilers(shape):
    """vmap over the parameters of two models gives the logits of each."""
    shape, kind = sized(shape, 32, 4, 2), CompleteP()
    models = [build_model(shape, kind) for _ in range(2)]
    stacked, buffers = torch.func.stack_module_state(models)
    tokens = torch.randint(0, 256, (2, 64))
    together = torch.func.vmap(
        lambda p, b: torch.func.functional_call(models[0], (p, b), (tokens,)), in_dims=(0, 0)
    )(stacked, buffers)
    for one, logits in zip(models, together, strict=True):
        torch.testing.assert_close(logits, one(tokens))


# -- the optimizer


@pytest.mark.parametrize("shape", FAMILIES, ids=name_of)
def test_ten_steps_equal_torchs_adamw_with_groups_written_by_hand(shape):
    """At four times the base width and depth, with gradients so small that epsilon affects the update."""
    shape, kind = sized(shape, 64, 4, 4), CompleteP(base_width=16, base_depth=1, base_head_dim=8)
    model = build_model(shape, kind).double()
    layout = FlatLayout.of(model)
    optimizer = OptimizerSpec(peak_lr=0.01, embedding_lr_ratio=3.0, head_lr_ratio=0.5, eps=1e-4)
    flat = layout.flatten({n: p.detach() for n, p in model.named_parameters()}).clone()
    first, second = torch.zeros_like(flat), torch.zeros_like(flat)
    ours = group_vectors(layout, optimizer, kind, shape).to(torch.float64)
    groups = []
    for name, p in model.named_parameters():
        block, matrix = name.startswith("blocks."), p.ndim >= 2
        ratio = (
            3.0 if name.startswith(("embedding.", "positions.")) else 0.5 if name.startswith("head.") else 1.0
        )
        groups.append(
            {
                "params": [p],
                "lr": 0.01 * ratio * (0.25 if block and matrix else 1.0),
                "weight_decay": 0.0 if not matrix else 0.4 if block else 0.1,
                "eps": 1e-4 / 16 if block else 1e-4 / 4,
            }
        )
    theirs = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    controls = control_rows([0.01] * 10, 0, optimizer).double()
    for step in range(10):
        gradients = {n: 1e-5 * torch.randn_like(p) for n, p in model.named_parameters()}
        for name, p in model.named_parameters():
            p.grad = gradients[name].clone()
        theirs.step()
        adamw_update(flat, layout.flatten(gradients), first, second, ours, optimizer, controls[step])
    for name, p in model.named_parameters():
        torch.testing.assert_close(layout.views(flat)[name], p.detach(), rtol=1e-5, atol=1e-7)


def test_a_matrix_without_a_role_is_an_error():
    with pytest.raises(ValueError, match=r"'experts\.weight' has no role"):
        role_of("experts.weight", 2)


# -- recipes, specs, runs


def test_the_recipes_lr_applies_at_the_base_shape():
    """The recipe's width rule or muP's, never both."""
    # A horizon so short that the recipe's own rules hold at this size.
    wide, recipe, alone = GPTShape(width=256, depth=8, heads=16), DefaultRecipe(), SweepHorizons(1e5, 1e5)
    standard = decide(recipe, STANDARD, wide, 1e5, alone)
    assert standard == recipe.decide(wide, 1e5, alone)
    assert standard.optimizer.peak_lr == pytest.approx(0.0075 / 4**0.67)
    mup = decide(recipe, MuP(), wide, 1e5, alone)
    assert mup.optimizer.peak_lr == pytest.approx(0.0075)
    assert mup.batch_tokens == standard.batch_tokens
    # A quarter of it for the hidden matrices, at four times the base width.
    assert MuP().factors(Role.HIDDEN, wide).lr == 1 / 4
    assert decide(recipe, MuP(base_width=128), wide, 1e5, alone).optimizer.peak_lr == pytest.approx(
        0.0075 / 2**0.67
    )


def spec(**changes) -> RunSpec:
    base = RunSpec(
        sweep="s", role="single", budget_flops=1e9, shape=GPTShape(width=32, depth=4, heads=2), data=PySource(),
        schedule=Cosine(), optimizer=OptimizerSpec(peak_lr=0.007), batch_tokens=512, train_tokens=512 * 20,
    )  # fmt: skip
    return replace(base, **changes)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_a_spec_has_a_parametrization_and_an_old_spec_is_standard(kind):
    one = spec(parametrization=kind)
    data = json.loads(dumps(one.to_dict()))
    assert RunSpec.from_dict(data) == one
    assert (one.run_id() == spec().run_id()) == (kind.kind == "standard")
    del data["parametrization"]
    assert RunSpec.from_dict(data) == spec()


def test_a_base_shape_that_the_family_cannot_have_is_refused():
    with pytest.raises(UserError, match="base_head_dim=16"):
        spec(parametrization=MuP(base_width=40))


def test_trained_runs_differ_by_parametrization(tmp_path):
    """Real runs away from the base shape: their first losses differ, and all of them learn."""
    curves = {}
    for kind in KINDS:
        planned = PlannedRun(spec(parametrization=kind), Execution())
        store = RunStore(tmp_path / kind.kind)
        record = train_run(planned, store, store.claim(planned.spec))
        curves[kind.kind] = [p.train_loss_nats for p in record.curve]
    assert len({curve[0] for curve in curves.values()}) == 3
    assert all(math.isfinite(c[-1]) and c[-1] < c[0] - 0.5 for c in curves.values())


TINY_PLAN = ["sweep=s", "device=cpu", "compile=false", "data.max_mb=1", "design.budgets_flops=[1e9]"]


def test_a_plan_of_a_version_without_parametrizations_is_the_same_plan(tmp_path, monkeypatch, capsys):
    """An option that an old plan.json does not have is not a difference if the runs are the same; another value is one."""
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *TINY_PLAN]) == 0
    store = RunStore("results/s")
    plan = store.read_plan()
    assert {run.spec.parametrization for run in plan.runs} == {STANDARD}
    assert plan.settings.pop("parametrization") == {"kind": "standard"}
    store.write_plan(plan)
    store.claim(
        plan.runs[0].spec
    ).release()  # the sweep has begun, so that from here on differences are refused
    assert main(["plan", *TINY_PLAN]) == 0
    assert "unchanged" in capsys.readouterr().out
    assert main(["plan", *TINY_PLAN, "parametrization=mup"]) == 2
    assert "parametrization (on disk nothing, now" in capsys.readouterr().err


def test_a_list_multiplies_a_plan(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *TINY_PLAN, "parametrization=standard,completep"]) == 0
    out = capsys.readouterr().out
    assert "completep" in out
    data = json.loads((tmp_path / "results/s/plan.json").read_text())
    kinds = [run["spec"]["parametrization"]["kind"] for run in data["runs"]]
    assert sorted(set(kinds)) == ["completep", "standard"]
    assert kinds.count("completep") == kinds.count("standard")


def test_a_list_of_corpora_is_refused_before_training(tmp_path, monkeypatch, capsys):
    """Workers check one corpus per sweep, so such a plan could not be trained."""
    monkeypatch.chdir(tmp_path)
    few = [word for word in TINY_PLAN if not word.startswith("data")]
    assert main(["plan", *few, "data=zipf_facts", "data.facts=9", "data.slope=0.3,0.7"]) == 2
    message = capsys.readouterr().err
    assert "a sweep has one" in message
    assert "data.slope: 0.3, 0.7" in message
    assert not (tmp_path / "results/s/plan.json").exists()


def test_an_experiments_lists_multiply_its_plan(tmp_path, monkeypatch):
    """experiment=lr_transfer plans every size with each parametrization; a choice by the user replaces its list."""
    monkeypatch.chdir(tmp_path)
    small = ["experiment=lr_transfer", "device=cpu", "compile=false", "design.widths=[16]", "design.seeds=1"]
    assert main(["plan", *small]) == 0
    runs = RunStore("results/lr_transfer").read_plan().runs
    assert [run.spec.parametrization.kind for run in runs[::15]] == ["standard", "mup", "completep"]
    assert len(runs) == 3 * 3 * 5
    assert main(["plan", *small, "sweep=mine", "parametrization=mup"]) == 0
    assert {run.spec.parametrization.kind for run in RunStore("results/mine").read_plan().runs} == {"mup"}
