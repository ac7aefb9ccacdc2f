"""What fine-tuning learns to write: which of the base's answers become targets, in which form, and what is counted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny import tiny_model, tiny_rows, tiny_tokenizer

import looper.generation
import stages.targets
from looper.base_model import fetch_base
from looper.generation import Completion, Request, generate_in_chunks
from looper.jsonl import write_jsonl
from looper.params import FolderBase, SelfTargets, check
from looper.prompts import TEMPLATES, answer_text, end_token_ids, prompt_ids, training_ids
from looper.targets import gold_targets, self_targets, solution_of
from regime_w.answers import extract_answer

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{**row, "annotated": f"{row['solution']}\n#### {row['gold_answer']}"} for row in tiny_rows(3)]  # golds 3, 5, 7
CHATML, R1 = TEMPLATES["chatml"], TEMPLATES["deepseek_r1"]


@pytest.fixture
def draw(monkeypatch, tokenizer, tmp_path):
    """(targets, metrics) where the base answers the rows, in their order, with the given texts.

    A text that ends in "…" is truncated there; every other one is ended by the template's end token.
    """
    def run(answers, rows=ROWS, template=CHATML, max_tokens=512, calls=None):
        def fake(model, requests, scratch, **options):
            (calls if calls is not None else []).append((model, requests, scratch, options))
            texts = [text for each in answers for text in each]
            assert len(texts) == len(requests)
            written = [text.removesuffix("…") if text.endswith("…") else text + template.end for text in texts]
            ids = [tokenizer.encode(text, add_special_tokens=False) for text in written]
            return [Completion(each, [0.0] * len(each), text.endswith("…")) for each, text in zip(ids, texts)]

        monkeypatch.setattr(looper.generation, "generate_in_chunks", fake)
        settings = SelfTargets(samples=len(answers[0]), temperature=0.7, max_new_tokens=40, batch_size=6, seed=5)
        return self_targets("model", tokenizer, template, rows, settings, max_tokens, tmp_path)

    return run


def completion_tokens(tokenizer, solution, gold):
    return len(tokenizer.encode(f"{solution}\n#### {gold}<|im_end|>", add_special_tokens=False))


def test_a_right_answer_replaces_the_solution_and_a_wrong_or_truncated_one_does_not(draw):
    targets, _ = draw([["It is 4.", "1+2 is 3."], ["Five, 6.", "No idea."], ["4+3=7…", "Eight: 8."]])
    assert targets == [{**ROWS[0], "solution": "1+2 is 3.", "target": "self"},
                       {**ROWS[1], "target": "gold"}, {**ROWS[2], "target": "gold"}]
    assert targets[1]["solution"] == "She has 2+3=5 apples."


def test_answers_are_compared_as_numbers(draw):
    targets, _ = draw([["It is $3.00."], ["10/2 = 10/2"], ["7.5"]])
    assert [row["target"] for row in targets] == ["self", "self", "gold"]


@pytest.mark.parametrize(("text", "solution"), [
    ("3+4 is 7.\n#### 7", "3+4 is 7."),
    ("3+4 is 7.\n#### 7\nThat is all.", "3+4 is 7."),
    ("So it is #### 7", "So it is"),
    ("3+4 is 7.\n\n**#### 7**", "3+4 is 7."),
    ("3+4 is 7.\n##### 7", "3+4 is 7."),
    ("3+4 is \\boxed{7}. \n\n", "3+4 is \\boxed{7}."),
    (" 3+4 is 7", " 3+4 is 7"),
    ("#### 7", None), ("  \n#### 7", None), ("", None),
    ("3\n#### 3\n3+4\n#### 7", None),  # a further marker
    ("#### Step 1: add\n3+4 is 7.", None),  # a heading: the text is whole, and holds the marker
    ("<|im_start|> 7", None), ("<｜User｜> 7", None), ("<think>3+4</think> 7", None),
])
def test_the_solution_is_the_text_without_its_answer_line(text, solution):
    assert solution_of(text, CHATML) == solution


@pytest.mark.parametrize(("text", "solution"), [
    ("<think>\nThree and four.\nSeven.\n</think>\n\n**Solution:** 3+4 = \\boxed{7}", "Three and four.\nSeven."),
    ("<think>\nSeven.</think>\n\n#### 7", "Seven."),
    ("<think>\n\n</think>\n\n3+4 is 7.\n#### 7", None),  # no reasoning where the template wants it
    ("<think>\nSeven.\n#### 7\n</think>\n\n#### 7", None),
])
def test_in_a_think_block_the_solution_is_the_reasoning(text, solution):
    assert solution_of(text, R1) == solution


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_self_row_is_trained_to_end_in_one_marker_the_gold_and_the_end_token(draw, tokenizer, name):
    template = TEMPLATES[name]
    think = "Seven.\n</think>\n\n" if name == "deepseek_r1" else "Seven.\n"
    targets, _ = draw([["2"], ["4"], [f"{think}#### 7.0"]], template=template)
    assert [row["target"] for row in targets] == ["gold", "gold", "self"]
    (ids, mask), = training_ids(tokenizer, template, targets[2:])
    completion = tokenizer.decode([token for token, trained in zip(ids, mask) if trained])
    assert completion == f"{think}#### 7{template.end}" and ids[-1] in end_token_ids(tokenizer, template)


def test_a_special_token_amid_the_answer_is_not_decoded_away(draw):
    targets, metrics = draw([["1+2 <|endoftext|>is 3."], ["2+3 is 5."], ["7"]])
    assert [row["target"] for row in targets] == ["gold", "self", "self"]
    assert metrics["right_share"] == 1.0 and metrics["self_share"] == 0.666667


@pytest.mark.parametrize(("lengths", "chosen"), [
    ([9], 0), ([9, 2], 1), ([2, 9], 0), ([9, 2, 5], 2), ([2, 8, 4, 6], 2), ([9, 5, 1, 5, 5], 1), ([3, 3, 3, 3], 0),
])
def test_of_the_right_samples_the_first_of_median_length_is_taken(draw, lengths, chosen):
    texts = [f"{'x' * length}{i} 3" for i, length in enumerate(lengths)]  # an x is a token
    (row,), _ = draw([texts], rows=ROWS[:1])
    assert row["solution"] == texts[chosen]


def test_wrong_samples_have_no_part_in_the_median(draw):
    (row,), _ = draw([["x 4", "xx 3", "xxx 4", "xxxxxx 3", "xxxxxxxxx 3", "xxxxxxxxxxxx…"]], rows=ROWS[:1])
    assert row["solution"] == "xxxxxx 3"


def test_a_sample_that_would_make_too_long_a_row_is_not_kept(draw, tokenizer):
    long = {**ROWS[0], "solution": "xxxxxxxxxxxxxxxx 3"}
    (ids, _), = training_ids(tokenizer, CHATML, [long])
    fits = len(ids)
    assert draw([[long["solution"]]], rows=ROWS[:1], max_tokens=fits)[0] == [{**long, "target": "self"}]
    targets, metrics = draw([[long["solution"]]], rows=ROWS[:1], max_tokens=fits - 1)
    assert targets == [{**ROWS[0], "target": "gold"}] and metrics["right_share"] == 1.0
    (row,), _ = draw([[long["solution"], "x 3"]], rows=ROWS[:1], max_tokens=fits - 1)
    assert row["solution"] == "x 3"


def test_each_question_is_asked_neutrally_as_often_as_set(draw, tokenizer, tmp_path):
    calls = []
    draw([["3", "4"], ["5", "6"], ["7", "8"]], calls=calls)
    ((model, requests, scratch, options),) = calls
    prompts = [prompt_ids(tokenizer, CHATML, row["question"]) for row in ROWS]
    assert requests == [Request(prompts[i], 0.7) for i in (0, 0, 1, 1, 2, 2)]
    assert (model, scratch) == ("model", tmp_path)
    assert options == {"max_new_tokens": 40, "batch_size": 6, "seed": 5, "progress": "targets",
                       "eos_token_ids": {tokenizer.eos_token_id}}


def test_metrics_are_counted_by_hand(draw, tokenizer):
    _, metrics = draw([["x 3", "xxxx 3\n#### 3", "4"],  # two right, both kept
                       ["5…", "6", "7"],  # a right one, truncated: not kept
                       ["6", "5", "none"]])
    kept = [completion_tokens(tokenizer, "x 3", 3), completion_tokens(tokenizer, "xxxx 3", 3)]
    assert kept[1] - kept[0] == 3
    assert metrics == {"rows": 3, "self_share": 0.333333, "any_right_share": 0.666667,
                       "kept_tokens": sum(kept) / 2, "samples": 9, "right_share": 0.333333}


def test_gold_targets_are_the_rows():
    targets, metrics = gold_targets(ROWS)
    assert targets == [{**row, "target": "gold"} for row in ROWS]
    assert metrics == {"rows": 3, "self_share": 0.0, "any_right_share": 0.0, "kept_tokens": None, "samples": 0,
                       "right_share": None}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with params.yaml, dvc.yaml's stage and the train rows, where the stage is run."""
    def make(rows=ROWS, **sft):
        monkeypatch.chdir(tmp_path)
        params = yaml.safe_load((ROOT / "params.yaml").read_text())
        params["sft"] |= sft
        params["model"] = {"device": "cpu", "dtype": "float32", "quantization": "none", "template": "chatml"}
        Path("params.yaml").write_text(yaml.safe_dump(params))
        stage = {"cmd": "python -m stages.targets", "deps": ["models/base", "data/train.jsonl"],
                 "params": ["model", "sft.targets", "sft.self", "sft.max_tokens"]}
        Path("dvc.yaml").write_text(yaml.safe_dump({"stages": {"targets": stage}}))
        write_jsonl(Path("data/train.jsonl"), rows)
        return tmp_path

    return make


def written(path="data/sft_targets.jsonl"):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_gold_needs_no_model_and_no_torch(project):
    folder = project(targets="gold")
    code = ("import runpy, sys\nsys.argv = ['targets']\nrunpy.run_module('stages.targets', run_name='__main__')\n"
            "print({'torch', 'transformers', 'scipy'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True,
                          env={"PYTHONPATH": str(ROOT), "PATH": ""})
    assert done.returncode == 0 and done.stdout.endswith("\nset()\n"), done.stderr
    assert written() == [{**row, "target": "gold"} for row in ROWS]
    assert json.loads(Path("metrics/targets.json").read_text()) == gold_targets(ROWS)[1]


def test_the_stage_writes_what_the_base_itself_answers_and_the_same_again(project, tmp_path):
    """The real engine on a tiny model that ends its answers soon; what it happens to answer is made the gold."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.eos_token_id] *= 2
    model.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    own = {"samples": 8, "temperature": 1.0, "max_new_tokens": 48, "batch_size": 16, "seed": 1}
    requests = [Request(prompt_ids(tokenizer, CHATML, row["question"]), 1.0) for row in ROWS for _ in range(8)]
    drawn = generate_in_chunks(model, requests, tmp_path / "drawn", max_new_tokens=48, batch_size=16, seed=1,
                               eos_token_ids=end_token_ids(tokenizer, CHATML))
    rows, expected = [], []
    for i, row in enumerate(ROWS):
        samples = drawn[8 * i:8 * i + 8]
        answers = [extract_answer(answer_text(tokenizer, CHATML, each.token_ids)) for each in samples]
        texts = [tokenizer.decode(each.token_ids[:-1]) for each in samples]  # special tokens shown, and so refused
        fit = [(answer, text) for answer, text, each in zip(answers, texts, samples)
               if answer and answers.count(answer) == 1 and not each.truncated and solution_of(text, CHATML)]
        own_answer = i < 2 and fit  # the last question gets a gold that nobody gives
        rows.append({**row, "gold_answer": fit[0][0] if own_answer else "123456789"})
        expected.append((fit[0][1].rstrip(), "self") if own_answer else (row["solution"], "gold"))
    assert "self" in [target for _, target in expected], "the tiny model ends no answer with a number: try another seed"

    project(rows, targets="self", self=own)
    fetch_base(FolderBase(source="folder", path=str(tmp_path / "source"), digest=None, licence="none"), Path("models/base"))
    stages.targets.main()
    first = Path("data/sft_targets.jsonl").read_bytes(), Path("metrics/targets.json").read_bytes()
    assert [(row["solution"], row["target"]) for row in written()] == expected
    assert json.loads(first[1])["samples"] == 24
    assert not list(Path(".scratch").iterdir())
    stages.targets.main()
    assert (Path("data/sft_targets.jsonl").read_bytes(), Path("metrics/targets.json").read_bytes()) == first


@pytest.mark.parametrize(("sft", "error"), [
    ({"targets": "own"}, "  sft.targets: Input should be 'gold' or 'self', found 'own'"),
    ({"self": {"samples": 4, "temperature": 0.0, "max_new_tokens": 400, "batch_size": 256, "seed": 0}},
     "  sft.self.temperature: Input should be greater than 0, found 0.0"),  # greedy samples would all be the same
])
def test_settings_that_cannot_be_meant_are_named(sft, error):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["sft"] |= sft
    with pytest.raises(ValueError) as caught:
        check(params, "params.yaml")
    assert str(caught.value).splitlines()[1:] == [error]
