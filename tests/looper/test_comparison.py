"""Two models on the same questions: what a difference is made of, and the command that compares two files."""

import pytest

from looper.comparison import among_formatted, compare, divide_gain, main
from looper.evaluation import judge
from looper.jsonl import write_jsonl


def answers(texts: list[str], truncated: bool = False) -> list[dict]:
    rows = [{"id": f"test-{i:05}", "question": f"{i}?", "gold_answer": "18"} for i in range(len(texts))]
    return [judge(row, text, 10 + len(text), truncated) for row, text in zip(rows, texts, strict=True)]


@pytest.mark.parametrize(
    ("old", "new", "part", "sign"),
    [
        (("I cannot say", False), ("#### 18", False), "format", 1),
        (("#### 17", True), ("#### 18", False), "format", 1),  # did not end
        (("<think>it is 18", False), ("#### 18", False), "format", 1),
        (("#### 18", False), ("#### 17", True), "format", -1),
        (("#### 17", False), ("#### 18", False), "reasoning", 1),
        (("18, no:\n#### 17", False), ("#### 18", False), "reasoning", 1),  # both in form: what it says counts
        (("#### 18", False), ("#### 17", False), "reasoning", -1),
        (("it is 17", False), ("#### 18", False), "reasoning", 1),  # 18 nowhere: no parser could read it
        (("it is 180, or 1.8", False), ("#### 18", False), "reasoning", 1),
        (("18 eggs in 2 nests", False), ("#### 18", False), "either", 1),
        (("$18.00, as 9 + 9 shows", False), ("#### 18", False), "either", 1),
        (("it is 18", False), ("18 at first\n#### 17", False), "either", -1),
    ],
)
def test_a_changed_answer_belongs_to_one_part(old, new, part, sign):
    gain = divide_gain(answers([old[0]], old[1]), answers([new[0]], new[1]))
    assert {name: (each["difference"], each["questions"]) for name, each in gain.items()} == {
        name: (sign, 1) if name == part else (0, 0) for name in ("format", "reasoning", "either")}


def test_the_strict_measure_looks_at_answers_that_both_models_format():
    """Of five questions three are in form twice, of which the old model gets one right and the new one all."""
    old = answers(["#### 17", "#### 18", "#### 1", "18", "#### 18"])
    new = answers(["#### 18", "#### 18", "#### 18", "#### 18", "no idea"])
    found = among_formatted(old, new)
    assert (found["questions"], found["difference"]) == (3, round(2 / 3, 6))  # (3 - 1) / 3
    assert found["low"] <= found["difference"] <= found["high"] <= 1
    assert among_formatted(answers(["18"]), answers(["#### 18"])) == {
        "questions": 0, "difference": None, "low": None, "high": None}


def test_a_negative_gold_is_found_with_any_minus():
    rows = [{"id": "test-00000", "question": "?", "gold_answer": "-18"}]
    old, new = (judge(rows[0], text, 5, False) for text in ("−18 degrees at 6 o'clock", "#### -18"))
    assert divide_gain([old], [new])["either"]["difference"] == 1


def test_the_command_compares_two_files(tmp_path, capsys):
    """Ten questions, four to six right: three gained (one of them unreadable before), one lost; p = 2 · (1 + 4) / 2⁴."""
    old = answers(["#### 18"] * 4 + ["#### 17"] * 5 + ["none"])
    new = answers(["#### 17"] + ["#### 18"] * 5 + ["#### 17"] * 3 + ["#### 18"])
    files = [str(tmp_path / f"{name}.jsonl") for name in ("old", "new")]
    for name, rows in zip(files, (old, new)):
        write_jsonl(tmp_path / name, rows)
    found = compare(old, new)
    assert main(files) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"10 questions: 40.0% to 60.0%, +20.0 points ({100 * found['low']:+.1f} to {100 * found['high']:+.1f}); "
        "3 gained, 1 lost, McNemar p 0.62", "of it format +10.0, reasoning +10.0, either +0.0"]
    assert found["low"] < 0.2 < found["high"]


def test_the_command_says_what_cannot_be_compared(tmp_path, capsys):
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    write_jsonl(one, answers(["#### 18"] * 2))
    write_jsonl(other, answers(["#### 18"] * 2)[::-1])
    assert main([str(one)]) == main([]) == 2
    assert capsys.readouterr().err.startswith("usage: python -m looper.comparison OLD.jsonl NEW.jsonl")
    assert main([str(one), str(other)]) == 2
    assert "other.jsonl answer different questions, or in another order" in capsys.readouterr().err
    other.unlink()
    assert main([str(one), str(other)]) == 2
    assert "other.jsonl" in capsys.readouterr().err
