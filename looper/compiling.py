"""PyTorch's compiler for small pieces of work on rows, each of which would otherwise be many kernels on a GPU."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A fused kernel rounds to bfloat16 wherever the separate ones do, so that greedy tokens stay those of plain code. And
# neither the clock nor the first call's number of rows chooses a sum's order, so that equal runs have equal samples.
OPTIONS = {"emulate_precision_casts": True, "deterministic": True, "split_reductions": False}


def compiles_on(device: torch.device) -> bool:
    """Whether what computes there is compiled."""
    return device.type == "cuda"


@cache
def compiled_by_rows(function: Callable, exact_division: bool = True) -> Callable:
    """`function`, whose tensor arguments are all [rows, ...], compiled at its first call, once for any number of rows.

    All other sizes are constants to the compiler, which makes better kernels so, and a single row is a case of its own.
    exact_division: whether to divide as plain code does, which is slow where nothing else is done.
    TORCH_COMPILE_DISABLE=1 in the environment leaves the plain function.
    """
    options = OPTIONS | {"eager_numerics.division_rounding": exact_division}
    # Read here, and at imports: looper.stage sets it against those libraries that would compile at import
    with patch.dict(os.environ, TORCHDYNAMO_DISABLE="0"):
        fused = torch.compile(function, options=options)

    def of_rows(*arguments):
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                torch._dynamo.maybe_mark_dynamic(argument, 0)
        return fused(*arguments)

    return of_rows


@contextmanager
def compiled_pieces(model: "PreTrainedModel") -> Iterator[None]:
    """Compiles the model's norms, MLPs and rotary embedding: each once for all layers, which share their code.

    Whole layers would be compiled one by one, since each asks the cache for keys of its own.
    """
    classes = {type(module) for module in model.modules() if type(module).__name__.endswith(("RMSNorm", "MLP"))}
    modeling = sys.modules[type(model).__module__]
    with ExitStack() as stack:
        for each in classes:
            stack.enter_context(patch.object(each, "forward", _forward(each.forward)))
        if hasattr(modeling, "apply_rotary_pos_emb"):
            stack.enter_context(patch.object(modeling, "apply_rotary_pos_emb", _rotary(modeling.apply_rotary_pos_emb)))
        yield


def _forward(forward: Callable) -> Callable:
    """A module's `forward` from states [..., hidden] to states of that shape."""
    fused = compiled_by_rows(forward)

    def of_states(module: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
        return fused(module, states.flatten(0, -2)).view(states.shape)

    return of_states


def _rotary(rotary: Callable) -> Callable:
    """Of queries and keys [batch, heads, tokens, dim] and tables [batch or 1, tokens, dim]; a row is a token."""
    fused = compiled_by_rows(rotary)

    def of_states(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
        tables = [table.expand(len(query), -1, -1).flatten(0, 1) for table in (cos, sin)]
        states = [each.transpose(1, 2).flatten(0, 1) for each in (query, key)]  # no copy: so the projections left them
        return tuple(each.unflatten(0, query.shape[::2]).transpose(1, 2) for each in fused(*states, *tables))

    return of_states
