"""The compiled path of a GPU on a processor: layers are compiled, and attention is one opaque operator, as there."""

from unittest.mock import patch

import pytest
import torch
from torch._dynamo.utils import counters

from looper import compiling, layers, packing


def _probabilities(query, key, starts, scale):
    row = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
    allowed = (row[:, None] == row) & torch.ones(len(row), len(row)).tril().bool()
    scores = torch.einsum("ahd,bhd->hab", query.float(), key.float()) * scale
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1)


@torch.library.custom_op("looper_tests::rows", mutates_args=())
def rows(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, longest: int,
         scale: float) -> torch.Tensor:
    """What PyTorch's operator of the flash kernel computes; each [tokens, heads, dim]."""
    assert all(each.is_contiguous() for each in (query, key, value)) and starts.diff().max() <= longest
    out = torch.einsum("hab,bhd->ahd", _probabilities(query, key, starts, scale), value.float())
    return out.to(query.dtype).contiguous()


@torch.library.custom_op("looper_tests::rows_backward", mutates_args=())
def rows_backward(gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                  starts: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    p, gradient = _probabilities(query, key, starts, scale), gradient.float()
    by_p = torch.einsum("ahd,bhd->hab", gradient, value.float())
    by_score = p * (by_p - (by_p * p).sum(-1, keepdim=True)) * scale
    by_each = (torch.einsum("hab,bhd->ahd", by_score, key.float()), torch.einsum("hab,ahd->bhd", by_score, query.float()),
               torch.einsum("hab,ahd->bhd", p, gradient))
    return tuple(each.to(query.dtype).contiguous() for each in by_each)


rows.register_fake(lambda query, *_: torch.empty_like(query))
rows_backward.register_fake(lambda _, *states_and_rest: tuple(map(torch.empty_like, states_and_rest[:3])))


def _keep(ctx, inputs, output):
    *states, ctx.longest, ctx.scale = inputs
    ctx.save_for_backward(*states)


rows.register_autograd(lambda ctx, gradient: (*rows_backward(gradient, *ctx.saved_tensors, ctx.scale), None, None, None),
                       setup_context=_keep)


def varlen(query, key, value, starts, _, longest, __, scale, window_size):
    return rows(query, key, value, starts, longest, scale)


def filling_up():
    """Within the block a processor fills passes up, as a GPU does."""
    own = packing.filling
    return patch.object(packing, "filling", lambda tokens, device: own(tokens, torch.device("cuda")))


def filled_rows(lengths, device, passes=()):
    """`packing.rows_of` where passes are filled up."""
    with filling_up():
        return packing.rows_of(lengths, device, passes)


@pytest.fixture
def opaque_attention(monkeypatch):
    monkeypatch.setattr(packing, "_has_flash_kernel", lambda query: True)
    monkeypatch.setattr(packing, "varlen_attn", varlen)


@pytest.fixture
def compiled_here(monkeypatch, opaque_attention):
    """A processor compiles too; yields a function → how many programs were made since."""
    torch._dynamo.reset()
    layers._compiled.cache_clear(), compiling.compiled.cache_clear()
    counters.clear()
    monkeypatch.setattr(compiling, "compiles_on", lambda device: True)
    monkeypatch.setattr(layers, "compiles", lambda layer: True)  # in float32 too
    yield lambda: counters["stats"]["unique_graphs"]
    assert not counters["graph_break"], counters["graph_break"]
    torch._dynamo.reset()
