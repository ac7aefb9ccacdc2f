"""Deterministic kernels within the block, and what was there before it afterwards; training runs inside it."""

import pytest
import torch
import transformers
from tests.looper.ppo_helpers import run
from tiny import tiny_model, tiny_rows, tiny_sft
from torch.utils import deterministic as memory

from looper.determinism import deterministic
from looper.prompts import TEMPLATES
from looper.sft import finetune


@pytest.mark.parametrize("before", [False, True])
def test_the_block_leaves_what_it_found(before):
    torch.use_deterministic_algorithms(before)
    filled = memory.fill_uninitialized_memory
    try:
        with pytest.raises(KeyError), deterministic():
            assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
            assert not memory.fill_uninitialized_memory
            raise KeyError
        assert torch.are_deterministic_algorithms_enabled() == before and memory.fill_uninitialized_memory == filled
    finally:
        torch.use_deterministic_algorithms(False)


class Asks(transformers.TrainerCallback):
    def __init__(self):
        self.found = set()

    def on_step_end(self, args, state, control, **kwargs):
        self.found.add(torch.are_deterministic_algorithms_enabled())


def test_training_is_inside_the_block(monkeypatch, tokenizer, tmp_path):
    for train in (lambda: run(tmp_path / "ppo"),
                  lambda: finetune(tiny_model(), tokenizer, TEMPLATES["chatml"], tiny_rows(), tiny_sft(),
                                   tmp_path / "scratch", tmp_path / "live")):
        asks = Asks()
        monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [*transformers.trainer.DEFAULT_CALLBACKS, asks])
        train()
        assert asks.found == {True} and not torch.are_deterministic_algorithms_enabled()
