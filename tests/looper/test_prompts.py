"""Golden tests: every rendered character of prompts and training rows, and which tokens are trained on."""

import pytest

from looper.prompts import TEMPLATES, answer_text, end_token_ids, prompt_ids, training_ids, tutoring_text

ROW = {"id": "train-00000", "question": "Ann has 3 apples and buys {4} more. How many?\n",
       "solution": "She has 3+4=7 apples.\nThat is {7}.", "gold_answer": "7"}
ARM = "Reflect {first}."

INSTRUCTION = ("You are a mathematics tutor. Solve the problem step by step. "
               "Write the answer on a last line: #### <number>")
USER = f"{INSTRUCTION}\n\nAnn has 3 apples and buys {{4}} more. How many?"

# template: (the neutral prompt, the prompt with an arm's instruction, the completion)
GOLDEN = {
    "chatml": (
        f"<|im_start|>user\n{USER}<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nReflect {first}.<|im_end|>\n"
        f"<|im_start|>user\n{USER}<|im_end|>\n<|im_start|>assistant\n",
        "She has 3+4=7 apples.\nThat is {7}.\n#### 7<|im_end|>",
    ),
    "qwen": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{USER}<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nReflect {first}.<|im_end|>\n"
        f"<|im_start|>user\n{USER}<|im_end|>\n<|im_start|>assistant\n",
        "She has 3+4=7 apples.\nThat is {7}.\n#### 7<|im_end|>",
    ),
    "deepseek_r1": (
        f"<｜begin▁of▁sentence｜><｜User｜>{USER}<｜Assistant｜><think>\n",
        f"<｜begin▁of▁sentence｜><｜User｜>Reflect {{first}}.\n\n{USER}<｜Assistant｜><think>\n",
        "She has 3+4=7 apples.\nThat is {7}.\n</think>\n\n#### 7<｜end▁of▁sentence｜>",
    ),
}
END = {"chatml": "<|im_end|>", "qwen": "<|im_end|>", "deepseek_r1": "<｜end▁of▁sentence｜>"}

each_template = pytest.mark.parametrize("name", GOLDEN)


def test_there_is_a_golden_text_for_every_template():
    assert set(GOLDEN) == set(TEMPLATES)
    assert tutoring_text(ROW["question"]) == USER


@each_template
def test_rendered_texts_are_the_golden_ones(name):
    neutral, with_arm, completion = GOLDEN[name]
    template = TEMPLATES[name]
    assert template.prompt(USER) == neutral
    assert template.prompt(USER, ARM) == with_arm
    assert template.completion(ROW["solution"], ROW["gold_answer"]) == completion


@each_template
def test_token_ids_decode_to_the_golden_texts(name, tokenizer):
    neutral, with_arm, _ = GOLDEN[name]
    assert tokenizer.decode(prompt_ids(tokenizer, TEMPLATES[name], ROW["question"])) == neutral
    assert tokenizer.decode(prompt_ids(tokenizer, TEMPLATES[name], ROW["question"], ARM)) == with_arm


@each_template
def test_the_mask_is_on_the_completion_and_its_end_token(name, tokenizer):
    neutral, _, completion = GOLDEN[name]
    (ids, mask), = training_ids(tokenizer, TEMPLATES[name], [ROW])
    assert len(ids) == len(mask) and mask == sorted(mask), "zeros, then ones"
    trained = [token for token, bit in zip(ids, mask, strict=True) if bit]
    assert tokenizer.decode(trained) == completion
    assert tokenizer.decode([token for token, bit in zip(ids, mask, strict=True) if not bit]) == neutral
    end = tokenizer.convert_tokens_to_ids(END[name])
    assert trained[-1] == end and trained.count(end) == 1


@each_template
def test_training_begins_where_generation_does(name, tokenizer):
    """The prompt's tokens in training are those that generation is given: no merge over the boundary."""
    (ids, mask), = training_ids(tokenizer, TEMPLATES[name], [ROW])
    assert ids[:mask.index(1)] == prompt_ids(tokenizer, TEMPLATES[name], ROW["question"])


def test_rows_are_encoded_together_as_each_by_itself(tokenizer):
    rows = [ROW, {**ROW, "question": "How many?", "solution": "Seven."}]
    template = TEMPLATES["chatml"]
    assert training_ids(tokenizer, template, rows) == [training_ids(tokenizer, template, [row])[0] for row in rows]
    assert training_ids(tokenizer, template, []) == []


@each_template
def test_an_answer_has_its_prefill_and_no_special_tokens(name, tokenizer):
    template = TEMPLATES[name]
    (ids, mask), = training_ids(tokenizer, template, [ROW])
    expected = GOLDEN[name][2].removesuffix(END[name])
    prefill = "<think>\n" if name == "deepseek_r1" else ""
    assert answer_text(tokenizer, template, ids[mask.index(1):]) == prefill + expected
    spaced = "a , b . It 's </think> <think>"  # no clean-up of what the model wrote
    assert answer_text(tokenizer, template, tokenizer.encode(spaced, add_special_tokens=False)) == prefill + spaced


@each_template
def test_an_answer_ends_at_the_templates_end_and_at_the_tokenizers(name, tokenizer):
    expected = {tokenizer.convert_tokens_to_ids(END[name]), tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert end_token_ids(tokenizer, TEMPLATES[name]) == expected


def test_a_template_that_the_tokenizer_does_not_know_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"its end token '<\|eot\|>' is \d+ tokens .*choose the template .*qwen"):
        end_token_ids(tokenizer, TEMPLATES["chatml"]._replace(end="<|eot|>"))
