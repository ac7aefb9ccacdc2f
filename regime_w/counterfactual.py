"""Counterfactuals: the same question with one number changed, and its new answer by re-executing GSM8K's calculations.

GSM8K annotates each calculation of an answer as `<<expr=value>>`. The chain of these is executed anew with the changed
number; a counterfactual is made only where the new answer is certain (in short: regime_w/README.md, Counterfactuals):

- the number stands once in the question, in digits, is at least 3, and is no percentage, fraction, decimal, ratio,
  time, label, or fact of the world ("7 days a week");
- a calculation uses it once, and every other number in them is known: from the question, from an earlier calculation,
  or implied by a word ("dozen"), so that no step was done in the solver's head;
- every plain number of the question is used, so that none is redundant, and the answer overlooks none;
- no number in a calculation can be read in two ways that now differ;
- every value stays positive, an integer where it was one, and within a factor of three; the answer changes;
- values keep their order where that can be had, and always where the question compares ("at least", "the cheapest").
"""

import random
import re
from fractions import Fraction
from itertools import combinations, pairwise
from typing import NamedTuple

from regime_w.answers import canonical
from regime_w.quantities import Quantity, implied_constants, read_quantities


class Counterfactual(NamedTuple):
    """A changed question with its gold answer; `changed_from` and `changed_to` as they stand in the questions."""

    question: str
    gold_answer: str
    changed_from: str
    changed_to: str


class Step(NamedTuple):
    """One annotated calculation: its tokens (numbers as Fraction, operators as str) and its stated value."""

    tokens: list[Fraction | str]
    value: Fraction


class Move(NamedTuple):
    """A value before and after the change."""

    before: Fraction
    after: Fraction


NAMES = (
    ("James", "John", "Tom", "Mark", "Jack", "David", "Peter", "Michael", "Robert", "Daniel", "Andrew", "Paul"),
    ("Mary", "Anna", "Lisa", "Sarah", "Emily", "Jane", "Jessica", "Maria", "Julia", "Kate", "Laura", "Susan", "Rachel"),
)
TRIES = 60  # new numbers that are tried for one quantity
FACTOR = 3  # within which every calculated value stays
# Small numbers often count people and things listed by name: they change only if no other can
SMALLEST, PREFERRED = 3, 5
# A rule that a number switches on, a superlative, a room that can be full: calculations show only the case that holds
_COMPARES = re.compile(
    r"\b(?:at (?:least|most)|exceed\w*|minimum|maximum|limit\w*|overtime|whichever|most|least|median|prime|rounded|"
    r"(?:high|low|cheap|long|short|tall|bigg|larg|small|old|young|fast|slow|heavi|light|great|few|clos|earli|lat)est|"
    r"(?:over|more than|less than|above|below|under|beyond) \$?[0-9]|"
    r"capacity|holds?|full|fill\w*|pool|tank|container)\b",
    re.IGNORECASE)
_SYMBOLS = str.maketrans({"\u00d7": "*", "\u2212": "-", "\u2013": "-", "\u00f7": "/", "$": None, ",": None})
_TIMES = re.compile(r"(?<=[0-9 )])[xX](?=[ (0-9])")
_NUMBER = r"(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
_UNIT = r"(?:[ -]?[A-Za-z]++(?:/[A-Za-z]++)*+){0,3}+"  # possessive: no backtracking into words
_STEP = re.compile(rf"<<(?P<annotated>[^<>=]*)=(?P<value>[^<>=]*)>>"
                   rf"|(?P<prose>{_NUMBER}{_UNIT}(?: ?[-+*/] ?{_NUMBER}{_UNIT})+) ?= ?(?P<result>{_NUMBER})")
_WORD = re.compile(r"[ -]?[A-Za-z]+(?:/[A-Za-z]+)*")
_TOKEN = re.compile(r"\s*(?:([0-9]+\.?[0-9]*|\.[0-9]+)|([-+*/()]))")
_GOLD = re.compile(r"####\s*(-?[0-9,]+)\s*$")


def make_counterfactual(question: str, answer: str, seed: int, numbers: int = 1) -> Counterfactual | None:
    """The question with one number changed, or None where no change is certain.

    answer: GSM8K's own, with its `<<expr=value>>` annotations and the `####` line.
    seed: decides, together with the question, which number changes and to what.
    numbers: how many change at once; 2 and more are the harder kind, and the texts in the result are joined by '; '.
    """
    chain = read_chain(answer)
    if chain is None:
        return None
    quantities, implied = read_quantities(question), implied_constants(question, answer)
    used = {token for step in chain for token in step.tokens}
    if any(each.changeable and each.value not in used for each in quantities if each.value != 1):
        return None  # a number left aside: either it says something redundant, or the answer overlooks it
    stated = {each.value for each in quantities}
    known = implied | stated
    groups = list(combinations([each for each in quantities if _may_change(each, quantities, implied, chain)], numbers))
    random_ = random.Random(f"{seed} {question}")
    fallback = None
    for group in sorted(random_.sample(groups, len(groups)), key=lambda group: min(group).value < PREFERRED):
        for new in zip(*(_alike(int(each.value), random_) for each in group)):
            changes = {each.value: Fraction(value) for each, value in zip(group, new)}
            moved = execute(chain, known, changes)
            if moved is None or stated.intersection(new) or len(set(new)) < numbers:
                continue
            made = _changed(question, group, new, moved[-1].after)
            if keeps_order(moved, quantities, changes):
                return made
            fallback = fallback or made
    return None if _COMPARES.search(question) else fallback


def change_name(question: str, answer: str, seed: int) -> Counterfactual | None:
    """The harder kind in which the answer must stay: a person's name is changed to another of the same pronoun.

    None if the question holds none of the names in `NAMES`, or `answer` has no gold answer.
    """
    gold = _GOLD.search(answer)
    words = set(re.findall(r"[A-Z][a-z]+", question))
    present = [(name, names) for names in NAMES for name in names if name in words]
    if not gold or not present:
        return None
    random_ = random.Random(f"{seed} {question}")
    old, names = random_.choice(present)
    new = random_.choice([name for name in names if name not in words])
    return Counterfactual(re.sub(rf"\b{old}\b", new, question), str(int(gold[1].replace(",", ""))), old, new)


def read_chain(answer: str) -> list[Step] | None:
    """The calculations of a GSM8K answer in order: the annotated ones, and those in its prose ('3 + 4 = 7').

    None if there are none, an annotated one is not arithmetic or not equal to its value, or the last is not the gold.
    """
    gold = _GOLD.search(answer)
    steps = []
    for found in _STEP.finditer(_TIMES.sub("*", answer.translate(_SYMBOLS))):
        annotated = found["prose"] is None
        tokens = tokenize(found["annotated"] if annotated else _WORD.sub("", found["prose"]))
        stated = tokenize(found["value"] if annotated else found["result"])
        value = evaluate(tokens) if tokens else None
        if value is not None and stated and value == evaluate(stated):
            steps.append(Step(tokens, value))
        elif annotated:
            return None
    return steps if gold and steps and steps[-1].value == int(gold[1].replace(",", "")) else None


def tokenize(expression: str) -> list[Fraction | str] | None:
    """Numbers (as Fraction), operators and parentheses of an expression; None if anything else stands in it."""
    tokens, position = [], 0
    expression = expression.rstrip()
    while position < len(expression):
        found = _TOKEN.match(expression, position)
        if not found:
            return None
        tokens.append(Fraction(found[1].rstrip(".")) if found[1] else found[2])
        position = found.end()
    return tokens


def evaluate(tokens: list[Fraction | str]) -> Fraction | None:
    """The exact value of + - * / and parentheses over fractions; None if malformed or a division by zero."""
    rest = list(reversed(tokens))
    try:
        value = _sum(rest)
    except (IndexError, TypeError, ZeroDivisionError):
        return None
    return None if rest else value


def _sum(rest: list) -> Fraction:
    value = _product(rest)
    while rest and rest[-1] in ("+", "-"):
        value = value + _product(rest) if rest.pop() == "+" else value - _product(rest)
    return value


def _product(rest: list) -> Fraction:
    value = _factor(rest)
    while rest and rest[-1] in ("*", "/"):
        value = value * _factor(rest) if rest.pop() == "*" else value / _factor(rest)
    return value


def _factor(rest: list) -> Fraction:
    token = rest.pop()
    if token == "-":
        return -_factor(rest)
    if token == "(":
        value = _sum(rest)
        if rest.pop() != ")":
            raise TypeError("a parenthesis is not closed")
        return value
    return +token  # TypeError for an operator where a number must stand


def _may_change(each: Quantity, quantities: list[Quantity], implied: set[Fraction], chain: list[Step]) -> bool:
    return (
        each.changeable and each.value >= SMALLEST and each.value not in implied
        and sum(other.value == each.value for other in quantities) == 1
        and max(step.tokens.count(each.value) for step in chain) == 1
        and all(each.value != step.value for step in chain)
    )


def _alike(number: int, random_: random.Random) -> list[int]:
    """Other numbers of alike magnitude, shuffled: as many digits, within a factor of two, about as round."""
    step = max(1, 10 ** (len(str(number)) - len(str(number).rstrip("0"))) // 10)
    alike = [new for new in range(number - number // 2 // step * step, 2 * number + 1, step)
             if new != number and new >= SMALLEST and len(str(new)) == len(str(number))]
    return random_.sample(alike, min(len(alike), TRIES))


def execute(chain: list[Step], known: set[Fraction], changes: dict[Fraction, Fraction]) -> list[Move] | None:
    """What becomes of every value of the chain after `changes`; None if that is not certain, or the last stays.

    known: the values that calculations may use before any is calculated.
    """
    meanings = {value: {changes.get(value, value)} for value in known}
    moved = []
    for step in chain:
        tokens = []
        for token in step.tokens:
            options = {token} if isinstance(token, str) else meanings.get(token, set())
            if len(options) != 1:  # unknown, or known in two ways that now differ
                return None
            tokens.extend(options)
        value = evaluate(tokens)
        if value is None or not _alike_value(step.value, value):
            return None
        meanings.setdefault(step.value, set()).add(value)
        moved.append(Move(step.value, value))
    return moved if moved[-1].before != moved[-1].after else None


def keeps_order(moved: list[Move], quantities: list[Quantity], changes: dict[Fraction, Fraction]) -> bool:
    """Whether any two values, stated or calculated, compare as they did before."""
    stated = {Move(each.value, changes.get(each.value, each.value)) for each in quantities}
    return all(a.after < b.after for a, b in pairwise(sorted({*moved, *stated})))


def _alike_value(old: Fraction, new: Fraction) -> bool:
    as_whole = old.denominator % new.denominator == 0  # an integer stays one
    return as_whole and old / FACTOR <= new <= old * FACTOR  # which keeps 0 at 0, and has no room for less


def _changed(question: str, group: tuple[Quantity, ...], new: tuple[int, ...], gold: Fraction) -> Counterfactual:
    """The question with each quantity of `group`, in order of place, replaced; commas stay where they were."""
    old_texts = [question[each.start:each.end] for each in group]
    new_texts = [f"{value:,}" if "," in old else str(value) for old, value in zip(old_texts, new)]
    text = question
    for each, new_text in reversed(list(zip(group, new_texts))):  # from the end, so that places before it stay
        text = text[:each.start] + new_text + text[each.end:]
    return Counterfactual(text, canonical(gold), "; ".join(old_texts), "; ".join(new_texts))
