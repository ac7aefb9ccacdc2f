"""Live metrics: one TSV a metric with a row an update; a resumed run's curves have no gap."""

import json

import pytest
import torch
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from looper import live
from looper.live import LiveMetrics


@pytest.fixture
def clock(monkeypatch):
    """Two seconds pass between two looks at the clock."""
    times = iter(range(0, 1000, 2))
    monkeypatch.setattr(live.time, "perf_counter", lambda: float(next(times)))


def log(callback, state, step, **logs):
    """As the Trainer logs: a copy into the history, then the callbacks."""
    state.global_step = step
    callback.on_step_end(None, state, TrainerControl())
    state.log_history.append({**logs, "step": step})
    callback.on_log(None, state, TrainerControl(), logs=logs)


def table(folder, name):
    header, *rows = (folder / "plots" / "metrics" / f"{name}.tsv").read_text().splitlines()
    return header.split("\t"), [[float(cell) for cell in row.split("\t")] for row in rows]


def start(folder, history=()):
    callback, state = LiveMetrics(folder), TrainerState(log_history=list(history))
    callback.on_train_begin(None, state, TrainerControl())
    return callback, state


def test_each_metric_is_a_tsv_of_steps_and_values(tmp_path, clock):
    callback, state = start(tmp_path)
    log(callback, state, 1, loss=2.5, learning_rate=1e-3, grad_norm=0.5, epoch=0.1, num_tokens=100)
    log(callback, state, 2, loss=1.5, learning_rate=5e-4, grad_norm=0.25, epoch=0.2, num_tokens=400)
    log(callback, state, 2, train_runtime=3.0, train_loss=2.0, total_flos=9.0, epoch=0.2)
    callback.on_train_end(None, state, TrainerControl())
    assert table(tmp_path, "loss") == (["step", "loss"], [[1, 2.5], [2, 1.5]])
    assert table(tmp_path, "learning_rate")[1] == [[1, 1e-3], [2, 5e-4]]
    assert table(tmp_path, "tokens_per_second") == (["step", "tokens_per_second"], [[2, 150.0]])  # 300 tokens in 2 s
    files = sorted(path.name for path in (tmp_path / "plots" / "metrics").iterdir())
    assert files == ["grad_norm.tsv", "learning_rate.tsv", "loss.tsv", "tokens_per_second.tsv"]
    summary = json.loads((tmp_path / "metrics.json").read_text())
    assert summary["loss"] == 1.5 and summary["step"] == 2
    assert not list(tmp_path.rglob("dvc.yaml")), "dvc.yaml is written by hand"


def test_a_resumed_run_has_the_curves_of_one_that_was_not_killed(tmp_path, clock):
    callback, state = start(tmp_path)
    for step in (1, 2, 3):
        log(callback, state, step, loss=4.0 - step, num_tokens=100 * step)
        callback.on_pre_optimizer_step(None, state, TrainerControl())
    # killed; the checkpoint is of step 2, and TRL counts tokens from 0 again
    resumed, state = start(tmp_path, state.log_history[:2])
    for step in (3, 4):
        log(resumed, state, step, loss=4.0 - step, num_tokens=100 * (step - 2))
    resumed.on_train_end(None, state, TrainerControl())
    assert table(tmp_path, "loss")[1] == [[1, 3.0], [2, 2.0], [3, 1.0], [4, 0.0]]
    assert table(tmp_path, "tokens_per_second")[1] == [[2, 50.0], [4, 50.0]], "that of step 2 comes from the checkpoint"


def test_an_updates_numbers_are_written_in_the_next_one(tmp_path, clock):
    callback, state = start(tmp_path)
    for step in (1, 2, 3):
        callback.on_pre_optimizer_step(None, state, TrainerControl())
        log(callback, state, step, loss=float(step))
        written = [[float(before), float(before)] for before in range(1, step)]
        assert (table(tmp_path, "loss")[1] if written else []) == written
    assert not callback.on_train_end(None, state, TrainerControl()) and table(tmp_path, "loss")[1][-1] == [3, 3]


def test_the_rate_is_of_the_updates_whenever_they_are_logged(tmp_path, clock):
    callback, state = start(tmp_path)
    log(callback, state, 1, loss=1.0, num_tokens=100)
    callback.on_step_end(None, state, TrainerControl())  # two seconds after the first
    live.time.perf_counter()  # the next update's pass goes by before it is logged
    state.global_step = 2
    state.log_history.append({"step": 2})
    callback.on_log(None, state, TrainerControl(), logs={"loss": 1.0, "num_tokens": 500})
    assert state.log_history[-1]["tokens_per_second"] == 200.0


def test_only_the_first_process_writes(tmp_path, clock):
    callback, state = LiveMetrics(tmp_path / "live"), TrainerState(is_world_process_zero=False)
    callback.on_train_begin(None, state, TrainerControl())
    log(callback, state, 1, loss=1.0, num_tokens=1)
    callback.on_train_end(None, state, TrainerControl())
    assert not (tmp_path / "live").exists()


def test_the_bar_counts_from_the_checkpoint_and_shows_the_last_loss_alone(tmp_path, capsys):
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = Trainer(model=torch.nn.Linear(1, 1), args=arguments)
    live.show_progress(trainer, "sft")
    state, control, handler = TrainerState(max_steps=8, global_step=5), TrainerControl(), trainer.callback_handler
    handler.on_train_begin(arguments, state, control)
    for step, loss in ((6, 1.25), (7, 0.5), (8, 0.125)):
        state.global_step = step
        handler.on_step_end(arguments, state, control)
        handler.on_log(arguments, state, control, {"loss": loss, "grad_norm": 3.0})
    handler.on_train_end(arguments, state, control)
    shown = capsys.readouterr()
    bars = [bar for bar in shown.err.split("\r") if bar]
    assert bars[0].startswith("sft:  62%") and "5/8" in bars[0] and "8/8" in bars[-1] and "loss=0.125" in bars[-1]
    assert "grad_norm" not in shown.out + shown.err, "the Trainer's own bar is gone"
