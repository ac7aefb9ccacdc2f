"""Arms as bandits: which arm should answer, learnt from answers already scored.

An arm's posterior is Beta(1 + right, 1 + wrong). `uniform` is the original design and the default; `thompson` draws
each arm's accuracy from its posterior and takes the highest; `ucb1` (Auer, Cesa-Bianchi and Fischer 2002) takes the
highest mean + sqrt(2 ln n / nᵢ). A floor share keeps every arm alive: at 500 questions the difference of two arms has a
paired standard error near 2 points, too much to give one up. Propensities are stored, to correct estimates with.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from regime_w.arms import arm_of

Allocation = Literal["uniform", "thompson", "ucb1"]
PROPENSITY_DRAWS = 200
FLOOR = 0.2  # this share of the choices is spread evenly over the arms


class Posterior(NamedTuple):
    """What is known of one arm: how often it was right and how often wrong."""

    right: int = 0
    wrong: int = 0


class Choice(NamedTuple):
    """The chosen arm, and the probability with which each arm would have been chosen."""

    arm: int
    propensities: tuple[float, ...]


def propensities(posteriors: Sequence[Posterior], allocation: Allocation, rng: np.random.Generator, floor: float = FLOOR
                 ) -> np.ndarray:
    """The probability of choosing each arm, shape (arms,); none is below floor / arms. Sums to 1.

    Thompson's probabilities are estimated from draws of the posteriors, and the choice is made with the estimate: what
    is stored is exactly what was done. Raises ValueError for an unknown allocation or a floor outside [0, 1].
    """
    arms = len(posteriors)
    if not 0 <= floor <= 1:
        raise ValueError(f"floor must lie in [0, 1], found {floor}")
    right, wrong = np.array(posteriors, dtype=float).T
    if allocation == "uniform":
        best = np.full(arms, 1 / arms)
    elif allocation == "thompson":
        draws = rng.beta(1 + right, 1 + wrong, size=(PROPENSITY_DRAWS, arms))
        best = np.bincount(draws.argmax(axis=1), minlength=arms) / PROPENSITY_DRAWS
    elif allocation == "ucb1":
        best = _even_over_best(_ucb1(right, wrong))
    else:
        raise ValueError(f"allocation must be uniform, thompson or ucb1, found {allocation!r}")
    return floor / arms + (1 - floor) * best


def choose(posteriors: Sequence[Posterior], allocation: Allocation, rng: np.random.Generator, floor: float = FLOOR
           ) -> Choice:
    """One arm, drawn with `propensities`."""
    shares = propensities(posteriors, allocation, rng, floor)
    return Choice(int(rng.choice(len(shares), p=shares / shares.sum())), tuple(float(share) for share in shares))


def allocate(posteriors: Sequence[Posterior], answers: int, allocation: Allocation, seed: int, floor: float = FLOOR
             ) -> tuple[list[int], list[float]]:
    """(how many of a question's `answers` each arm gives, the propensities): for the rollouts of one question.

    `uniform` with as many answers as arms, or a multiple, gives every arm the same number, as in the original design.
    """
    rng = np.random.default_rng(seed)
    shares = propensities(posteriors, allocation, rng, floor)
    arms = len(posteriors)
    if allocation == "uniform" and answers % arms == 0:
        return [answers // arms] * arms, shares.tolist()
    return rng.multinomial(answers, shares / shares.sum()).tolist(), shares.tolist()


def posteriors_of(rows: Iterable[dict], names: Sequence[str]) -> list[Posterior]:
    """The posterior of each arm in `names` from scored rows; an arm that they lack starts afresh."""
    counts = {name: [0, 0] for name in names}
    for row in rows:
        for output in row["arm_outputs"]:
            if (name := arm_of(output)) in counts:
                counts[name][0 if output["correct"] else 1] += 1
    return [Posterior(*counts[name]) for name in names]


def update(posteriors: Sequence[Posterior], arm: int, right: bool) -> list[Posterior]:
    """The posteriors after one more answer of `arm`."""
    return [Posterior(each.right + right, each.wrong + (not right)) if i == arm else each
            for i, each in enumerate(posteriors)]


def replay(rows: Iterable[dict], floor: float = FLOOR, repeats: int = 20, seed: int = 0) -> dict[str, Any]:
    """What each allocation would have earned on full, scored rollouts, one arm a question, against the best single arm.

    rows: of `score.score_row`, all with the same arms. The questions' order is shuffled anew in each repeat.
    Accuracy is the mean over repeats; regret is in right answers: what the best single arm, known only afterwards, got
    beyond it. `ips` is the inverse-propensity estimate of the uniform accuracy from the chosen answers alone: it should
    agree with uniform's. Raises ValueError if there are no rows, or rows lack 'correct' or differ in their arms.
    """
    names, table = _table(rows)
    totals = table.sum(axis=0)
    best = int(totals.argmax())
    report: dict[str, Any] = {
        "questions": len(table), "floor": floor,
        "best_arm": {"name": names[best], "accuracy": _round(totals[best] / len(table))},
        "uniform_expected": {"accuracy": _round(table.mean()), "regret": _round(totals[best] - totals.mean())},
    }
    for allocation in ("uniform", "thompson", "ucb1"):
        runs = [_replay_once(table, allocation, floor, np.random.default_rng([seed, i])) for i in range(repeats)]
        earned, estimates, shares = (np.mean(each, axis=0) for each in zip(*runs, strict=True))
        report[allocation] = {
            "accuracy": _round(earned / len(table)), "regret": _round(totals[best] - earned), "ips": _round(estimates),
            "gain_over_uniform": _round(earned - totals.mean()),
            "shares": {name: _round(share) for name, share in zip(names, shares, strict=True)},
        }
    return report


def _replay_once(table: np.ndarray, allocation: Allocation, floor: float, rng: np.random.Generator
                 ) -> tuple[float, float, np.ndarray]:
    """(right answers, inverse-propensity estimate of the uniform accuracy, share of each arm)."""
    questions, arms = table.shape
    posteriors = [Posterior()] * arms
    earned, weighted, counts = 0, 0.0, np.zeros(arms)
    for row in rng.permutation(table):
        arm, shares = choose(posteriors, allocation, rng, floor)
        right = bool(row[arm])
        posteriors = update(posteriors, arm, right)
        earned += right
        weighted += right / (arms * shares[arm])
        counts[arm] += 1
    return earned, weighted / questions, counts / questions


def _ucb1(right: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """The upper bounds; infinite for an arm that was never tried."""
    tried = right + wrong
    with np.errstate(divide="ignore", invalid="ignore"):
        bounds = right / tried + np.sqrt(2 * np.log(max(1.0, tried.sum())) / tried)
    return np.where(tried == 0, np.inf, bounds)


def _even_over_best(values: np.ndarray) -> np.ndarray:
    best = values == values.max()
    return best / best.sum()


def _table(rows: Iterable[dict]) -> tuple[list[str], np.ndarray]:
    """(arm names, right or wrong as 1 or 0, shape (questions, arms))."""
    names, table = [], []
    for number, row in enumerate(rows, 1):
        outputs = row["arm_outputs"]
        found = [output["name"] for output in outputs]
        names = names or found
        if any("correct" not in output for output in outputs):
            raise ValueError(f"row {number}: an arm's output has no field 'correct'; score the file first")
        if found != names:
            raise ValueError(f"row {number}: a replay needs the arms of row 1 in their order, {', '.join(names)}, found "
                             f"{', '.join(found)}; give it rows that all arms answered (rollouts.allocation: uniform)")
        table.append([int(output["correct"]) for output in outputs])
    if not table:
        raise ValueError("a replay needs scored rows, found none; score a rollouts file first")
    return names, np.array(table)


def _round(value: float) -> float:
    return round(float(value), 6)
