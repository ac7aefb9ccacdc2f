"""A Trainer's updates without walks through all modules: they leave the model as the walks would."""

import pytest
import torch
from torch import nn

from looper.quick_updates import quick


class Walked(nn.Linear):
    """A layer that counts how often it is switched."""

    def __init__(self):
        super().__init__(2, 2)
        self.switched = 0

    def train(self, mode: bool = True):
        self.switched += 1
        return super().train(mode)


@pytest.fixture
def model() -> nn.Sequential:
    model = nn.Sequential(Walked(), nn.Linear(2, 2))
    model[1].requires_grad_(False)
    return model


def test_a_model_is_switched_once_and_again_only_to_the_other_mode(model):
    model[0].eval()  # as a base comes out of its file, whatever the model around it says
    model[0].switched = 0
    with quick(model):
        assert [model.train().training, model.train().training] == [True, True]
        assert model[0].training and model[0].switched == 1
        model.eval()
        model.eval()
        assert not model[0].training and model[0].switched == 2
        model.train(True)
        assert model[0].training and model[0].switched == 3
    model.train(True)
    assert model[0].switched == 4, "after the block the model walks again"


def test_a_child_that_others_switched_is_switched_back():
    """As an evaluation loop does with the model inside DistributedDataParallel, whose own flag stays."""
    inner = nn.Sequential(Walked())
    outer = nn.Sequential(inner)
    with quick(outer):
        outer.train()
        inner.eval()
        outer.train()
        assert inner.training and inner[0].training and inner[0].switched == 3
        outer.train()
        assert inner[0].switched == 3


def test_only_gradients_that_are_trained_are_forgotten(model):
    for each in model.parameters():
        each.grad = torch.ones_like(each)
    with quick(model):
        model.zero_grad()
    assert [each.grad is None for each in model.parameters()] == [True, True, False, False]
    model.zero_grad()
    assert all(each.grad is None for each in model.parameters())


def test_an_error_leaves_no_trace(model):
    with pytest.raises(RuntimeError, match="of the block"), quick(model):
        raise RuntimeError("of the block")
    assert model.train.__func__ is nn.Module.train and model.zero_grad.__func__ is nn.Module.zero_grad
