import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regime_w.counterfactual import (TRIES, Move, Step, _alike, _alike_value, change_name, evaluate, execute,
                                     keeps_order, make_counterfactual, read_chain, tokenize)
from regime_w.quantities import read_quantities

QUESTION = "Ann has 20 pens and buys 3 packs of 8 pens. How many pens has she?"
ANSWER = "She buys 3*8=<<3*8=24>>24 pens.\nShe has 20+24=<<20+24=44>>44.\n#### 44"


@pytest.mark.parametrize("seed", range(30))
def test_the_new_gold_follows_from_the_changed_question(seed: int) -> None:
    made = make_counterfactual(QUESTION, ANSWER, seed)
    numbers = [int(word.strip("$.")) for word in made.question.split() if word.strip("$.").isdigit()]
    assert int(made.gold_answer) == numbers[0] + numbers[1] * numbers[2] != 44
    assert sum(a != b for a, b in zip(numbers, [20, 3, 8])) == 1
    assert made.question == QUESTION.replace(f" {made.changed_from} ", f" {made.changed_to} ")


def test_it_is_deterministic_in_the_seed_and_seeds_differ() -> None:
    made = {make_counterfactual(QUESTION, ANSWER, seed) for seed in range(20)}
    assert made == {make_counterfactual(QUESTION, ANSWER, seed) for seed in range(20)}
    assert len({each.changed_to for each in made}) > 5
    assert {each.changed_from for each in made} == {"20", "8"}  # 3 is small: changed only if no other can


def test_a_small_number_changes_if_no_other_can_and_two_never() -> None:
    made = make_counterfactual("Ann has 3 bags of 2 pens. How many pens?", "<<3*2=6>>6\n#### 6", 0)
    assert made.changed_from == "3" and int(made.changed_to) in (4, 5, 6)
    assert int(made.gold_answer) == 2 * int(made.changed_to)
    assert make_counterfactual("Ann has 2 bags of 1 pen. How many pens?", "<<2*1=2>>2\n#### 2", 0) is None


def test_four_is_small_too_and_an_unused_one_is_no_obstacle() -> None:
    found = [make_counterfactual("Ann, 1 of us, has 4 bags of 5 pens. How many pens?", "<<4*5=20>>20\n#### 20", seed)
             for seed in range(10)]
    assert {each.changed_from for each in found} == {"5"}


def test_alike_numbers() -> None:
    def alike(number: int) -> list[int]:
        return sorted(_alike(number, random.Random(0)))

    assert alike(20) == [*range(10, 20), *range(21, 41)]
    assert alike(4) == [3, 5, 6, 7, 8]  # 2 is too small
    assert alike(7) == [4, 5, 6, 8, 9]  # 14 has two digits
    assert alike(12) == [10, 11, *range(13, 25)]  # 6 to 9 have one
    assert alike(300) == [*range(150, 300, 10), *range(310, 601, 10)]
    assert len(alike(5432)) == TRIES == 60 and min(alike(5432)) >= 2716 and max(alike(5432)) <= 9999
    assert _alike(5432, random.Random(0)) != _alike(5432, random.Random(1))


def test_commas_and_roundness_are_kept() -> None:
    made = make_counterfactual("A car costs $12,000 and tax is $300. What is the total?",
        "<<12000+300=12300>>12300\n#### 12300", 1)
    assert made.changed_from in ("12,000", "300")
    for seed in range(20):
        made = make_counterfactual("A car costs $12,000. With $99 on top, what is it?",
            "<<12000+99=12099>>12099\n#### 12099", seed)
        if made.changed_from == "12,000":
            assert "," in made.changed_to and made.changed_to.endswith("00") and f"${made.changed_to}." in made.question
            break
    else:
        pytest.fail("no seed changed the price")


@pytest.mark.parametrize(("old", "new", "alike"), [
    (30, 10, True), (30, 9, False), (30, 90, True), (30, 91, False), (3, 1, True), (0, 0, True), (0, 1, False),
    (0, -1, False), (10, 3, False),
    (3, Fraction(7, 2), False), (Fraction(1, 2), 1, True), (Fraction(3, 2), Fraction(5, 2), True), (-3, -3, False),
    (Fraction(1, 2), Fraction(1, 6), False), (Fraction(1, 4), Fraction(1, 2), True),
])
def test_values_stay_within_a_factor_of_three_and_whole(old: Fraction, new: Fraction, alike: bool) -> None:
    assert _alike_value(Fraction(old), Fraction(new)) is alike


@pytest.mark.parametrize(("question", "answer", "may_change"), [
    # 20 stands twice: to change one of them alone would contradict the other
    ("Ann has 20 pens. Of her 20 pens she gives 5 away. How many are left?", "<<20-5=15>>15\n#### 15", {"5"}),
    ("Ann has 20 pens and gives 5 away. How many are left?", "<<20-5=15>>15\n#### 15", {"20", "5"}),
])
def test_only_a_number_that_stands_once_changes(question: str, answer: str, may_change: set[str]) -> None:
    found = [make_counterfactual(question, answer, seed) for seed in range(40)]
    assert {each.changed_from for each in found} == may_change


def test_a_new_number_is_none_that_the_question_has() -> None:
    # 6 and 8 stand twice, so only 7 may change; between them there is no room, and the order gives way
    question = "Ann has 6 pens, 7 clips and 8 caps. She sorts the 6 pens and 8 caps. How many things has she?"
    found = [make_counterfactual(question, "<<6+7+8=21>>21\n#### 21", seed) for seed in range(60)]
    assert {(each.changed_from, each.changed_to) for each in found} == {("7", "4"), ("7", "5"), ("7", "9")}


@pytest.mark.parametrize("value", ["23", "25"])
def test_a_chain_whose_calculation_is_wrong_is_none(value: str) -> None:
    assert read_chain("<<3*8=24>>24, <<20+1=21>>21\n#### 21") is not None
    assert read_chain(f"<<3*8={value}>>{value}, <<20+1=21>>21\n#### 21") is None


def test_two_new_numbers_are_never_the_same() -> None:
    question, answer = "Ann has 3 pens and 4 clips. How many things has she?", "<<3+4=7>>7\n#### 7"
    found = [make_counterfactual(question, answer, seed, numbers=2) for seed in range(200)]
    pairs = {tuple(each.changed_to.split("; ")) for each in found if each}
    assert ("6", "5") in pairs and all(a != b for a, b in pairs)


def test_magnitude_stays_alike() -> None:
    question, answer = "A hall has 50 rows of 80 seats. How many seats?", "<<50*80=4000>>4000\n#### 4000"
    found = [make_counterfactual(question, answer, seed) for seed in range(60)]
    rows = {int(each.changed_to) for each in found if each.changed_from == "50"}
    seats = {int(each.changed_to) for each in found if each.changed_from == "80"}
    assert rows and min(rows) >= 25 and max(rows) <= 79  # under the 80 seats: values keep their order
    assert seats and min(seats) >= 51 and max(seats) <= 99  # two digits, over the 50 rows


@pytest.mark.parametrize(("question", "answer"), [
    ("Ann has 20 pens, Bob 20 more. Sum?", "<<20+20=40>>40\n#### 40"),  # stands twice
    ("Ann has 20 pens. Twenty more come. Sum?", "<<20+20=40>>40\n#### 40"),  # also in words
    ("Ann has 20% of 50 dollars. How much?", "<<50*20/100=10>>10\n<<50=50>>\n#### 10"),  # last is not the gold
    ("Ann has 20/25 of a pie", "<<20/25=.8>>.8\n#### 8"),
    ("Ann works 7 days a week, how many in 2 weeks?", "<<7*2=14>>14\n#### 14"),  # a fact, and implied by 'week'
    ("Ann has 20 pens, gives 5, gets some. Now?", "She had 15.\n<<15+9=24>>24\n#### 24"),  # 15 and 9 out of nowhere
    ("Ann has 20 pens and 30 clips and 9 cats. Pens and clips?", "<<20+30=50>>50\n#### 50"),  # 9 is left aside
    ("Ann has 20 pens and 30 clips and 0 cats. Pens and clips?", "<<20+30=50>>50\n#### 50"),  # and here 0
    ("Ann has 20 pens", "no calculation\n#### 20"), ("Ann has 20 pens", "<<20*2=41>>41\n#### 41"),
    ("Ann has 20 pens", "<<2x=4>>4\n#### 4"),
    ("Ann has 20 pens, gets twice as many and gives half away.", "<<20*2=40>>40\n<<40/2=20>>20\n#### 20"),  # a result
    # used twice in one calculation
    ("Ann has 20 pens", "<<20*2=40>>40"), ("", ""), ("Ann has 9 squared pens", "<<9*9=81>>81\n#### 81"),
])
def test_what_is_not_certain_gets_none(question: str, answer: str) -> None:
    assert all(make_counterfactual(question, answer, seed) is None for seed in range(5))


def test_a_value_that_two_things_share_is_not_touched() -> None:
    # 10 is Ann's pens and what is left of 14: only 14 or 4 could change, and then 10 has two readings
    question = "Ann has 10 pens. Bob had 14 and lost 4. How many have both?"
    answer = "Bob has <<14-4=10>>10.\n<<10+10=20>>20\n#### 20"
    assert make_counterfactual(question, answer, 0) is None


def test_values_stay_integers_and_positive() -> None:
    question = "48 eggs go into boxes of 6. Then 5 boxes are sold. How many boxes are left?"
    answer = "<<48/6=8>>8\n<<8-5=3>>3\n#### 3"
    for seed in range(40):
        made = make_counterfactual(question, answer, seed)
        eggs, size, sold = (int(word.strip(".")) for word in made.question.split() if word.strip(".").isdigit())
        assert eggs % size == 0 and eggs / size - sold == int(made.gold_answer) > 0


def test_a_comparison_keeps_its_outcome() -> None:
    question = "Ann had 15 points, Bob 14 points, and at least 28 are needed. How many more than needed have both?"
    answer = "<<15+14=29>>29\n<<29-28=1>>1\n#### 1"
    for seed in range(20):
        made = make_counterfactual(question, answer, seed)
        if made:
            ann, bob, needed = (int(word.strip(".,")) for word in made.question.split() if word.strip(".,").isdigit())
            assert bob < ann < needed < ann + bob
    # 3, 4 and 5 leave one another no room, as there are six, too
    answer = "<<3*4=12>>12\n<<12+5=17>>17\n#### 17"
    assert make_counterfactual("At least six come: 3 tables of 4, and 5 more. How many?", answer, 0) is None
    assert make_counterfactual("About six come: 3 tables of 4, and 5 more. How many?", answer, 0) is not None


def test_equations_in_prose_join_the_chain() -> None:
    question = "Ann has 20 pens and buys 3 packs of 8 pens. She gives 5 away. How many pens has she?"
    answer = "She has 20 + 24 = 44 pens as 3 packs x 8 pens = 24 pens.\n44 - 5 = <<44-5=39>>39\n#### 39"
    assert make_counterfactual(question, answer, 0) is None  # 24 is used before it is known
    answer = "She buys 3 packs x 8 pens/pack = 24 pens, so 20 pens + 24 pens = 44.\n<<44-5=39>>39\n#### 39"
    made = make_counterfactual(question, answer, 0)
    first, packs, size, away = (int(word) for word in made.question.split() if word.isdigit())
    assert int(made.gold_answer) == first + packs * size - away != 39


def test_read_chain() -> None:
    assert read_chain(ANSWER) == [Step([3, "*", 8], 24), Step([20, "+", 24], 44)]
    assert read_chain("so $1,200 - $200 = $1,000\n#### 1,000") == [Step([1200, "-", 200], 1000)]
    # prose that is wrong is no step
    assert read_chain("3 x 4 = 13, 3 x 4 = <<3*4=12>>12\n#### 12") == [Step([3, "*", 4], 12)]
    assert read_chain("<<-3+1=-2>>\n#### -2") == [Step(["-", 3, "+", 1], -2)]
    assert read_chain("<<3*4=12>>\n#### 13") is None
    assert read_chain("<<3*4=12>>\n#### 11") is None
    assert read_chain("<<=12>>\n#### 12") is None
    assert read_chain("<<3*4=>>\n#### 12") is None
    assert read_chain("#### 12") is None


@pytest.mark.parametrize(("expression", "value"), [
    ("2+3*4", 14), ("(2+3)*4", 20), ("2-3-4", -5), ("100/10/5", 2), ("-3+5", 2), ("2*-3", -6), ("--3", 3),
    ("1/4", Fraction(1, 4)),
    (".5*4", 2), ("5.*2", 10), ("2.50*2", 5), (" 7 ", 7), ("((7))", 7), ("8/(1/2)", 16), ("2*(3+4)-1", 13),
    ("10-2*3+4", 8),
])
def test_arithmetic(expression: str, value: object) -> None:
    assert evaluate(tokenize(expression)) == value


@pytest.mark.parametrize("expression", [
    "", "+", "2+", "(2", "2)", "2 3", "*2", "1/0", "2(3)", "()", "2+*3", "(2(", "+2",
])
def test_malformed_arithmetic_is_none(expression: str) -> None:
    assert evaluate(tokenize(expression)) is None


@pytest.mark.parametrize("expression", ["x", "2^3", "2**x", "2,5", "__import__", "1e3", "2 apples"])
def test_other_characters_are_refused(expression: str) -> None:
    assert tokenize(expression) is None


@given(st.recursive(st.integers(0, 99).map(str), lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(
    "({0[0]} {0[1]} {0[2]})".format)))
def test_arithmetic_equals_pythons(expression: str) -> None:
    exact = "".join(f"Fraction({part})" if part.isdigit() else part for part in expression.replace("(",
        "( ").replace(")", " )").split())
    try:
        expected = Fraction(eval(exact))  # our own text, not a model's
    except ZeroDivisionError:
        expected = None
    assert evaluate(tokenize(expression)) == expected


def test_execute_and_order() -> None:
    chain = read_chain(ANSWER)
    known = {Fraction(20), Fraction(3), Fraction(8)}
    assert execute(chain, known, {Fraction(8): Fraction(9)}) == [Move(24, 27), Move(44, 47)]
    assert execute(chain, known, {}) is None  # nothing changes
    assert execute(chain, known - {Fraction(3)}, {Fraction(8): Fraction(9)}) is None  # 3 is unknown
    squares = read_chain("<<(10-3)*(12-8)=28>>\n#### 28")
    assert execute(squares, known, {Fraction(3): Fraction(2)}) is None  # 10 and 12 are: (-2)·(-8) would do
    assert execute(chain, known, {Fraction(8): Fraction(25)}) is None  # 24 to 75: more than three times
    assert execute(chain, known, {Fraction(8): Fraction(24)}) == [Move(24, 72), Move(44, 92)]
    assert execute(chain, known, {Fraction(8): Fraction(17, 2)}) is None  # 25.5 is no integer
    assert execute(chain, known | {Fraction(24)}, {Fraction(8): Fraction(9)}) is None  # 24 has two readings
    assert execute(read_chain("<<20-8=12>>\n<<12-8=4>>\n#### 4"), known, {Fraction(8): Fraction(10)}) is None  # 4 to 0
    assert execute(read_chain("<<8*3=24>>\n<<24-24=0>>\n<<0+8=8>>\n#### 8"), known | {Fraction(0)},
        {Fraction(8): Fraction(9)})[1] == Move(0, 0)
    quantities = read_quantities("20 and 3 and 8")
    assert keeps_order([Move(24, 27), Move(44, 47)], quantities, {Fraction(8): Fraction(9)})
    assert not keeps_order([Move(24, 63), Move(44, 83)], quantities, {Fraction(8): Fraction(21)})  # 8 < 20, 21 > 20
    assert not keeps_order([Move(24, 60)], quantities, {Fraction(8): Fraction(20)})  # not equal before
    assert keeps_order([Move(20, 20), Move(8, 9)], quantities, {Fraction(8): Fraction(9)})


def test_several_numbers_at_once() -> None:
    for seed in range(20):
        made = make_counterfactual(QUESTION, ANSWER, seed, numbers=2)
        first, packs, size = (int(word) for word in made.question.split() if word.isdigit())
        assert sum(a != b for a, b in zip((first, packs, size), (20, 3, 8))) == 2
        assert int(made.gold_answer) == first + packs * size
        assert len(made.changed_from.split("; ")) == len(made.changed_to.split("; ")) == 2
    assert make_counterfactual(QUESTION, ANSWER, 0, numbers=4) is None


def test_another_name_keeps_the_answer() -> None:
    question = "James and Mary have 5 pens. James's pens are red; how many has Jameson?"
    made = [change_name(question, "#### 1,005", seed) for seed in range(30)]
    assert made == [change_name(question, "#### 1,005", seed) for seed in range(30)]
    assert {each.gold_answer for each in made} == {"1005"}
    assert {each.changed_from for each in made} == {"James", "Mary"}
    for each in made:
        assert each.changed_to not in question
        assert each.changed_from not in each.question.replace("Jameson", "")
        assert each.question == question.replace("Jameson", "J@").replace(each.changed_from,
            each.changed_to).replace("J@", "Jameson")
    assert change_name("He has 5 pens", "#### 5", 0) is None
    assert change_name(question, "no gold", 0) is None
