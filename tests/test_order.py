"""The order of training windows: a permutation in every epoch, and a pure function of (seed, position)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling_lab.training.data.order import WindowOrder, n_windows


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 5))
def test_every_epoch_is_a_permutation(n, seed, epoch):
    windows = WindowOrder(n, seed).windows(epoch * n, n)
    assert sorted(windows.tolist()) == list(range(n))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 500), seed=st.integers(0, 99), first=st.integers(0, 2000), count=st.integers(1, 700))
def test_any_range_equals_its_part_of_the_whole_order(n, seed, first, count):
    order = WindowOrder(n, seed)
    whole = np.concatenate([order.windows(i, 1) for i in range(first, first + count, 37)])
    assert order.windows(first, count)[::37].tolist() == whole.tolist()


def test_seeds_and_epochs_differ():
    a, b = WindowOrder(1000, 0), WindowOrder(1000, 1)
    assert (a.windows(0, 1000) != b.windows(0, 1000)).mean() > 0.9
    assert (a.windows(0, 1000) != a.windows(1000, 1000)).mean() > 0.9


def test_order_looks_random():
    """Neighboring positions are uncorrelated, within 4 standard errors of a correlation of 20,000 pairs."""
    windows = WindowOrder(20_000, 3).windows(0, 20_000).astype(float)
    assert abs(np.corrcoef(windows[:-1], windows[1:])[0, 1]) < 4 / np.sqrt(20_000)
    # The first tenth of an epoch is spread over the corpus: mean within 4 standard errors of the middle.
    assert abs(windows[:2000].mean() - 10_000) < 4 * 20_000 / np.sqrt(12 * 2000)


def test_huge_corpora_need_no_permutation_table():
    windows = WindowOrder(10**13, 0).windows(10**12, 1000)
    assert windows.min() >= 0
    assert windows.max() < 10**13
    assert len(set(windows.tolist())) == 1000


def test_golden_order():
    """A run id implies the data order, so it must be the same on every machine and version."""
    assert WindowOrder(10, 0).windows(0, 10).tolist() == [3, 7, 0, 9, 2, 5, 1, 8, 4, 6]


def test_windows_of_a_corpus():
    assert [n_windows(n, 4) for n in (4, 5, 8, 9)] == [0, 1, 1, 2]
    with pytest.raises(ValueError, match="n_windows=0"):
        WindowOrder(0, 0)
