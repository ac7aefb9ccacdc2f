"""Rollouts: all eight arms answer every question and its counterfactual, in one batch, each at its own temperature."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from looper.generation import Completion, Request, generate_in_chunks
from looper.params import Rollouts
from looper.prompts import Template, answer_text, end_token_ids, prompt_ids
from regime_w.answers import extract_answer, split_reasoning
from regime_w.arms import ARMS, Arm


def questions_of_round(rows: list[dict], count: int, number: int) -> list[dict]:
    """The `count` rows that round `number` (from 1) asks: each round the next ones, from the first again after the last."""
    count = min(count, len(rows))
    start = (number - 1) * count
    return [rows[i % len(rows)] for i in range(start, start + count)]


def roll_out(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: Template, rows: list[dict],
             counterfactuals: dict[str, dict], settings: Rollouts, scratch: Path) -> list[dict]:
    """One rollouts row a question, in the order of `rows`.

    counterfactuals: by the question's id; a question without one is answered once.
    scratch: finished chunks are kept there, so that a kill loses at most one.
    """
    asked = [(row, kind) for row in rows for kind in ("question", "counterfactual")
             if kind == "question" or row["id"] in counterfactuals]
    requests = [
        Request(prompt_ids(tokenizer, template, (row if kind == "question" else counterfactuals[row["id"]])["question"],
                           arm.instruction), arm.temperature)
        for row, kind in asked for arm in ARMS]
    completions = iter(generate_in_chunks(
        model, requests, scratch, max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size,
        eos_token_ids=end_token_ids(tokenizer, template), seed=settings.seed, progress="rollouts"))
    answers = {(row["id"], kind): [next(completions) for _ in ARMS] for row, kind in asked}
    return [_row(row, counterfactuals.get(row["id"]), answers, tokenizer, template) for row in rows]


def _row(row: dict, counterfactual: dict | None, answers: dict, tokenizer, template: Template) -> dict[str, Any]:
    first = answers[row["id"], "question"]
    second = answers.get((row["id"], "counterfactual"), [None] * len(ARMS))
    keys = ("question", "gold_answer", "changed_from", "changed_to")
    return {
        "id": row["id"], "question": row["question"], "gold_answer": row["gold_answer"],
        "counterfactual": counterfactual and {key: counterfactual[key] for key in keys},
        "arm_outputs": [_arm_output(arm, one, other, tokenizer, template)
                        for arm, one, other in zip(ARMS, first, second, strict=True)],
    }


def _arm_output(arm: Arm, completion: Completion, other: Completion | None, tokenizer, template: Template) -> dict:
    text = _text(completion, tokenizer, template)
    return {"name": arm.name, "style": arm.style, "temperature": arm.temperature,
            "full_text": text["full_text"], "reasoning": text["reasoning"], "answer": text["answer"],
            "token_ids": completion.token_ids, "num_tokens": text["num_tokens"], "truncated": text["truncated"],
            "logprobs": completion.logprobs, "counterfactual": other and _text(other, tokenizer, template)}


def _text(completion: Completion, tokenizer, template: Template) -> dict[str, Any]:
    full = answer_text(tokenizer, template, completion.token_ids)
    reasoning, _ = split_reasoning(full)
    unclosed = full.rfind("<think>") > full.rfind("</think>")
    return {"full_text": full, "reasoning": reasoning, "answer": extract_answer(full),
            "num_tokens": len(completion.token_ids), "truncated": completion.truncated or unclosed}
