"""The numbers of a word problem: those that it states, in digits or words, and those that its words imply."""

import re
from fractions import Fraction
from typing import NamedTuple

_SMALL = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
          "seventeen eighteen nineteen").split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
WORDS = {word: i for i, word in enumerate(_SMALL)} | {word: 20 + 10 * i for i, word in enumerate(_TENS)}
SCALES = {"hundred": 100, "thousand": 1000, "million": 1_000_000}

# What a word says about numbers that the question does not write
_IMPLIED = [(re.compile(rf"\b(?:{words})", re.IGNORECASE), [Fraction(value) for value in values.split()])
            for words, values in {
    "half|halves|halv|midpoint": "2 1/2 50", "twice|doubl|both|pair|couple|twin|two|second": "2",
    "tripl|thrice|third|trio": "3 1/3", "quadrupl": "4", "quarter": "4 1/4 25", "fourth": "4 1/4", "fifth": "5 1/5",
    "sixth": "6 1/6", "seventh": "7 1/7", "eighth": "8 1/8", "ninth": "9 1/9", "tenth": "10 1/10",
    "dozen": "12", "decade": "10", "centur": "100", "score": "20",
    "week": "7 52", "month": "12 30", "year": "12 365 52", "da(?:y|ily)": "24 7",
    "(?:January|March|May|July|August|October|December)\\b": "31", "(?:April|June|September|November)\\b": "30",
    "February": "28", "hour": "60 24", "minute": "60", "second": "60",
    "feet|foot|ft\\b|inch": "12", "yard": "3 36", "mile": "5280", "pound|ounce|lb": "16", "gallon": "4", "quart": "4 2",
    "ton\\b|tons\\b": "2000", "kilo|km\\b|kg\\b|ml\\b|millil|millim": "1000", "centim|meter|metre": "100",
    "percent|cent": "100", "dime": "10 1/10", "nickel": "5 1/20", "penn": "1 1/100",
    "square|rectang": "2 4", "triang": "3", "hexagon": "6", "rais|trip|way|back and forth": "2",
}.items()] + [(re.compile(r"%"), [Fraction(100), Fraction(1, 100)]), (re.compile(""), [Fraction(0), Fraction(1)])]


class Quantity(NamedTuple):
    """A number that a question states: its value, where it stands, and whether another could stand there."""

    value: Fraction
    start: int
    end: int
    changeable: bool


_NUMBER = re.compile(r"[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+")
_WORD = "|".join(sorted([*WORDS, *SCALES], key=len, reverse=True))
_WORDED = re.compile(rf"\b(?:{_WORD})(?:[\s-]+(?:and\s+)?(?:{_WORD}))*\b", re.IGNORECASE)
_RELATED = re.compile(r"([0-9]+)\s*([/:])\s*([0-9]+)")
_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(?:%|percent|per cent)", re.IGNORECASE)

_TIME = r"(?:second|minute|hour|day|night|week|month|year)s?"
# Before a number: it is part of another, a label or a date
_LABEL = re.compile(r"(?:[\w.#/:,-]|\b(?:grade|chapter|page|room|number|no|size|level|route|apartment|class|season|"
                    r"episode|section|version|year|day|week|age|jan\w*|feb\w*|march|apr\w*|may|june?|july?|aug\w*|"
                    r"sep\w*|oct\w*|nov\w*|dec\w*)\.?\s)$", re.IGNORECASE)
_YEAR = re.compile(r"\b(?:in|since|by|from|until|to|and|of|before|after)\s$", re.IGNORECASE)
# Behind a number: a percentage, fraction, ratio, time, ordinal, range or decimal; or a fact of the world
_BOUND = re.compile(rf"\s?(?:%|percent\b|per cent\b|[/:]\s?[0-9]|[ap]\.?m\b|o'clock)"
                    rf"|[,.]?[0-9]|-[0-9]|(?:st|nd|rd|th)\b|\s?to [0-9]"
                    rf"|[\s-]{_TIME} (?:a|an|per|each|every|in|of|out of)(?: the| a| an| each| one)? {_TIME}\b"
                    rf"|[\s-](?:sides?|sided|legs|wheels|fingers|letters|cards)\b", re.IGNORECASE)


def read_quantities(question: str) -> list[Quantity]:
    """Every number of the question digits first, then words; words, and their parts, are not changeable."""
    quantities = []
    for found in _NUMBER.finditer(question):
        value = Fraction(found[0].replace(",", ""))
        before = question[max(0, found.start() - 20):found.start()]
        free = not ("." in found[0] or _BOUND.match(question, found.end()) or _LABEL.search(before)
                    or _YEAR.search(before) and 1500 <= value <= 2100)
        quantities.append(Quantity(value, *found.span(), free))
    for found in _WORDED.finditer(question):
        words = [word for word in re.split(r"[\s-]+", found[0].lower()) if word != "and"]
        parts = {Fraction(WORDS.get(word, SCALES.get(word, 0))) for word in words}
        quantities += [Quantity(value, *found.span(), False) for value in sorted(parts | {_in_words(words)})]
    return quantities


def implied_constants(question: str, answer: str) -> set[Fraction]:
    """Numbers that a calculation may use though the question does not write them: 'dozen' implies 12, '40%' implies 60.

    Words count in the question and in the answer; fractions, ratios and percentages in the question.
    """
    implied = {value for pattern, values in _IMPLIED if pattern.search(f"{question} {answer}") for value in values}
    for top, mark, bottom in _RELATED.findall(question):
        a, b = int(top), int(bottom)
        implied |= {Fraction(a), Fraction(b), Fraction(b - a)}
        implied |= {Fraction(a + b)} if mark == ":" else {Fraction(a, b), 1 - Fraction(a, b)} if b else set()
    for percent in map(Fraction, _PERCENT.findall(question)):
        implied |= {percent, 100 - percent, 100 + percent, percent / 100, 1 - percent / 100, 1 + percent / 100}
    return implied


def _in_words(words: list[str]) -> Fraction:
    """'two hundred five' is 205."""
    total = current = 0
    for word in words:
        if word not in SCALES:
            current += WORDS[word]
        elif word == "hundred":
            current = max(current, 1) * 100
        else:
            total, current = total + max(current, 1) * SCALES[word], 0
    return Fraction(total + current)
