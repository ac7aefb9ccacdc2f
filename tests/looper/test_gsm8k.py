"""Prepared data: three sources, every row checked, three splits without a common question."""

import json
import random
import re

import pytest

from looper.files import sha256
from looper.gsm8k import divide, prepare, refuse_overlap
from looper.jsonl import write_jsonl
from looper.params import HubData, PathData, SampleData

REVISION = "7" * 40


def problem(number, **changes):
    """A row of GSM8K: `number` pens at 3 dollars."""
    return {"question": f"Ann buys {number} pens at 3 dollars each. How much does she pay?",
            "answer": f"She pays {number}*3=$<<{number}*3={number * 3}>>{number * 3}.\n#### {number * 3}", **changes}


def path_source(folder, train, test, **changes):
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "test.jsonl", test)
    settings = {"source": "path", "path": str(folder), "train_sha256": None, "test_sha256": None, "dev_share": 0.2,
                "seed": 0}
    return PathData(**settings | changes)


TRAIN, TEST = [problem(number) for number in range(11, 31)], [problem(number) for number in range(41, 46)]


def test_a_row_is_the_question_the_solution_and_the_canonical_gold(tmp_path):
    answer = "First 6*200=<<6*200=1200>>1,200 <b>.\nThen <<1200+34=1234>>1,234.\n#### 1,234 "
    (splits, _, _) = prepare(path_source(tmp_path, TRAIN, [{"question": " What? ", "answer": answer}]))
    assert splits["test"] == [{
        "id": "test-00000", "question": "What?", "solution": "First 6*200=1,200 <b>.\nThen 1,234.",
        "gold_answer": "1234", "annotated": answer.strip()}]
    assert list(splits["test"][0]) == ["id", "question", "solution", "gold_answer", "annotated"]


@pytest.mark.parametrize(("written", "gold"), [
    ("#### 18", "18"), ("####18", "18"), ("####  1,234,567", "1234567"), ("#### -5", "-5"), ("#### -1,000", "-1000"),
    ("#### 007", "7"), ("#### -0", "0"), ("#### 18\n", "18"), ("#### 3 is wrong\n#### 4", "4"),
])
def test_gold_answers_are_canonical_integers(tmp_path, written, gold):
    splits, _, metrics = prepare(path_source(tmp_path, TRAIN, [problem(50, answer=f"So it is.\n{written}")]))
    assert splits["test"][0]["gold_answer"] == gold and metrics["dropped"] == {"total": 0}


@pytest.mark.parametrize(("row", "reason"), [
    (problem(50, answer="So it is.\n#### 2.5"), "no integer after ####"),
    (problem(50, answer="So it is.\n#### ,"), "no integer after ####"),
    (problem(50, answer="So it is.\n#### ٣"), "no integer after ####"),
    (problem(50, answer="So it is 18."), "no integer after ####"),
    (problem(50, answer="#### 18\nand more"), "no integer after ####"),
    (problem(50, answer="#### 18"), "no solution"),
    (problem(50, question=" \n"), "empty question"),
    (problem(41, question=problem(41)["question"].upper().replace(" ", "  ")), "duplicate question"),
])
def test_what_cannot_be_used_is_dropped_and_counted(tmp_path, row, reason):
    splits, _, metrics = prepare(path_source(tmp_path, TRAIN, [*TEST, row, problem(60)]))
    assert metrics["dropped"] == {"total": 1, reason: 1} and metrics["rows"] == {"train": 16, "dev": 4, "test": 6}
    lines = [f"test-{i:05d}" for i in (0, 1, 2, 3, 4, 6)]
    assert [each["id"] for each in splits["test"]] == lines, "ids are the source's lines"


def test_the_official_train_split_is_divided_80_to_20_by_the_seed(tmp_path):
    def ids(seed):
        splits, _, _ = prepare(path_source(tmp_path, TRAIN, TEST, seed=seed))
        assert (len(splits["train"]), len(splits["dev"]), len(splits["test"])) == (16, 4, 5)
        return [row["id"] for row in splits["train"]], [row["id"] for row in splits["dev"]]

    train, dev = ids(0)
    assert sorted(train + dev) == [f"train-{number:05d}" for number in range(20)]
    assert ids(0) == (train, dev) and ids(1) != (train, dev) and train != sorted(train), "shuffled by the seed alone"
    random.seed(99)
    assert ids(0) == (train, dev), "whatever the global state"


@pytest.mark.parametrize(("rows", "share", "dev"), [(7473, 0.2, 1495), (10, 0.25, 2), (5, 0.0, 0), (3, 0.5, 2)])
def test_dev_gets_its_share_rounded(rows, share, dev):
    train, held_out = divide([{"id": i} for i in range(rows)], share, 0)
    assert len(held_out) == dev and len(train) == rows - dev


def test_a_question_in_two_splits_is_refused(tmp_path):
    same = TRAIN[3]["question"].replace(" ", "  ").upper()
    with pytest.raises(ValueError, match=r"train-00003 \((train|dev)\) and test-00005 \(test\) are the same question"):
        prepare(path_source(tmp_path, TRAIN, [*TEST, problem(50, question=same)]))


def test_an_empty_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the dev split is empty"):
        prepare(path_source(tmp_path, TRAIN[:2], TEST))
    with pytest.raises(ValueError, match="the test split is empty"):
        prepare(path_source(tmp_path, TRAIN, [problem(50, answer="none")]))
    rows = [{"id": "a", "question": "q"}]
    refuse_overlap({"train": rows, "dev": [{"id": "b", "question": "r"}]})


def test_counterfactuals_are_of_train_and_dev_alone(tmp_path):
    splits, counterfactuals, metrics = prepare(path_source(tmp_path, TRAIN, TEST))
    rows = {row["id"]: (split, row) for split in ("train", "dev") for row in splits[split]}
    assert counterfactuals and metrics["counterfactual_share"]["train"] > 0.5
    for each in counterfactuals:
        split, original = rows[each["id"]]
        assert list(each) == ["id", "split", "question", "gold_answer", "changed_from", "changed_to"]
        assert each["split"] == split
        count, price = map(int, re.findall(r"\d+", each["question"]))
        assert each["gold_answer"] == str(count * price) != original["gold_answer"]
        assert original["question"].replace(each["changed_from"], each["changed_to"]) == each["question"]
    for split, share in metrics["counterfactual_share"].items():
        assert share == sum(each["split"] == split for each in counterfactuals) / len(splits[split])


# ---- path ----

def test_hashes_of_the_files_are_checked(tmp_path):
    settings = path_source(tmp_path, TRAIN, TEST)
    right = sha256(tmp_path / "test.jsonl")
    prepare(settings.model_copy(update={"test_sha256": right}))
    with pytest.raises(ValueError, match=f"test.jsonl: sha256 {right}, prepare.test_sha256 says {'0' * 64}; nothing"):
        prepare(settings.model_copy(update={"test_sha256": "0" * 64}))


def test_a_missing_file_says_where_to_put_it(tmp_path):
    settings = path_source(tmp_path, TRAIN, TEST)
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(ValueError, match=r"prepare.path: .*test\.jsonl is not here; put GSM8K's train.jsonl and"):
        prepare(settings)


@pytest.mark.parametrize(("line", "message"), [
    ('{"question": "What?"}', "field 'answer' is missing"),
    ('{"question": 1, "answer": "#### 1"}', "field 'question' is int"),
    ('{"question": "What?"', "not a JSON object"),
])
def test_a_broken_row_is_named_by_file_line_and_field(tmp_path, line, message):
    settings = path_source(tmp_path, TRAIN, TEST)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/train.jsonl:21: {message}")):
        prepare(settings)


# ---- hub ----

HUB = HubData(source="hub", repo="openai/gsm8k", config="main", revision=REVISION, dev_share=0.2, seed=0)


class Split(list):
    def to_list(self):
        return list(self)


def test_the_hub_gives_what_the_files_give(tmp_path, monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: (
        asked.append((names, options)) or {"train": Split(TRAIN), "test": Split(TEST)}))
    assert prepare(HUB) == prepare(path_source(tmp_path, TRAIN, TEST))
    assert asked == [(("openai/gsm8k", "main"), {"revision": REVISION})]


def test_a_broken_row_of_the_hub_is_named(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {
        "train": Split(TRAIN), "test": Split([*TEST, {"question": "What?", "answer": None}])})
    with pytest.raises(ValueError, match=f"openai/gsm8k {REVISION}, test row 5: field 'answer' is NoneType, must"):
        prepare(HUB)


# ---- sample ----

def test_the_built_in_problems_fill_the_three_splits():
    settings = SampleData(source="sample", train=60, dev=15, test=30, seed=0)
    splits, counterfactuals, metrics = prepare(settings)
    assert metrics["rows"] == {"train": 60, "dev": 15, "test": 30} and metrics["dropped"] == {"total": 0}
    assert [row["id"] for row in splits["dev"]] == [f"dev-{i:05d}" for i in range(15)]
    for row in (row for rows in splits.values() for row in rows):
        assert "<<" not in row["solution"] and "####" not in row["solution"] and row["gold_answer"] in row["solution"]
        assert row["annotated"].endswith(f"#### {row['gold_answer']}")
    assert len(counterfactuals) > 20
    assert json.dumps(prepare(settings)) == json.dumps((splits, counterfactuals, metrics)), "the same each time"
    assert prepare(settings.model_copy(update={"seed": 1}))[0] != splits
