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
from regime_w.sample_rows import random_rows, worked_rows
from regime_w.score import score_row


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
    assert capsys.readouterr().err.startswith(f"{file}:2: not a JSON object (")
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
    assert command.main(["score", str(source), str(target)]) == 0
    assert json.loads(capsys.readouterr().out)["questions"] == 5
    assert len(target.read_text().splitlines()) == 5
    assert command.main(["replay", str(target)]) == 0
    assert json.loads(capsys.readouterr().out)["questions"] == 5
    source.write_text('{"id": "x", "gold_answer": "1"}\n')
    assert command.main(["score", str(source), str(target)]) == 2
    assert capsys.readouterr().err == f"{source}:1: field 'arm_outputs' is missing; add it\n"
    assert command.main(["score", str(tmp_path / "no"), str(target)]) == 2


def test_how_many_rows_bench_scores(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(command, "bench", lambda count: count)
    assert command.main(["bench"]) == command.main(["bench", "7"]) == 0
    assert capsys.readouterr().out == "100000\n7\n"


def test_other_commands(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments in ([], ["score"], ["bench", "x"], ["bench", "0"], ["bench", "1", "2"]):
        assert command.main(arguments) == 2
        assert "score IN.jsonl OUT.jsonl" in capsys.readouterr().err
    assert command.main(["bench", "50"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == {"questions", "seconds", "peak_memory_mib"}
    problems = tmp_path / "gsm8k.jsonl"
    problems.write_text(json.dumps({"question": "Ann has 20 pens and buys 9. Sum?",
    "answer": "<<20+9=29>>29\n#### 29"}) + "\n"
                        + json.dumps({"question": "Ann has 20 pens?", "answer": "#### 20"}) + "\n")
    assert command.main(["counterfactuals", str(problems)]) == 0
    assert json.loads(capsys.readouterr().out) == {"questions": 2, "counterfactuals": 1, "share": 0.5}


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
