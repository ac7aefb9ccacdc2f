"""Rollouts: which prompts are asked in which order, and what a row keeps of the answers."""

import json

import pytest
from tiny import tiny_rows

from looper import rollouts
from looper.generation import Completion
from looper.params import Rollouts
from looper.ppo_data import samples_from_rows
from looper.ppo_settings import PPOSettings
from looper.prompts import TEMPLATES, prompt_ids
from looper.rollouts import WAVE, questions_of_round, roll_out
from regime_w.arms import ARMS
from regime_w.bandit import posteriors_of
from regime_w.rows import check_row
from regime_w.score import score_rows
from regime_w.settings import ScoreSettings

SETTINGS = Rollouts(questions=3, allocation="uniform", max_new_tokens=17, batch_size=5, seed=11)
THOMPSON = SETTINGS.model_copy(update={"allocation": "thompson"})
ROWS = tiny_rows(3)
COUNTERFACTUALS = {
    "train-00001": {"id": "train-00001", "split": "train", "question": "Ann has 9 apples and buys 3 more. How many?",
                    "gold_answer": "12", "changed_from": "2", "changed_to": "9"},
    "train-00099": {"id": "train-00099", "split": "train", "question": "not asked", "gold_answer": "1",
                    "changed_from": "1", "changed_to": "2"},
}


@pytest.fixture
def asked(monkeypatch, tokenizer):
    """A model whose i-th answer is `#### i`; what it was asked."""
    calls = []

    def generate_in_chunks(model, requests, scratch, **options):
        calls.append((model, requests, scratch, options))
        texts = [f"It is so.\n#### {i}<|im_end|>" for i in range(len(requests))]
        answers = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return [Completion(ids, [-0.5] * len(ids), truncated=i % 2 == 1) for i, ids in enumerate(answers)]

    monkeypatch.setattr(rollouts, "generate_in_chunks", generate_in_chunks)
    return calls


def test_every_arm_answers_every_question_and_its_counterfactual_in_one_call(asked, tokenizer, tmp_path):
    template = TEMPLATES["qwen"]
    roll_out("model", tokenizer, template, ROWS, COUNTERFACTUALS, SETTINGS, tmp_path)
    ((model, requests, scratch, options),) = asked
    questions = [row["question"] for row in (ROWS[0], ROWS[1], COUNTERFACTUALS["train-00001"], ROWS[2])]
    expected = [(prompt_ids(tokenizer, template, question, arm.instruction), arm.temperature)
                for question in questions for arm in ARMS]
    assert [tuple(request) for request in requests] == expected and len(requests) == 32
    assert (model, scratch) == ("model", tmp_path)
    assert options["eos_token_ids"] == {tokenizer.eos_token_id} and options["seed"] == 11
    assert (options["max_new_tokens"], options["batch_size"]) == (17, 5)


def test_the_prompt_of_an_arm_is_its_instruction_and_the_neutral_one(asked, tokenizer, tmp_path):
    roll_out("model", tokenizer, TEMPLATES["qwen"], ROWS[:1], {}, SETTINGS, tmp_path)
    texts = [tokenizer.decode(request.prompt) for request in asked[0][1]]
    for text, arm in zip(texts, ARMS, strict=True):
        assert text.startswith(f"<|im_start|>system\n{arm.instruction}<|im_end|>\n<|im_start|>user\n")
        assert text.endswith(f"{ROWS[0]['question']}<|im_end|>\n<|im_start|>assistant\n")


def test_each_row_gets_its_own_answers_in_the_arms_order(asked, tokenizer, tmp_path):
    rows = roll_out("model", tokenizer, TEMPLATES["chatml"], ROWS, COUNTERFACTUALS, SETTINGS, tmp_path)
    assert [row["id"] for row in rows] == [row["id"] for row in ROWS]
    answers = [[output["answer"] for output in row["arm_outputs"]] for row in rows]
    assert answers == [[str(i) for i in range(start, start + 8)] for start in (0, 8, 24)]
    others = [[other and other["answer"] for other in (output["counterfactual"] for output in row["arm_outputs"])]
              for row in rows]
    assert others == [[None] * 8, [str(i) for i in range(16, 24)], [None] * 8]
    for row in rows:
        assert [(output["name"], output["style"], output["temperature"]) for output in row["arm_outputs"]] == [
            (arm.name, arm.style, arm.temperature) for arm in ARMS]


def test_a_row_has_exactly_the_agreed_fields(asked, tokenizer, tmp_path):
    rows = roll_out("model", tokenizer, TEMPLATES["chatml"], ROWS, COUNTERFACTUALS, SETTINGS, tmp_path)
    row, output = rows[1], rows[1]["arm_outputs"][3]
    assert list(row) == ["id", "question", "gold_answer", "counterfactual", "arm_outputs"]
    assert row["counterfactual"] == {"question": "Ann has 9 apples and buys 3 more. How many?", "gold_answer": "12",
                                     "changed_from": "2", "changed_to": "9"}
    assert rows[0]["counterfactual"] is None
    ids = tokenizer.encode("It is so.\n#### 11<|im_end|>", add_special_tokens=False)
    assert list(output) == ["name", "style", "temperature", "full_text", "reasoning", "answer", "token_ids",
                            "num_tokens", "truncated", "logprobs", "counterfactual"]
    assert output["full_text"] == "It is so.\n#### 11" and output["answer"] == "11"
    assert output["token_ids"] == ids and output["num_tokens"] == len(ids) and output["logprobs"] == [-0.5] * len(ids)
    assert output["truncated"] is True and rows[1]["arm_outputs"][2]["truncated"] is False
    assert output["counterfactual"] == {
        "full_text": "It is so.\n#### 19", "reasoning": output["reasoning"], "answer": "19", "num_tokens": len(ids),
        "truncated": True}
    assert json.loads(json.dumps(rows)) == rows


@pytest.mark.parametrize(("written", "truncated", "reasoning", "answer"), [
    ("She has 7.\n</think>\n\n#### 7<｜end▁of▁sentence｜>", False, "She has 7.", "7"),
    ("She has 7, #### 7<｜end▁of▁sentence｜>", True, "She has 7, #### 7", None),
    ("a</think> <think> again #### 8<｜end▁of▁sentence｜>", True, None, None),
])
def test_an_unclosed_think_is_truncated_whatever_ended_it(monkeypatch, tokenizer, tmp_path, written, truncated,
                                                          reasoning, answer):
    ids = tokenizer.encode(written, add_special_tokens=False)
    monkeypatch.setattr(rollouts, "generate_in_chunks", lambda _, requests, *__, **___: [
        Completion(ids, [0.0] * len(ids), False) for _ in requests])
    (row,) = roll_out("model", tokenizer, TEMPLATES["deepseek_r1"], ROWS[:1], {}, SETTINGS, tmp_path)
    output = row["arm_outputs"][0]
    assert output["full_text"] == "<think>\n" + written.removesuffix("<｜end▁of▁sentence｜>")
    assert output["truncated"] is truncated and output["answer"] == answer and output["num_tokens"] == len(ids)
    assert reasoning is None or output["reasoning"].strip() == reasoning


@pytest.mark.parametrize(("count", "number", "expected"), [
    (2, 1, [0, 1]), (2, 2, [2, 3]), (2, 3, [4, 0]), (5, 1, [0, 1, 2, 3, 4]),
    (5, 2, [0, 1, 2, 3, 4]),
])
def test_each_round_takes_the_next_questions(count, number, expected):
    assert [row["i"] for row in questions_of_round([{"i": i} for i in range(5)], count, number)] == expected


def test_more_questions_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="holds 5 questions, rollouts.questions asks for 6"):
        questions_of_round([{}] * 5, 6, 1)


@pytest.fixture
def answering(monkeypatch, tokenizer):
    """generate_in_chunks of a model that is right (7) as the arm `clever`, else wrong; keeps chunks as the real one.

    Returns the arms' names of each call, the calls' options, and how many answers were generated rather than read.
    """
    clever, calls, generated = "maudlin-0.3", [], []

    def generate_in_chunks(model, requests, scratch, **options):
        arms = [next(arm.name for arm in ARMS
                     if arm.temperature == request.temperature and arm.instruction in tokenizer.decode(request.prompt))
                for request in requests]
        calls.append((arms, scratch, options["seed"]))
        if not scratch.exists():
            generated.append(len(requests))
            scratch.mkdir(parents=True)
        texts = [f"#### {7 if arm == clever else 8}<|im_end|>" for arm in arms]
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return [Completion(each, [-0.5] * len(each), truncated=False) for each in ids]

    monkeypatch.setattr(rollouts, "generate_in_chunks", generate_in_chunks)
    return clever, calls, generated


MANY = [{"id": f"train-{i:05}", "question": f"Question {i}?", "gold_answer": "7.0"} for i in range(WAVE + 40)]
CHANGED = {row["id"]: {"question": "Changed?", "gold_answer": "9", "changed_from": "1", "changed_to": "2"}
           for row in MANY[::2]}


def allocated(tokenizer, folder, settings=THOMPSON):
    return roll_out("model", tokenizer, TEMPLATES["qwen"], MANY, CHANGED, settings, folder)


def test_thompson_asks_the_arm_that_is_right_once_it_knows(answering, tokenizer, tmp_path):
    clever, calls, _ = answering
    rows = allocated(tokenizer, tmp_path)
    assert [row["id"] for row in rows] == [row["id"] for row in MANY]
    assert [scratch.name for _, scratch, _ in calls] == ["wave-00000", "wave-00001", "wave-00002"]
    assert len({seed for *_, seed in calls}) == 3  # or the waves would sample with the same random numbers
    for row in rows[:WAVE]:
        assert row["allocation"] == {"rule": "uniform", "propensities": {arm.name: 0.125 for arm in ARMS}}
        assert [output["name"] for output in row["arm_outputs"]] == [arm.name for arm in ARMS]
    # After 32 right answers of one arm and none of the others, its share is the floor's eighth and all the rest
    later = [output["arm"] for row in rows[WAVE:] for output in row["arm_outputs"]]
    assert [row["allocation"]["propensities"][clever] for row in rows[WAVE:]] == pytest.approx([0.2 / 8 + 0.8] * 40)
    assert later.count(clever) / len(later) == pytest.approx(0.825, abs=0.06)
    assert len(later) == 40 * 8


def test_a_thompson_row_says_who_answered_and_with_which_probability(answering, tokenizer, tmp_path):
    clever, calls, _ = answering
    rows = allocated(tokenizer, tmp_path)
    asked = iter(arm for arms, *_ in calls for arm in arms)
    for row in rows:
        outputs, shares = row["arm_outputs"], row["allocation"]["propensities"]
        assert len(outputs) == len({output["name"] for output in outputs}) == 8
        assert list(shares) == [arm.name for arm in ARMS] and sum(shares.values()) == pytest.approx(1, abs=1e-12)
        arms = [output["arm"] for output in outputs]
        assert [output["propensity"] for output in outputs] == [shares[arm] for arm in arms]
        assert [(output["style"], output["temperature"]) for output in outputs] == [
            (arm.style, arm.temperature) for name in arms for arm in ARMS if arm.name == name]
        for kind in ("question", "counterfactual")[:1 + (row["id"] in CHANGED)]:
            assert [next(asked) for _ in outputs] == arms, kind
        names = [output["name"] for output in outputs if output["arm"] == clever]
        assert names == [clever, *(f"{clever}#{i}" for i in range(2, len(names) + 1))][:len(names)]
        assert (row["counterfactual"] is None) == (row["id"] not in CHANGED) == (outputs[0]["counterfactual"] is None)
    assert next(asked, None) is None
    check_row(rows[-1])


@pytest.mark.slow
def test_thompson_comes_from_the_seed_and_goes_on_after_a_kill(answering, tokenizer, tmp_path):
    _, calls, generated = answering
    whole = allocated(tokenizer, tmp_path / "whole")
    assert allocated(tokenizer, tmp_path / "again") == whole
    assert allocated(tokenizer, tmp_path / "other", THOMPSON.model_copy(update={"seed": 12})) != whole
    del calls[:], generated[:]
    (tmp_path / "killed" / "wave-00000").mkdir(parents=True)  # what was finished before the kill
    (tmp_path / "killed" / "wave-00001").mkdir()
    assert allocated(tokenizer, tmp_path / "killed") == whole
    assert len(calls) == 3 and generated == [8 * (8 + 4)]  # the last wave: 8 questions, 4 of them with a counterfactual


def test_thompson_s_rows_are_scored_by_arm(answering, tokenizer, tmp_path):
    clever, *_ = answering
    rows = allocated(tokenizer, tmp_path)
    scored, metrics = score_rows(rows, ScoreSettings(cf="chsh", resamples=100))
    scored = list(scored)
    found = metrics.metrics()["arms"]
    assert set(found) == {arm.name for arm in ARMS} and sum(arm["answers"] for arm in found.values()) == 8 * len(rows)
    assert found[clever]["accuracy"] == 1 and found["wolfram-0.2"]["accuracy"] == 0
    first, second = posteriors_of(scored, [clever, "wolfram-0.2"])
    assert first == (found[clever]["answers"], 0) and second == (0, found["wolfram-0.2"]["answers"])
    samples = samples_from_rows(scored, lambda _: [1], PPOSettings(credit="arm"))
    assert len({sample.id for sample in samples}) == len(samples) > WAVE * 8
    assert any(sample.id.endswith(f"/{clever}#2") for sample in samples)


def test_uniform_rows_hold_no_allocation(asked, tokenizer, tmp_path):
    (row,) = roll_out("model", tokenizer, TEMPLATES["qwen"], ROWS[:1], {}, SETTINGS, tmp_path)
    assert "allocation" not in row and not any({"arm", "propensity"} & set(output) for output in row["arm_outputs"])
