"""PyTorch's compiler, for what a GPU computes: there Python, launching thousands of small kernels, is the limit.

It is imported when something is compiled, and no sooner: a stage on a processor starts, and computes, without it.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from inspect import unwrap
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

# Where PyTorch's own kernels round to bfloat16, so do the compiled ones.
OPTIONS = {"emulate_precision_casts": True}


def compiles_on(device: torch.device) -> bool:
    """Whether what computes there is compiled."""
    return device.type == "cuda"


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled when it is first called: one program for all sizes that its tensors take."""
    # looper.stage switches the compiler off, for the libraries that would load it for nothing
    with patch.dict(os.environ, TORCHDYNAMO_DISABLE="0"):
        program = torch.compile(function, dynamic=True, options=OPTIONS)
    # Of several processes each layer is a program already: it need not be cut at what they send each other
    torch._dynamo.config.optimize_ddp = False
    return program


@contextmanager
def compiled_layers(model: nn.Module) -> Iterator[None]:
    """Within the block the decoder layers of `model` are compiled, if they are on a GPU: one program for all layers.

    Layers in four bits stay as they are: bitsandbytes' calls leave the compiler little to join.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer  # what compiles a function alone needs no more

    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer) and _compiles(layer)]
    kinds = [type(layer) for layer in layers]
    for layer, kind in zip(layers, kinds, strict=True):
        layer.__class__ = _compiled_kind(kind)
    try:
        yield
    finally:
        for layer, kind in zip(layers, kinds, strict=True):
            layer.__class__ = kind


def _compiles(layer: nn.Module) -> bool:
    return all(compiles_on(weight.device) and weight.is_floating_point() for weight in layer.parameters())


@cache
def _compiled_kind(kind: type[nn.Module]) -> type[nn.Module]:
    """`kind`, a class of decoder layers, with its forward pass compiled.

    Checkpoints of activations stay outside, and call the program again. transformers wraps them around the layer's call,
    later versions around its forward pass: hence `unwrap`.
    """
    return type(kind.__name__, (kind,), {"forward": compiled(unwrap(kind.forward))})
