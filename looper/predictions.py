"""Greedy answers to questions, judged: what `dev_eval` and `eval` publish."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from looper.evaluation import evaluation_metrics, judge, robustness
from looper.generation import Request, generate_in_chunks
from looper.params import Eval
from looper.prompts import Template, answer_text, end_token_ids, prompts_ids


def predict(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: Template, rows: list[dict],
            settings: Eval, scratch: Path, label: str) -> list[dict]:
    """One prediction row a question, in the order of `rows`; finished chunks are kept in `scratch`."""
    prompts = prompts_ids(tokenizer, template, [row["question"] for row in rows])
    requests = [Request(prompt, temperature=0.0) for prompt in prompts]
    completions = generate_in_chunks(
        model, requests, scratch, max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size,
        eos_token_ids=end_token_ids(tokenizer, template), seed=0, progress=label)  # greedy: the seed decides nothing
    return [judge(row, answer_text(tokenizer, template, each.token_ids), len(each.token_ids), each.truncated)
            for row, each in zip(rows, completions, strict=True)]


def predict_dev(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: Template, rows: list[dict],
                counterfactuals: Sequence[dict], settings: Eval, scratch: Path,
                label: str) -> tuple[list[dict], dict[str, Any]]:
    """The prediction rows of `rows`; and `evaluation_metrics` of them, with `robustness` under "counterfactual".

    counterfactuals: of any split; those of `rows` are asked too, by the question's id.
    """
    changed = {row["id"]: row for row in counterfactuals}
    pairs = [row for row in rows if row["id"] in changed]
    asked_too = [changed[row["id"]] for row in pairs]
    answers = predict(model, tokenizer, template, rows + asked_too, settings, scratch, label)
    predictions = answers[:len(rows)]
    asked = {answer["id"]: answer for answer in predictions}
    original = [asked[row["id"]] for row in pairs]
    return predictions, {**evaluation_metrics(predictions), "counterfactual": robustness(original, answers[len(rows):])}
