from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regime_w.scoring import (leading_answers, s_cf, s_cf_without_each, s_end, s_end_without_each, s_path,
    s_path_within_style,
                              s_path_without_each, s_wm)
from regime_w.settings import ScoreSettings

ANSWERS = st.lists(st.sampled_from(["1", "2", "3", None]), max_size=9)
LENGTHS = st.lists(st.integers(0, 3000), max_size=9)


@pytest.mark.parametrize(("answers", "value"), [
    (["1"] * 8, 1.0), (["1", "1", "2"], 1 / 3), (["1", "1", "2", "2"], 2 / 6), (["1", "2"], 0.0), ([None, None], 0.0),
    (["1", "1", None], 1 / 3), (["1"], 0.0), ([], 0.0), (["1"] * 5 + ["2"] * 2 + [None], (10 + 1) / 28),
])
def test_s_end_by_hand(answers: list, value: float) -> None:
    assert s_end(answers) == value


@given(ANSWERS)
def test_s_end_counts_pairs(answers: list) -> None:
    pairs = list(combinations(answers, 2))
    agreeing = sum(a is not None and a == b for a, b in pairs)
    assert s_end(answers) == (agreeing / len(pairs) if pairs else 0.0)
    assert 0 <= s_end(answers) <= 1


@given(ANSWERS.filter(len), st.randoms())
def test_order_does_not_matter(answers: list, random_) -> None:
    shuffled = random_.sample(answers, len(answers))
    assert s_end(shuffled) == s_end(answers)
    assert s_cf(shuffled, "1") == s_cf(answers, "1")
    lengths = [len(str(each)) for each in answers]
    assert s_path(random_.sample(lengths, len(lengths))) == s_path(lengths)


@given(st.lists(st.sampled_from(["1", "2", None]), min_size=2, max_size=9))
def test_one_more_arm_that_agrees_with_the_leaders_never_lowers_s_end(answers: list) -> None:
    for leader in leading_answers(answers):
        assert s_end([*answers, leader]) >= s_end(answers) - 1e-12
    assert s_end([*answers, "new"]) <= s_end(answers)


@pytest.mark.parametrize(("lengths", "value"), [
    ([100] * 8, 1.0), ([7], 1.0), ([0, 0], 0.0), ([], 0.0), ([0], 0.0),
    ([100, 300], 1 / (1 + 0.25)),  # mean 200, standard deviation 100: CV 0.5
    ([0, 100], 0.5),  # CV 1
    ([2, 4, 4, 4, 5, 5, 7, 9], 1 / (1 + (2 / 5) ** 2)),  # mean 5, population standard deviation 2
])
def test_s_path_by_hand(lengths: list, value: float) -> None:
    assert s_path(lengths) == pytest.approx(value, abs=1e-12)


@given(LENGTHS.filter(any), st.integers(1, 50))
def test_s_path_is_bounded_and_does_not_depend_on_the_unit(lengths: list, factor: int) -> None:
    assert 0 < s_path(lengths) <= 1
    assert s_path([factor * length for length in lengths]) == pytest.approx(s_path(lengths), abs=1e-12)


def test_s_path_within_style_leaves_differences_between_styles_aside() -> None:
    assert s_path_within_style([100, 300, 100, 300], ["w", "m", "w", "m"]) == 1.0
    assert s_path_within_style([100, 300, 50, 50], ["w", "w", "m", "m"]) == pytest.approx((0.8 + 1) / 2, abs=1e-12)
    assert s_path_within_style([100, 100, 0], ["w", "w", "m"]) == 0.5
    assert s_path_within_style([100, 300, 50, 80], ["w", "w", "m", "x"]) == pytest.approx(2.8 / 3, abs=1e-12)
    assert s_path_within_style([], []) == 0.0


def test_s_cf_is_the_share_right_on_the_counterfactual() -> None:
    assert s_cf(["5", "5", "6", None], "5") == 0.5
    assert s_cf(["6"], "5") == 0.0
    assert s_cf([], "5") == 0.0


def test_s_wm_weighs_the_components() -> None:
    assert s_wm(1, 1, 1) == pytest.approx(1, abs=1e-12)
    assert (s_wm(1, 0, 0), s_wm(0, 1, 0), s_wm(0, 0, 1)) == (0.4, 0.3, 0.3)
    settings = ScoreSettings(weight_end=1.0, weight_path=2.0, weight_cf=3.0)
    assert s_wm(0.5, 0.25, 0.125, settings) == 0.5 + 0.5 + 0.375


@pytest.mark.parametrize(("answers", "leading"), [
    (["1", "1", "2"], {"1"}), (["1", "2"], {"1", "2"}), ([None, None, "3"], {"3"}), ([None], set()), ([], set()),
    (["1", "1", "2", "2", "3"], {"1", "2"}),
])
def test_leading_answers(answers: list, leading: set) -> None:
    assert leading_answers(answers) == leading


@given(st.lists(st.tuples(st.sampled_from(["1", "2", "3", None]), st.integers(0, 3000)), min_size=1, max_size=9))
def test_without_each_is_the_component_of_the_others(arms: list) -> None:
    answers, lengths = [each[0] for each in arms], [each[1] for each in arms]
    rests = [[*range(i), *range(i + 1, len(arms))] for i in range(len(arms))]
    assert s_end_without_each(answers) == [s_end([answers[i] for i in rest]) for rest in rests]
    assert s_path_without_each(lengths) == [s_path([lengths[i] for i in rest]) for rest in rests]
    assert s_cf_without_each(answers, "1") == [s_cf([answers[i] for i in rest], "1") for rest in rests]


def test_styles_and_answers_are_compared_by_value() -> None:
    assert s_path_within_style([100, 300], ["wolfram", "".join(("wolf", "ram"))]) == pytest.approx(0.8, abs=1e-12)
    gold = "".join(("1", "8"))  # no literal, so that it is not the same object as an answer
    assert s_cf_without_each(["18", "18", "7"], gold) == [0.5, 0.5, 1.0] and s_cf(["18", "7"], gold) == 0.5
