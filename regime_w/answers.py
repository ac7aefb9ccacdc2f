"""Answers out of model text, and their comparison as exact numbers. Nothing here evaluates what a model wrote.

Time is linear in the text: markers are searched from the end, and numbers are read in short windows.
"""

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache

OPEN, CLOSE, MARKER, BOX = "<think>", "</think>", "####", "\\boxed{"
WINDOW = 200  # characters: how far from a marker, or from the end, a number is read
MAX_DIGITS, MAX_EXPONENT = 60, 30  # beyond these it is no answer, and exact arithmetic would take long

# What typography, LaTeX and currencies put in, before or behind a number
_REPLACE = [(old, new) for new, olds in {
    "-": ("\u2212", "\u2013", "\u2011", "\uff0d", "\ufe63"),
    "/": ("\u2044",),
    ",": ("{,}",),
    "\u2009": ("\\,", "\\;", "\\:", "\\ ", "~"),
    "": ("\\!", "\\$", "$", "€", "£", "**", "__", "\\left", "\\right"),
    "*": ("\\times", "\\cdot", "×"),
    "\\frac": ("\\dfrac", "\\tfrac", "\\cfrac"),
}.items() for old in olds]
_VULGAR = "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
_TYPESET = [(re.compile(pattern), new) for pattern, new in (
    (f"(?<=[0-9])(?=[{_VULGAR}])", " "),
    (f"[{_VULGAR}]", lambda found: unicodedata.normalize("NFKC", found[0])),
    ("(?<=10)[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda found: "^" + unicodedata.normalize("NFKC", found[0])),
    (r"(?<=[0-9])\*\*(?=[0-9])", "^"),  # a power; any other ** is bold
    (r"(?<=[A-Za-z}])\^\{?[0-9]\}?", ""),  # of a unit, as in m^2
)]

_SEPARATORS = ",\u00a0\u2007\u2009\u200a\u202f"
_NO_SEPARATORS = dict.fromkeys(map(ord, _SEPARATORS))
_DIGITS = rf"(?:[0-9]{{1,3}}(?:[{_SEPARATORS}][0-9]{{3}})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"{_DIGITS}(?:\.[0-9]+)?"
_ARGUMENT = rf"\s?(?:\{{\s?([-+]?{_DECIMAL})\s?\}}|([0-9]))"
_FRAC = re.compile(rf"(?:([0-9])\s?)?\\frac{_ARGUMENT}{_ARGUMENT}")
_TEN = r"10\s?\^\s?\{?\s?"
_NUMBER = re.compile(rf"""
    (?P<sign> (?<![\w.)\]}}]) [-+] )?
    (?: (?: (?P<whole> {_DIGITS}) \s )? (?P<top> {_DECIMAL}) \s?/\s? (?P<bottom> {_DECIMAL}) (?! \.?[0-9])
      | {_TEN} (?P<of_ten> [-+]?[0-9]+)
      | (?P<decimal> {_DECIMAL} | (?<![A-Za-z0-9]) \.[0-9]+ )
        (?: [eE] (?P<exponent> [-+]?[0-9]+) | \s?[*xX]\s?{_TEN} (?P<power> [-+]?[0-9]+) )?
    )""", re.VERBOSE)

_ANSWER = re.compile(r"answer\s{0,3}(?:is\b|:|=)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\n|[.!?](?=\s)")
# '#### Step 3: …', and '#### 3. Add …' with more beneath it
_HEADING = re.compile(r"\W*(?:step\b|[0-9]{1,2}[.)][ ]+[a-z][^\n]*\n\s*\S)", re.IGNORECASE)
_LEAD = re.compile(r"(?:\\[a-z]+|(?!\.[0-9])[^\w+-]|_|(?:the\s+)?(?:final\s+)?answer\b(?:\s+is\b)?)*", re.IGNORECASE)


def split_reasoning(text: str) -> tuple[str, str]:
    """(reasoning, final): before and after the last `</think>`; without a think block, before and from the last `####`.

    An unclosed `<think>` is all reasoning; a text with neither marker is all final.
    """
    if CLOSE in text or OPEN in text:
        return _think_block(text)
    before, marker, after = text.rpartition(MARKER)
    return before.strip(), (marker + after).strip()


def extract_answer(text: str) -> str | None:
    """The answer of a model's text as a canonical number, such as '18', '-0.5' or '1/3'; None if there is none.

    After the last `</think>`: the last `####`, else the last `\\boxed{}`, else the last 'answer is',
    else the last number. A text with an unclosed `<think>` has no answer.
    """
    _, final = _think_block(text)
    for read in (_after_marker, _in_box, _after_answer_is, _last_number):
        number = read(final)
        if number is not None:
            return canonical(number)
    return None


def is_unclosed(text: str) -> bool:
    """Whether a `<think>` is open at the end: the text was cut short, whatever ended it, and has no answer."""
    return text.rfind(OPEN) > text.rfind(CLOSE)


def is_formatted(text: str) -> bool:
    """Whether the text gives its answer as asked: a `####` with a number, after any think block."""
    return _after_marker(_think_block(text)[1]) is not None


def answers_match(a: str | None, b: str | None) -> bool:
    """Whether both are numbers, and the same one: '18.00' and '18' match, a missing answer matches nothing."""
    first, second = _parse_or_none(a), _parse_or_none(b)
    return first is not None and first == second


def parse_number(text: str) -> Fraction | None:
    """The first number of a short text, exactly; None if there is none.

    Reads signs, thousands separators, decimals, fractions, mixed numbers, scientific notation, currencies and LaTeX;
    '%' and other units are left aside: '25%' is 25.
    """
    return next(_numbers(_beginning(text)), None)


def canonical(number: Fraction) -> str:
    """'18', '-0.5', or '1/3' where no finite decimal is equal to it."""
    if number.denominator == 1:
        return str(number.numerator)
    twos, rest = _divide_out(number.denominator, 2)
    fives, rest = _divide_out(rest, 5)
    if rest != 1:
        return f"{number.numerator}/{number.denominator}"
    places = max(twos, fives)
    digits = str(abs(number.numerator) * 10**places // number.denominator).rjust(places + 1, "0")
    return f"{'-' * (number < 0)}{digits[:-places]}.{digits[-places:]}"


@lru_cache(maxsize=4096)  # answers repeat; but texts may be long
def canonical_answer(answer: str | None) -> str | None:
    """A stored answer in canonical form: '18.00' becomes '18'; None for what holds no number."""
    number = _parse_or_none(answer)
    return None if number is None else canonical(number)


# lm-evaluation-harness, task gsm8k: its two filters and its comparison, for figures that others can compare with

INVALID = "[invalid]"
_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def strict_match(text: str) -> str:
    """The harness's strict-match: the first `#### ` with a number, as written, else '[invalid]'."""
    found = _STRICT.search(text)
    return found[1].strip() if found else INVALID


def flexible_extract(text: str) -> str:
    """The harness's flexible-extract: the last number-like run of characters, as written, else '[invalid]'."""
    found = None
    for found in _FLEXIBLE.finditer(text):
        pass
    return found[0].strip() if found else INVALID


def harness_match(extracted: str, gold: str) -> bool:
    """The harness's exact_match with the task's patterns; `gold` is canonical, or GSM8K's whole answer text."""
    return _harness_form(extracted) == _harness_form(gold)


def _harness_form(text: str) -> str:
    # `re.sub("(?s).*#### ", "", …)` keeps what follows the last '#### '; said this way it takes linear time
    text = text.replace(",", "").replace("$", "").rpartition("#### ")[2]
    return re.sub(r"\.$", "", text).lower()


def _think_block(text: str) -> tuple[str, str]:
    closed = text.rfind(CLOSE)
    if is_unclosed(text):
        return text.replace(OPEN, "").replace(CLOSE, "").strip(), ""
    if closed < 0:
        return "", text
    return text[:closed].replace(OPEN, "").replace(CLOSE, "").strip(), text[closed + len(CLOSE):].strip()


def _after_marker(text: str) -> Fraction | None:
    _, marker, after = text.rpartition(MARKER)
    line = _sentence(after) if marker else ""
    if _HEADING.match(after, 0, WINDOW):
        return None
    if "=" in line:
        return _value(line)
    return _number_at(_clean(line))


def _in_box(text: str) -> Fraction | None:
    _, box, after = text.rpartition(BOX)
    content, depth = _beginning(after) if box else "", 1
    for end, char in enumerate(content):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return _value(content[:end])
    return _value(content)


def _after_answer_is(text: str) -> Fraction | None:
    found = None
    for found in _ANSWER.finditer(text):
        pass
    return _value(_sentence(text[found.end():])) if found else None


def _last_number(text: str) -> Fraction | None:
    end = max(text.rfind(digit) for digit in "0123456789" + _VULGAR) + 1
    number = None
    for number in _numbers(text[max(0, end - WINDOW):end + 2]):  # with what closes \frac{1}{2}
        pass
    return number


def _beginning(text: str) -> str:
    """At most WINDOW characters; a number that would be cut is left out."""
    return text if len(text) <= WINDOW else text[:WINDOW + 1].rstrip("0123456789.,/")[:WINDOW]


def _sentence(text: str) -> str:
    """The first line or sentence that is not empty, of at most WINDOW characters."""
    text = _beginning(text).lstrip(" \t\r\n:*")
    end = _SENTENCE_END.search(text)
    return text[:end.start()] if end else text


def _value(text: str) -> Fraction | None:
    """The first number behind the last '=', if there is one: '3 * 6 = 18' is 18. Else the first number."""
    before, equals, after = text.rpartition("=")
    number = parse_number(after)
    return parse_number(before) if equals and number is None else number


def _number_at(text: str) -> Fraction | None:
    """The number that begins the text, but for punctuation, LaTeX commands and 'the answer is'."""
    lead = _LEAD.match(text).end()
    found = _NUMBER.match(text, lead)
    return _read(found) if found else None


def _numbers(text: str):
    return (number for found in _NUMBER.finditer(_clean(text)) if (number := _read(found)) is not None)


def _clean(text: str) -> str:
    for pattern, new in _TYPESET:
        text = pattern.sub(new, text)
    for old, new in _REPLACE:
        if old in text:
            text = text.replace(old, new)
    return _FRAC.sub(_plain_fraction, text) if "\\frac" in text else text


def _plain_fraction(found: re.Match) -> str:
    whole, *argument = found.groups(default="")
    text = "{}{}/{}{}".format(*argument)
    sign = "-" * (text.count("-") % 2)
    return f"{whole}{' ' if whole else ''}{sign}{text.replace('-', '')}"


def _read(found: re.Match) -> Fraction | None:
    if found.end() - found.start() > MAX_DIGITS:
        return None
    part = {name: text.translate(_NO_SEPARATORS) for name, text in found.groupdict(default="").items()}
    exponent = int(part["exponent"] or part["power"] or part["of_ten"] or 0)
    if abs(exponent) > MAX_EXPONENT:
        return None
    if part["top"]:
        bottom = Fraction(part["bottom"])
        if bottom == 0:
            return None
        value = int(part["whole"] or 0) + Fraction(part["top"]) / bottom
    else:
        value = Fraction(part["decimal"] or 1) * Fraction(10) ** exponent
    return -value if part["sign"] == "-" else value


def _parse_or_none(text: str | None) -> Fraction | None:
    return None if text is None else parse_number(text)


def _divide_out(number: int, prime: int) -> tuple[int, int]:
    times = 0
    while number % prime == 0:
        number, times = number // prime, times + 1
    return times, number
