"""The order of the passes, the figures of the table by hand, and what a gate that fails does."""

import json
from types import SimpleNamespace

import pytest

from bench import __main__ as command
from bench import measure
from bench.measure import Gate, Pass, Side, Stage, order, timed


class Clock:
    """Time that passes when a side says so."""

    def __init__(self):
        self.now, self.ran = 0.0, []

    def __call__(self):
        return self.now

    def side(self, name, seconds, tokens=60, setup=0.0):
        durations = iter(seconds)

        def work():
            self.ran.append(name)
            self.now += next(durations)
            return tokens

        def run():
            done = timed(work)
            return done._replace(setup=setup)

        return Side(name, run)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(measure, "perf_counter", clock)
    monkeypatch.setattr(measure, "process_time", lambda: clock.now / 4)
    return clock


def stage(clock, *gates, limit=None):
    sides = [clock.side("looper", [9.0, 2.0, 4.0, 3.0], setup=0.5),
             clock.side("B1: plain", [13.0, 10.0, 30.0, 12.0], 24)]
    return Stage("sft", sides, lambda: list(gates), limit)


def test_the_order_is_a_b_b_a():
    assert order(2) == [0, 1, 1, 0, 0, 1]
    assert order(3) == [0, 1, 2, 2, 1, 0, 0, 1, 2]
    assert order(2, passes=4) == [0, 1, 1, 0, 0, 1, 1, 0]


def test_a_warm_up_then_the_passes_in_order(clock):
    measure.measure(stage(clock))
    assert "".join(name[0] for name in clock.ran) == "lB" + "lBBllB"


def test_figures_are_medians_and_the_warm_up_stands_apart(clock):
    ours, plain = measure.measure(stage(clock))
    assert (ours.tokens, ours.seconds, ours.rate, ours.warm_up, ours.setup) == (60, 3.0, 20.0, 6.0, 0.5)
    assert [each.seconds for each in ours.passes] == [2.0, 4.0, 3.0] and (ours.cpu, plain.cpu) == (0.75, 3.0)
    assert (plain.tokens, plain.seconds, plain.rate, plain.warm_up, plain.setup) == (24, 12.0, 2.0, 1.0, 0.0)
    assert [each.gib for each in (ours, plain)] == [None, None], "there is no CUDA"


def test_a_pass_that_was_quicker_to_warm_up_gives_no_negative_warm_up():
    run = iter([Pass(10, 1.0, 0.0), *[Pass(10, 2.0, 0.0)] * 3])
    (measured,) = measure.measure(Stage("eval", [Side("looper", lambda: next(run))]))
    assert (measured.warm_up, measured.rate) == (0.0, 5.0)


def test_the_table_by_hand(clock):
    one = stage(clock, Gate("loss", 2e-6, 1e-5), limit=40.0)
    assert command.table(one, measure.measure(one), one.gates()).strip().splitlines() == [
        "sft        tokens  seconds  CPU s  tokens/s  warm-up s  set-up s  of the limit  looper is",
        "looper         60     3.00   0.75        20        6.0       0.5         50.0%",
        "B1: plain      24    12.00   3.00         2        1.0       0.0          5.0%     10.00x",
        "limit: 40 tokens/s",
        "gate loss: 2.00e-06 (at most 1e-05): holds",
    ]


def test_gates_hold_up_to_their_limit_and_never_on_nan():
    assert Gate("g", 1e-5, 1e-5).holds and not Gate("g", 1.1e-5, 1e-5).holds
    assert not Gate("g", float("nan"), 1.0).holds


@pytest.mark.parametrize("found, status, ratio", [(1e-6, 0, 10.0), (4e-5, 1, None), (float("nan"), 1, None)])
def test_a_failed_gate_takes_the_ratio_away_and_ends_with_1(clock, monkeypatch, capsys, tmp_path, found, status, ratio):
    monkeypatch.setattr(command, "build", lambda *_: stage(clock, Gate("loss", found, 1e-5), Gate("other", 0.0, 1e-5)))
    assert command.main(["--stage", "score", "--json", str(tmp_path / "figures.json")]) == status
    (written,) = json.loads((tmp_path / "figures.json").read_text())["stages"]
    assert written["gates_hold"] is (status == 0) and written["sides"][1]["ratio"] == ratio
    assert [side["rate"] for side in written["sides"]] == [20.0, 2.0]
    printed = capsys.readouterr().out
    assert ("10.00x" in printed) == (status == 0)
    if found == 4e-5:
        assert "gate loss: 4.00e-05 (at most 1e-05): FAILED: exceeds the limit by 3.00e-05" in printed
        assert "gate other: 0.00e+00 (at most 1e-05): holds" in printed and "(gate failed)" in printed


@pytest.mark.parametrize("arguments, complaint", [
    (["--stage", "sft,fly"], "fly is none of sft,rollouts,ppo,eval,score"),
    (["--against", "b3"], "b3 is none of b1,b2"),
    (["--against", "none,b1"], "none is none of b1,b2"),
    (["--without", "b1"], "b1 is none of compiling,filling,graphs,unpacking"),
    (["--batch", "0"], "0 is not a positive whole number"),
    (["--rows", "0"], "0 is not a positive whole number"),
])
def test_arguments_that_make_no_sense_end_with_2(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2 and complaint in capsys.readouterr().err


def test_a_folder_that_is_no_base_model_ends_with_2(tmp_path, capsys):
    assert command.main(["--stage", "sft", "--model", str(tmp_path), "--device", "cpu"]) == 2
    assert f"{tmp_path}/manifest.json is missing" in capsys.readouterr().err
    assert command.main(["--stage", "sft", "--model", "8b-shape", "--device", "cpu"]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("model, device, asked, found", [
    ("folder", "cuda", "nf4", "nf4"), ("folder", "cuda", "none", "none"), ("8b-shape", "cuda", "none", "nf4"),
    ("folder", "cpu", "nf4", "none"),
])
def test_on_cuda_the_8b_shape_trains_in_nf4_and_another_base_as_the_params_say(model, device, asked, found, monkeypatch,
                                                                              tmp_path):
    from bench import random_8b, workload

    (tmp_path / "manifest.json").touch()
    monkeypatch.setattr(command, "FOLDER_8B", tmp_path)
    monkeypatch.setattr(random_8b, "make_8b", lambda folder: folder)
    monkeypatch.setattr(command, "load_params", lambda: SimpleNamespace(model=SimpleNamespace(quantization=asked)))
    monkeypatch.setattr(workload, "set_up", lambda *given: given)
    name = str(tmp_path) if model == "folder" else model
    assert command.prepare(command.parse(["--model", name, "--device", device])) == (tmp_path, device, found)


def test_scoring_is_measured_alone(capsys, tmp_path):
    assert command.main(["--stage", "score", "--rows", "20", "--json", str(tmp_path / "figures.json")]) == 0
    (written,) = json.loads((tmp_path / "figures.json").read_text())["stages"]
    (side,) = written["sides"]
    assert (side["tokens"], written["unit"], side["ratio"], len(side["passes"])) == (20, "rows", None, 3)
    assert "rows/s" in capsys.readouterr().out
