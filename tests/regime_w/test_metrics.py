import math
from collections import Counter

import numpy as np
import pytest

from regime_w import metrics as metrics_module
from regime_w.metrics import Distribution, beta_interval, rounded
from regime_w.sample_rows import random_rows
from regime_w.score import score_row, score_rows
from regime_w.settings import ScoreSettings


def arm(name: str, answer: str | None, tokens: int, changed: str | None = None, style: str = "wolfram") -> dict:
    return {"name": name, "style": style, "answer": answer, "num_tokens": tokens, "counterfactual": {"answer": changed}}


def rows() -> list[dict]:
    """Three questions, three arms; the second and third have a counterfactual."""
    return [
        {"id": "1", "gold_answer": "5", "counterfactual": None,
         "arm_outputs": [arm("a", "5", 10), arm("b", "5.0", 20), arm("c", "6", 30, style="maudlin")]},
        {"id": "2", "gold_answer": "7", "counterfactual": {"gold_answer": "8"},
         "arm_outputs": [arm("a", "7", 40, "8"), arm("b", "9", 50, "7"), arm("c", None, 60, None, "maudlin")]},
        {"id": "3", "gold_answer": "1", "counterfactual": {"gold_answer": "2"},
         "arm_outputs": [arm("a", "3", 100, "1.0"), arm("b", "3", 100, "4"), arm("c", "3", 100, "2", "maudlin")]},
    ]


def metrics_of(given: list[dict], settings: ScoreSettings = ScoreSettings(resamples=100)) -> dict:
    scored, metrics = score_rows(given, settings)
    assert len(list(scored)) == len(given)
    return metrics.metrics()


def test_accuracies_by_hand() -> None:
    found = metrics_of(rows())
    assert found["questions"] == 3
    # Right: 2 of 3, 1 of 3, 0 of 3. Majority: right; a tie of '7' and '9' counts half; wrong.
    assert found["accuracy"] == {"mean": pytest.approx(1 / 3, abs=1e-6), "any": pytest.approx(2 / 3, abs=1e-6),
        "majority": 0.5}
    assert found["signal"] == {"share": pytest.approx(2 / 3, abs=1e-6), "mixed_share": pytest.approx(2 / 3, abs=1e-6)}


def test_arms_by_hand() -> None:
    found = metrics_of(rows())["arms"]
    assert list(found) == ["a", "b", "c"]
    assert [each["answers"] for each in found.values()] == [3, 3, 3]
    assert found["a"]["accuracy"] == pytest.approx(2 / 3, abs=1e-6)
    assert [each["mean_length"] for each in found.values()] == [50, pytest.approx(170 / 3, abs=1e-6),
        pytest.approx(190 / 3, abs=1e-6)]
    assert [each["majority_share"] for each in found.values()] == [1.0, 1.0, pytest.approx(1 / 3, abs=1e-6)]
    assert [each["posterior_mean"] for each in found.values()] == [0.6, 0.4, 0.2]
    low, high = beta_interval(2, 1)
    assert (found["a"]["posterior_low"], found["a"]["posterior_high"]) == (round(low, 6), round(high, 6))


def test_arms_over_many_rows_are_counted_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arms that come late, and a last batch that lacks the latest of them."""
    monkeypatch.setattr(metrics_module, "BATCH", 64)
    given = list(random_rows(200, seed=4))
    for i, row in enumerate(given):
        kept = slice(2, None) if i < 100 else slice(4) if i < 150 else slice(2, 5)
        row["arm_outputs"] = row["arm_outputs"][kept]
    scored, metrics = score_rows(given, ScoreSettings(resamples=100))
    answers, right, tokens = Counter(), Counter(), Counter()
    for row in scored:
        for output in row["arm_outputs"]:
            answers[output["name"]] += 1
            right[output["name"]] += output["correct"]
            tokens[output["name"]] += output["num_tokens"]
    found = metrics.metrics()["arms"]
    assert found.keys() == answers.keys() and len(set(answers.values())) > 2
    for name, count in answers.items():
        figures = found[name]
        assert figures["answers"] == count
        assert figures["accuracy"] == pytest.approx(right[name] / count, abs=1e-6)
        assert figures["mean_length"] == pytest.approx(tokens[name] / count, abs=1e-6)


def test_counterfactual_gap_by_hand() -> None:
    found = metrics_of(rows())["counterfactual"]
    # Questions 2 and 3: 1 of 6 right on q, 2 of 6 on q', 2 of 6 repeat the old gold ('7' and '1.0')
    assert found == {"share": pytest.approx(2 / 3, abs=1e-6), "accuracy_original": pytest.approx(1 / 6, abs=1e-6),
                     "accuracy_changed": pytest.approx(2 / 6, abs=1e-6), "gap": pytest.approx(-1 / 6, abs=1e-6),
                     "repeats_old_gold": pytest.approx(2 / 6, abs=1e-6),
                     "placeholder_share": pytest.approx(1 / 3, abs=1e-6)}
    settings = ScoreSettings(cf="placeholder", resamples=100)
    assert metrics_of(rows(), settings)["counterfactual"]["placeholder_share"] == 1.0


def test_without_a_counterfactual_those_figures_are_not_defined() -> None:
    found = metrics_of(rows()[:1])
    assert found["counterfactual"] == {"share": 0.0, "accuracy_original": None, "accuracy_changed": None, "gap": None,
                                       "repeats_old_gold": None, "placeholder_share": 1.0}
    assert found["chsh"]["questions"] == 0 and found["chsh"]["s"] is None
    assert found["s_end"]["correlation_with_correctness"] is None  # one question does not vary


def test_chsh_counts_questions_with_both_parties() -> None:
    found = metrics_of(rows())["chsh"]
    # Question 2: W right 1 of 2 on q, 1 of 2 on q': means 0, 0.
    # Question 3: W wrong on q (-1), and wrong on q' (-1); M -1, +1:
    # S = 1 - 1 + 1 + 1 = 2. Mean 1.
    assert (found["questions"], found["s"]) == (2, 1.0)
    one_party = rows()
    for row in one_party:
        row["arm_outputs"].pop()
    assert metrics_of(one_party)["chsh"]["questions"] == 0


def test_components_over_many_rows_equal_numpys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regime_w.metrics.BATCH", 64)
    given = list(random_rows(300, seed=4))  # several batches and a rest
    found = metrics_of(given)
    scored = [score_row(row) for row in given]
    right = np.array([np.mean([output["correct"] for output in row["arm_outputs"]]) for row in scored])
    for name in ("reward", "s_end", "s_path", "s_cf", "s_wm"):
        low, high, bins = (-1, 2, 12) if name == "reward" else (0, 1, 10)
        values = np.array([row[name] for row in scored])
        assert found[name]["mean"] == pytest.approx(values.mean(), abs=2e-6)
        assert found[name]["std"] == pytest.approx(values.std(), abs=2e-6)
        assert (found[name]["min"], found[name]["max"]) == (round(values.min(), 6), round(values.max(), 6))
        assert found[name]["correlation_with_correctness"] == pytest.approx(np.corrcoef(values, right)[0, 1], abs=2e-6)
        edges = np.linspace(low, high, bins + 1) - 1e-10
        edges[-1] += 1  # the last bin also holds its upper end
        expected, _ = np.histogram(values, bins=edges)
        assert list(found[name]["histogram"].values()) == expected.tolist()


def test_histogram_names_its_bins_and_holds_what_lies_beyond() -> None:
    distribution = Distribution(0.0, 1.0, 10)
    distribution.add(np.array([-3.0, 0.0, 0.3, 0.1 + 0.2, 0.95, 1.0, 7.0]), np.zeros(7))
    assert distribution.metrics()["histogram"] == {
        "0.00..0.10": 2, "0.10..0.20": 0, "0.20..0.30": 0, "0.30..0.40": 2, "0.40..0.50": 0, "0.50..0.60": 0,
        "0.60..0.70": 0,
        "0.70..0.80": 0, "0.80..0.90": 0, "0.90..1.00": 3}
    assert Distribution(0.0, 1.0, 10).metrics() == {}


def test_correlation_needs_both_to_vary() -> None:
    distribution = Distribution(0.0, 1.0, 10)
    distribution.add(np.array([0.5, 0.5]), np.array([0.0, 1.0]))
    assert distribution.metrics()["correlation_with_correctness"] is None
    distribution = Distribution(0.0, 1.0, 10)
    distribution.add(np.array([0.0, 1.0]), np.array([0.5, 0.5]))
    assert distribution.metrics()["correlation_with_correctness"] is None
    distribution.add(np.array([0.0, 1.0]), np.array([1.0, 0.0]))
    assert distribution.metrics()["correlation_with_correctness"] == pytest.approx(-math.sqrt(0.5))


def test_beta_interval_against_known_quantiles() -> None:
    # Beta(1, 1): 0.025 and 0.975. Beta(2, 1) has CDF x²: sqrt(0.025) and sqrt(0.975).
    assert beta_interval(0, 0) == pytest.approx((0.025, 0.975), abs=0.005)
    assert beta_interval(1, 0) == pytest.approx((math.sqrt(0.025), math.sqrt(0.975)), abs=0.01)
    assert beta_interval(5, 2, seed=1) == beta_interval(5, 2, seed=1) != beta_interval(5, 2, seed=2)


def test_rounding() -> None:
    assert rounded({"a": {"b": 0.12345678}, "c": 3, "d": None}) == {"a": {"b": 0.123457}, "c": 3, "d": None}


def test_no_rows_give_no_figures() -> None:
    found = metrics_of([])
    assert found["questions"] == 0 and found["accuracy"] == {"mean": None, "any": None, "majority": None}
