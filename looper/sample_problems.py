"""The built-in problem source: grade-school word problems in GSM8K's format, made from the templates beside this file.

What keeps the splits apart: the numbers of a question, as a set, belong to one split, whatever the template. A hash of
them says which. So a model that has learned an answer by heart meets it in no other split.
"""

import hashlib
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from types import CodeType
from typing import Any, Literal

import yaml

Split = Literal["train", "dev", "test"]

TEMPLATES = Path(__file__).with_suffix(".yaml")
SHARES = {"train": 12, "dev": 3, "test": 5}  # of every 20 sets of numbers; train and dev stand 80 to 20
SMALLEST, LARGEST = 2, 150  # of numbers and results: from 2, so that each noun is plural; small, for a tiny model

RESULT = re.compile(r"(\$?)\[(\w+) = ([^\]]+)\]")  # [total = boxes*each], or $[cost = count*price]
NAME = re.compile(r"[a-z]\w*")


@dataclass(frozen=True, eq=False)
class Template:
    """One kind of problem; the YAML file explains the parts."""

    name: str
    question: str
    steps: tuple[str, ...]
    numbers: dict[str, range]
    words: dict[str, list[str]]
    test_only: bool

    @property
    def results(self) -> list[tuple[str, str]]:
        """(name, expression) of each step, in order."""
        return [(result, expression) for step in self.steps for _, result, expression in RESULT.findall(step)]


def generate(split: Split, count: int, seed: int) -> list[dict[str, str]]:
    """`count` problems of `split`, each {"question", "answer", "template"}; the same on every machine.

    A smaller count gives the beginning of a larger one. The templates take turns, and none uses a set of numbers twice
    in one order. Raises ValueError for an unknown split and for a count that the templates cannot give.
    """
    if split not in SHARES:
        raise ValueError(f"sample problems: split {split!r} is none of {', '.join(SHARES)}; ask for one of them")
    templates, people = load()
    templates = [template for template in templates if split == "test" or not template.test_only]
    most = sum(len(fillings(template)[split]) for template in templates)
    if not 0 <= count <= most:
        raise ValueError(f"sample problems: the templates give 0 to {most} {split} problems, not {count}; ask for no "
                         f"more (setting prepare.{split}), or widen the number ranges in {TEMPLATES.name}")
    draws = {template.name: random.Random(f"{seed} {split} {template.name}") for template in templates}
    waiting = {template.name: _shuffled(fillings(template)[split], draws[template.name]) for template in templates}
    turns = random.Random(f"{seed} {split}")
    problems: list[dict[str, str]] = []
    while len(problems) < count:
        for template in _shuffled(templates, turns):
            if waiting[template.name]:
                problems.append(_write(template, waiting[template.name].pop(), people, draws[template.name]))
    return problems[:count]


def split_of(numbers: tuple[int, ...]) -> Split:
    """The one split in which a question may give these numbers, in any order."""
    digest = hashlib.sha256(" ".join(map(str, sorted(numbers))).encode()).digest()
    place = int.from_bytes(digest[:8], "big") % sum(SHARES.values())
    return "train" if place < SHARES["train"] else "dev" if place < SHARES["train"] + SHARES["dev"] else "test"


@cache
def load() -> tuple[list[Template], list[tuple[str, str, str]]]:
    """The templates, and the people as (name, "she" or "he", "her" or "his")."""
    file = yaml.safe_load(TEMPLATES.read_text(encoding="utf-8"))
    templates = [Template(each["name"], each["question"], tuple(each["steps"]),
                          {name: _range(*bounds) for name, bounds in each["numbers"].items()},
                          each.get("words", {}), each.get("test_only", False)) for each in file["templates"]]
    return templates, [tuple(person.split()) for person in file["people"]]


@cache
def fillings(template: Template) -> dict[Split, list[dict[str, int]]]:
    """Each split's values for the template's numbers and results, in a fixed order.

    Numbers, results and the constants of the expressions are all different, so that each is known by its value and a
    number can be changed without meeting another; every number and result is a whole one in SMALLEST..LARGEST.
    """
    constants = {int(digits) for _, expression in template.results for digits in re.findall(r"\b\d+", expression)}
    # Plain eval: the expressions are this project's own, from the file beside this one.
    chain = [(result, compile(expression, template.name, "eval")) for result, expression in template.results]
    found: dict[Split, list[dict[str, int]]] = {split: [] for split in SHARES}
    for numbers in product(*template.numbers.values()):
        if len(set(numbers)) == len(numbers) and constants.isdisjoint(numbers):
            values = _values(dict(zip(template.numbers, numbers, strict=True)), chain, constants)
            if values:
                found[split_of(numbers)].append(values)
    return found


def _values(values: dict[str, int], chain: list[tuple[str, CodeType]], constants: set[int]) -> dict[str, int] | None:
    taken = constants.union(values.values())
    for result, code in chain:
        value = eval(code, {"__builtins__": {}}, values)
        if value != int(value) or not SMALLEST <= value <= LARGEST or value in taken:
            return None
        values[result] = int(value)
        taken.add(values[result])
    return values


def _write(template: Template, values: Mapping[str, int], people: list[tuple[str, str, str]],
           draw: random.Random) -> dict[str, str]:
    (name, she, her), (friend, _, _) = draw.sample(people, 2)
    fields: dict[str, Any] = {"name": name, "friend": friend, "she": she, "She": she.capitalize(),
                              "her": her, "Her": her.capitalize(), **values}
    for word, choices in template.words.items():
        one, _, many = draw.choice(choices).partition("/")
        fields |= {word: one, f"{word}s": many}
    steps = [RESULT.sub(lambda found: _annotate(found, values), step).format_map(fields) for step in template.steps]
    last = template.results[-1][0]
    return {"question": template.question.format_map(fields), "answer": "\n".join([*steps, f"#### {values[last]}"]),
            "template": template.name}


def _annotate(found: re.Match[str], values: Mapping[str, int]) -> str:
    dollar, result, expression = found.groups()
    shown = NAME.sub(lambda name: str(values[name[0]]), expression)
    return f"{shown}={dollar}<<{shown}={values[result]}>>{values[result]}"


def _range(lowest: int, highest: int, step: int = 1) -> range:
    return range(lowest, highest + 1, step)


def _shuffled(items: list, draw: random.Random) -> list:
    return draw.sample(items, len(items))
