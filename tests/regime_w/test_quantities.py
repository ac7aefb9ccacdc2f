from fractions import Fraction

import pytest

from regime_w.quantities import implied_constants, read_quantities


def values(question: str, changeable: bool) -> list[Fraction]:
    return [each.value for each in read_quantities(question) if each.changeable is changeable]


@pytest.mark.parametrize("text", [
    "He has 12 apples", "It costs $12", "12 of them", "a 12-page book", "paid $12/hour", "(12 left)", "in 12 minutes",
    "for 12 days", "12, 1", "runs 12 times a week",
])
def test_a_plain_number_may_change(text: str) -> None:
    assert Fraction(12) in values(text, True)


@pytest.mark.parametrize("text", [
    "12% of", "12 % of", "12 percent", "3/12 of", "12/15 of", "12 / 15", "ratio 12:5", "ratio 5:12", "at 12:30",
    "at 12 pm", "12 o'clock",
    "the 12th day", "from 12 to 15", "12-15 apples", "0-12 years", "costs $12.50", "grade 12", "Chapter 12", "No. 12",
    "#12", "room 12",
    "aged 3-12", "A12 road", "day 12", "June 12", "12 hours a day", "12 days per week", "12 months in a year",
    "a 12-sided die", "12 legs",
])
def test_a_number_that_is_part_of_something_else_may_not(text: str) -> None:
    assert Fraction(12) not in values(text, True)


def test_years_may_not_change_but_as_many_things_may() -> None:
    assert values("In 1990 he", True) == []
    assert values("since 2100, of 1500", True) == []
    assert values("paid 1990 dollars", True) == [1990]
    assert values("in 1499 and in 2101", True) == [1499, 2101]


def test_where_numbers_stand() -> None:
    text = "He paid $1,250 for 2.5 pounds, .5 more"
    assert [(str(each.value), text[each.start:each.end], each.changeable) for each in read_quantities(text)] == [
        ("1250", "1,250", True), ("5/2", "2.5", False), ("1/2", ".5", False)]


@pytest.mark.parametrize(("text", "total"), [
    ("three", 3), ("Twenty-five", 25), ("two hundred five", 205), ("two hundred and five", 205),
    ("three thousand two hundred", 3200),
    ("hundred", 100), ("a thousand", 1000), ("one million two thousand", 1_002_000), ("ninety nine", 99), ("zero", 0),
])
def test_number_words(text: str, total: int) -> None:
    found = values(text, False)
    assert total in found
    assert values(text, True) == []


def test_number_words_give_their_parts_too() -> None:
    assert set(values("ten twenty-dollar bills", False)) == {10, 20, 30}
    assert values("tone of the often weighty sixteenth", False) == []


def test_implied_constants_by_words() -> None:
    implied = implied_constants("Half a dozen a week", "")
    assert {2, Fraction(1, 2), 12, 7, 52, 0, 1} <= implied
    assert 60 not in implied
    assert 60 in implied_constants("", "that is an hour")
    assert implied_constants("nothing here", "") == {0, 1}


def test_implied_constants_by_fractions_ratios_and_percentages() -> None:
    assert {3, 4, 1, Fraction(3, 4), Fraction(1, 4)} <= implied_constants("3/4 of", "")
    assert {2, 5, 3, 7} <= implied_constants("in the ratio 2:5", "")
    assert 7 not in implied_constants("2/5", "")
    assert Fraction(2, 5) not in implied_constants("2:5", "")
    assert {40, 60, 140, 100, Fraction(2, 5), Fraction(3, 5), Fraction(7, 5)} <= implied_constants("40% of", "")
    assert 60 not in implied_constants("of", "40% of 10, 3/4")
    assert {1, 0, -1} >= implied_constants("1/0", "") - {0, 1}
