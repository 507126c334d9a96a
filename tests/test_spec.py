"""Specs, ids and their JSON form."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.specs import spec
from scaling_lab.core.errors import UserError
from scaling_lab.core.parametrization import MuP
from scaling_lab.core.schedules import Constant, Cosine
from scaling_lab.core.shapes.gpt import GPTShape
from scaling_lab.core.shapes.gpt2 import GPT2Shape
from scaling_lab.core.sources.pysource import PySource
from scaling_lab.core.spec import EvalSpec, Execution, OptimizerSpec, Plan, PlannedRun, RunSpec
from scaling_lab.core.storage.serialization import canonical_json, dumps, to_dict


def test_golden_ids():
    """These ids are on users' disks: changing them loses runs. Add fields with defaults instead."""
    assert spec().run_id() == "gpt-w32-d2-c1e11-s0-cde11d6ea5"
    other = spec(
        shape=GPT2Shape(width=48, depth=3, heads=3), seed_init=7, schedule=Constant(), dtype="bfloat16"
    )
    assert other.run_id() == "gpt2-w48-d3-c1e11-s7-87a143e985"


def test_labels_do_not_change_the_id():
    assert spec(sweep="other", role="noise").run_id() == spec().run_id()


@pytest.mark.parametrize(
    "changes",
    [
        {"seed_init": 1}, {"seed_data": 1}, {"dtype": "bfloat16"}, {"train_tokens": 512}, {"batch_tokens": 1024},
        {"budget_flops": 2e11}, {"parent": "x", "parent_step": 1}, {"keep_steps": (3,)}, {"eval": EvalSpec(points=3)}, {"schedule": Cosine(final_fraction=0.0)},
        {"optimizer": OptimizerSpec(peak_lr=0.03)}, {"shape": GPTShape(width=32, depth=3, heads=2)},
        {"data": PySource(split_seed=1)}, {"parametrization": MuP()},
    ],
)  # fmt: skip
def test_every_other_field_changes_the_id(changes):
    assert spec(**changes).run_id() != spec().run_id()


def test_a_default_is_not_in_the_canonical_form():
    assert canonical_json(GPTShape()) == '{"kind":"gpt"}'
    assert json.loads(canonical_json(GPTShape(width=32, depth=4))) == {"kind": "gpt", "width": 32, "depth": 4}


# The first example imports the families and sources.
@settings(deadline=None)
@given(
    width=st.sampled_from([16, 32, 64]), depth=st.integers(1, 5), steps=st.integers(1, 10**6), lr=st.floats(1e-6, 1),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_json_round_trip(width, depth, steps, lr, seed):
    one = spec(
        shape=GPTShape(width=width, depth=depth, heads=2), train_tokens=512 * steps,
        optimizer=OptimizerSpec(peak_lr=lr), seed_init=seed,
    )  # fmt: skip
    again = RunSpec.from_dict(json.loads(dumps(one.to_dict())))
    assert again == one
    assert again.run_id() == one.run_id()


def test_a_field_of_a_newer_version_is_an_error():
    data = spec().to_dict()
    data["flux"] = 1
    with pytest.raises(ValueError, match="flux"):
        RunSpec.from_dict(data)


def test_derived_numbers():
    one = spec()
    assert one.steps == 1000
    assert one.batch_sequences == 8
    n = 12 * 2 * 32 * 32 + 5 * 32 + 256 * 32
    assert one.n_params() == n
    assert one.train_flops() == 6.0 * n * 512_000
    assert one.learning_rate(999) == pytest.approx(0.02 * 0.1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_tokens": 100}, "batch_tokens=100"),
        ({"train_tokens": 100}, "train_tokens=100 is less than one step"),
        ({"train_tokens": 1000}, "train_tokens=1000 is not a whole number"),
        ({"dtype": "float8"}, "dtype='float8'"),
        ({"shape": GPTShape(vocab_size=100)}, "model.vocab_size=100"),
    ],
)
def test_impossible_specs_are_refused(changes, named):
    with pytest.raises(UserError, match=named):
        spec(**changes)


def test_plan_round_trip_and_repeated_runs():
    runs = (PlannedRun(spec(), Execution()), PlannedRun(spec(seed_init=1), Execution(compile=True)))
    plan = Plan("s", runs, spec().convention, "abc", rounding=("r",), notes=("n",), settings=to_dict(spec()))
    assert Plan.from_dict(json.loads(dumps(plan.to_dict()))) == plan
    assert plan.total_flops == 2 * spec().train_flops()
    with pytest.raises(UserError, match="same run twice"):
        Plan("s", (runs[0], runs[0]), spec().convention, "abc")
