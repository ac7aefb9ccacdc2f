"""Judging answers, and the four figures of an evaluation: ours, lm-evaluation-harness's two, and the format rate."""

from collections.abc import Callable, Sequence
from typing import Any

from looper.statistics import Interval, paired_bootstrap, wilson
from regime_w.answers import (
    answers_match,
    extract_answer,
    flexible_extract,
    harness_match,
    is_formatted,
    is_unclosed,
    split_reasoning,
    strict_match,
)

# What every row of data/predictions/<model>.jsonl has, and of which type: the `fields` of looper.jsonl.read_jsonl.
PREDICTION_FIELDS = {
    "id": str, "question": str, "gold_answer": str, "full_text": str, "reasoning": str, "answer": (str, type(None)),
    "correct": bool, "num_tokens": int, "truncated": bool,
}


def judge(row: dict[str, Any], text: str, num_tokens: int, truncated: bool) -> dict[str, Any]:
    """The predictions row of an answer: what was asked, what was written, and whether it is right.

    row: a question with `id`, `question` and `gold_answer`. text: the answer, what the template prefilled included.
    truncated: no end of sequence came. An unclosed <think> counts as truncated whatever ended it.
    """
    answer = extract_answer(text)
    return {
        "id": row["id"], "question": row["question"], "gold_answer": row["gold_answer"],
        "full_text": text, "reasoning": split_reasoning(text)[0], "answer": answer,
        "correct": answers_match(answer, row["gold_answer"]),
        "num_tokens": num_tokens, "truncated": truncated or is_unclosed(text),
    }


def evaluation_metrics(predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The four figures with 95% Wilson intervals, each as value, low and high; n, truncation rate, mean tokens.

    accuracy: `correct` of the rows, by our parser. strict_match, flexible_extract: lm-evaluation-harness's two filters
    on the same texts. format_rate: answers in the form that the prompt asks for. Fractions, rounded to 6 digits.
    Raises ValueError if there are no predictions.
    """
    n = len(predictions)
    if n == 0:
        raise ValueError("no predictions to evaluate: the split is empty; rerun the stage prepare with more questions")
    hits = {
        "accuracy": sum(row["correct"] for row in predictions),
        "strict_match": _harness_hits(predictions, strict_match),
        "flexible_extract": _harness_hits(predictions, flexible_extract),
        "format_rate": sum(is_formatted(row["full_text"]) for row in predictions),
    }
    return {
        "n": n,
        **{name: _rounded(wilson(count, n)) for name, count in hits.items()},
        "truncation_rate": round(sum(row["truncated"] for row in predictions) / n, 6),
        "mean_tokens": round(sum(row["num_tokens"] for row in predictions) / n, 6),
    }


def robustness(original: Sequence[dict[str, Any]], changed: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How much of the accuracy survives one number of the question being changed and the answer recomputed.

    original, changed: predictions rows of the same questions in the same order, as asked and as changed.
    original, changed: shares right, with 95% Wilson intervals. gap: their difference, with that of the paired bootstrap.
    repeats_old_gold: share of the answers to the changed question that give the original's gold: recited, not computed.
    {"n": 0} if there are none.
    """
    n = len(original)
    if n == 0:
        return {"n": 0}
    before, after = ([row["correct"] for row in rows] for rows in (original, changed))
    repeats = sum(answers_match(new["answer"], old["gold_answer"]) for old, new in zip(original, changed, strict=True))
    return {"n": n, "original": _rounded(wilson(sum(before), n)), "changed": _rounded(wilson(sum(after), n)),
            "gap": _rounded(paired_bootstrap(after, before)), "repeats_old_gold": round(repeats / n, 6)}


def _rounded(figure: Interval) -> dict[str, float]:
    return {end: round(value, 6) for end, value in figure._asdict().items()}


def _harness_hits(predictions: Sequence[dict[str, Any]], extract: Callable[[str], str]) -> int:
    return sum(harness_match(extract(row["full_text"]), row["gold_answer"]) for row in predictions)
