"""The decoder layers of a model in training, compiled on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from inspect import unwrap

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from looper import compiling
from looper.packing import ATTENTION


@contextmanager
def compiled_layers(model: nn.Module) -> Iterator[None]:
    """Within the block the decoder layers of `model` are compiled where `compiles` says so: one program for all of them."""
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer) and compiles(layer)]
    kinds = [type(layer) for layer in layers]
    # What comes into the first layer has a gradient, as what comes into the others: that layer needs no program of its own
    embeddings = [module for module in model.modules() if layers and isinstance(module, nn.Embedding)]
    hooks = [each.register_forward_hook(lambda module, given, made: made.requires_grad_()) for each in embeddings]
    for layer, kind in zip(layers, kinds, strict=True):
        layer.__class__ = _compiled(kind)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, kind in zip(layers, kinds, strict=True):
            layer.__class__ = kind


def compiles(layer: nn.Module) -> bool:
    """Whether `layer` computes in halves on a GPU, its rows end to end.

    In float32 its rows attend one by one (looper.packing): that would be compiled for each pass anew. Of a layer in four
    bits bitsandbytes' calls leave the compiler little to join.
    """
    weights = list(layer.parameters())
    return (layer.self_attn.config._attn_implementation == ATTENTION
            and all(compiling.compiles_on(weight.device) and weight.is_floating_point() for weight in weights)
            and any(weight.dtype != torch.float32 for weight in weights))


@cache
def _compiled(kind: type[nn.Module]) -> type[nn.Module]:
    """`kind`, a class of decoder layers, with its forward pass compiled.

    Checkpoints of activations stay outside, and call the program again. transformers wraps them around the layer's call,
    later versions around its forward pass: hence `unwrap`.
    """
    return type(kind.__name__, (kind,), {"forward": compiling.compiled(unwrap(kind.forward))})
