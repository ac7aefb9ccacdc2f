"""Fine-tuning on a processor without work that the loss ignores: no padding, and the head on labelled positions alone.

On a GPU a pass costs its launches and TRL's kernels do this; on a processor every padded position and every pass over
the vocabulary is paid for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

ATTENTION = "looper_rows"
IGNORED = -100  # the label of a position that is not learned
HEAD_POSITIONS = 128  # whose logits exist at once: 25 MB at 49,152 tokens, which the cache of a processor holds
# Models with full attention whose logits are hidden states times the head's weights, and nothing else.
PLAIN = ("llama", "qwen2")


def row_attention(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None,
                  scaling: float | None = None, dropout: float = 0.0, row_lengths: list[int] | None = None,
                  **kwargs: Any) -> tuple[Tensor, None]:
    """Causal attention of each row to itself, as transformers' AttentionInterface calls it.

    query [1, heads, tokens, dim], key and value [1, key-value heads, tokens, dim]: rows one after another, each of as
    many tokens as `row_lengths` says.
    """
    grouped = query.shape[1] != key.shape[1]
    rows = zip(*(states.split(row_lengths, 2) for states in (query, key, value)))
    out = [F.scaled_dot_product_attention(*row, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped)
           for row in rows]
    return torch.cat([each.transpose(1, 2) for each in out], 1), None


# No mask function is registered under this name: transformers makes no mask.
AttentionInterface.register(ATTENTION, row_attention)


@contextmanager
def packed(model: PeftModel) -> Iterator[None]:
    """Within the block, a pass of TRL's SFTTrainer lays the rows end to end and scores the labelled positions alone.

    What it returns is what TRL's own head returns, up to the order of sums. Models other than `PLAIN` keep their way.
    """
    causal = model.get_base_model()
    if causal.config.model_type not in PLAIN or getattr(causal.config, "use_sliding_window", False):
        yield
        return
    attention, forward = causal.config._attn_implementation, causal.forward
    causal.set_attn_implementation(ATTENTION)
    causal.forward = lambda **inputs: _scores(causal, **inputs)
    try:
        yield
    finally:
        causal.forward = forward
        causal.set_attn_implementation(attention)


def _scores(causal: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, labels: Tensor,
            **_: Any) -> SimpleNamespace:
    """What TRL's head returns, of right-padded input_ids and labels [rows, length]; each value [labelled positions]."""
    real = attention_mask.bool()
    positions = torch.arange(real.shape[1]).expand_as(real)
    hidden = causal.base_model(input_ids=input_ids[real][None], position_ids=positions[real][None], use_cache=False,
                               row_lengths=real.sum(1).tolist()).last_hidden_state[0]
    # A position's label is the next token of its row
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)[real]
    labelled = following != IGNORED
    weight = causal.get_output_embeddings().weight
    log_probs, entropy, is_top1 = Head.apply(hidden[labelled], weight, following[labelled])
    return SimpleNamespace(log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=labelled[labelled],
                           aux_loss=None)


class Head(torch.autograd.Function):
    """Hidden states to log-probabilities, without all positions' logits at once and without making any of them twice.

    The gradient of log softmax(W h)[target] by h is W[target] - W^T softmax(W h): it is made with the log-probability.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The targets' log-probabilities, the entropies in nats, and whether each target is the likeliest token, each
        [positions]; of hidden [positions, width], weight [vocabulary, width] and targets [positions]."""
        log_probs, entropies = torch.empty(2, len(hidden))
        is_top1, gradient = torch.empty(len(hidden), dtype=torch.bool), torch.empty_like(hidden)
        for start in range(0, len(hidden), HEAD_POSITIONS):
            some = slice(start, start + HEAD_POSITIONS)
            target = targets[some, None]
            logits = F.linear(hidden[some].to(weight.dtype), weight).float()
            is_top1[some] = logits.argmax(-1) == target[:, 0]
            log_p = logits.sub_(logits.logsumexp(-1, keepdim=True))
            log_probs[some] = log_p.gather(1, target)[:, 0]
            p = log_p.exp()
            entropies[some] = -torch.linalg.vecdot(p, log_p)
            gradient[some] = weight[target[:, 0]] - p.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(entropies, is_top1)
        return log_probs, entropies, is_top1

    @staticmethod
    def backward(ctx: Any, by_log_prob: Tensor, *_: None) -> tuple[Tensor, None, None]:
        gradient, = ctx.saved_tensors
        return gradient * by_log_prob[:, None].to(gradient.dtype), None, None
