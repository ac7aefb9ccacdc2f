"""Training without padding: the rows of a pass end to end, each attending to itself.

On a processor the language model's head is ours too: it makes no logits twice. On a GPU TRL's kernels do better.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from looper.distributed import rank

ATTENTION = "looper_rows"
IGNORED = -100  # the label of a position that is not learned
# On a GPU a pass has a multiple of so many tokens, a large one of an eighth of the power of two below it: few sizes come
# again and again. For each new one cuBLAS looks for its kernels and looper.graphs records a graph. A row of nothing but
# filling makes it up.
PASS_TOKENS = 128
HEAD_POSITIONS = 128  # whose logits exist at once: 25 MB at 49,152 tokens, which the cache of a processor holds
# Models with full attention whose logits are hidden states times the head's weights, and nothing else.
PLAIN = ("llama", "qwen2")


class Rows(NamedTuple):
    """Where the rows of a pass stand, laid end to end."""

    lengths: list[int]  # how many tokens each has
    starts: Tensor  # [rows + 1], int32, on the model's device: where each starts, and the last ends
    longest: int  # beside the lengths: a compiled layer reads it, and would be compiled anew for each other list


def end_to_end(lengths: list[int], width: int, device: torch.device,
               passes: Sequence[Sequence[int]] = ()) -> tuple[Rows, Tensor, Tensor]:
    """Of right-padded rows [rows, width] with so many tokens: (`rows_of` them, their tokens' positions [1, tokens], the
    tokens' places in the rows laid flat). From numbers that Python has: to look into a mask, it would wait for a GPU."""
    rows = rows_of(lengths, device, passes)
    positions = [torch.arange(length) for length in lengths]
    places = [row * width + each for row, each in enumerate(positions)]
    extra = torch.arange(sum(rows.lengths) - sum(lengths))
    found = _sent(torch.cat([*positions, extra, *places]), device)
    return rows, found[None, :sum(rows.lengths)], found[sum(rows.lengths):]


def rows_of(lengths: list[int], device: torch.device, passes: Sequence[Sequence[int]] = ()) -> Rows:
    """Where rows of these lengths stand, with a last row of `filling`, if there is any.

    passes: the rows' lengths of every process's pass at the same time, if there are several. All become of one size: else
    each process would meet a new one at another time, and the others would wait while it records (looper.graphs).
    """
    passes = [lengths, *filter(None, passes)]
    totals = [sum(each) for each in passes]
    longest = max(map(max, passes))
    if extra := filling(max(totals), device):
        size = max(totals) + extra
        lengths, longest = [*lengths, size - totals[0]], max(longest, size - min(totals))
    return Rows(lengths, _sent(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device), longest)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A processor's tensor on the device. Of pinned memory, or the way to a GPU may wait for what it has to do before."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def filling(tokens: int, device: torch.device) -> int:
    """The tokens that a pass of `tokens` has besides: at least one on a GPU, so that the number of rows tells nothing."""
    if device.type != "cuda":
        return 0
    step = max(PASS_TOKENS, 1 << tokens.bit_length() >> 4)
    return step - tokens % step


def row_attention(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None,
                  scaling: float | None = None, dropout: float = 0.0, rows: Rows | None = None,
                  **kwargs: Any) -> tuple[Tensor, None]:
    """Causal attention of each row to itself, as transformers' AttentionInterface calls it.

    query [1, heads, tokens, dim], key and value [1, key-value heads, tokens, dim]: `rows` one after another. Without
    `rows`, [batch, …, …, …]: each of the batch is one.
    """
    groups = query.shape[1] // key.shape[1]
    if rows is None:
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scaling,
                                             enable_gqa=groups > 1)
        return out.transpose(1, 2), None
    if _has_flash_kernel(query):
        # Contiguous, as is then all that the kernel returns: the compiler counts on it
        query, key, value = (each[0].transpose(0, 1).repeat_interleave(count, 1)
                             for each, count in ((query, 1), (key, groups), (value, groups)))
        return varlen_attn(query, key, value, rows.starts, rows.starts, rows.longest, rows.longest, scale=scaling,
                           window_size=(-1, 0))[None], None
    parts = zip(*(states.split(rows.lengths, 2) for states in (query, key, value)))
    out = [F.scaled_dot_product_attention(*part, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=groups > 1)
           for part in parts]
    return torch.cat([each.transpose(1, 2) for each in out], 1), None


def _has_flash_kernel(query: Tensor) -> bool:
    return query.is_cuda and query.dtype != torch.float32  # it takes halves alone


# No mask function is registered under this name: transformers makes no mask.
AttentionInterface.register(ATTENTION, row_attention)


@contextmanager
def packed(model: PeftModel) -> Iterator[None]:
    """Within the block, a pass of TRL's SFTTrainer lays the rows end to end and scores the labelled positions alone.

    What it returns is what TRL's own head returns, up to the order of sums. Models other than `PLAIN` keep their way.
    """
    causal = model.get_base_model()
    if not is_plain(causal):
        yield
        return
    attention, forward = causal.config._attn_implementation, causal.forward
    causal.set_attn_implementation(ATTENTION)
    if causal.device.type == "cpu":
        causal.forward = lambda **inputs: _scores(causal, **inputs)
    else:
        causal.forward = lambda **inputs: _unpadded(forward, **inputs)
    try:
        yield
    finally:
        causal.forward = forward
        causal.set_attn_implementation(attention)


def is_plain(causal: PreTrainedModel) -> bool:
    """Whether `causal` is a model of which rows can be laid end to end."""
    return causal.config.model_type in PLAIN and not getattr(causal.config, "use_sliding_window", False)


def _unpadded(forward: Callable[..., Any], input_ids: Tensor, attention_mask: Tensor, labels: Tensor,
              passes: Sequence[Sequence[int]] = (), **inputs: Any) -> Any:
    """`forward` of right-padded input_ids and labels [rows, length], their rows end to end.

    passes: the lengths of every process's rows, as `rows_of` takes them; without them the mask is asked.
    """
    lengths = list(passes[rank()]) if passes else attention_mask.sum(1).tolist()
    rows, positions, places = end_to_end(lengths, input_ids.shape[1], input_ids.device, passes)
    ids, following = input_ids.flatten()[places], labels.flatten()[places]
    extra = positions.shape[1] - len(ids)
    # Nothing of its row precedes a first token: the row before must not be trained to say it
    following = F.pad(following, (0, extra), value=IGNORED)[None].masked_fill(positions == 0, IGNORED)
    return forward(input_ids=F.pad(ids, (0, extra))[None], position_ids=positions, rows=rows, labels=following, **inputs)


def _scores(causal: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, labels: Tensor,
            **_: Any) -> SimpleNamespace:
    """What TRL's head returns, of right-padded input_ids and labels [rows, length]; each value [labelled positions]."""
    rows, positions, places = end_to_end(attention_mask.sum(1).tolist(), input_ids.shape[1], input_ids.device)
    hidden = causal.base_model(input_ids=input_ids.flatten()[places][None], position_ids=positions, use_cache=False,
                               rows=rows).last_hidden_state[0]
    # A position's label is the next token of its row
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()[places]
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
