"""Log-probabilities in chunks against numbers worked by hand, a plain loop in float64, and the equation of TRL 1.12.0
(`trl/trainer/utils.py`, selective_log_softmax), written anew in numpy."""

import math

import numpy as np
import pytest
import torch

from looper import ppo_math
from tests.looper.ppo_helpers import close, tensor


def test_log_softmax_by_hand():
    # logits (0, ln 3): probabilities 1/4 and 3/4
    hidden, weight = tensor([[1.0], [1.0]]), tensor([[0.0], [math.log(3)]])
    logprobs, entropy = ppo_math.selective_log_softmax(hidden, weight, torch.tensor([0, 1]))
    close(logprobs, [math.log(1 / 4), math.log(3 / 4)])
    close(entropy, [0.25 * math.log(4) + 0.75 * math.log(4 / 3)] * 2)


@pytest.mark.parametrize("chunk", [1, 3, 5, 64])
def test_log_softmax_and_its_gradient_equal_the_plain_way(chunk):
    torch.manual_seed(chunk)
    hidden, weight = torch.randn(5, 6, dtype=torch.float64), torch.randn(11, 6, dtype=torch.float64)
    targets, upstream = torch.randint(11, (5,)), torch.randn(5, dtype=torch.float64)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    logprobs, entropy = ppo_math.selective_log_softmax(hidden, weight, targets, chunk)
    found = torch.autograd.grad(logprobs, (hidden, weight), upstream)
    # numpy, token by token; d log p(target) / d logits = onehot − p
    h, w = hidden.detach().numpy(), weight.detach().numpy()
    expected_hidden, expected_weight = np.zeros_like(h), np.zeros_like(w)
    for n in range(5):
        logits = w @ h[n]
        p = np.exp(logits) / np.exp(logits).sum()
        assert logprobs[n].item() == pytest.approx(math.log(p[targets[n]]), abs=1e-6)
        assert entropy[n].item() == pytest.approx(-(p * np.log(p)).sum(), abs=1e-6)
        slope = (np.eye(11)[targets[n]] - p) * upstream[n].item()
        expected_hidden[n] = slope @ w
        expected_weight += slope[:, None] * h[n]
    close(found[0], expected_hidden)
    close(found[1], expected_weight)
    assert not entropy.requires_grad


def test_log_softmax_is_that_of_trl():
    rng = np.random.default_rng(0)
    hidden, weight, index = rng.normal(size=(9, 5)), rng.normal(size=(13, 5)), rng.integers(0, 13, 9)
    logits = hidden @ weight.T
    selected_logits = np.take_along_axis(logits, index[:, None], -1)[:, 0]  # selective_log_softmax, full precision
    expected = selected_logits - np.array([np.log(np.exp(row).sum()) for row in logits])
    close(ppo_math.selective_log_softmax(tensor(hidden), tensor(weight), torch.tensor(index), 4)[0], expected)


def test_log_softmax_never_holds_all_logits(monkeypatch):
    sizes = []
    plain = torch.nn.functional.linear
    monkeypatch.setattr(ppo_math.F, "linear", lambda h, w: sizes.append(len(h)) or plain(h, w))
    hidden = torch.randn(10, 4, requires_grad=True)
    logprobs, _ = ppo_math.selective_log_softmax(hidden, torch.randn(7, 4), torch.zeros(10, dtype=torch.long), chunk=4)
    assert sizes == [4, 4, 2]
    logprobs.sum().backward()
    assert sorted(sizes) == [2, 2, 4, 4, 4, 4]  # the backward pass makes each chunk again: none was kept


def test_log_softmax_of_bfloat16_is_computed_in_float32():
    hidden, weight = torch.randn(3, 64).bfloat16(), torch.randn(50, 64).bfloat16() * 3
    targets = torch.tensor([1, 2, 3])
    logprobs, entropy = ppo_math.selective_log_softmax(hidden, weight, targets)
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), exact[range(3), targets], rtol=1e-5, atol=1e-5)


def test_log_softmax_stays_finite_at_huge_logits():
    hidden, weight = torch.tensor([[1e4]]), torch.tensor([[1.0], [-1.0]])
    logprobs, entropy = ppo_math.selective_log_softmax(hidden, weight, torch.tensor([1]))
    close(logprobs, [-2e4])
    close(entropy, [0.0])
