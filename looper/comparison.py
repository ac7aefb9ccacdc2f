"""Two models' predictions on the same questions: the difference in accuracy, its test, and what it is made of.

`python -m looper.comparison OLD.jsonl NEW.jsonl` compares two files of data/predictions, also of two experiments.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from looper.evaluation import PREDICTION_FIELDS
from looper.jsonl import read_jsonl
from looper.statistics import detectable_difference, mcnemar, paired_bootstrap
from regime_w.answers import answers_match, is_formatted

GAINS = ("format", "reasoning", "either")


def compare(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Two models' predictions on the same questions: the difference in accuracy, its test, and what it is made of.

    gained, lost: questions that only the new, only the old model gets right. p_value: of McNemar's exact test.
    detectable: the smallest true difference that such a test would show in 80% of cases. gain: see `divide_gain`.
    both_formatted: see `among_formatted`.
    """
    before, after = ([row["correct"] for row in rows] for rows in (old, new))
    test = mcnemar(before, after)
    return {
        **_difference(before, after),
        "gained": test.gained, "lost": test.lost, "p_value": float(f"{test.p_value:.6g}"),
        "detectable": round(detectable_difference(test.gained + test.lost, len(old)), 6),
        "gain": divide_gain(old, new),
        "both_formatted": among_formatted(old, new),
    }


def among_formatted(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The strict measure of reasoning: the difference in accuracy on the questions that both models answer in the form
    asked for, where form can explain nothing. The figures are None where there are no such questions."""
    pairs = [pair for pair in zip(old, new, strict=True) if all(is_formatted(row["full_text"]) for row in pair)]
    before, after = ([pair[place]["correct"] for pair in pairs] for place in (0, 1))
    figures = _difference(before, after) if pairs else dict.fromkeys(("difference", "low", "high"))
    return {"questions": len(pairs), **figures}


def divide_gain(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The difference in accuracy as three parts that add up to it, each with its interval and its number of questions.

    Every question that one model gets right and the other wrong belongs to one part:
    format: the wrong answer cannot be read or did not end, so it may be wrong in form alone.
    reasoning: both answers are in the form asked for, or the wrong one nowhere writes the right number, so that no
    reading of it would be right.
    either: the wrong answer writes the right number somewhere, and one of the two was read by the parser's fallbacks.
    The rule looks at old and new alike, so that a change of form alone cannot pass for a change of reasoning.
    """
    causes = [_cause(*pair) for pair in zip(old, new, strict=True)]
    gain = {}
    for name in GAINS:
        before, after = ([row["correct"] and cause == name for row, cause in zip(rows, causes, strict=True)]
                         for rows in (old, new))
        gain[name] = {**_difference(before, after), "questions": causes.count(name)}
    return gain


def _cause(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    if old["correct"] == new["correct"]:
        return None
    wrong = new if old["correct"] else old
    if wrong["answer"] is None or wrong["truncated"]:
        return "format"
    both_formatted = is_formatted(old["full_text"]) and is_formatted(new["full_text"])
    return "either" if _writes(wrong["full_text"], wrong["gold_answer"]) and not both_formatted else "reasoning"


def _writes(text: str, number: str) -> bool:
    found = re.findall(r"[0-9][0-9.,]*", text.replace("{,}", ","))
    return any(answers_match(each, number.lstrip("-")) for each in found)


def _difference(before: Sequence[bool], after: Sequence[bool]) -> dict[str, float]:
    value, low, high = paired_bootstrap(before, after)
    return {"difference": round(value, 6), "low": round(low, 6), "high": round(high, 6)}


def main(arguments: Sequence[str]) -> int:
    """Prints the comparison of two files; returns the exit status: 2 for a call or files that cannot be compared."""
    if len(arguments) != 2:
        print("usage: python -m looper.comparison OLD.jsonl NEW.jsonl (two files of data/predictions, of the same "
              "questions)", file=sys.stderr)
        return 2
    try:
        old, new = (read_jsonl(Path(name), PREDICTION_FIELDS) for name in arguments)
        if [row["id"] for row in old] != [row["id"] for row in new]:
            raise ValueError(f"{arguments[0]} and {arguments[1]} answer different questions, or in another order: nothing "
                             "can be paired; give two files of the same split and the same prepare settings")
        found = compare(old, new)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shares = [100 * sum(row["correct"] for row in rows) / len(rows) for rows in (old, new)]
    low, high = 100 * found["low"], 100 * found["high"]
    print(f"{len(old):,} questions: {shares[0]:.1f}% to {shares[1]:.1f}%, {shares[1] - shares[0]:+.1f} points "
          f"({low:+.1f} to {high:+.1f}); {found['gained']} gained, {found['lost']} lost, McNemar p {found['p_value']:.2g}")
    print("of it " + ", ".join(f"{name} {100 * part['difference']:+.1f}" for name, part in found["gain"].items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
