"""An update's figures, read while the next one is under way: the same ones, and none is lost or stored too late."""

import pytest
import torch
from tiny import tiny_model, tiny_rows, tiny_sft
from transformers import TrainerCallback

from looper import sft
from looper.late_logs import Figures, LateLogs
from looper.prompts import TEMPLATES


class ReadAtOnce(sft.SFTTrainer):
    def training_step(self, *given, **named):
        return super(LateLogs, self).training_step(*given, **named)

    def _maybe_log_save_evaluate(self, *given, **named):
        return super(LateLogs, self)._maybe_log_save_evaluate(*given, **named)


class Watch(TrainerCallback):
    """When each update was logged: (updates done, steps logged) as each update ends, and as each checkpoint is stored."""

    def __init__(self):
        self.ended, self.stored = [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.ended.append((state.global_step, [entry["step"] for entry in state.log_history]))

    def on_save(self, args, state, control, **kwargs):
        self.stored.append((state.global_step, [entry["step"] for entry in state.log_history]))


@pytest.fixture
def train(tokenizer, tmp_path, monkeypatch):
    """Trains the tiny model with a trainer class; returns (trainer, watch). Three epochs of two updates of two passes."""
    def run(kind, **settings):
        trainers, watch = [], Watch()

        def build(**options):
            trainers.append(kind(**options | {"callbacks": [*options["callbacks"], watch]}))
            return trainers[-1]

        monkeypatch.setattr(sft, "SFTTrainer", build)
        folder = tmp_path / kind.__name__
        sft.finetune(tiny_model(), tokenizer, TEMPLATES["chatml"], tiny_rows(8),
                     tiny_sft(**{"epochs": 3, "batch_size": 4, "micro_batch": 2, "save_steps": 4} | settings),
                     folder / "scratch", folder / "live")
        return trainers[-1], watch

    return run


def test_the_figures_are_those_read_at_once(train):
    late, _ = train(sft.SFTTrainer)
    early, _ = train(ReadAtOnce)
    clock = {"tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
    found, expected = ([{name: value for name, value in entry.items() if name not in clock}
                        for entry in trainer.state.log_history] for trainer in (late, early))
    assert len(expected) == 7 and {"loss", "grad_norm", "learning_rate", "entropy", "mean_token_accuracy", "num_tokens",
                                   "epoch", "step"} <= set(expected[0])
    assert found == expected


def test_an_update_is_logged_in_the_next_one_and_before_it_is_stored(train):
    _, watch = train(sft.SFTTrainer)
    assert watch.ended == [(step, list(range(1, step))) for step in range(1, 7)]
    assert watch.stored == [(4, [1, 2, 3, 4]), (6, [1, 2, 3, 4, 5, 6])]


@pytest.mark.parametrize("update", [3, 4])  # the fourth ends in the very step that stores a checkpoint
def test_a_loss_that_is_not_finite_is_never_stored(train, tmp_path, monkeypatch, update):
    real = sft.TRLTrainer.training_step

    def training_step(self, *given, **named):
        loss = real(self, *given, **named)
        return loss * float("nan") if self.state.global_step == update - 1 else loss

    monkeypatch.setattr(sft.TRLTrainer, "training_step", training_step)
    with pytest.raises(ValueError, match=f"the loss of update {update} is nan"):
        train(sft.SFTTrainer)
    assert not list((tmp_path / "SFTTrainer").rglob("checkpoint-*"))


def test_figures_are_read_when_they_have_arrived():
    class Event:
        def synchronize(self):
            numbers.copy_(torch.tensor([6.0, 0.5]))

    class Trainer(LateLogs):
        _total_loss_scalar, _metrics = 1.0, {"train": {"entropy": ["next"]}}

        def log(self, logs):
            self.logged = logs, self._metrics["train"]

    numbers, trainer = torch.zeros(2), Trainer()
    trainer._figures = Figures(numbers, 0.1, {"entropy": ["this"]}, Event())
    trainer._log_figures()
    assert trainer.logged == ({"loss": 6.0, "grad_norm": 0.5, "learning_rate": 0.1}, {"entropy": ["this"]})
    assert trainer._total_loss_scalar == 7.0 and trainer._metrics["train"] == {"entropy": ["next"]}
    trainer._log_figures()
    assert trainer._total_loss_scalar == 7.0, "each is logged once"


def test_a_gpu_is_not_asked_for_the_lengths_of_rows(train):
    """On a processor the mask is: that costs nothing."""
    trainer, _ = train(sft.SFTTrainer)
    (batch, *_) = trainer.get_train_dataloader()
    assert "passes" not in batch
    trainer.args.use_cpu = False
    (batch, *_) = trainer.get_train_dataloader()
    assert batch["passes"] == [batch["attention_mask"].sum(1).tolist()]
