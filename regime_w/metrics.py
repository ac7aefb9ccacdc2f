"""What the scored rollouts of a run say, gathered row by row in constant memory. Glossary: regime_w/README.md."""

import math
from collections import Counter
from operator import itemgetter
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
        self.arms = ArmTallies()
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
        self.with_signal += any(map(itemgetter("advantage"), outputs))
        self.arms.add([arm_of(output) for output in outputs], arms.correct, arms.lengths,
                      [answer in leading for answer in arms.answers])
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
            "arms": self.arms.metrics(self.settings.seed),
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
            self.arms.fold()
            self.pending.clear()


class ArmTallies:
    """The arms over all their answers, which are gathered in flat lists until `fold` counts them."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}  # of the arms, by name
        self.gathered: tuple[list, ...] = [], [], [], []  # of each answer: its arm's number, right, tokens, in majority
        self.sums = np.zeros((0, 4), dtype=int)  # of each arm: answers, right, tokens, in majority

    def add(self, names: list[str], right: list[bool], tokens: list[int], in_majority: list[bool]) -> None:
        """A row's answers."""
        numbers = [self.numbers.setdefault(name, len(self.numbers)) for name in names]
        for gathered, values in zip(self.gathered, (numbers, right, tokens, in_majority)):
            gathered += values

    def fold(self) -> None:
        numbers, *columns = map(np.array, self.gathered)
        sums = [np.bincount(numbers, weights, len(self.numbers)) for weights in (None, *columns)]  # exact up to 2⁵³
        sums = np.array(sums, dtype=int).T
        sums[:len(self.sums)] += self.sums
        self.sums = sums
        for gathered in self.gathered:
            gathered.clear()

    def metrics(self, seed: int) -> dict[str, dict[str, float]]:
        return {name: self._metrics(*sums, seed) for name, sums in zip(self.numbers, self.sums.tolist(), strict=True)}

    def _metrics(self, answers: int, right: int, tokens: int, in_majority: int, seed: int) -> dict[str, float]:
        low, high = beta_interval(right, answers - right, seed)
        return {
            "answers": answers, "accuracy": right / answers, "mean_length": tokens / answers,
            "majority_share": in_majority / answers,
            "posterior_mean": (right + 1) / (answers + 2), "posterior_low": low, "posterior_high": high,
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


def rounded(value: Any) -> Any:
    """`value` with every float rounded to 6 digits."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return round(value, 6) if isinstance(value, float) else value


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None
