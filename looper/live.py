"""Training while it happens: a progress bar, and DVCLive files that `dvc plots` and the report draw."""

import time
from pathlib import Path

from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ProgressCallback


def show_progress(trainer: Trainer, label: str) -> None:
    """Gives `trainer` a bar named `label`, with the last loss, in place of its own: that one adds a line of every metric an
    update, which LiveMetrics keeps, and counts what a resumed run did before as done in no time."""
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Bar(label))


class _Bar(TrainerCallback):
    def __init__(self, label: str) -> None:
        self.label = label

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.label, unit="update",
                        dynamic_ncols=True, disable=not state.is_world_process_zero)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.4f}", refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class LiveMetrics(TrainerCallback):
    """Writes every number that the trainer logs to `folder`, with the training tokens per second since the last log.

    An update's numbers are written in the next one, while a GPU goes back through the layers: here it would wait. After a
    resume the folder starts with what the checkpoint's history holds, so the curves have no gap.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.live = None
        self.ended = 0.0  # when the last update did: looper.late_logs has its figures logged later, and not always alike
        self.since: tuple[float, float] | None = None  # (that time, tokens) of the last update that was logged
        self.kept: list[tuple[dict, int]] = []  # (logs, step), not written yet

    def on_train_begin(self, args, state, control, **kwargs):
        from dvclive import Live

        if not state.is_world_process_zero:
            return
        # dvcyaml=False: dvc.yaml is written by hand; save_dvc_exp=False: the pipeline tracks, not the logger
        self.live = Live(str(self.folder), save_dvc_exp=False, dvcyaml=False)
        for entry in state.log_history:
            self._write(entry, entry["step"])
        self.since = None

    def on_step_end(self, args, state, control, **kwargs):
        self.ended = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.live is None:
            return
        tokens = logs.get("num_tokens")
        if tokens is not None:
            if self.since:
                rate = {"tokens_per_second": (tokens - self.since[1]) / (self.ended - self.since[0])}
                logs.update(rate)
                state.log_history[-1].update(rate)  # the Trainer has put a copy of `logs` there
            self.since = self.ended, tokens
        self.kept.append((dict(logs), state.global_step))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._write_kept()

    def on_train_end(self, args, state, control, **kwargs):
        self._write_kept()
        if self.live is not None:
            self.live.end()

    def _write_kept(self) -> None:
        for logs, step in self.kept:
            self._write(logs, step)
        self.kept.clear()

    def _write(self, logs: dict, step: int) -> None:
        self.live.step = step
        for name, value in logs.items():
            if name not in ("step", "epoch", "num_tokens") and not name.startswith(("train_", "total_")):
                self.live.log_metric(name, value)
        self.live.make_summary()
