"""The figures of an update, read while the next one is under way.

The Trainer reads loss and gradient norm when an update ends. There Python waits until the GPU has done all it was given,
and then the GPU waits until Python has prepared the next update.
"""

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from looper.distributed import total, world


class Figures(NamedTuple):
    """What an update leaves to be logged."""

    numbers: Tensor  # loss and gradient norm: [2], on the way from the device
    learning_rate: float
    metrics: dict[str, list[float]]  # TRL's
    arrived: torch.cuda.Event | None  # after which the numbers may be read; on a processor they may be at once


class LateLogs:
    """Of a TRL SFTTrainer that logs every update, before its own class. Before a checkpoint is stored, and one is at the
    end, all is logged."""

    _figures: Figures | None = None

    def training_step(self, *given: Any, **named: Any) -> Tensor:
        loss = super().training_step(*given, **named)
        self._log_figures()  # a GPU is on its way back through the layers; global_step is the last update's still
        return loss

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Tensor | float | None, *given: Any,
                                 learning_rate: float | None = None, **named: Any) -> None:
        if self.control.should_log:
            self._take_figures(tr_loss, grad_norm, learning_rate)
            self.control.should_log = False
        if self.control.should_save:
            self._log_figures()
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *given, learning_rate=learning_rate, **named)

    def _take_figures(self, tr_loss: Tensor, grad_norm: Tensor | float, learning_rate: float) -> None:
        norm = torch.as_tensor(grad_norm, dtype=tr_loss.dtype, device=tr_loss.device)
        loss = total(tr_loss.detach().clone()) / world()
        numbers, arrived = torch.stack([loss, norm]).to("cpu", non_blocking=True), None
        if tr_loss.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        tr_loss.zero_()
        self._figures = Figures(numbers, learning_rate, self._metrics["train"], arrived)
        self._metrics["train"] = defaultdict(list)

    def _log_figures(self) -> None:
        if (figures := self._figures) is None:
            return
        self._figures = None
        if figures.arrived:
            figures.arrived.synchronize()
        loss, norm = figures.numbers.tolist()
        self._total_loss_scalar += loss
        following, self._metrics["train"] = self._metrics["train"], figures.metrics
        self.log({"loss": loss, "grad_norm": norm, "learning_rate": figures.learning_rate})
        self._metrics["train"] = following
