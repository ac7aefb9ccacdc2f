"""N processes against one: the order of the runs, the ratio by hand, the end of a run that fails; a real comparison."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import pytest

from bench import __main__ as bench
from bench import gpus
from looper import distributed

ROOT = Path(__file__).resolve().parents[2]


class Runs:
    """In place of subprocess.run: writes figures as `python -m bench` does, or ends with a status."""

    def __init__(self, rates, tokens=(60,) * 4, statuses=(0,) * 4):
        self.figures, self.commands = iter(zip(rates, tokens, statuses, strict=True)), []

    def __call__(self, command, **_):
        rate, tokens, status = next(self.figures)
        self.commands.append(command)
        if status:
            return SimpleNamespace(returncode=status)
        side = {"name": "looper", "tokens": tokens, "rate": rate}
        stages = [{"stage": name, "unit": "tokens", "sides": [side | {"rate": times * rate}]}
                  for times, name in enumerate(command[command.index("--stage") + 1].split(","), 1)]
        written = {"machine": {"device": "fake"}, "processes": self.processes[len(self.commands) - 1], "stages": stages}
        Path(command[command.index("--json") + 1]).write_text(json.dumps(written))
        return SimpleNamespace(returncode=0)

    @property
    def processes(self):
        """How many each command starts."""
        return [int(each[each.index("--num_processes") + 1]) if "--num_processes" in each else 1 for each in self.commands]


@pytest.fixture
def compared(monkeypatch, tmp_path):
    """Compares three processes with one, on fakes; returns (exit status, the runs, what was written or None)."""
    def compare(runs, *arguments):
        monkeypatch.setattr(gpus.subprocess, "run", runs)
        status = gpus.main(["3", "--device", "cpu", "--json", str(tmp_path / "figures.json"), *arguments])
        file = tmp_path / "figures.json"
        return status, runs, json.loads(file.read_text()) if file.exists() else None

    return compare


# ---- on fakes ----


def test_the_order_is_one_n_n_one_and_only_the_launcher_differs(compared):
    _, runs, _ = compared(Runs([1.0] * 4), "--stage", "rollouts,sft", "--rows", "16", "--batch", "4", "--model", "m")
    assert runs.processes == [1, 3, 3, 1]
    asked = [each[each.index("bench") + 1:each.index("--json")] for each in runs.commands]
    assert asked == [["--against", "none", "--stage", "rollouts,sft", "--model", "m", "--device", "cpu", "--batch", "4",
                      "--rows", "16"]] * 4
    assert [each[1:each.index("bench")] for each in runs.commands[::3]] == [["-m"]] * 2
    assert "--rows" not in compared(Runs([1.0] * 4))[1].commands[0], "each stage's own number"


def test_the_ratio_by_hand(compared, capsys):
    status, _, written = compared(Runs([100.0, 150.0, 170.0, 60.0]), "--stage", "sft,eval")
    sft, evaluation = written["stages"]
    assert (status, written["machine"]) == (0, {"device": "fake"})
    assert [(side["processes"], side["tokens"], side["rate"]) for side in sft["sides"]] == [(1, 60, 80.0), (3, 60, 160.0)]
    assert [[run["rate"] for run in side["runs"]] for side in sft["sides"]] == [[100.0, 60.0], [150.0, 170.0]]
    assert (sft["ratio"], evaluation["ratio"], evaluation["sides"][1]["rate"]) == (2.0, 2.0, 320.0)
    assert capsys.readouterr().out.strip().splitlines() == [
        "stage  processes  tokens  first run, tokens/s  second run  mean  ratio",
        "sft            1      60                  100          60    80",
        "sft            3      60                  150         170   160  2.00x",
        "eval           1      60                  200         120   160",
        "eval           3      60                  300         340   320  2.00x",
    ]


@pytest.mark.parametrize("found, status", [(2, 2), (-9, 137)])
def test_a_run_that_fails_ends_all_with_its_status_and_nothing_is_written(compared, capsys, found, status):
    ended, runs, written = compared(Runs([1.0] * 4, statuses=(0, 0, found, 0)))
    assert (ended, len(runs.commands), written) == (status, 3, None)
    assert not capsys.readouterr().out


def test_other_work_gives_no_ratio(compared, capsys):
    status, _, written = compared(Runs([1.0] * 4, tokens=(60, 60, 59, 60)), "--stage", "sft")
    assert (status, written) == (1, None)
    assert "sft: the four runs counted 60, 60, 59, 60 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, complaint", [
    (["1", "--device", "cpu"], "give 2 or more"), (["two"], "two is not a positive whole number"),
    (["2", "--stage", "score"], "score is none of sft,rollouts,ppo,eval"),
    (["4", "--device", "cuda"], "4 processes need as many GPUs, and this host has 3"),
])
def test_arguments_that_make_no_sense_end_with_2(arguments, complaint, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(gpus.subprocess, "run", lambda *_, **__: pytest.fail("nothing shall be run"))
    with pytest.raises(SystemExit) as stopped:
        gpus.main(arguments)
    assert stopped.value.code == 2 and complaint in capsys.readouterr().err


# ---- one process of several ----


@pytest.mark.parametrize("arguments, complaint", [
    (["--stage", "sft"], "--against b1,b2 is one process's work, and a launcher started 2"),
    (["--stage", "sft,score", "--against", "none"], "--stage score is one process's work, and a launcher started 2"),
])
def test_what_is_one_processs_work_is_refused_to_several(monkeypatch, capsys, arguments, complaint):
    joined = []
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(bench, "start_processes", joined.append)
    monkeypatch.setattr(bench, "world", lambda: 2)
    monkeypatch.setattr(bench, "prepare", lambda _: pytest.fail("nothing shall be loaded"))
    assert bench.main([*arguments, "--device", "cpu"]) == 2
    assert complaint in capsys.readouterr().err and [model.device for model in joined] == ["cpu"]


def test_without_a_launcher_a_bench_never_starts_processes(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(bench, "start_processes", lambda _: pytest.fail("an accelerate configuration may ask for several"))
    assert bench.main(["--stage", "score", "--rows", "20"]) == 0


def test_processes_divide_the_rows_and_keep_those_of_a_prompt_together(monkeypatch):
    from bench.generation import Row, own_share

    rows = [Row([prompt], temperature, 1 + prompt) for prompt in range(3) for temperature in (0.2, 0.3)]
    assert own_share(rows) == rows, "alone, a process has all, in their order"
    monkeypatch.setattr(distributed, "world", lambda: 2)
    for number, expected in ((0, rows[:2] + rows[4:]), (1, rows[2:4])):
        monkeypatch.setattr(distributed, "rank", lambda: number)
        assert own_share(rows) == expected


# ---- really ----


@pytest.mark.slow
def test_two_processes_do_the_work_of_one(base, setup, tmp_path):
    from bench import sft
    from bench.workload import lengths
    from looper.prompts import training_ids

    file = tmp_path / "figures.json"
    done = subprocess.run([sys.executable, "-m", "bench.gpus", "2", "--stage", "sft,rollouts", "--device", "cpu",
                           "--rows", "8", "--model", str(base), "--json", str(file)], cwd=ROOT, capture_output=True,
                          text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-5000:]
    tokens = {"sft": sum(len(ids) for ids, _ in training_ids(setup.tokenizer, setup.template, sft.make_rows(setup, 8))),
              "rollouts": sum(output for _, output in lengths(8))}
    stages = json.loads(file.read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["sft", "rollouts"]
    for stage in stages:
        one, two = stage["sides"]
        assert [(run["processes"], run["tokens"]) for side in (one, two) for run in side["runs"]] == [
            (count, tokens[stage["stage"]]) for count in (1, 1, 2, 2)]
        rates = [mean(run["rate"] for run in side["runs"]) for side in (one, two)]
        assert stage["ratio"] == pytest.approx(rates[1] / rates[0]) and min(rates) > 0
        assert all(len(run["passes"]) == 3 for side in (one, two) for run in side["runs"])
    assert len(done.stdout.strip().splitlines()) == 5, "one table: its head, and two sides of two stages"


@pytest.mark.slow
def test_an_error_of_all_processes_is_said_once(base):
    done = subprocess.run([sys.executable, *gpus.LAUNCH, "--num_processes", "2", "--module", "bench", "--stage", "rollouts",
                           "--device", "cpu", "--model", str(base)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode and not done.stdout
    assert done.stderr.count("bench: --against b1,b2 is one process's work, and a launcher started 2") == 1, done.stderr
