"""What the scored rollouts of a run say, gathered row by row in constant memory. Glossary: regime_w/README.md."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from regime_w.answer_set import AnswerSet
from regime_w.arms import arm_of
from regime_w.chsh import chsh_summary
from regime_w.scoring import leading_answers
from regime_w.settings import ScoreSettings

COMPONENTS = ("reward", "s_end", "s_path", "s_cf", "s_wm")
POSTERIOR_DRAWS = 20_000
BATCH = 1024


class ScoreMetrics:
    """`add` each scored row, then read `metrics()`."""

    def __init__(self, settings: ScoreSettings) -> None:
        self.settings = settings
        self.questions = self.any_right = self.with_signal = self.mixed = self.placeholders = 0
        self.mean_right = self.majority_right = 0.0
        self.arms: defaultdict[str, ArmTally] = defaultdict(ArmTally)
        self.answers: list[tuple[list, ...]] = []  # of each row: arms, right, tokens, in the majority; likewise
        self.components = {
            "reward": Distribution(-1.0, 2.0, 12), **{name: Distribution(0.0, 1.0, 10) for name in COMPONENTS[1:]}}
        self.pending: list[tuple[float, ...]] = []  # components and share of right arms, folded in by the thousand
        self.counterfactual = CounterfactualTally()
        self.outcomes: Counter = Counter()  # (Wolfram's, Maudlin's): few different ones in any file

    def add(self, row: dict, arms: AnswerSet) -> None:
        """Counts a scored row; `arms` is its `AnswerSet`."""
        outputs = row["arm_outputs"]
        share = sum(arms.correct) / len(arms.correct)
        leading = leading_answers(arms.answers)
        self.questions += 1
        self.mean_right += share
        self.any_right += share > 0
        self.mixed += 0 < share < 1
        self.majority_right += (arms.gold in leading) / max(1, len(leading))
        self.with_signal += any([output["advantage"] for output in outputs])
        self.answers.append(([arm_of(output) for output in outputs], arms.correct, arms.lengths,
                             [answer in leading for answer in arms.answers]))
        self.pending.append((row["reward"], row["s_end"], row["s_path"], row["s_cf"], row["s_wm"], share))
        if len(self.pending) == BATCH:
            self._fold()
        self.placeholders += arms.takes_placeholder(self.settings)
        if arms.cf_answers is not None:
            self.counterfactual.add(arms)
            first, second = arms.outcomes()
            if first.arms and second.arms:
                self.outcomes[first, second] += 1

    def metrics(self) -> dict[str, Any]:
        """The metrics as nested dicts, floats rounded to 6 digits; None where a figure is not defined."""
        n = self.questions
        self._fold()
        return rounded({
            "questions": n,
            "accuracy": {"mean": _share(self.mean_right, n), "any": _share(self.any_right, n),
                         "majority": _share(self.majority_right, n)},
            "arms": {name: tally.metrics(self.settings.seed) for name, tally in self.arms.items()},
            **{name: distribution.metrics() for name, distribution in self.components.items()},
            "signal": {"share": _share(self.with_signal, n), "mixed_share": _share(self.mixed, n)},
            "counterfactual": {**self.counterfactual.metrics(n), "placeholder_share": _share(self.placeholders, n)},
            "chsh": chsh_summary(self.outcomes, self.settings.resamples, self.settings.seed),
        })

    def _fold(self) -> None:
        if self.pending:
            *components, shares = np.array(self.pending).T
            for distribution, values in zip(self.components.values(), components, strict=True):
                distribution.add(values, shares)
            names, *columns = (list(chain.from_iterable(column)) for column in zip(*self.answers, strict=True))
            for name, sums in sums_by(names, columns).items():
                self.arms[name].add(*sums)
            self.pending.clear()
            self.answers.clear()


class ArmTally:
    """One arm over all its answers."""

    def __init__(self) -> None:
        self.answers = self.right = self.tokens = self.in_majority = 0

    def add(self, answers: int, right: int, tokens: int, in_majority: int) -> None:
        self.answers += answers
        self.right += right
        self.tokens += tokens
        self.in_majority += in_majority

    def metrics(self, seed: int) -> dict[str, float]:
        low, high = beta_interval(self.right, self.answers - self.right, seed)
        return {
            "answers": self.answers, "accuracy": self.right / self.answers, "mean_length": self.tokens / self.answers,
            "majority_share": self.in_majority / self.answers,
            "posterior_mean": (self.right + 1) / (self.answers + 2), "posterior_low": low, "posterior_high": high,
        }


class CounterfactualTally:
    """Arms' answers to the questions that have a counterfactual, on both versions."""

    def __init__(self) -> None:
        self.questions = self.answers = self.right = self.cf_right = self.repeats = 0

    def add(self, arms: AnswerSet) -> None:
        self.questions += 1
        self.answers += len(arms.answers)
        self.right += sum(arms.correct)
        self.cf_right += arms.cf_answers.count(arms.cf_gold)
        self.repeats += arms.cf_answers.count(arms.gold)

    def metrics(self, questions: int) -> dict[str, float | None]:
        return {
            "share": _share(self.questions, questions),
            "accuracy_original": _share(self.right, self.answers),
            "accuracy_changed": _share(self.cf_right, self.answers),
            "gap": _share(self.right - self.cf_right, self.answers),
            "repeats_old_gold": _share(self.repeats, self.answers),
        }


class Distribution:
    """A component's distribution over questions, and its correlation with the share of right arms."""

    def __init__(self, low: float, high: float, bins: int) -> None:
        self.low, self.width, self.counts = low, (high - low) / bins, np.zeros(bins, dtype=int)
        self.n, self.minimum, self.maximum = 0, math.inf, -math.inf
        self.x = self.y = self.xx = self.yy = self.xy = 0.0

    def add(self, values: np.ndarray, shares_right: np.ndarray) -> None:
        """Both of shape (questions,): the component, and the share of right arms."""
        self.n += len(values)
        self.minimum, self.maximum = min(self.minimum, float(values.min())), max(self.maximum, float(values.max()))
        bins = ((values - self.low) / self.width + 1e-9).astype(int)  # an edge belongs above, rounding aside
        self.counts += np.bincount(bins.clip(0, len(self.counts) - 1), minlength=len(self.counts))
        self.x += float(values.sum())
        self.y += float(shares_right.sum())
        self.xx += float(values @ values)
        self.yy += float(shares_right @ shares_right)
        self.xy += float(values @ shares_right)

    def metrics(self) -> dict[str, Any]:
        if not self.n:
            return {}
        mean = self.x / self.n
        variance = max(0.0, self.xx / self.n - mean * mean)
        return {"mean": mean, "std": math.sqrt(variance), "min": self.minimum, "max": self.maximum,
                "correlation_with_correctness": self._correlation(variance), "histogram": self._histogram()}

    def _correlation(self, variance: float) -> float | None:
        """Pearson's; None where one of the two does not vary."""
        mean, other = self.x / self.n, self.y / self.n
        other_variance = self.yy / self.n - other * other
        if min(variance, other_variance) < 1e-12:
            return None
        return (self.xy / self.n - mean * other) / math.sqrt(variance * other_variance)

    def _histogram(self) -> dict[str, int]:
        """Counts by the bin's lower and upper end; the first and the last bin also hold what lies beyond them."""
        edges = [self.low + i * self.width for i in range(len(self.counts) + 1)]
        return {f"{edges[i]:.2f}..{edges[i + 1]:.2f}": int(count) for i, count in enumerate(self.counts)}


def beta_interval(successes: int, failures: int, seed: int = 0) -> tuple[float, float]:
    """The central 95% of the posterior Beta(1 + successes, 1 + failures), from seeded draws."""
    draws = np.random.default_rng(seed).beta(1 + successes, 1 + failures, POSTERIOR_DRAWS)
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


def sums_by(names: Sequence[str], columns: Sequence[Sequence[int]]) -> dict[str, list[int]]:
    """For each name, in the order of their first appearance: how often it appears, and the sum of each column there."""
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    which = np.array([numbers[name] for name in names])
    counts = [np.bincount(which), *(np.bincount(which, column) for column in columns)]  # floats: exact up to 2⁵³
    return dict(zip(numbers, np.array(counts, dtype=int).T.tolist(), strict=True))


def rounded(value: Any) -> Any:
    """`value` with every float rounded to 6 digits."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return round(value, 6) if isinstance(value, float) else value


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None
