"""The sampler against exact distributions and plain float64."""

import pytest
import torch

from looper.sampler import choose, draw


def test_draw_is_the_inverse_cdf_over_blocks_with_a_remainder():
    generator = torch.Generator().manual_seed(2)
    weights = torch.rand(1000, generator=generator) ** 8
    weights[torch.arange(0, 1000, 3)] = 0.0  # never to be drawn
    weights[:300] = 0.0  # nor a whole block
    probabilities = weights / weights.sum()
    points = 50_000
    uniforms = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    tokens = torch.cat([draw(probabilities.expand(len(part), -1), part) for part in uniforms.split(5000)])
    assert (tokens.diff() >= 0).all()
    counts = torch.bincount(tokens, minlength=1000)
    assert (counts - probabilities * points).abs().max() <= 1.01
    assert counts[weights == 0].sum() == 0


def test_draw_at_the_ends_takes_tokens_of_positive_probability():
    probabilities = torch.zeros(2, 600)
    probabilities[:, 310] = 0.25
    probabilities[:, 320] = 0.75
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(probabilities, ends).tolist() == [310, 320]


def test_draw_on_block_borders_takes_tokens_of_positive_probability():
    generator = torch.Generator().manual_seed(5)
    scales = 10 ** (torch.rand(200, 8, 1, generator=generator) * -12)
    weights = torch.rand(200, 8, 256, generator=generator) * (torch.arange(256) >= 100)  # blocks begin with zeros
    weights = (weights * scales).flatten(1)
    mass = weights.view(200, 8, 256).sum(-1).double().cumsum(-1)
    for border in range(8):
        uniforms = mass[:, border - 1] / mass[:, -1] if border else torch.zeros(200, dtype=torch.float64)
        tokens = draw(weights, uniforms)
        assert (weights.gather(1, tokens[:, None]) > 0).all()


def test_choose_reports_the_logprob_of_the_scaled_distribution():
    logits = torch.tensor([[0.0, 1.0, 3.0], [0.0, 1.0, 3.0]])
    tokens, logprobs = choose(logits, torch.tensor([0.0, 0.5]), torch.tensor([0.0, 0.0], dtype=torch.float64))
    assert tokens.tolist() == [2, 0]  # greedy; the first token at uniform 0
    greedy = 3 - torch.tensor([0.0, 1.0, 3.0]).logsumexp(0)
    sampled = 0 - torch.tensor([0.0, 2.0, 6.0]).logsumexp(0)
    torch.testing.assert_close(logprobs, torch.stack([greedy, sampled]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [768, 37 * 128, 1000])  # divided by 256, by 128 as Qwen's 151,936, by neither
def test_choose_is_argmax_and_softmax_written_out(vocabulary, dtype):
    generator = torch.Generator().manual_seed(6)
    logits = (torch.randn(200, vocabulary, generator=generator) * 4).to(dtype)
    temperatures = torch.tensor([0.0, 0.7, 1.0, 1.5]).repeat(50)
    uniforms = torch.rand(200, dtype=torch.float64, generator=generator)
    probabilities = torch.softmax(logits.float() / temperatures.masked_fill(temperatures == 0, 1.0)[:, None], -1)
    cumulative = probabilities.double().cumsum(-1)
    drawn = (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(-1)
    expected = torch.where(temperatures == 0, logits.argmax(-1), drawn)
    tokens, logprobs = choose(logits, temperatures, uniforms)
    assert torch.equal(tokens, expected)
    assert torch.equal(logprobs, probabilities.gather(1, expected[:, None])[:, 0].log())
    greedy, greedy_logprobs = choose(logits, temperatures, None)
    assert torch.equal(greedy, logits.argmax(-1)) and greedy_logprobs.dtype == torch.float32
    assert torch.allclose(greedy_logprobs, torch.log_softmax(logits.float(), -1).amax(-1), rtol=0, atol=5e-6)
