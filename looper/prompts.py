"""What the models read and write: one tutoring prompt, three chat templates, and the tokens of both.

The templates are ours, not the tokenizer's: the stock one of the R1 distillations drops the reasoning of earlier turns,
and Qwen's adds a system turn unasked. Golden tests hold every rendered character.
"""

from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import NamedTuple, Protocol

INSTRUCTION = "You are a mathematics tutor. Solve the problem step by step. Write the answer on a last line: #### <number>"

ROW = {"id": str, "question": str, "solution": str, "gold_answer": str}  # a prepared row: its fields and their types


class Template(NamedTuple):
    """A chat format: what stands around the system text, the user text and the answer."""

    system: str  # with {text}; left out when there is no system text
    default_system: str
    user: str  # with {text}; ends where the model's answer begins
    prefill: str  # the answer's first characters, given to the model and not generated
    solution: str  # the trained answer, with {solution} and {gold}
    end: str  # the token that ends the answer

    def prompt(self, user: str, system: str = "") -> str:
        """The rendered text up to where the model continues."""
        if not self.system:  # no system turn in this format: its text leads the user's
            user, system = "\n\n".join(filter(None, (system, user))), ""
        system = system or self.default_system
        turn = self.system.format(text=system) if system else ""
        return turn + self.user.format(text=user) + self.prefill

    def completion(self, solution: str, gold: str) -> str:
        """The text that fine-tuning teaches, its end token included."""
        return self.solution.format(solution=solution, gold=gold) + self.end


_CHATML_SYSTEM = "<|im_start|>system\n{text}<|im_end|>\n"
_CHATML_USER = "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"

TEMPLATES = {
    "chatml": Template(_CHATML_SYSTEM, "", _CHATML_USER, "", "{solution}\n#### {gold}", "<|im_end|>"),
    "qwen": Template(
        _CHATML_SYSTEM,
        "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        _CHATML_USER,
        "",
        "{solution}\n#### {gold}",
        "<|im_end|>",
    ),
    # DeepSeek's model card: no system prompt, and the answer opens a <think> block. Begin-of-sentence is part of the text.
    "deepseek_r1": Template(
        "",
        "",
        "<｜begin▁of▁sentence｜><｜User｜>{text}<｜Assistant｜>",
        "<think>\n",
        "{solution}\n</think>\n\n#### {gold}",
        "<｜end▁of▁sentence｜>",
    ),
}


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that this module uses."""

    eos_token_id: int | None

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]: ...
    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...
    def decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...


def tutoring_text(question: str) -> str:
    """The user's turn: the instruction, then the question."""
    return f"{INSTRUCTION}\n\n{question.strip()}"


def prompt_ids(tokenizer: Tokenizer, template: Template, question: str, instruction: str = "") -> list[int]:
    """Token ids of the prompt for `question`; `instruction` is an arm's, none for the neutral prompt."""
    return prompts_ids(tokenizer, template, [question], [instruction])[0]


def prompts_ids(tokenizer: Tokenizer, template: Template, questions: Sequence[str],
                instructions: Iterable[str] = repeat("")) -> list[list[int]]:
    """`prompt_ids` of each question, each with its instruction."""
    return _encode(tokenizer, [template.prompt(tutoring_text(question), instruction)
                               for question, instruction in zip(questions, instructions)])


def training_ids(tokenizer: Tokenizer, template: Template, rows: list[dict]) -> list[tuple[list[int], list[int]]]:
    """(input_ids, completion_mask) of each prepared row.

    Prompt and completion are encoded apart, so that the boundary falls exactly where generation begins; the mask is 1 on
    the completion, its end token included: a model that never sees the end in its labels does not learn to stop.
    """
    prompts = prompts_ids(tokenizer, template, [row["question"] for row in rows])
    completions = _encode(tokenizer, [template.completion(row["solution"], row["gold_answer"]) for row in rows])
    return [(prompt + completion, [0] * len(prompt) + [1] * len(completion))
            for prompt, completion in zip(prompts, completions, strict=True)]


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids of each text; all in one call, which the tokenizer spreads over the processor's cores."""
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []  # it takes no empty list


def answer_text(tokenizer: Tokenizer, template: Template, token_ids: list[int]) -> str:
    """The full text of an answer: what the template gave the model, then what it wrote, special tokens left out."""
    return template.prefill + tokenizer.decode(token_ids, skip_special_tokens=True)


def end_token_ids(tokenizer: Tokenizer, template: Template) -> set[int]:
    """The tokens after which an answer is over.

    Raises ValueError if the tokenizer does not know the template's end as one token.
    """
    end = tokenizer.encode(template.end, add_special_tokens=False)
    if len(end) != 1:
        raise ValueError(
            f"model.template: its end token {template.end!r} is {len(end)} tokens to this tokenizer; "
            f"choose the template that the base model was trained with ({', '.join(TEMPLATES)})"
        )
    return {end[0]} | ({tokenizer.eos_token_id} - {None})
