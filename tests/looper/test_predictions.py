"""Predictions: the neutral prompt, greedily, judged in the order of the questions; by the real engine too."""

import pytest
import torch
from tiny import tiny_model, tiny_rows

from looper import predictions
from looper.evaluation import PREDICTION_FIELDS
from looper.generation import Completion
from looper.params import Eval
from looper.predictions import predict, predict_dev
from looper.prompts import TEMPLATES, prompt_ids

SETTINGS = Eval(max_new_tokens=9, batch_size=2)
ROWS = tiny_rows(3)


def test_the_neutral_prompts_are_asked_greedily_and_judged_in_order(monkeypatch, tokenizer, tmp_path):
    template, calls = TEMPLATES["deepseek_r1"], []
    written = [f"Sum.\n</think>\n\n#### {ROWS[0]['gold_answer']}.0<｜end▁of▁sentence｜>", "It is 7 #### 7",
               "</think>\n#### 99"]

    def generate_in_chunks(model, requests, scratch, **options):
        calls.append((model, requests, scratch, options))
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in written]
        return [Completion(each, [0.0] * len(each), truncated=i == 2) for i, each in enumerate(ids)]

    monkeypatch.setattr(predictions, "generate_in_chunks", generate_in_chunks)
    found = predict("model", tokenizer, template, ROWS, SETTINGS, tmp_path, "test base")
    ((model, requests, scratch, options),) = calls
    prompts = [prompt_ids(tokenizer, template, row["question"]) for row in ROWS]
    assert [tuple(request) for request in requests] == [(prompt, 0.0) for prompt in prompts]
    assert (model, scratch, options["max_new_tokens"], options["batch_size"]) == ("model", tmp_path, 9, 2)
    assert options["eos_token_ids"] == set(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<｜end▁of▁sentence｜>"]))
    assert [row["id"] for row in found] == [row["id"] for row in ROWS]
    assert [(row["answer"] is not None, row["correct"], row["truncated"]) for row in found] == [
        (True, True, False), (False, False, True), (True, False, True)], "right; an unclosed <think>; wrong and cut"
    assert found[0]["full_text"] == "<think>\n" + written[0].removesuffix("<｜end▁of▁sentence｜>")
    for row, text in zip(found, written, strict=True):
        assert list(row) == list(PREDICTION_FIELDS)
        assert row["num_tokens"] == len(tokenizer.encode(text, add_special_tokens=False))


def test_the_real_engine_writes_what_transformers_does(monkeypatch, tokenizer, tmp_path):
    model, template = tiny_model(), TEMPLATES["chatml"]
    found = predict(model, tokenizer, template, ROWS, SETTINGS, tmp_path, "test base")
    for row, prediction in zip(ROWS, found, strict=True):
        ids = torch.tensor([prompt_ids(tokenizer, template, row["question"])])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=9)
        written = whole[0, ids.shape[1]:]
        assert prediction["full_text"] == tokenizer.decode(written, skip_special_tokens=True)
        assert prediction["num_tokens"] == len(written)
        assert prediction["truncated"] == (written[-1].item() != tokenizer.eos_token_id)
    monkeypatch.setattr("looper.generation._run", lambda *_: pytest.fail("a finished chunk was generated again"))
    assert predict(model, tokenizer, template, ROWS, SETTINGS, tmp_path, "test base") == found


def test_dev_metrics_ask_the_questions_and_the_counterfactuals_they_have(monkeypatch, tokenizer, tmp_path):
    """Three questions, the second with a counterfactual; another split's counterfactual is not asked."""
    changed = [{"id": name, "question": "Ann has 9.", "gold_answer": "1234"} for name in (ROWS[1]["id"], "train-99999")]
    asked = []

    def generate_in_chunks(model, requests, scratch, **options):
        asked.extend(tokenizer.decode(list(request.prompt)) for request in requests)
        texts = [f"#### {ROWS[0]['gold_answer']}", f"#### {ROWS[1]['gold_answer']}", "none", "#### 1234"]
        return [Completion(tokenizer.encode(text, add_special_tokens=False), [], truncated=False) for text in texts]

    monkeypatch.setattr(predictions, "generate_in_chunks", generate_in_chunks)
    answers, found = predict_dev("model", tokenizer, TEMPLATES["chatml"], ROWS, changed, SETTINGS, tmp_path, "dev sft")
    assert [question in text for question, text in zip([*(row["question"] for row in ROWS), "Ann has 9."], asked,
                                                       strict=True)] == [True] * 4
    assert [row["id"] for row in answers] == [row["id"] for row in ROWS], "as asked, not the changed ones"
    assert [row["correct"] for row in answers] == [True, True, False]
    assert found["n"] == 3 and found["accuracy"]["value"] == round(2 / 3, 6)
    assert found["counterfactual"] | {"gap": None, "original": None, "changed": None} == {
        "n": 1, "original": None, "changed": None, "gap": None, "repeats_old_gold": 0.0}
    assert found["counterfactual"]["changed"]["value"] == found["counterfactual"]["original"]["value"] == 1.0
