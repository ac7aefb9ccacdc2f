"""The sampler: from logits to the next token of each row, and its log-probability."""

from math import gcd

import torch
import torch.nn.functional as F

VOCABULARY_BLOCK = 256  # the sampler first draws a block of at most so many tokens, then a token in it


def draw(probabilities: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Inverse-CDF samples [rows] from probabilities [rows, vocabulary] (float32) and uniforms [rows] (float64, [0, 1)).

    Two levels, a block and then a token in it, cumulated in float64: in one float32 sum over the vocabulary, rounding
    gives tokens of probability near 0 a share of 1e-7, enough to be drawn some times in a million.
    """
    rows, vocabulary = probabilities.shape
    size = gcd(vocabulary, VOCABULARY_BLOCK)  # blocks without a remainder, lest the padding copies everything
    if size < VOCABULARY_BLOCK // 4:
        size = VOCABULARY_BLOCK
        probabilities = F.pad(probabilities, (0, -vocabulary % size))
    blocks = probabilities.view(rows, -1, size)
    mass = blocks.sum(-1).double()
    cumulative = mass.cumsum(-1)
    target = uniforms * cumulative[:, -1]
    block = _first_above(cumulative, target)
    chosen_mass = mass.gather(1, block)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, size))[:, 0].double().cumsum(-1)
    rest = (target[:, None] - cumulative.gather(1, block) + chosen_mass) / chosen_mass  # position in the block, [0, 1)
    token = _first_above(inside, rest[:, 0] * inside[:, -1])
    return (block * size + token)[:, 0]


def _first_above(cumulative: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """First index [rows, 1] whose cumulative sum exceeds the target: never one of weight 0, not even where rounding
    left the target just below 0."""
    return (cumulative <= target[:, None].clamp(min=0)).sum(-1, keepdim=True)


def choose(
    logits: torch.Tensor, temperatures: torch.Tensor, uniforms: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Next tokens [rows] and their float32 log-probabilities [rows] from logits [rows, vocabulary] of any dtype.

    temperatures [rows], 0 for greedy; uniforms None where all rows are greedy. The log-probability is that of
    softmax(logits / temperature), at temperature 1 for greedy rows. Compiled, it passes over the logits for their
    largest, for the sum, and for the blocks' sums, and writes nothing of their size.
    """
    tokens = logits.argmax(-1)
    logits = logits.float()  # no copy where compiled
    if uniforms is None:
        return tokens, logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    greedy = temperatures == 0
    probabilities = torch.softmax(logits / temperatures.masked_fill(greedy, 1.0)[:, None], -1)
    tokens = torch.where(greedy, tokens, draw(probabilities, uniforms))
    return tokens, probabilities.gather(1, tokens[:, None])[:, 0].log()
