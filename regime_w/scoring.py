"""Regime W's components: how coherent a set of answers to one question is. Formulas: regime_w/README.md, The scores.

Plain functions over sequences with one entry an arm. Answers are canonical strings (`answers.extract_answer`) or None.
"""

from collections.abc import Sequence
from itertools import compress
from operator import mul

from regime_w.settings import ScoreSettings


def s_end(answers: Sequence[str | None]) -> float:
    """Agreeing pairs / all pairs, in [0, 1]. A missing answer agrees with nothing; fewer than two arms: 0."""
    pairs = len(answers) * (len(answers) - 1)
    return sum(answers.count(answer) - 1 for answer in answers if answer is not None) / pairs if pairs else 0.0


def leading_answers(answers: Sequence[str | None]) -> set[str]:
    """The most frequent answers: one, several in a tie, or none if no arm answered."""
    counts = {answer: answers.count(answer) for answer in set(answers) if answer is not None}
    most = max(counts.values(), default=0)
    return {answer for answer, count in counts.items() if count == most}


def s_path(lengths: Sequence[int]) -> float:
    """1 / (1 + CV²), CV the population coefficient of variation of the lengths in tokens; in [0, 1].

    Said exactly: (Σℓ)² / (K·Σℓ²). 1 if all lengths are equal, 0 if no arm wrote anything (or there is none).
    """
    total = sum(lengths)
    return total * total / (len(lengths) * sum(map(mul, lengths, lengths))) if total else 0.0


def s_path_within_style(lengths: Sequence[int], styles: Sequence[str]) -> float:
    """The mean of `s_path` over the styles: differences between the styles, which are intended, cost nothing."""
    names = sorted(set(styles))
    parts = [s_path(list(compress(lengths, [style == name for style in styles]))) for name in names]
    return sum(parts) / len(parts) if parts else 0.0


def s_cf(answers: Sequence[str | None], gold: str) -> float:
    """The share of arms whose answer to the counterfactual is its recomputed gold answer; 0 for no arms."""
    return answers.count(gold) / len(answers) if answers else 0.0


def s_wm(end: float, path: float, cf: float, settings: ScoreSettings = ScoreSettings()) -> float:
    """The weighted sum of the components; in [0, 1] if the weights sum to 1."""
    return settings.weight_end * end + settings.weight_path * path + settings.weight_cf * cf


# Each component as it would be without one of the arms, for all arms at once: what an arm adds is the difference


def s_end_without_each(answers: Sequence[str | None]) -> list[float]:
    """`s_end` of the other answers, for each arm."""
    pairs = (len(answers) - 1) * (len(answers) - 2)
    agreeing = [0 if answer is None else answers.count(answer) - 1 for answer in answers]
    whole = sum(agreeing)
    return [(whole - 2 * own) / pairs if pairs else 0.0 for own in agreeing]


def s_path_without_each(lengths: Sequence[int]) -> list[float]:
    """`s_path` of the other lengths, for each arm."""
    others, total, squares = len(lengths) - 1, sum(lengths), sum(map(mul, lengths, lengths))
    return [(total - own) ** 2 / (others * (squares - own * own)) if total > own else 0.0 for own in lengths]


def s_cf_without_each(answers: Sequence[str | None], gold: str) -> list[float]:
    """`s_cf` of the other answers, for each arm."""
    others, right = len(answers) - 1, answers.count(gold)
    return [(right - (answer == gold)) / others if others else 0.0 for answer in answers]
