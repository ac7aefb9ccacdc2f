import pytest

from looper.evaluation import PREDICTION_FIELDS, evaluation_metrics, judge, robustness
from looper.jsonl import read_jsonl, write_jsonl

ROW = {"id": "test-00003", "question": "How many?", "gold_answer": "18", "solution": "unused", "annotated": "unused"}


def test_judge_writes_the_documented_row():
    text = "<think>9 twice\nis 18</think>\nSo it is\n#### 18.00"
    row = judge(ROW, text, num_tokens=12, truncated=False)
    assert list(row) == ["id", "question", "gold_answer", "full_text", "reasoning", "answer", "correct", "num_tokens",
                         "truncated"]
    assert (row["id"], row["question"], row["gold_answer"]) == ("test-00003", "How many?", "18")
    assert row["full_text"] == text
    assert "9 twice" in row["reasoning"]
    assert "####" not in row["reasoning"]
    assert row["correct"] is True
    assert (row["num_tokens"], row["truncated"]) == (12, False)


def test_rows_are_read_back_with_the_declared_types(tmp_path):
    rows = [judge(ROW, "#### 18", 4, False), judge(ROW, "no idea", 3, True)]
    write_jsonl(tmp_path / "base.jsonl", rows)
    assert read_jsonl(tmp_path / "base.jsonl", PREDICTION_FIELDS) == rows


@pytest.mark.parametrize(
    ("text", "answer_is_none", "correct"),
    [
        ("#### 18", False, True),
        ("The answer is 18.", False, True),
        ("#### 17", False, False),
        ("18 at first\n#### 17", False, False),
        ("I do not know.", True, False),
        ("", True, False),
    ],
)
def test_judge_right_and_wrong(text, answer_is_none, correct):
    row = judge(ROW, text, 5, False)
    assert (row["answer"] is None, row["correct"]) == (answer_is_none, correct)


@pytest.mark.parametrize(
    ("text", "ended_early", "truncated"),
    [
        ("#### 18", False, False),
        ("#### 18", True, True),
        ("<think>9 + 9 = 18", False, True),
        ("<think>a</think> b <think>9 + 9 = 18", False, True),
        ("<think>a</think> #### 18", False, False),
    ],
)
def test_an_unclosed_think_is_truncated(text, ended_early, truncated):
    assert judge(ROW, text, 5, ended_early)["truncated"] is truncated


def test_the_four_figures_by_hand():
    """Texts that the figures read differently: a #### with decimals, a last number, an open think block."""
    texts = ["9+9\n#### 18", "9+9\n#### 18.00", "that makes 18", "that makes 17", "#### 20", "<think>9+9=18"]
    tokens = [10, 20, 30, 40, 50, 61]
    metrics = evaluation_metrics([judge(ROW, text, count, False) for text, count in zip(texts, tokens, strict=True)])
    assert list(metrics) == ["n", "accuracy", "strict_match", "flexible_extract", "format_rate", "truncation_rate",
                             "mean_tokens"]
    assert metrics["n"] == 6
    assert metrics["accuracy"]["value"] == 0.5  # texts 1, 2, 3
    assert metrics["strict_match"]["value"] == round(1 / 6, 6)  # text 1: "18.00" is not "18" to the harness
    assert metrics["flexible_extract"]["value"] == 0.5  # texts 1, 3, 6: the harness reads inside the open <think> too
    assert metrics["format_rate"]["value"] == 0.5  # texts 1, 2, 5
    assert metrics["truncation_rate"] == round(1 / 6, 6)
    assert metrics["mean_tokens"] == round(211 / 6, 6)


def test_intervals_are_wilson_and_rounded():
    rows = [judge(ROW, "#### 18" if i < 3 else "#### 1", 7, False) for i in range(10)]
    assert evaluation_metrics(rows)["accuracy"] == {"value": 0.3, "low": 0.107791, "high": 0.603222}


def test_no_predictions_is_an_error():
    with pytest.raises(ValueError, match="no predictions"):
        evaluation_metrics([])


def test_robustness_by_hand():
    """Four questions, 18 as asked and 20 as changed: right-right, right-wrong, right-recited, wrong-right."""
    changed_row = ROW | {"gold_answer": "20"}
    original = [judge(ROW, text, 4, False) for text in ("#### 18", "#### 18", "#### 18", "#### 5")]
    changed = [judge(changed_row, text, 4, False) for text in ("#### 20", "#### 7", "#### 18", "#### 20")]
    found = robustness(original, changed)
    assert (found["n"], found["original"]["value"], found["changed"]["value"]) == (4, 0.75, 0.5)
    assert found["gap"]["value"] == 0.25 and found["gap"]["low"] <= -0.25 and found["gap"]["high"] >= 0.75
    assert found["repeats_old_gold"] == 0.25
    # Wilson's interval of 2 of 4 is 0.5 ± z·√(n/4 + z²/4)/(n + z²) = 0.5 ± 0.349961 at z = 1.959964
    assert (found["changed"]["low"], found["changed"]["high"]) == (0.150039, 0.849961)


def test_robustness_of_nothing_is_its_count():
    assert robustness([], []) == {"n": 0}
