"""Rollouts: the arms answer every question and its counterfactual, each at its own temperature.

Eight answers a question. `rollouts.allocation: uniform`, the original design, takes one of each arm; `thompson` takes
more of the arms that were right more often so far.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from looper.files import sha256_text
from looper.generation import Completion, Request, generate_in_chunks
from looper.params import Rollouts
from looper.prompts import Template, answer_text, end_token_ids, prompts_ids
from regime_w.answers import answers_match, extract_answer, is_unclosed, split_reasoning
from regime_w.arms import ARMS, Arm
from regime_w.bandit import Posterior, allocate, update

WAVE = 32  # questions that Thompson sampling allocates at once: few enough to learn from, enough to fill a batch


def questions_of_round(rows: list[dict], count: int, number: int) -> list[dict]:
    """The `count` rows that round `number` (from 1) asks: each round the next ones, then the first again.

    Raises ValueError if there are fewer.
    """
    if len(rows) < count:
        raise ValueError(f"the train split holds {len(rows)} questions, rollouts.questions asks for {count}; lower it")
    start = (number - 1) * count
    return [rows[i % len(rows)] for i in range(start, start + count)]


def roll_out(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: Template, rows: list[dict],
             counterfactuals: dict[str, dict], settings: Rollouts, scratch: Path) -> list[dict]:
    """One rollouts row a question, in the order of `rows`.

    counterfactuals: by the question's id; a question without one is answered once.
    scratch: finished chunks are kept there, so that a kill loses at most one.
    Under thompson a row also holds `allocation` (each arm's propensity), and an output its `arm` and `propensity`.
    """
    def answered(rows: list[dict], arms: Sequence[Sequence[Arm]], seed: int, folder: Path) -> list[dict]:
        """The rows of these questions; arms: who answers each of them. All in one batch."""
        asked = [(row, kind, each) for row, these in zip(rows, arms, strict=True)
                 for kind in ("question", "counterfactual") if kind == "question" or row["id"] in counterfactuals
                 for each in these]
        texts = [(row if kind == "question" else counterfactuals[row["id"]])["question"] for row, kind, _ in asked]
        prompts = prompts_ids(tokenizer, template, texts, [arm.instruction for _, _, arm in asked])
        requests = [Request(prompt, arm.temperature) for prompt, (_, _, arm) in zip(prompts, asked, strict=True)]
        completions = iter(generate_in_chunks(
            model, requests, folder, max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size,
            eos_token_ids=end_token_ids(tokenizer, template), seed=seed, progress="rollouts"))
        answers: dict[tuple[str, str], list[Completion]] = {}
        for row, kind, _ in asked:
            answers.setdefault((row["id"], kind), []).append(next(completions))
        return [_row(row, counterfactuals.get(row["id"]), these, answers, tokenizer, template)
                for row, these in zip(rows, arms, strict=True)]

    if settings.allocation == "uniform":
        return answered(rows, [ARMS] * len(rows), settings.seed, scratch)
    made, posteriors = [], [Posterior()] * len(ARMS)
    for start in range(0, len(rows), WAVE):
        wave, rule = rows[start:start + WAVE], "thompson" if start else "uniform"  # at first nothing is known
        plans = [allocate(posteriors, len(ARMS), rule, _seed(settings, row["id"])) for row in wave]
        arms = [[arm for arm, count in zip(ARMS, counts, strict=True) for _ in range(count)] for counts, _ in plans]
        folder = f"wave-{start // WAVE:05}"
        new = answered(wave, arms, _seed(settings, folder), scratch / folder)
        for row, these, (_, shares) in zip(new, arms, plans, strict=True):
            _store_allocation(row, these, rule, shares)
            for arm, output in zip(these, row["arm_outputs"], strict=True):
                posteriors = update(posteriors, ARMS.index(arm), answers_match(output["answer"], row["gold_answer"]))
        made += new
    return made


def _seed(settings: Rollouts, what: str) -> int:
    return int(sha256_text(f"{settings.seed}/{what}")[:15], 16)


def _store_allocation(row: dict, arms: Sequence[Arm], rule: str, shares: Sequence[float]) -> None:
    """Writes into the row with which probability each arm was to give each of its answers."""
    propensities = {arm.name: share for arm, share in zip(ARMS, shares, strict=True)}
    row["allocation"] = {"rule": rule, "propensities": propensities}
    for arm, output in zip(arms, row["arm_outputs"], strict=True):
        output |= {"arm": arm.name, "propensity": propensities[arm.name]}


def _row(row: dict, counterfactual: dict | None, arms: Sequence[Arm], answers: dict[tuple[str, str], list[Completion]],
         tokenizer, template: Template) -> dict[str, Any]:
    first = answers[row["id"], "question"]
    second = answers.get((row["id"], "counterfactual"), [None] * len(arms))
    keys = ("question", "gold_answer", "changed_from", "changed_to")
    return {
        "id": row["id"], "question": row["question"], "gold_answer": row["gold_answer"],
        "counterfactual": counterfactual and {key: counterfactual[key] for key in keys},
        "arm_outputs": [_arm_output(name, arm, one, other, tokenizer, template)
                        for name, arm, one, other in zip(_names(arms), arms, first, second, strict=True)],
    }


def _names(arms: Sequence[Arm]) -> list[str]:
    """A name for each output of a row: its arm's, with #2, #3 … where the arm answers again."""
    earlier = [list(arms[:i]).count(arm) for i, arm in enumerate(arms)]
    return [f"{arm.name}#{count + 1}" if count else arm.name for arm, count in zip(arms, earlier, strict=True)]


def _arm_output(name: str, arm: Arm, completion: Completion, other: Completion | None, tokenizer, template: Template
                ) -> dict:
    text = _text(completion, tokenizer, template)
    return {"name": name, "style": arm.style, "temperature": arm.temperature,
            "full_text": text["full_text"], "reasoning": text["reasoning"], "answer": text["answer"],
            "token_ids": completion.token_ids, "num_tokens": text["num_tokens"], "truncated": text["truncated"],
            "logprobs": completion.logprobs, "counterfactual": other and _text(other, tokenizer, template)}


def _text(completion: Completion, tokenizer, template: Template) -> dict[str, Any]:
    full = answer_text(tokenizer, template, completion.token_ids)
    reasoning, _ = split_reasoning(full)
    return {"full_text": full, "reasoning": reasoning, "answer": extract_answer(full),
            "num_tokens": len(completion.token_ids), "truncated": completion.truncated or is_unclosed(full)}
