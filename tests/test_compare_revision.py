"""Tests of what scripts/compare_revision.py counts as a difference between two revisions."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module, and the script imports the others
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def values() -> ModuleType:
    return load("compare_revision_rules")


@pytest.fixture(scope="module")
def script(values) -> ModuleType:
    load("compare_revision_trees")
    return load("compare_revision")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (1.0, 1.0000000000000002),
        (0.0, -0.0),
        (1, True),
        (None, 0),
        ("ok", "at_edge"),
        ([1, 2], [1, 2, 3]),
        ([1, 2], [1, 3]),
        ({"a": 1}, {}),
        ({"a": None}, {}),
        ({"a": {"b": 1}}, {"a": None}),
        (b"one", b"two"),
        (b'{"a": 1}', b'{"a":1}'),
        (b'{"a": 1}', b'{"a": 1, "b": 2}'),
    ],
)
def test_differences(values, old, new):
    found = values.compare({"x": old}, {"x": new}, values.Rules())
    assert len(found.differences) == 1
    assert found.differences[0][0].startswith(("x", "(bytes)", "a"))


def test_equal_values_are_counted(values):
    value = {"a": [1, 2.5, None, "ok"], "b": {"c": float("nan")}, "d": b"bytes"}
    found = values.compare(value, value, values.Rules())
    assert (found.values, found.differences) == (6, [])


def test_a_new_key_is_listed_and_is_not_a_difference(values):
    old = {"rows": [{"a": 1}, {"a": 2}]}
    new = {"rows": [{"a": 1, "b": 3}, {"a": 2, "b": 4}], "findings": []}
    found = values.compare(old, new, values.Rules())
    assert found.differences == []
    assert found.added == {"rows[].b": 2, "findings": 1}


def test_exempt_keys_are_matched_from_the_end_of_the_path(values):
    rules = values.Rules(exempt=("wall_time_s", "environment.host"))
    old = {"points": [{"wall_time_s": 1.0, "loss": 2.0}], "environment": {"host": "a"}, "host": "a"}
    new = {"points": [{"wall_time_s": 9.0, "loss": 2.0}], "environment": {}, "host": "b"}
    found = values.compare(old, new, rules)
    assert found.differences == [("host", "a", "b")]
    assert found.values == 2


def test_a_sentence_may_be_reworded_but_not_appear_or_vanish(values):
    rules = values.Rules(sentences=("message", "warnings"))
    old = {"message": "No budget.", "warnings": ["one", "two"]}
    found = values.compare(old, {"message": "no budgets", "warnings": ["three"]}, rules)
    assert found.differences == []
    assert +found.reworded == {"message": 1, "warnings": 1}
    assert len(values.compare(old, {"message": None, "warnings": []}, rules).differences) == 2
    assert len(values.compare({"message": None, "warnings": []}, old, rules).differences) == 2


def test_the_files_of_a_run(values):
    rules = values.RULES["runs"]
    record = {"wall_time_s": 1.0, "environment": {"host": "a", "torch": "2"}, "final_val_loss_nats": 2.0}
    again = {"wall_time_s": 2.0, "environment": {"host": "b", "torch": "2"}, "final_val_loss_nats": 2.0}
    assert values.compare(record, again, rules).differences == []
    for changed in ({**again, "final_val_loss_nats": 2.1}, {**again, "environment": {"torch": "3"}}):
        assert len(values.compare(record, changed, rules).differences) == 1


def test_sentences_by_name_may_be_reworded(values):
    rules = values.Rules(sentences=("messages",))
    found = values.compare(
        {"messages": {"E": "old", "A": None}}, {"messages": {"E": "new", "A": None}}, rules
    )
    assert (found.differences, +found.reworded) == ([], {"messages.E": 1})
    assert values.compare({"messages": {"E": "old"}}, {"messages": {"E": None}}, rules).differences


def test_a_missing_document_is_a_difference_and_no_document_is_an_error(values):
    found = values.compare_documents({"a": 1, "b": 1}, {"a": 1, "runs/x/c": 1}, values.EXACT)
    assert found.differences == [("b", "there", "missing")]
    assert found.added == {"c": 1}
    for empty in ({}, {"a": {}}, {"a": {"source": 1}}):
        with pytest.raises(values.Failed):
            values.compare_documents(empty, empty, values.RULES["analysis.json"])


def test_bytes_that_are_json_are_compared_by_value(values):
    old, new = {"runs": [{"lr": 1.0}]}, {"runs": [{"lr": 2.0}]}
    found = values.compare(json.dumps(old).encode(), json.dumps(new).encode(), values.Rules())
    assert found.differences == [("runs[0].lr", 1.0, 2.0)]


def test_tensors_differ_by_one_bit(script, tmp_path):
    def checkpoint(name: str, data: bytes) -> dict[str, str]:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data.pkl", b"names")
            archive.writestr("archive/data/0", data)
            archive.writestr("archive/.data/serialization_id", name)
        (tmp_path / name).write_bytes(buffer.getvalue())
        return script.tensor_digests(tmp_path / name)

    first = checkpoint("a", b"\0\0")
    assert first.keys() == {"data.pkl", "data/0"}
    assert first == checkpoint("b", b"\0\0")
    assert first != checkpoint("c", b"\0\1")


def test_plans_are_compared_byte_for_byte_but_for_their_sentences(values, script, tmp_path):
    def plan(sentences: list[str], indent: int = 1) -> dict[str, dict[str, object]]:
        document = {"runs": [{"run_id": "a"}], "notes": sentences, "rounding": []}
        (tmp_path / "plan.json").write_text(json.dumps(document, indent=indent))
        return {"plan": script.plan_document(tmp_path / "plan.json")}

    rules = values.RULES["plan.json"]
    same = values.compare_documents(plan(["It ends."]), plan(["The run ends."]), rules)
    assert (same.differences, +same.reworded) == ([], {"notes": 1})
    for other in (plan([]), plan(["One.", "Two."]), plan(["It ends."], indent=2)):
        assert values.compare_documents(plan(["It ends."]), other, rules).differences


def test_the_report_fails_where_nothing_was_compared(script):
    for each in (
        script.Row("plans", "nothing", script.Comparison(), 0.0),
        script.Row("plans", "could not be run", script.Comparison(), 0.0, "Failed: no plan"),
        script.Row("plans", "one", script.Comparison(1, [("a", 1, 2)]), 0.0),
    ):
        assert "NOT IDENTICAL" in script.report("title", [each])
    good = script.Row("plans", "one", script.Comparison(1), 0.0)
    assert "All values compared are identical." in script.report("title", [good])
