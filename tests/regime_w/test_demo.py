import io
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from regime_w import __main__ as command
from regime_w import demo, sample_rows
from regime_w.arms import ARMS, Arm
from regime_w.rows import encode, write_lines
from regime_w.sample_rows import random_rows, worked_rows
from regime_w.score import score_file, score_row


def test_the_demo_explains_every_worked_question(capsys: pytest.CaptureFixture) -> None:
    assert demo.main([]) == 0
    out = capsys.readouterr().out
    for row in worked_rows():
        scored = score_row(row)
        assert row["id"] in out
        assert f"reward {scored['reward']:.3f} = correctness" in out
        for output in scored["arm_outputs"]:
            assert f"{output['reward']:>9.3f}{output['advantage']:>z11.3f}" in out
    assert "-0.000" not in out
    assert out.count("wolfram-0.2") == len(worked_rows())
    assert "0.4 of s_wm" in out and "0.001 a token of mean length over 400" in out


def test_the_demo_on_a_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in random_rows(3)))
    assert demo.main([str(file)]) == 0
    assert "random-000002" in capsys.readouterr().out
    file.write_text(json.dumps(worked_rows()[0]) + "\n{}\n")
    assert demo.main([str(file)]) == 2
    assert capsys.readouterr().err == f"{file}:2: field 'id' is missing; add it\n"
    file.write_text(json.dumps(worked_rows()[0]) + "\n\n")
    assert demo.main([str(file)]) == 2
    assert capsys.readouterr().err == f"{file}:2: the line is empty; remove it\n"
    assert demo.main([str(tmp_path / "none.jsonl")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_one_more_arm_is_one_more_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sample_rows, "ARMS", (*ARMS, Arm("new-1.0", "new", 1.0, "Be brief.")))
    assert demo.main([]) == 0
    assert len(score_row(next(random_rows(1)))["arm_outputs"]) == 9


def test_the_demo_prints_on_any_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert demo.main([]) == 0
    sys.stdout.flush()
    assert b"counterfactual, q?:" in sys.stdout.buffer.getvalue()


def test_the_demos_help(capsys: pytest.CaptureFixture) -> None:
    assert demo.main(["--help"]) == 0
    assert demo.main(["a", "b"]) == 2
    assert capsys.readouterr().out.count("python -m regime_w.demo") == 2


def test_worked_questions_show_what_they_say() -> None:
    agree, alone, remembered, wrong, long = map(score_row, worked_rows())
    assert agree["s_wm"] == pytest.approx(1, abs=2e-3)
    assert [output["correct"] for output in alone["arm_outputs"]].count(True) == 1
    assert remembered["s_cf"] == 0.25 < remembered["s_end"]
    assert wrong["reward"] < 0.5 and wrong["s_end"] == 1.0
    assert long["reward_parts"]["length"] < -0.5


def test_score_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in random_rows(5)))
    for arguments in (["score", "--json", str(source), str(target)], ["score", str(source), str(target), "--json"]):
        assert command.main(arguments) == 0
        assert json.loads(capsys.readouterr().out) == score_file(source, tmp_path / "other.jsonl")
    assert len(target.read_text().splitlines()) == 5
    assert command.main(["replay", str(target)]) == 0
    assert json.loads(capsys.readouterr().out)["questions"] == 5
    source.write_text('{"id": "x", "gold_answer": "1"}\n')
    assert command.main(["score", str(source), str(target)]) == 2
    assert capsys.readouterr().err == f"{source}:1: field 'arm_outputs' is missing; add it\n"
    assert command.main(["score", str(tmp_path / "no"), str(target)]) == 2


def test_the_summary_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    output = {"style": "wolfram", "num_tokens": 100, "counterfactual": {"answer": "9"}}
    outputs = [{**output, "name": name, "answer": answer}
               for name, answer in (("a", "5"), ("b", "5"), ("c", "9"), ("d", None))]
    row = {"id": "q", "gold_answer": "5", "counterfactual": {"gold_answer": "9"}, "arm_outputs": outputs}
    others = [{**row, "counterfactual": None, "arm_outputs": [{**each, "answer": "4"} for each in outputs]}] * 3
    source.write_text("".join(json.dumps(each) + "\n" for each in (row, *others)))
    assert command.main(["score", str(source), str(target)]) == 0
    # s_end 1/6 and 1; s_path 1; s_cf 1 and 0.5; s_wm 0.4/6 + 0.6 and 0.85; reward 1 + 0.7 s_wm and -0.5 + 0.7 s_wm
    assert capsys.readouterr().out == f"""\
questions       4
accuracy        mean 12.5%, any arm 25.0%, majority 25.0%
mean reward     0.438
mean components s_end 0.792, s_path 1.000, s_cf 0.625, s_wm 0.804
counterfactual  gap -50.0 points: 50.0% right on q, 100.0% on q' (25.0% of questions have one)
scored file     {target}
"""
    source.write_text(json.dumps(others[0]))
    assert command.main(["score", str(source), str(target)]) == 0
    assert "counterfactual  no question has one\n" in capsys.readouterr().out
    outputs[2]["answer"] = "5"  # as many right on q as on q′
    for each, changed in zip(outputs, ("9", "9", "9", "1")):
        each["counterfactual"] = {"answer": changed}
    source.write_text(json.dumps(row))
    assert command.main(["score", str(source), str(target)]) == 0
    assert "counterfactual  gap +0.0 points: 75.0% right on q, 75.0% on q' (100.0% of questions have one)\n" in (
        capsys.readouterr().out)


def test_a_name_that_the_terminal_lacks_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target, shown = tmp_path / "in.jsonl", tmp_path / "outé.jsonl", io.BytesIO()
    write_lines(source, map(encode, worked_rows()))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert command.main(["score", str(source), str(target)]) == 0 and target.exists()
    sys.stdout.flush()
    assert b"out?.jsonl" in shown.getvalue()


def test_how_many_rows_bench_scores(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(command, "bench", lambda count: count)
    assert command.main(["bench"]) == command.main(["bench", "7"]) == 0
    assert capsys.readouterr().out == "100000\n7\n"


def test_other_commands(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert command.main(["bench", "50"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == {"questions", "seconds", "peak_memory_mib"}
    problems = tmp_path / "gsm8k.jsonl"
    problems.write_text(json.dumps({"question": "Ann has 20 pens and buys 9. Sum?",
    "answer": "<<20+9=29>>29\n#### 29"}) + "\n"
                        + json.dumps({"question": "Ann has 20 pens?", "answer": "#### 20"}) + "\n")
    assert command.main(["counterfactuals", str(problems)]) == 0
    assert json.loads(capsys.readouterr().out) == {"questions": 2, "counterfactuals": 1, "share": 0.5}


@pytest.mark.parametrize(("arguments", "text"), [
    ("", "a command is missing; name one of score, replay, bench, counterfactuals"),
    ("scor a b", "unknown command 'scor'; name one of score, replay, bench, counterfactuals"),
    ("score a", "score takes IN.jsonl and OUT.jsonl, and --json if wanted, found a"),
    ("score --json a", "score takes IN.jsonl and OUT.jsonl, and --json if wanted, found --json a"),
    ("replay", "replay takes SCORED.jsonl, found nothing"),
    ("counterfactuals a b", "counterfactuals takes GSM8K.jsonl, found a b"),
    ("bench x", "bench takes at most N, an integer above 0, found x"),
    ("bench 0", "bench takes at most N, an integer above 0, found 0"),
    ("bench 1 2", "bench takes at most N, an integer above 0, found 1 2"),
])
def test_misuse_is_said_before_the_usage(arguments: str, text: str, capsys: pytest.CaptureFixture) -> None:
    assert command.main(arguments.split()) == 2
    assert capsys.readouterr().err == f"{text}\n\n{command.__doc__}\n"


@pytest.mark.parametrize(("name", "line", "text"), [
    ("replay", "3", "the row must be an object, found 3; mend it"),
    ("replay", "{}", "field 'arm_outputs' is missing; add it"),
    ("replay", '{"arm_outputs": []}',
     "field 'arm_outputs' must be a list of at least one arm's output, found []; mend it"),
    ("replay", '{"arm_outputs": [3]}', "field 'arm_outputs[0]' must be an object, found 3; mend it"),
    ("replay", '{"arm_outputs": [{"correct": true}]}', "field 'arm_outputs[0].name' is missing; score the file first"),
    ("replay", '{"arm_outputs": [{"name": "a"}]}', "field 'arm_outputs[0].correct' is missing; score the file first"),
    ("replay", '{"arm_outputs": [{"name": "a", "correct": 1}]}',
     "field 'arm_outputs[0].correct' must be true or false, found 1; mend it"),
    ("counterfactuals", "[]", "the row must be an object, found []; mend it"),
    ("counterfactuals", '{"answer": "4"}', "field 'question' is missing; add it"),
    ("counterfactuals", '{"question": "?", "answer": 4}', "field 'answer' must be a string, found 4; mend it"),
])
def test_what_other_commands_cannot_read(name: str, line: str, text: str, tmp_path: Path, capsys) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(line + "\n")
    assert command.main([name, str(file)]) == 2
    assert capsys.readouterr().err == f"{file}:1: {text}\n"


def test_help_of_a_command_is_the_usage(capsys) -> None:
    assert command.main(["score", "--help"]) == 0 and "regime_w score IN.jsonl OUT.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize(("module", "status"), [("regime_w", 0), ("regime_w.demo", 0)])
def test_as_programs(module: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    for name in (module, f"{module}.__main__"):
        monkeypatch.delitem(sys.modules, name, raising=False)  # else runpy warns that it runs a second time
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(module, run_name="__main__")
    assert stopped.value.code == status
    assert f"python -m {module}" in "".join(capsys.readouterr())


def test_nothing_heavy_is_imported() -> None:
    code = ("import sys, regime_w.demo, regime_w.__main__; "
            "print([name for name in ('torch', 'transformers', 'pydantic', 'scipy', 'looper') if name in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout == "[]\n"
