"""CHSH and Contextuality-by-Default on answers: the two styles as parties, (q, q′) as settings. See docs/chsh.md.

An outcome is +1 for a right answer and −1 for a wrong one. A party's outcomes on a version of the question are those of
its arms. Independent arms are a local model: the expected |S| is at most 2. S measures robustness, nothing quantum.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

CONTEXTS = ((0, 0), (0, 1), (1, 0), (1, 1))  # (x, y): which version each party answers, 0 = q, 1 = q′


class Outcomes(NamedTuple):
    """How many of a party's arms were right on q and on q′, of how many arms."""

    right_q: int
    right_cf: int
    arms: int

    def means(self) -> tuple[float, float]:
        """The mean outcome on q and on q′, each in [-1, 1]; 0 for a party without arms."""
        if not self.arms:
            return 0.0, 0.0
        return 2 * self.right_q / self.arms - 1, 2 * self.right_cf / self.arms - 1


def correlations(a: Outcomes, b: Outcomes) -> dict[tuple[int, int], float]:
    """E(x, y): the mean over all pairs of an arm of `a` and an arm of `b` of the product of their outcomes.

    Over all pairs that mean is the product of the two means.
    """
    return {(x, y): a.means()[x] * b.means()[y] for x, y in CONTEXTS}


def s_value(e: Mapping[tuple[int, int], float]) -> float:
    """S = E(q,q) + E(q,q′) + E(q′,q) − E(q′,q′) (Clauser, Horne, Shimony and Holt 1969)."""
    return e[0, 0] + e[0, 1] + e[1, 0] - e[1, 1]


def s_cf_chsh(a: Outcomes, b: Outcomes) -> float:
    """max(0, S) / 2 if any outcome is right, else 0; in [0, 1]."""
    if not (a.right_q or a.right_cf or b.right_q or b.right_cf):
        return 0.0
    return max(0.0, s_value(correlations(a, b))) / 2


def chsh_summary(cells: Mapping[tuple[Outcomes, Outcomes], int], resamples: int, seed: int) -> dict[str, float | None]:
    """Mean S over questions, its 95% bootstrap interval, and a permutation null.

    cells: how many questions had each pair of outcomes; few pairs differ, so this holds any number of questions.
    null: the second party's outcomes are dealt anew among the questions, `resamples` times. It keeps how often each
    party is right and breaks what they share about a question; p_value is the share of deals with a mean S as high.
    """
    keys = ("questions", "s", "s_low", "s_high", "null_mean", "null_low", "null_high", "p_value")
    n = sum(cells.values())
    if not n:
        return dict.fromkeys(keys, None) | {"questions": 0}
    rng = np.random.default_rng(seed)
    pairs = sorted(cells)
    counts = np.array([cells[pair] for pair in pairs])
    values = np.array([s_value(correlations(a, b)) for a, b in pairs])
    s = float(counts @ values / n)
    means = rng.multinomial(n, counts / n, size=resamples) @ values / n
    null = _permuted(pairs, counts, resamples, rng)
    p_value = (1 + np.sum(null >= s - 1e-12)) / (1 + resamples)
    figures = (n, s, *np.quantile(means, (0.025, 0.975)), null.mean(), *np.quantile(null, (0.025, 0.975)), p_value)
    return dict(zip(keys, (figures[0], *map(float, figures[1:])), strict=True))


def _permuted(pairs: Sequence[tuple[Outcomes, Outcomes]], counts: np.ndarray, resamples: int, rng: np.random.Generator
              ) -> np.ndarray:
    """Mean S of `resamples` random deals, shape (resamples,).

    A random deal is a random table with the margins of the observed one: row after row, and in each cell after cell,
    hypergeometric draws without replacement from what the second party's outcomes have left. All deals at once.
    """
    firsts, seconds = sorted({a for a, _ in pairs}), sorted({b for _, b in pairs})
    row_sums = [sum(int(count) for (a, _), count in zip(pairs, counts) if a == first) for first in firsts]
    column_sums = [sum(int(count) for (_, b), count in zip(pairs, counts) if b == second) for second in seconds]
    left = np.tile(column_sums, (resamples, 1))  # [resamples, columns]
    sums = np.zeros(resamples)
    for first, row_sum in zip(firsts, row_sums):
        to_deal = np.full(resamples, row_sum)
        behind = left.sum(1)  # what the columns after this one have left
        for column, second in enumerate(seconds):
            behind -= left[:, column]
            dealt = rng.hypergeometric(left[:, column], behind, to_deal)
            to_deal -= dealt
            left[:, column] -= dealt
            sums += dealt * s_value(correlations(first, second))
    return sums / sum(row_sums)


def cbd(contexts: Mapping[tuple[int, int], Sequence[tuple[int, int]]]) -> dict[str, float]:
    """Contextuality-by-Default for the four contexts (Kujala, Dzhafarov and Larsson 2015), from paired outcomes.

    contexts: for each (x, y), the outcomes (a, b) of ±1 that the parties gave together, at least one pair.
    s_odd: the largest of the sums of the four E(x, y) with an odd number of minus signs; S is one of them.
    delta: inconsistency of the marginals, Σₓ|⟨A_x in (x,0)⟩ − ⟨A_x in (x,1)⟩| + Σ_y|⟨B_y in (0,y)⟩ − ⟨B_y in (1,y)⟩|.
    bound: 2 + delta. degree: s_odd − bound; only above 0 are the outcomes contextual.
    """
    first, second = ({key: sum(pair[i] for pair in pairs) / len(pairs) for key, pairs in contexts.items()}
                     for i in (0, 1))
    e = {key: sum(a * b for a, b in pairs) / len(pairs) for key, pairs in contexts.items()}
    delta = sum(abs(first[i, 0] - first[i, 1]) + abs(second[0, i] - second[1, i]) for i in (0, 1))
    s_odd = max(sum(sign * e[key] for sign, key in zip(signs, CONTEXTS))
                for signs in product((1, -1), repeat=4) if signs.count(-1) % 2)
    return {"s_odd": s_odd, "delta": delta, "bound": 2 + delta, "degree": s_odd - 2 - delta}
