"""The small pieces of a model that a decoding step consists of, each compiled once for all layers.

Whole layers would be compiled one by one, since each asks the cache for keys of its own.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch

from looper.compiling import compiled_by_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def compiled_pieces(model: "PreTrainedModel") -> Iterator[None]:
    """Within the block the model's norms, MLPs and rotary embedding are compiled."""
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
