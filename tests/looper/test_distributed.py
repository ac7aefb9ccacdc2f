"""Several processes against one: the same training up to the order of sums, the same answers, one end after an error."""

import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tiny import CPU, tiny_base, tiny_rows, tiny_sft

from looper import distributed
from looper.jsonl import write_jsonl
from looper.params import load_params
from looper.sft import passes_an_update

ROOT = Path(__file__).resolve().parents[2]
CUDA = CPU.model_copy(update={"device": "cuda"})


# ---- what is asked for ----


@pytest.fixture
def configure(tmp_path, monkeypatch):
    """Writes this machine's accelerate configuration; nothing is started by it."""
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    started = []
    monkeypatch.setattr(distributed, "_launch", lambda **options: started.append(options) or 0)

    def write(text: str) -> list:
        (tmp_path / "accelerate").mkdir(exist_ok=True)
        (tmp_path / "accelerate" / "default_config.yaml").write_text(text)
        return started

    return write


@pytest.mark.parametrize("names", [{}, {"HF_HOME": "~/a"}, {"XDG_CACHE_HOME": "/b"},
                                   {"HF_HOME": "/a", "XDG_CACHE_HOME": "/b"}])
def test_the_configuration_is_where_accelerate_looks_for_it(monkeypatch, names):
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/someone", **names}.items():
        monkeypatch.setenv(name, value)
    there = runpy.run_module("accelerate.commands.config.config_args")["default_config_file"]
    assert str(distributed.configuration_file()) == there


@pytest.mark.parametrize(("text", "model", "asked"), [
    ("num_processes: 2\n", CUDA, [{"one_host": True}]),
    ("num_processes: 2\nuse_cpu: false\nnum_machines: 1\n", CUDA, [{"one_host": True}]),
    ("num_processes: 16\nnum_machines: 2\n", CUDA, [{"one_host": False}]),
    ("num_processes: 2\nuse_cpu: true\n", CPU, [{"one_host": True}]),
    ("num_processes: 2\nuse_cpu: true\n", CUDA, []),
    ("num_processes: 2\n", CPU, []),
    ("num_processes: 1\n", CUDA, []),
    ("num_processes: -1\n", CUDA, []),
    ("distributed_type: 'NO'\n", CUDA, []),
])
def test_a_stage_is_several_processes_where_the_configuration_says_so(configure, text, model, asked):
    started = configure(text)
    if asked:
        with pytest.raises(SystemExit) as end:
            distributed.start_processes(model)
        assert end.value.code == 0
    else:
        distributed.start_processes(model)
    assert started == asked


@pytest.mark.parametrize("text", ["num_processes: two\n", "- 2\n", "num_processes: {\n", ""])
def test_a_configuration_that_cannot_be_read_is_named(configure, text):
    configure(text)
    with pytest.raises(ValueError, match=r"accelerate/default_config\.yaml: .* accelerate config"):
        distributed.start_processes(CUDA)


def test_more_processes_than_gpus_are_refused(configure, monkeypatch):
    for name, value in {"LOCAL_RANK": "2", "RANK": "0", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"more processes than this host has GPUs \(2\); lower num_processes"):
        distributed.start_processes(CUDA)


@pytest.mark.parametrize(("batch", "micro", "processes", "passes"), [
    (8, 8, 1, 1), (8, 2, 1, 4), (8, 8, 2, 1), (8, 2, 2, 2), (8, 1, 3, 4), (8, 4, 3, 1), (6, 1, 4, 2), (8, 1, 16, 1),
    (5, 1, 2, 5),
])
def test_an_update_takes_the_fewest_passes_that_fit(batch, micro, processes, passes):
    assert passes_an_update(tiny_sft(batch_size=batch, micro_batch=micro), processes) == passes


def test_alone_a_process_does_all_and_waits_for_nobody():
    values = torch.tensor([1.0])
    assert distributed.total(values) is values and values.item() == 1
    assert (distributed.rank(), distributed.world(), distributed.share([3, 4, 5])) == (0, 1, [3, 4, 5])
    assert distributed.gathered("a") == ["a"] and distributed.agreed("a") == "a"
    distributed.barrier()
    distributed.first_process_only()


def test_rows_are_dealt_so_that_each_process_has_about_as_much(monkeypatch):
    assert distributed.dealt([3, 9, 1], abs) == [[3, 9, 1]]
    monkeypatch.setattr(distributed, "world", lambda: 3)
    assert distributed.dealt([3, 9, 1, 8, 2, 7, 6, 4, 5], abs) == [[9, 4, 3], [8, 5, 2], [7, 6, 1]]
    assert distributed.dealt([3, 9], abs) == [[9], [3], []]


# ---- the same results ----


def made_by(count: int, folder: Path, device: str) -> list[dict]:
    """What each of `count` processes makes of the worker's tasks, in one started as a stage is and in several as a launcher
    starts them. None is this one: what ran here before, compiling above all, would sum in another order."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"OMP_NUM_THREADS": "1", "HF_HOME": str(folder),  # where no accelerate configuration is
              "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "tests.looper.distributed_worker", str(folder), device]
    launcher = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port)}
    own = [launcher | {"RANK": str(i), "LOCAL_RANK": str(i)} if count > 1 else {} for i in range(count)]
    processes = [subprocess.Popen(command, env=os.environ | shared | each, text=True, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT) for each in own]
    try:
        printed = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(printed)[-5000:]
    return [torch.load(folder / f"rank-{i}.pt", weights_only=False) for i in range(count)]


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def made(request, tmp_path_factory) -> tuple[dict, list[dict]]:
    """(what one process makes, what each of two makes); two chunks of answers are there from the one's run."""
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    folder = tmp_path_factory.mktemp("distributed")
    (alone,) = made_by(1, folder / "alone", request.param)
    shutil.copytree(folder / "alone" / "chunks", folder / "some-chunks")
    for index in (0, 2, 3):
        (folder / "some-chunks" / f"chunk-{index:05}.jsonl").unlink()
    return alone, made_by(2, folder / "two", request.param)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "tolerance"), [("sft", 1e-6), ("ppo question", 1e-5), ("ppo arm", 1e-6)])
def test_training_is_the_same_up_to_the_order_of_sums(made, task, tolerance):
    (weights, metrics), both = made[0][task], [each[task] for each in made[1]]
    for found, found_metrics in both:
        assert found.keys() == weights.keys() and len(weights) > 10
        for name in weights:
            torch.testing.assert_close(found[name].cpu(), weights[name].cpu(), rtol=0, atol=tolerance)
        assert found_metrics == both[0][1] and found_metrics.keys() == metrics.keys()
        assert all(torch.equal(found[name].cpu(), both[0][0][name].cpu()) for name in weights), "no process drifts away"
        for name in metrics:
            assert found_metrics[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("made", ["cpu"], indirect=True)  # on a GPU graphs are for halves: the test below
@pytest.mark.parametrize("plain", ["sft", "ppo question", "ppo arm"])
def test_graphs_are_the_same_in_several_processes(made, plain):
    task = f"{plain} as graphs"
    for weights, _ in [made[0][task], *(each[task] for each in made[1])]:
        for name, expected in made[0][plain][0].items():
            torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["sft", "ppo question", "ppo arm"])
def test_halves_train_alike_in_all_processes(made, task):
    """Adam makes a whole step of what is rounding in halves: what is logged is compared, not the weights. A gradient that
    lacked a process's rows would have another norm."""
    (_, metrics), both = made[0][f"{task} in halves"], [each[f"{task} in halves"] for each in made[1]]
    for name, expected in both[1][0].items():
        assert torch.equal(both[0][0][name].cpu(), expected.cpu()), f"{name}: no process drifts away"
    if task == "sft":
        assert both[0][1]["logged loss"] == pytest.approx(metrics["logged loss"], rel=5e-3)
        assert both[0][1]["logged grad_norm"] == pytest.approx(metrics["logged grad_norm"], rel=0.05)
    else:
        assert both[0][1]["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=0.05)


@pytest.mark.slow
def test_every_process_knows_the_rows_of_all_in_each_pass_of_fine_tuning(made, request):
    alone, (one, other) = made[0]["passes"], (each["passes"] for each in made[1])
    # Alone there is nothing to know, but that to ask a GPU for its rows' lengths would be to wait for it
    on_gpu = request.node.callspec.params["made"] == "cuda"
    assert alone and (all(len(passes) == 1 for passes in alone) if on_gpu else set(alone) == {None})
    assert one == other and all(len(passes) == 2 for passes in one)
    # Passes of four rows, two a process; the last update of an epoch has five: four and one, for which the other has two tokens
    assert [[len(part) for part in passes] for passes in one] == 2 * [*[[2, 2]] * 5, [1, 1]]
    assert [passes[1] for passes in one if len(passes[1]) == 1] == [[2], [2]]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["chunks", "targets", "rollouts uniform", "rollouts thompson", "predict_dev"])
def test_answers_are_identical(made, task):
    alone, both = made
    assert alone[task] and all(each[task] == alone[task] for each in both)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "whole"), [
    ("sft killed", "sft with dropout"), ("ppo question killed", "ppo question"),
    ("sft killed in halves", "sft with dropout in halves"), ("ppo question killed in halves", "ppo question in halves")])
def test_a_killed_training_goes_on_with_the_same_bits(made, task, whole):
    for each in [made[0], *made[1]]:
        (weights, metrics), (expected, expected_metrics) = each[task], each[whole]
        assert metrics == expected_metrics and all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_other_rows_get_other_dropout(made):
    """With the same random numbers both processes would drop the same places of different rows."""
    alone, both = made
    assert both[0]["seed"] == alone["seed"] != both[1]["seed"]
    plain, dropout = (both[0][task][0] for task in ("sft", "sft with dropout"))
    assert not all(torch.equal(plain[name], dropout[name]) for name in plain)


# ---- stages ----

STAGE = '''"""Stage meets: processes that meet, or do not."""

import os
import signal
import time
from pathlib import Path

from looper.distributed import barrier, rank, start_processes, world
from looper.params import load_params
from looper.stage import run


def main(what: str) -> None:
    start_processes(load_params().model)
    print(f"{world()} processes")
    if what == "killed" and rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "all" or (what == "one" and rank() == 1):
        raise ValueError(f"{what}: mend it")
    if what == "waiting":
        Path(f"process-{rank()}").write_text(str(os.getpid()))
        time.sleep(60)
    barrier()


if __name__ == "__main__":
    run(main, __doc__, arguments=("WHAT",))
'''


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A repository with a tiny base and test questions, on a machine whose configuration asks for two CPU processes."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("looper", "regime_w", "dvc.yaml"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "stages", folder / "stages")
    (folder / "stages" / "meets.py").write_text(STAGE)
    params = load_params(ROOT / "params.yaml").model_dump(mode="json")
    params["model"] = CPU.model_dump()
    params["eval"] = {"max_new_tokens": 8, "batch_size": 1}  # chunks of four questions
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    (folder / "models").mkdir()
    tiny_base(folder / "models" / "base")
    write_jsonl(folder / "data" / "test.jsonl", tiny_rows(10))
    configuration = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_CPU", "num_machines": 1,
                     "num_processes": 2, "use_cpu": True, "mixed_precision": "bf16"}
    (folder / "home" / "accelerate").mkdir(parents=True)
    (folder / "home" / "accelerate" / "default_config.yaml").write_text(yaml.safe_dump(configuration))
    return folder


def environment(folder: Path) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": str(folder), "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}


def start(folder: Path, *stage: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *stage], cwd=folder, env=environment(folder), capture_output=True,
                          text=True, timeout=120)


@pytest.mark.slow
def test_a_stage_on_two_processes_writes_the_same_files(project, monkeypatch):
    from stages.eval import main

    arguments, files = ("base", "models/base/manifest.json"), ["data/predictions/base.jsonl", "metrics/eval_base.json"]
    done = start(project, "stages.eval", *arguments)
    said = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert (done.returncode, said) == (0, ["test accuracy of base", "eval base models/base/manifest.json"]), done.stderr
    assert not list((project / ".scratch").iterdir())
    on_two = [(project / file).read_bytes() for file in files]
    for file in files:
        (project / file).unlink()
    monkeypatch.chdir(project)
    monkeypatch.setenv("HF_HOME", str(project / "nothing is there"))
    main(*arguments)
    assert [(project / file).read_bytes() for file in files] == on_two


@pytest.mark.slow
@pytest.mark.parametrize(("what", "status", "error"), [
    ("all", 2, "meets: all: mend it\n"),
    ("one", 2, "meets: one: mend it\n"),
    ("killed", 137, "meets: process 1 was ended by signal 9; run the stage again: it goes on where it was\n"),
])
def test_one_processs_end_is_the_stages_end_and_is_said_once(project, what, status, error):
    done = start(project, "stages.meets", what)
    assert (done.returncode, done.stdout) == (status, "2 processes\n"), done.stderr
    assert done.stderr.count("meets: ") == 1 and error in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's prctl")
def test_the_processes_end_when_their_launcher_is_killed(project):
    """Else they would go on beside the next run, which takes up the same scratch folder."""
    command = [sys.executable, "-m", "stages.meets", "waiting"]
    with subprocess.Popen(command, cwd=project, env=environment(project)) as launcher:
        deadline, files = time.monotonic() + 60, [project / f"process-{i}" for i in range(2)]
        while not all(file.exists() and file.read_text() for file in files):
            assert launcher.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        launcher.kill()
    programs = [Path("/proc", file.read_text(), "cmdline") for file in files]
    deadline = time.monotonic() + 10
    while any(program.exists() and program.read_bytes() for program in programs):  # empty: ended, not yet reaped
        assert time.monotonic() < deadline, "a process lives on"
        time.sleep(0.05)


def test_bad_params_are_said_once_and_nothing_is_started(project):
    params = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(params.replace("max_new_tokens: 8", "max_new_tokens: -8"))
    done = start(project, "stages.eval", "base", "models/base/manifest.json")
    (project / "params.yaml").write_text(params)
    assert (done.returncode, done.stderr.count("eval.max_new_tokens: ")) == (2, 1), done.stderr
    assert done.stderr.startswith("eval: params.yaml has 1 error(s); nothing was run\n")
    assert done.stderr.count("\n") == 2
