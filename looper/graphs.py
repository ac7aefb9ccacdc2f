"""The decoder layers of a model in training as CUDA graphs: all kernels of a pass are launched at once.

Python takes longer to launch the thousand small kernels of a pass, LoRA's above all, than a GPU to compute them. A graph
is recorded for each size of pass, of which looper.packing leaves few, if there is memory for the graphs of all of them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from looper.gpu_memory import unused_bytes
from looper.layers import compiles
from looper.packing import Rows


# Times what a pass keeps for its way back. The memory that the graphs of all sizes share grows while these come in any
# order, and the first time of each computes beside it: at the 8B shape, with weights of 16 GiB, 49 were reserved, not 29.
ROOM = 4
BOUND = 512  # tokens of a row, at least: a smaller bound saves attention a few empty blocks, and has graphs of its own

@contextmanager
def graphed_layers(model: nn.Module, checkpointing: bool) -> Iterator[None]:
    """Within the block the decoder layers of `model` are launched as graphs where `graphs` says so.

    A forward pass must be done with, its backward pass too if it has one, before the next begins: the graphs of all sizes
    compute in the same memory. checkpointing: whether activations are to be computed again, which leaves layers as they are.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    frozen = not any(each.weight.requires_grad for each in model.modules() if isinstance(each, nn.Embedding))
    if checkpointing or not frozen or not graphs(layers):
        yield
        return
    whole = Layers(layers)
    # The model calls its layers one by one: the first does the work of all, the others hand it on. Their classes stay: for
    # other ones the compiler would make other programs
    layers[0].forward = whole
    for layer in layers[1:]:
        layer.forward = lambda hidden, **given: hidden
    try:
        with _own_stream(whole.parameters[0].device):
            yield
    finally:
        for layer in layers:
            del layer.forward
        whole.passes.clear()  # they hold each other, and the memory


def graphs(layers: Sequence[GradientCheckpointingLayer]) -> bool:
    """Whether `layers` are launched as graphs: where they are compiled."""
    return bool(layers) and all(map(compiles, layers))


class Layers:
    """All decoder layers as one function. The gradients of their parameters stand in fixed places from its first pass on."""

    def __init__(self, layers: Sequence[GradientCheckpointingLayer]) -> None:
        self.layers = [partial(type(layer).forward, layer) for layer in layers]
        self.recorded: bool | None = None  # not known before the first pass
        self.parameters = [each for layer in layers for each in layer.parameters() if each.requires_grad]
        self.gradients: list[Tensor] = []
        self.passes: dict[tuple[int, int, int], Pass] = {}  # by size
        self.memory: Any = None  # of the graphs
        self.begun = 0  # forward passes

    def __call__(self, hidden: Tensor, *, position_embeddings: tuple[Tensor, Tensor], rows: Rows, **_: Any) -> Tensor:
        """hidden [1, tokens, width] → the same. What a model gives its layers besides, `PLAIN` ones do not read."""
        # Attention needs no more than a bound of the rows' lengths: few bounds make few graphs
        rows = rows._replace(longest=max(BOUND, 1 << (rows.longest - 1).bit_length()))
        if self.recorded is None:
            self.recorded = self._have_room(hidden, position_embeddings, rows)
            self.gradients = [torch.zeros_like(each) for each in self.parameters if self.recorded]
        if not self.recorded:
            return self.run(hidden, position_embeddings, rows)
        size = hidden.shape[1], len(rows.starts), rows.longest
        if size not in self.passes:
            self.passes[size] = Pass(self, hidden, position_embeddings, rows._replace(lengths=[]))
        # Embeddings are frozen. What comes out has a gradient nevertheless: the parameters' is made on its way back
        return _Replay.apply(hidden.detach().requires_grad_(), self, self.passes[size], position_embeddings, rows.starts)

    def run(self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], rows: Rows) -> Tensor:
        """The layers one after another."""
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=position_embeddings, rows=rows)
        return hidden

    def _have_room(self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], rows: Rows) -> bool:
        """Whether ROOM times what a first pass keeps for its way back is unused; says so where it is not."""
        with _leaving_no_trace(hidden.device), torch.enable_grad():
            before = allocated_bytes(hidden.device)
            out = self.run(hidden.detach().requires_grad_(), position_embeddings, rows)
            keeps = allocated_bytes(hidden.device) - before
            del out
        if has_room(ROOM * keeps):
            return True
        print("The GPU's memory is too small to launch passes as graphs: their kernels are launched one by one", flush=True)
        return False

    def take_gradients(self) -> None:
        """The parameters' gradients are those in the fixed places, from 0 on if they had none."""
        if self.parameters[0].grad is None:
            torch._foreach_zero_(self.gradients)
            for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
                parameter.grad = gradient


class Pass:
    """The layers at one size: what a graph reads and writes stands in fixed places."""

    def __init__(self, layers: Layers, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], rows: Rows) -> None:
        self.layers = layers
        self.hidden = hidden.detach().clone().requires_grad_()  # as what comes into any other layer: one program for all
        self.position_embeddings = tuple(each.detach().clone() for each in position_embeddings)
        self.rows = rows._replace(starts=rows.starts.clone())
        self.gradient = torch.zeros_like(hidden)  # of the loss by self.out
        with _leaving_no_trace(hidden.device):
            self._forward()  # the first time compiles, and libraries take what they need
            self._gradients()
            torch.cuda.empty_cache()  # the graphs have memory of their own, and take nothing that is left of this
            self.forward = record(self._forward, layers)
            self.backward = record(self._backward, layers)

    @torch.enable_grad()
    def _forward(self) -> None:
        self.out = self.layers.run(self.hidden, self.position_embeddings, self.rows)

    def _backward(self) -> None:
        torch._foreach_add_(self.layers.gradients, self._gradients())

    def _gradients(self) -> Sequence[Tensor]:
        with torch.autocast(self.hidden.device.type, enabled=False):  # as outside: it is for the way forward alone
            return torch.autograd.grad(self.out, self.layers.parameters, self.gradient)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, layers: Layers, one: Pass, position_embeddings: tuple[Tensor, Tensor],
                starts: Tensor) -> Tensor:
        layers.begun += 1
        ctx.layers, ctx.one, ctx.number = layers, one, layers.begun
        torch._foreach_copy_([one.hidden, *one.position_embeddings], [hidden, *position_embeddings])
        one.rows.starts.copy_(starts)
        one.forward()
        return one.out.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        if ctx.number != ctx.layers.begun:
            raise RuntimeError("a pass through the layers began before the backward pass of the one before it: both compute "
                               "in the same memory (looper/graphs.py); finish one first")
        ctx.layers.take_gradients()
        ctx.one.gradient.copy_(gradient)
        ctx.one.backward()
        return None, None, None, None, None


def allocated_bytes(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def has_room(size: int) -> bool:
    """Whether so many bytes of the GPU's memory are unused; of a processor's they are."""
    return not size or unused_bytes() >= size


def record(run: Callable[[], None], layers: Layers) -> Callable[[], None]:
    """A function that has the GPU do again what `run` has it do."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: of several processes, NCCL asks the GPU from a thread of its own meanwhile
    with torch.cuda.graph(graph, pool=layers.memory, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        run()
    layers.memory = graph.pool()
    return graph.replay


@contextmanager
def _leaving_no_trace(device: torch.device) -> Iterator[None]:
    """Random generators stand after the block where they stood before: a resumed run records at other times. What autocast
    keeps is thrown away: in a graph it would stay as it is now."""
    torch.clear_autocast_cache()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    torch.clear_autocast_cache()


@contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """Within the block a GPU works on a stream of its own. Nothing can be recorded on the default one, and autograd returns
    to it for each parameter that DistributedDataParallel has met there."""
    if device.type != "cuda":
        yield
        return
    outside, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(outside)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        outside.wait_stream(stream)
