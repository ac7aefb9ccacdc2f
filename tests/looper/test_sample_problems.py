"""The built-in problems: format, arithmetic, English, and what keeps the splits apart.

Questions and answers are read back with this file's own patterns and evaluator; nothing of the module's is used for it.
"""

import ast
import hashlib
import json
import operator
import re
from collections import Counter
from fractions import Fraction
from functools import cache

import pytest

from looper.sample_problems import fillings, generate, load, split_of

SPLITS = ("train", "dev", "test")
MANY = 1000  # enough that small templates give all they have
UNITS = "mile|page|hour|day|dollar|liter|meter|kilometer|kilogram|degree|leg|seat|egg|ticket|year|box|bag|row|tray"
ANNOTATION = re.compile(r"(?P<shown>[\d+*/-]+)=\$?<<(?P<expression>[^<>=]+)=(?P<value>\d+)>>(?P<again>\d+)")
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


@cache
def problems(split):
    return generate(split, MANY, seed=7)


@pytest.fixture(params=SPLITS)
def split(request):
    return request.param


def evaluate(expression):
    def value(node):
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        return OPERATORS[type(node.op)](value(node.left), value(node.right))

    return value(ast.parse(expression, mode="eval").body)


def integers(text):
    return [int(digits) for digits in re.findall(r"\d+", text)]


def chain(answer):
    """[(expression, value)] of an answer in GSM8K's format; fails where the format is not kept."""
    *steps, last = answer.split("\n")
    found = [ANNOTATION.findall(step) for step in steps]
    assert [len(each) for each in found] == [1] * len(steps), answer
    assert answer.count("<<") == answer.count(">>") == len(steps), answer
    for [(shown, expression, value, again)] in found:
        assert shown == expression and value == again, answer
    assert last == f"#### {found[-1][0][2]}", answer
    return [(expression, int(value)) for [(_, expression, value, _)] in found]


def test_a_problem_in_full():
    first = next(each for each in generate("train", 60, seed=0) if each["template"] == "two_goods_change")
    assert first == {
        "question": "Yuki buys 5 lemons at $2 each and 7 coconuts at $6 each. She pays with $80. "
                    "How many dollars does she get back?",
        "answer": "The lemons cost 5*2=$<<5*2=10>>10.\nThe coconuts cost 7*6=$<<7*6=42>>42.\n"
                  "Both cost 10+42=$<<10+42=52>>52.\nYuki gets back 80-52=$<<80-52=28>>28.\n#### 28",
        "template": "two_goods_change",
    }


def test_the_same_on_every_machine():
    text = "\n".join(json.dumps(row) for split in SPLITS for row in generate(split, 200, seed=1))
    found = hashlib.sha256(text.encode()).hexdigest()
    assert found == "0bbcca731e8efe127f4a072aea3d9c2add5e677b14c855d50ec75249b74734f6"


def test_every_chain_reexecutes(split):
    for problem in problems(split):
        for expression, value in chain(problem["answer"]):
            assert evaluate(expression) == value, problem


def test_every_step_follows_from_the_question(split):
    """Operands are the question's numbers, earlier results, or a constant in words; every given number is used."""
    for problem in problems(split):
        given = integers(problem["question"])
        known, used = {*given, 2, 4, 100}, set()
        for expression, value in chain(problem["answer"]):
            assert known.issuperset(integers(expression)), problem
            used.update(integers(expression))
            known.add(value)
        assert used.issuperset(given), problem


def test_numbers_are_small_and_told_apart_by_value(split):
    """What a counterfactual needs: no number stands twice, and none equals a result or a constant of the chain."""
    for problem in problems(split):
        given, steps = integers(problem["question"]), chain(problem["answer"])
        results = [value for _, value in steps]
        constants = {number for expression, _ in steps for number in integers(expression)}.difference(given, results)
        apart = [*given, *results, *constants]
        assert len(set(apart)) == len(apart), problem
        assert min(given + results) >= 2 and max(given + results) <= 150, problem


def test_short_enough_for_a_tiny_model(split):
    for problem in problems(split):
        assert len(problem["question"].split()) <= 45, problem
        solution = re.sub(r"<<[^<>]*>>", "", problem["answer"])
        assert max(len(line.split()) for line in solution.split("\n")) <= 9, problem
        assert len(re.findall(r"[A-Za-z]+|\d|[^\w\s]", solution)) <= 58, problem


def test_templates_are_many_and_of_one_to_four_steps():
    steps = {problem["template"]: len(chain(problem["answer"])) for problem in problems("test")}
    assert len(steps) >= 40
    assert set(Counter(steps.values())) == {1, 2, 3, 4}
    assert min(Counter(steps.values()).values()) >= 5


def test_some_templates_are_only_in_test():
    kinds = {split: {problem["template"] for problem in problems(split)} for split in SPLITS}
    assert kinds["train"] == kinds["dev"] < kinds["test"]
    assert 0.12 <= len(kinds["test"] - kinds["train"]) / len(kinds["test"]) <= 0.18


def test_templates_take_turns():
    counts = Counter(problem["template"] for problem in generate("train", 400, seed=3))
    assert len(counts) == 38 and set(counts.values()) == {10, 11}  # 400 = 38 * 10 + 20


def test_no_numbers_of_one_split_in_another():
    """Not of the same template nor of any other, in whatever order."""
    seen = {split: {frozenset(integers(problem["question"])) for problem in problems(split)} for split in SPLITS}
    assert min(map(len, seen.values())) > 400
    assert seen["train"].isdisjoint(seen["dev"] | seen["test"]) and seen["dev"].isdisjoint(seen["test"])


def test_every_filling_is_in_the_split_of_its_numbers():
    """All that the templates can ever give, not only a sample."""
    sizes = Counter()
    for template in load()[0]:
        for split, found in fillings(template).items():
            sizes[split] += len(found)
            assert {split_of(tuple(values[name] for name in template.numbers)) for values in found} == {split}
    assert sizes["train"] > 10_000 and 0.75 < sizes["train"] / (sizes["train"] + sizes["dev"]) < 0.85
    assert split_of((3, 12, 7)) == split_of((7, 3, 12)) == split_of((12, 7, 3))


def test_no_question_and_no_filling_twice():
    rows = [problem for split in SPLITS for problem in problems(split)]
    assert len({" ".join(row["question"].lower().split()) for row in rows}) == len(rows)
    assert len({(row["template"], *integers(row["question"])) for row in rows}) == len(rows)


def test_a_smaller_count_is_the_beginning(split):
    assert generate(split, 97, seed=5) == generate(split, 300, seed=5)[:97]
    assert generate(split, 0, seed=5) == []


def test_another_seed_gives_other_problems():
    first, second = ({row["question"] for row in generate("train", 300, seed)} for seed in (1, 2))
    assert len(first & second) < 30


def test_gives_all_it_has_and_says_when_more_is_asked():
    with pytest.raises(ValueError, match=r"give 0 to \d+ dev problems, not 1000000; .* prepare\.dev") as raised:
        generate("dev", 1_000_000, seed=1)
    most = int(re.search(r"0 to (\d+)", str(raised.value))[1])
    assert len({row["question"] for row in generate("dev", most, seed=1)}) == most
    with pytest.raises(ValueError, match=f"not {most + 1}"):
        generate("dev", most + 1, seed=1)
    with pytest.raises(ValueError, match="not -1"):
        generate("dev", -1, seed=1)


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="'validation' is none of train, dev, test"):
        generate("validation", 1, seed=1)


def test_the_text_is_whole(split):
    for problem in problems(split):
        question, answer = problem["question"], problem["answer"]
        assert re.fullmatch(r"[A-Z][^{}\[\]\n]*\?", question), question
        assert "  " not in question + answer and not re.search(r"[{}\[\]]", answer), problem
        assert not re.search(r"\b[Aa] [aeiou]", question + answer), problem
        assert all(re.match(r"[A-Z\d]", line) and line.endswith(".") for line in answer.split("\n")[:-1]), problem


def test_nouns_after_numbers_are_plural():
    """Each word that has two forms stands as its first after a, each, every; as its second after a number."""
    pairs = {tuple(word.split("/")) for template in load()[0] for words in template.words.values()
             for word in words if "/" in word}
    assert len(pairs) > 50
    singular, plural = ("|".join(map(re.escape, forms)) for forms in zip(*pairs, strict=True))
    counted = rf"(\d|[Mm]any) (more |new |red |white )?({singular}|{UNITS})\b"
    wrong = re.compile(rf"{counted}|\b([Aa]|[Ee]ach|[Ee]very) ({plural})\b")
    for problem in (problem for split in SPLITS for problem in problems(split)):
        text = problem["question"] + " " + re.sub(r"<<[^<>]*>>", "", problem["answer"])
        assert not wrong.search(text), problem


def test_pronouns_agree_with_the_first_name(split):
    she = {person: she for person, she, _ in load()[1]}
    for problem in problems(split):
        words = re.findall(r"[A-Za-z]+", problem["question"])
        names = [word for word in words if word in she]
        pronouns = {"she" if word.lower() in ("she", "her") else "he" for word in words
                    if word.lower() in ("she", "her", "he", "his")}
        assert not pronouns or pronouns == {she[names[0]]}, problem
