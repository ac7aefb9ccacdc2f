"""How sure a figure is, and whether two models differ: an interval, an exact test and a paired bootstrap."""

from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """An estimate and the ends of its 95% interval."""

    value: float
    low: float
    high: float


class McNemar(NamedTuple):
    """Two models' right and wrong answers to the same questions.

    gained: questions that only the new model gets right; lost: those that only the old one does.
    p_value: two-sided and exact.
    """

    gained: int
    lost: int
    p_value: float


def wilson(successes: int, n: int) -> Interval:
    """A share and its 95% score interval (Wilson 1927), which stays inside [0, 1] and holds its level near 0 and 1.

    Raises ValueError if there is nothing to take a share of.
    """
    if n < 1:
        raise ValueError("a share of no questions has no interval: give at least one question")
    # Written out, because every evaluation needs it and importing scipy.stats takes a second
    share, z = successes / n, NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def mcnemar(old: Sequence[bool], new: Sequence[bool]) -> McNemar:
    """McNemar's exact test: given that the two models differ on a question, either is the right one as often.

    old, new: one outcome a question, the same questions in the same order. Without a differing question p is 1.
    """
    from scipy.stats import binomtest

    _same_questions(old, new)
    gained = sum(after and not before for before, after in zip(old, new, strict=True))
    lost = sum(before and not after for before, after in zip(old, new, strict=True))
    p_value = binomtest(gained, gained + lost, 0.5).pvalue if gained + lost else 1.0
    return McNemar(gained, lost, float(p_value))


def paired_bootstrap(old: Sequence[float], new: Sequence[float], seed: int = 0, resamples: int = 10_000) -> Interval:
    """The mean of new − old, and its 95% percentile interval over resampled questions (Efron and Tibshirani 1993, 13).

    old, new: one figure a question, the same questions in the same order; equal seeds give equal intervals.
    A resample's mean depends only on how often each distinct difference was drawn, and those counts are multinomial:
    drawing the counts is the same bootstrap without its n draws a resample.
    """
    _same_questions(old, new)
    n = len(old)
    differences, counts = np.unique(np.asarray(new, dtype=float) - np.asarray(old, dtype=float), return_counts=True)
    means = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples) @ differences / n
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(counts @ differences / n), float(low), float(high))


def detectable_difference(discordant: int, n: int, power: float = 0.8) -> float:
    """The smallest true difference that McNemar's test at 5% finds with this power, by the normal approximation.

    discordant: questions of the n on which the two models differ. (z₀.₉₇₅ + z_power)·√discordant / n: Connor 1987, to
    first order. Where none differ, one is assumed.
    """
    quantile = NormalDist().inv_cdf
    return (quantile((1 + CONFIDENCE) / 2) + quantile(power)) * max(discordant, 1) ** 0.5 / n


def _same_questions(old: Sequence, new: Sequence) -> None:
    if len(old) != len(new) or not len(old):
        raise ValueError(f"a paired comparison needs the same questions, at least one: found {len(old)} and {len(new)}")
