import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from looper.statistics import detectable_difference, mcnemar, paired_bootstrap, wilson

Z = 1.959963984540054  # the normal distribution's 97.5% point


def outcomes(both: int, old_only: int, new_only: int, neither: int) -> tuple[list[bool], list[bool]]:
    old = [True] * both + [True] * old_only + [False] * new_only + [False] * neither
    new = [True] * both + [False] * old_only + [True] * new_only + [False] * neither
    return old, new


def test_wilson_against_the_written_out_formula():
    p, n = 0.3, 10
    middle = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    assert wilson(3, 10) == pytest.approx((0.3, middle - half, middle + half), abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (1, 2), (11, 60), (395, 1319), (1319, 1319), (0, 1319)])
def test_wilson_against_scipy(successes, n):
    ends = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert wilson(successes, n) == pytest.approx((successes / n, ends.low, ends.high), abs=1e-12)


def test_wilson_at_the_ends():
    assert wilson(0, 10) == pytest.approx((0, 0, Z**2 / (10 + Z**2)), abs=1e-12)
    assert wilson(10, 10) == pytest.approx((1, 10 / (10 + Z**2), 1), abs=1e-12)


def test_wilson_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one question"):
        wilson(0, 0)


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"),
    [
        (5, 0, 2 / 32),  # 2 · C(5,0) / 2⁵
        (0, 5, 2 / 32),
        (1, 7, 2 * (1 + 8) / 256),
        (2, 6, 2 * (1 + 8 + 28) / 256),
        (3, 3, 1.0),
        (0, 0, 1.0),
    ],
)
def test_mcnemar_by_hand(gained, lost, p_value):
    result = mcnemar(*outcomes(both=4, old_only=lost, new_only=gained, neither=3))
    assert (result.gained, result.lost) == (gained, lost)
    assert result.p_value == pytest.approx(p_value, abs=1e-12)


def test_bootstrap_agrees_with_drawing_question_by_question():
    old, new = outcomes(both=60, old_only=20, new_only=45, neither=75)
    difference = np.array(new, dtype=float) - np.array(old, dtype=float)
    rng = np.random.default_rng(7)
    means = difference[rng.integers(0, len(old), (20_000, len(old)))].mean(axis=1)
    result = paired_bootstrap(old, new, resamples=20_000)
    assert result.value == 25 / 200
    assert (result.low, result.high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.006)


def test_bootstrap_of_figures_that_are_not_outcomes():
    old, new = [0.0, 0.0, 0.0, 0.0], [0.5, 0.25, 0.5, 0.75]
    result = paired_bootstrap(old, new)
    assert result.value == 0.5
    assert 0.25 <= result.low < 0.5 < result.high <= 0.75


def test_bootstrap_is_seeded():
    pair = outcomes(both=500, old_only=161, new_only=200, neither=500)
    assert paired_bootstrap(*pair, seed=3) == paired_bootstrap(*pair, seed=3)
    assert paired_bootstrap(*pair, seed=3) != paired_bootstrap(*pair, seed=4)


def test_bootstrap_without_a_difference_has_no_width():
    assert paired_bootstrap([True, False], [True, False]) == (0, 0, 0)
    assert paired_bootstrap([False] * 3, [True] * 3) == (1, 1, 1)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_exchanging_the_models_changes_signs_only(pairs):
    old, new = zip(*pairs, strict=True)
    there, back = paired_bootstrap(old, new, resamples=200), paired_bootstrap(new, old, resamples=200)
    assert there.value == pytest.approx(-back.value, abs=1e-12)
    assert mcnemar(old, new).p_value == mcnemar(new, old).p_value
    assert mcnemar(old, new)[:2] == mcnemar(new, old)[1::-1]


@pytest.mark.parametrize("function", [mcnemar, paired_bootstrap])
def test_only_the_same_questions_are_compared(function):
    with pytest.raises(ValueError, match="same questions.*found 2 and 1"):
        function([True, False], [True])
    with pytest.raises(ValueError, match="found 0 and 0"):
        function([], [])


def test_detectable_difference_at_the_size_of_gsm8k():
    assert detectable_difference(132, 1319) == pytest.approx(0.0244, abs=5e-5)  # (1.960 + 0.842)·√132 / 1319
    assert detectable_difference(264, 1319) == pytest.approx(0.0345, abs=5e-5)
    assert detectable_difference(0, 100) == detectable_difference(1, 100)
