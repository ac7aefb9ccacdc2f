"""The key-value cache of a running batch, and the attention over it.

A slot is one row of the running batch. Its tokens lie at cache positions 0, 1, 2, ... whatever the other slots hold, so
there is no left-padding.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.cache_utils import Cache

ATTENTION = "looper_slots"


class Ragged(NamedTuple):
    """How many keys each row may use, for the flash kernel: int32 tensors on the device."""

    used: torch.Tensor  # [rows]
    query_starts: torch.Tensor  # [rows + 1]: 0, 1, 2, ...
    key_starts: torch.Tensor  # [rows + 1]: where each slot begins in the cache's storage, in tokens


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    ragged: Ragged | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' AttentionInterface calls it: causal in a prefill pass, one query a row in a step.

    query [rows, heads, queries, dim], key and value [rows, key-value heads, keys, dim]. A step has a mask, or `ragged`
    where the flash kernel serves, which reads no key beyond a row's own. Keys and values are never repeated for the
    query heads that share them: without the kernel those heads are folded into the query axis.
    """
    window = kwargs.get("sliding_window")
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None or (window or key.shape[2]) < key.shape[2]:
        raise ValueError(
            f"{type(module).__name__}: soft-capped, sink and sliding-window attention (window {window}) are not "
            f"supported by looper.slots at {key.shape[2]} tokens; use a base model with full attention"
        )
    rows, heads, queries, dim = query.shape
    keys = key.shape[2]
    if ragged is not None:
        # PyTorch's public varlen_attn takes no seqused_k before 2.12; the operator below it does.
        out = torch.ops.aten._flash_attention_forward(
            query[:, :, 0],
            key.transpose(1, 2).flatten(0, 1),  # the storage as it lies
            value.transpose(1, 2).flatten(0, 1),
            ragged.query_starts,
            ragged.key_starts,
            1,
            key.shape[2],
            dropout_p=0.0,
            is_causal=False,
            return_debug_mask=False,
            scale=scaling,
            seqused_k=ragged.used,
        )[0]
        return out[:, None], None
    if attention_mask is None:
        grouped, causal = heads != key.shape[1], queries == keys
        # After a shared beginning the queries are the last of the keys' positions.
        mask = None if causal else torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scaling, enable_gqa=grouped)
    else:
        folded = query.reshape(rows, key.shape[1], -1, dim)
        out = F.scaled_dot_product_attention(folded, key, value, attn_mask=attention_mask, scale=scaling)
        out = out.reshape(rows, heads, queries, -1)
    return out.transpose(1, 2).contiguous(), None


# No mask function is registered under this name: transformers then passes masks on as they are.
AttentionInterface.register(ATTENTION, slot_attention)


class SlotCache(Cache):
    """Keys and values of all slots: per layer [slots, max_length, key-value heads, dim].

    A step sets `at` before it runs. Storage is zeroed once: a masked key then weighs exactly 0, and 0 times what stands
    there, zeros or an earlier row's states, is 0.
    """

    def __init__(self, slots: int, max_length: int):
        super().__init__(layers=[])
        self.slots, self.max_length = slots, max_length
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.at: tuple[torch.Tensor, torch.Tensor, int]  # slot indices [rows], positions [rows], keys to attend to

    def storage(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if layer == len(self.keys):  # the first pass shows the shapes
            for store, states in ((self.keys, key), (self.values, value)):
                store.append(states.new_zeros(self.slots, self.max_length, states.shape[1], states.shape[3]))
        return self.keys[layer], self.values[layer]

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Writes one new position a row and returns the first rows' cache up to the length in `at`."""
        keys, values = self.storage(layer_idx, key, value)
        slots, positions, length = self.at
        keys[slots, positions] = key[:, :, 0]
        values[slots, positions] = value[:, :, 0]
        return keys[: len(slots), :length].transpose(1, 2), values[: len(slots), :length].transpose(1, 2)

    def copy(self, sources: torch.Tensor, targets: torch.Tensor, length: int) -> None:
        """Copies the first `length` positions of slots to other slots, as if all at the same time."""
        for store in (*self.keys, *self.values):
            store[targets, :length] = store[sources, :length]


class Beginning(Cache):
    """Keys and values of the tokens that all prompts begin with: per layer [1, key-value heads, tokens, dim]."""

    def __init__(self, tokens: int):
        super().__init__(layers=[])
        self.tokens = tokens
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args, **kwargs):
        self.keys.append(key)
        self.values.append(value)
        return key, value


class PrefillCache(Cache):
    """Stores a prefill pass's keys and values in the given slots, after those of the beginning that the pass leaves out.

    Attention sees the beginning and the pass.
    """

    def __init__(self, cache: SlotCache, slots: torch.Tensor, beginning: Beginning):
        super().__init__(layers=[])
        self.cache, self.slots, self.beginning = cache, slots, beginning

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args, **kwargs):
        if self.beginning.tokens:
            before = (self.beginning.keys[layer_idx], self.beginning.values[layer_idx])
            key, value = (torch.cat((first.expand(len(states), -1, -1, -1), states), 2)
                          for first, states in zip(before, (key, value)))
        keys, values = self.cache.storage(layer_idx, key, value)
        keys[self.slots, : key.shape[2]] = key.transpose(1, 2)
        values[self.slots, : key.shape[2]] = value.transpose(1, 2)
        return key, value
