"""What fine-tuning learns to write: the gold solutions, or the base model's own right answers to the same questions.

The latter is rejection sampling as in STaR (Zelikman et al. 2022) and RFT (Yuan et al. 2023): the model's own words,
kept where they reach the gold answer, so that the format is what is left to learn. Gold targets load no torch.
"""

from pathlib import Path
from statistics import fmean, median_low
from typing import TYPE_CHECKING, Any, NamedTuple

from looper.params import SelfTargets
from looper.prompts import Template, answer_text, end_token_ids, prompts_ids, training_ids
from regime_w.answers import CLOSE, MARKER, OPEN, answers_match, extract_answer, is_formatted, split_reasoning

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from looper.generation import Completion

# A solution with one of these would teach to write the format's own marks in the midst of the reasoning.
MARKS = (MARKER, OPEN, CLOSE, "<|", "<｜")


class Sample(NamedTuple):
    """An answer of the base to a train question, judged.

    right: its answer is the gold, as an evaluation judges it. solution: what it gives a target, None where it is not
    fit for one. tokens: of that target's completion as fine-tuning encodes it, end token included; 0 without one.
    """

    right: bool
    solution: str | None = None
    tokens: int = 0


def gold_targets(rows: list[dict]) -> tuple[list[dict], dict[str, Any]]:
    """(targets, metrics): the rows as they are, each marked as gold."""
    return _targets(rows, [[] for _ in rows])


def self_targets(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", template: Template, rows: list[dict],
                 settings: SelfTargets, max_tokens: int, scratch: Path) -> tuple[list[dict], dict[str, Any]]:
    """(targets, metrics): the rows in their order, `solution` replaced by the model's own where it has a right one.

    max_tokens: the most that prompt and completion of a target may have; a longer sample is not kept.
    scratch: finished chunks of samples are kept there, so that a kill loses at most one.
    """
    from looper.generation import Request, generate_in_chunks

    prompts = prompts_ids(tokenizer, template, [row["question"] for row in rows])
    requests = [Request(prompt, settings.temperature) for prompt in prompts for _ in range(settings.samples)]
    completions = iter(generate_in_chunks(
        model, requests, scratch, max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size,
        eos_token_ids=end_token_ids(tokenizer, template), seed=settings.seed, progress="targets"))
    judged = [[_judged(tokenizer, template, row, next(completions)) for _ in range(settings.samples)] for row in rows]
    kept = [{**row, "solution": sample.solution} for row, samples in zip(rows, judged, strict=True)
            for sample in samples if sample.solution]
    encoded = iter(training_ids(tokenizer, template, kept))
    drawn = [[_fitting(sample, *next(encoded), max_tokens) if sample.solution else sample for sample in samples]
             for samples in judged]
    return _targets(rows, drawn)


def solution_of(text: str, template: Template) -> str | None:
    """What the text of an answer gives for the template's {solution}; None if it gives nothing that can stand there.

    Where the template opens a think block, the reasoning in it; else the text up to the `####` that gives the answer.
    """
    if OPEN in template.prefill:
        solution, _ = split_reasoning(text)
    elif is_formatted(text):
        before, _, _ = text.rpartition(MARKER)
        lines, _, lead = before.rpartition("\n")
        solution = before if any(map(str.isalnum, lead)) else lines  # '**#### 18**': the asterisks belong to the marker
    else:
        solution = text
    return None if not solution.strip() or any(mark in solution for mark in MARKS) else solution.rstrip()


def _judged(tokenizer, template: Template, row: dict, completion: "Completion") -> Sample:
    text = answer_text(tokenizer, template, completion.token_ids)
    if not answers_match(extract_answer(text), row["gold_answer"]):
        return Sample(right=False)
    written = completion.token_ids[:-1]  # all but the end token
    plain, shown = (tokenizer.decode(written, skip_special_tokens=skip) for skip in (True, False))
    return Sample(True, None if completion.truncated or plain != shown else solution_of(text, template))


def _fitting(sample: Sample, ids: list[int], completion_mask: list[int], max_tokens: int) -> Sample:
    """`sample` with its tokens; without its solution if prompt and completion are more than `max_tokens`."""
    return sample._replace(tokens=sum(completion_mask)) if len(ids) <= max_tokens else Sample(right=True)


def _targets(rows: list[dict], drawn: list[list[Sample]]) -> tuple[list[dict], dict[str, Any]]:
    """drawn: the samples of each row."""
    targets = [_target(row, [sample for sample in samples if sample.solution])
               for row, samples in zip(rows, drawn, strict=True)]
    samples = [sample for each in drawn for sample in each]
    metrics = {
        "rows": len(rows),
        "self_share": _mean([target["target"] == "self" for target in targets]),
        "any_right_share": _mean([any(sample.right for sample in each) for each in drawn]),
        "kept_tokens": _mean([sample.tokens for sample in samples if sample.solution]),
        "samples": len(samples),
        "right_share": _mean([sample.right for sample in samples]),
    }
    return targets, metrics


def _target(row: dict, kept: list[Sample]) -> dict:
    if not kept:
        return {**row, "target": "gold"}
    # Of median length, so that neither end moves the model's own length: the shortest right answers leave steps out or
    # guess, the longest repeat themselves. No draw decides; of two in the middle the shorter, of equal ones the first.
    length = median_low(sample.tokens for sample in kept)
    chosen = next(sample for sample in kept if sample.tokens == length)
    return {**row, "solution": chosen.solution, "target": "self"}


def _mean(values: list) -> float | None:
    return round(fmean(values), 6) if values else None
