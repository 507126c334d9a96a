"""Tests of parsing the command line and option values: flags anywhere, lenient numbers, one-line errors."""

from __future__ import annotations

import contextlib
import re
from fractions import Fraction
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling_lab.cli.options.arguments import nearest, parse
from scaling_lab.cli.options.configs import builtin_folder
from scaling_lab.cli.options.values import read_value, split_list
from scaling_lab.core.counts import Convention
from scaling_lab.core.errors import UserError
from scaling_lab.launching.hydra_jobs import hydra_text


def test_flags_are_taken_in_any_position():
    arguments = parse(["--json", "analyze", "runs=a.csv", "-q", "seed=1", "--verbose"])
    assert arguments.command == "analyze"
    assert arguments.flags == {"json", "quiet", "verbose"}
    assert [a.text for a in arguments.assignments] == ["runs=a.csv", "seed=1"]


def test_only_the_first_equals_sign_splits_and_hydras_plus_is_removed():
    arguments = parse(["analyze", "runs=a=b (1).csv", "++columns.loss=val loss (nats)", "where.train/loss=1"])
    assert [(a.key, a.value) for a in arguments.assignments] == [
        ("runs", "a=b (1).csv"),
        ("columns.loss", "val loss (nats)"),
        ("where.train/loss", "1"),
    ]


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["plan", "seed=1", "seed=2"], "seed is given twice"),
        (["plan", "seed=1", "+seed=2"], "seed is given twice"),
        (["plan", "seed="], "seed= has no value"),
        (["plan", "seed", "=", "1"], "'seed' is not an option"),
        (["plan", "~tracker=none"], "cannot be removed"),
        (["plan", "--jsno"], "Did you mean --json?"),
        (["plan", "--seed=3"], "seed=3"),
        (["seed=3"], "without a command"),
        (["plan", "sweep=a\nb"], "control character"),
    ],
)
def test_refusals_give_the_reason(argv, part):
    with pytest.raises(UserError) as error:
        parse(argv)
    assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "wanted", "value"),
    [
        ("1e9", int, 10**9),
        ("2.5B", int, 2_500_000_000),
        ("200_000", int, 200_000),
        ("2M", int, 2_000_000),
        ("1.1T", int, 1_100_000_000_000),
        ("12.", int, 12),
        ("-3", int, -3),
        ("1e-3", float, 1e-3),
        ("400M", float, 4e8),
        ("yes", bool, True),
        ("off", bool, False),
        ("null", int | None, None),
        ("7", int | None, 7),
        ("auto", int | str, "auto"),
        ("'quoted name'", str, "quoted name"),
        ("a, b=c (1)", str, "a, b=c (1)"),
        ("[1e9, 4e9]", tuple[float, ...], (1e9, 4e9)),
        ("1K,2K", tuple[int, ...], (1000, 2000)),
        ("[]", tuple[int, ...], ()),
        ("six_n_total", Convention, Convention.SIX_N_TOTAL),
        ("hull", Literal["interpolate", "hull"], "hull"),
    ],
)
def test_values_are_parsed_leniently(text, wanted, value):
    read = read_value("key", text, wanted)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("hours", "30m", 0.5),
        ("gpu_hours", "1h30m", 1.5),
        ("hours", "2", 2.0),
        ("max_hours", "2d", 48.0),
        ("wall_time_s", "3m", 180.0),
    ],
)
def test_a_time_is_read_in_the_unit_of_the_fields_name(key, text, value):
    assert read_value(key, text, float) == value


def test_a_price_per_hour_is_not_a_time():
    assert read_value("price_per_hour", "2.49", float | None) == 2.49
    with pytest.raises(UserError, match="expected a number such as"):
        read_value("price_per_hour", "2h", float | None)


@pytest.mark.parametrize(
    ("text", "wanted", "part"),
    [
        ("1.5", int, "an integer"),
        ("abc", int, "an integer"),
        ("1e30", int, "too large"),
        ("1e9999", float, "too large"),
        ("9" * 500, int, "too large"),
        ("nan", float, "a number"),
        ("inf", float, "a number"),
        ("maybe", bool, "true or false"),
        ("[1,,2]", tuple[int, ...], "a list"),
        ("six", Convention, "six_n_total"),
        ("hul", Literal["interpolate", "hull"], "Did you mean 'hull'?"),
    ],
)
def test_a_wrong_value_names_the_option_and_the_expected_type(text, wanted, part):
    with pytest.raises(UserError) as error:
        read_value("some.key", text, wanted)
    assert "some.key" in str(error.value)
    assert part in str(error.value)


@given(st.integers(0, 10**6), st.sampled_from(["", "K", "m", "B", "T"]))
def test_suffixes_are_exact(number, suffix):
    factor = {"": 1, "K": 10**3, "m": 10**6, "B": 10**9, "T": 10**12}[suffix]
    assert read_value("key", f"{number}{suffix}", int) == number * factor
    assert read_value("key", f"{number}.5{suffix or 'K'}", float) == float(
        Fraction(2 * number + 1, 2) * (factor if suffix else 1000)
    )


@given(st.text() | st.floats().map(str) | st.integers().map(str) | st.lists(st.integers()).map(str))
def test_any_text_is_parsed_correctly_or_refused_with_the_options_name(text):
    for wanted in (int, float, bool, tuple[int, ...], int | None, Convention):
        try:
            value = read_value("seed", text, wanted)
        except UserError as error:
            refusal = str(error)
        else:
            refusal = None
            assert_is_read(value, text, wanted)
        assert refusal is None or refusal.startswith("seed="), wanted


def assert_is_read(value: object, text: str, wanted: object) -> None:
    """The value has the expected type, and equals the number that Python parses, if it does (suffixes have their own test)."""
    if wanted is Convention:
        assert value == Convention(text.strip())
    elif wanted is bool:
        assert value is (text.strip().lower() in ("true", "yes", "on", "1"))
    elif wanted == tuple[int, ...]:
        assert type(value) is tuple
        assert all(type(part) is int for part in value)
        if numbers := re.fullmatch(r"\[(-?\d+(?:, -?\d+)*)\]", text, re.ASCII):
            assert list(value) == [int(part) for part in numbers[1].split(", ")]
    elif value is None:
        assert wanted == int | None
        assert text.strip().lower() in ("null", "none")
    else:
        assert type(value) is (float if wanted is float else int)
        with contextlib.suppress(ValueError):
            assert value == (float if wanted is float else Fraction)(text)


@pytest.mark.parametrize(
    ("text", "parts"),
    [("a,b", ["a", "b"]), ("[1,2],[3]", ["[1,2]", "[3]"]), ("'a,b',c", ["'a,b'", "c"]), ("a", ["a"])],
)
def test_lists_split_at_the_top_level_only(text, parts):
    assert split_list(text) == parts


def test_the_nearest_key_considers_the_last_part():
    keys = ["model.width", "model.depth", "seed", "recipe.warmup_fraction", "design.sizes.min_width"]
    assert nearest("model.widht", keys) == "model.width"
    assert nearest("depht", keys) == "model.depth"
    assert nearest("schedule.warmup_fraction", keys) == "recipe.warmup_fraction"
    assert nearest("zzz", keys) is None


@given(st.text(st.characters(min_codepoint=32, exclude_categories=["Cs", "Cc"]), min_size=1))
def test_hydra_reads_back_exactly_the_text_that_was_quoted_for_it(text):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        line = hydra_text("key", text)
    except UserError:
        assert "${" in text
        return
    assert OverridesParser.create().parse_override(f"++key={line}").value() == text


def test_hydra_reads_back_other_values():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for value in (1, -2, 1e-7, 5e10, True, None, [1.5, 2.0], ["a'b", "c"]):
        parsed = OverridesParser.create().parse_override(f"++key={hydra_text('key', value)}").value()
        assert parsed == value, value


def test_hydras_own_options_keep_their_plus():
    argv = ["sweep", "++seed=1", "+hydra.launcher.ray.init.log_to_driver=false", "hydra/launcher=ray"]
    arguments = parse(argv)
    assert [a.key for a in arguments.assignments] == [
        "seed",
        "hydra.launcher.ray.init.log_to_driver",
        "hydra/launcher",
    ]
    assert [a.text for a in arguments.assignments] == argv[1:]


def test_configs_are_found_in_a_source_tree_that_is_not_installed(monkeypatch):
    def not_installed(package):
        raise ModuleNotFoundError(package)

    monkeypatch.setattr("importlib.resources.files", not_installed)
    assert (builtin_folder.__wrapped__() / "experiment" / "quickstart.yaml").is_file()
