"""Counterfactuals: the same question with one number changed, and its new answer by re-executing GSM8K's calculations.

GSM8K annotates each calculation of an answer as `<<expr=value>>`. The chain of these is executed anew with the changed
number; a counterfactual is made only where the new answer is certain (design.md, section 5). What makes it so:

- the number stands once in the question, in digits, is at least 5 (smaller ones count people and things listed by name),
  and is no percentage, fraction, decimal, ratio, time, label, or fact of the world ("7 days a week");
- the calculations use it, and every other number in them is known: from the question, from an earlier calculation, or
  implied by a word ("dozen"), so that no step was done in the solver's head;
- no number in a calculation can be read in two ways that now differ;
- every value keeps its sign, stays an integer where it was one, and stays within a factor of three; the answer changes.
"""

import random
import re
from collections.abc import Iterator
from fractions import Fraction
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


SMALLEST = 5
_STEP = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")
_TOKEN = re.compile(r"\s*(?:([0-9]+\.?[0-9]*|\.[0-9]+)|([-+*/()]))")
_GOLD = re.compile(r"####\s*(-?[0-9,]+)\s*$")


def make_counterfactual(question: str, answer: str, seed: int) -> Counterfactual | None:
    """The question with one number changed, or None where no change is certain.

    answer: GSM8K's own, with its `<<expr=value>>` annotations and the `####` line.
    seed: decides, together with the question, which number changes and to what.
    """
    chain = read_chain(answer)
    if chain is None:
        return None
    quantities = read_quantities(question)
    implied = implied_constants(question, answer)
    random_ = random.Random(f"{seed} {question}")
    candidates = [each for each in quantities if _may_change(each, quantities, implied, chain)]
    for each in random_.sample(candidates, len(candidates)):
        alike = _alike(int(each.value))
        for new in random_.sample(alike, min(len(alike), 100)):
            gold = _execute(chain, quantities, implied, {each.value: Fraction(new)})
            if gold is not None and all(new != other.value for other in quantities):
                return _changed(question, each, new, gold)
    return None


def read_chain(answer: str) -> list[Step] | None:
    """The annotated calculations of a GSM8K answer, in order.

    None if there are none, one is not arithmetic or not equal to its value, or the last is not the gold answer.
    """
    gold = _GOLD.search(answer)
    steps = []
    for expression, stated in _STEP.findall(answer):
        tokens, value = tokenize(expression), tokenize(stated)
        if tokens is None or value is None or evaluate(tokens) is None or evaluate(tokens) != evaluate(value):
            return None
        steps.append(Step(tokens, evaluate(tokens)))
    return steps if gold and steps and steps[-1].value == int(gold[1].replace(",", "")) else None


def tokenize(expression: str) -> list[Fraction | str] | None:
    """Numbers (as Fraction), operators and parentheses of an arithmetic expression; None if anything else stands in it."""
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
        and any(each.value in step.tokens for step in chain)
        and all(each.value != step.value for step in chain)
    )


def _alike(number: int) -> list[int]:
    """Other numbers of alike magnitude: as many digits, within a factor of two, about as round."""
    step = max(1, 10 ** (len(str(number)) - len(str(number).rstrip("0"))) // 10)
    return [new for new in range(number - number // 2 // step * step, 2 * number + 1, step)
            if new != number and new >= SMALLEST and len(str(new)) == len(str(number))]


def _execute(chain: list[Step], quantities: list[Quantity], implied: set[Fraction],
             changes: dict[Fraction, Fraction]) -> Fraction | None:
    """The last value of the chain after `changes`; None if it is not certain or does not change."""
    known = {value: {value} for value in implied | {each.value for each in quantities}}
    known |= {old: {new} for old, new in changes.items()}
    value = None
    for step in chain:
        tokens = []
        for token in step.tokens:
            meanings = {token} if isinstance(token, str) else known.get(token, set())
            if len(meanings) != 1:  # unknown, or known in two ways that now differ
                return None
            tokens.extend(meanings)
        value = evaluate(tokens)
        if value is None or not _alike_value(step.value, value):
            return None
        known.setdefault(step.value, set()).add(value)
    return value if value != chain[-1].value else None


def _alike_value(old: Fraction, new: Fraction) -> bool:
    return old.denominator % new.denominator == 0 and (new == old == 0 or (new > 0 and old / 3 <= new <= old * 3))


def _changed(question: str, each: Quantity, new: int, gold: Fraction) -> Counterfactual:
    old_text = question[each.start:each.end]
    new_text = f"{new:,}" if "," in old_text else str(new)
    return Counterfactual(question[:each.start] + new_text + question[each.end:], canonical(gold), old_text, new_text)
