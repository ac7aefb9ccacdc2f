"""Every function against numbers worked by hand, a plain loop in float64, and the equations of the last TRL with PPO.

TRL 1.12.0 is meant: `trl/experimental/ppo/ppo_trainer.py` (PPOTrainer.train, masked_mean, masked_var, masked_whiten). Its
equations are written here anew, in numpy. It has none for importance weights, effective sample size and a KL controller.
test_selective_log_softmax.py has what makes log-probabilities.
"""

import math

import numpy as np
import pytest
import torch

from looper import ppo_math
from tests.looper.ppo_helpers import close, tensor

@pytest.fixture(params=range(5))
def case(request):
    """Random [4, 7] data: rows of 1 to 7 tokens, padding filled with rubbish that must not matter."""
    rng = np.random.default_rng(request.param)
    lengths = [7, 1, int(rng.integers(1, 8)), int(rng.integers(1, 8))]
    mask = np.arange(7) < np.array(lengths)[:, None]

    def draw(scale=1.0):
        return np.where(mask, rng.normal(size=(4, 7)) * scale, 7.7)

    return {"mask": mask, "lengths": lengths, "logprobs": -abs(draw()), "old": -abs(draw()), "ref": -abs(draw()),
            "advantages": draw(), "values": draw(), "old_values": draw(), "returns": draw(2.0), "rewards": draw(),
            "scores": rng.normal(size=4)}


def tensors(case, *names):
    return [torch.tensor(case[name]) for name in names]


# ---- KL ----


def test_kl_estimates_by_hand():
    # π = 1/2, π_ref = 1/4: log ratio of ref to π is −ln 2
    logprobs, ref = tensor([[math.log(1 / 2)]]), tensor([[math.log(1 / 4)]])
    close(ppo_math.kl_estimate(logprobs, ref, "k1"), [[math.log(2)]])
    close(ppo_math.kl_estimate(logprobs, ref, "k3"), [[0.5 - 1 + math.log(2)]])


def test_kl_estimates_are_those_of_trl_and_unbiased(case):
    logprobs, ref = case["logprobs"], case["ref"]
    logr = ref - logprobs  # PPOTrainer.train, "4. compute rewards"
    close(ppo_math.kl_estimate(*tensors(case, "logprobs", "ref"), "k1"), -logr)
    close(ppo_math.kl_estimate(*tensors(case, "logprobs", "ref"), "k3"), (np.exp(logr) - 1) - logr)
    p, q = np.exp(logprobs[0]) / np.exp(logprobs[0]).sum(), np.exp(ref[0]) / np.exp(ref[0]).sum()
    exact = (p * np.log(p / q)).sum()
    for estimator in ("k1", "k3"):  # the mean under p over all of its outcomes
        estimate = ppo_math.kl_estimate(torch.tensor(np.log(p)), torch.tensor(np.log(q)), estimator)
        assert (torch.tensor(p) * estimate).sum().item() == pytest.approx(exact, abs=1e-9)
        if estimator == "k3":
            assert (estimate >= 0).all()


def test_kl_estimates_equal_a_plain_loop(case):
    k1, k3 = (ppo_math.kl_estimate(*tensors(case, "logprobs", "ref"), estimator) for estimator in ("k1", "k3"))
    for b, t in np.ndindex(4, 7):
        p, q = math.exp(case["logprobs"][b, t]), math.exp(case["ref"][b, t])
        assert k1[b, t].item() == pytest.approx(math.log(p / q), abs=1e-6)
        assert k3[b, t].item() == pytest.approx(q / p - 1 - math.log(q / p), abs=1e-6)


# ---- rewards and GAE ----


def test_token_rewards_by_hand():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rewards = ppo_math.token_rewards(tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), tensor([10.0, -10.0]), mask, beta=0.1)
    close(rewards, [[-0.1, -0.2, 9.7], [-10.4, 0.0, 0.0]])


def test_token_rewards_equal_a_plain_loop(case):
    found = ppo_math.token_rewards(*tensors(case, "values", "scores", "mask"), 0.3)
    for b, t in np.ndindex(4, 7):
        inside, last = t < case["lengths"][b], t == case["lengths"][b] - 1
        expected = (-0.3 * case["values"][b, t] if inside else 0.0) + (case["scores"][b] if last else 0.0)
        assert found[b, t].item() == pytest.approx(expected, abs=1e-6)


def test_gae_by_hand():
    # γ = 1, λ = 1/2: δ = (1 + 3 − 2, 0 + 1 − 3, 5 + 0 − 1) = (2, −2, 4); A_2 = 4, A_1 = −2 + 2 = 0, A_0 = 2 + 0 = 2
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = ppo_math.gae(tensor([[1.0, 0.0, 5.0]]), tensor([[2.0, 3.0, 1.0]]), mask, gamma=1.0, lam=0.5)
    close(advantages, [[2.0, 0.0, 4.0]])
    close(returns, [[4.0, 3.0, 5.0]])


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.0, 0.95), (1.0, 0.0)])
def test_gae_equals_a_plain_loop(case, gamma, lam):
    advantages, returns = ppo_math.gae(*tensors(case, "rewards", "values", "mask"), gamma, lam)
    expected = np.zeros((4, 7))
    for b, length in enumerate(case["lengths"]):  # each row by itself, cut to its length: padding cannot leak
        following = 0.0
        for t in reversed(range(length)):
            next_value = case["values"][b, t + 1] if t + 1 < length else 0.0
            delta = case["rewards"][b, t] + gamma * next_value - case["values"][b, t]
            following = delta + gamma * lam * following
            expected[b, t] = following
    close(advantages, expected)
    close(returns, expected + np.where(case["mask"], case["values"], 0.0))


def test_rewards_and_gae_are_those_of_trl(case):
    """PPOTrainer.train, parts 4 and 6, for responses without padding (else TRL pays the score one token later)."""
    old, ref, values, scores = case["old"], case["ref"], case["values"], case["scores"]
    kl_coef, gamma, lam = 0.05, 1.0, 0.95
    rewards = -kl_coef * -(ref - old)
    rewards[np.arange(4), 6] += scores
    lastgaelam, reverse = 0, []
    for t in reversed(range(7)):
        nextvalues = values[:, t + 1] if t < 6 else 0.0
        lastgaelam = rewards[:, t] + gamma * nextvalues - values[:, t] + gamma * lam * lastgaelam
        reverse.append(lastgaelam)
    expected = np.stack(reverse[::-1], axis=1)
    mask = torch.ones(4, 7, dtype=torch.bool)
    kl = ppo_math.kl_estimate(*tensors(case, "old", "ref"), "k1")
    found = ppo_math.token_rewards(kl, torch.tensor(scores), mask, kl_coef)
    close(found, rewards)
    advantages, returns = ppo_math.gae(found, torch.tensor(values), mask, gamma, lam)
    close(advantages, expected)
    close(returns, expected + values)


def test_gae_of_a_thousand_tokens_in_float32():
    rewards = torch.zeros(1, 1000)
    rewards[0, -1] = 1.0
    mask = torch.ones(1, 1000, dtype=torch.bool)
    advantages, _ = ppo_math.gae(rewards, torch.zeros(1, 1000), mask, 1.0, 0.95)
    close(advantages[0], 0.95 ** np.arange(999, -1, -1.0))


# ---- whitening ----


def test_whiten_by_hand():
    # (1, 3, 5): mean 3, unbiased variance 4
    mask = torch.tensor([[True, True], [True, False]])
    close(ppo_math.whiten(tensor([[1.0, 3.0], [5.0, 99.0]]), mask), [[-1.0, 0.0], [1.0, 0.0]])


def test_whiten_is_that_of_trl(case):
    values, mask = case["advantages"], case["mask"]
    mean = (values * mask).sum() / mask.sum()  # masked_mean
    variance = ((values - mean) ** 2 * mask).sum() / mask.sum() * mask.sum() / (mask.sum() - 1)  # masked_var
    expected = (values - mean) / np.sqrt(variance + 1e-8)  # masked_whiten
    found = ppo_math.whiten(*tensors(case, "advantages", "mask"))
    close(found, np.where(mask, expected, 0.0))
    kept = found[torch.tensor(mask)]
    assert kept.mean().item() == pytest.approx(0, abs=1e-6) and kept.var().item() == pytest.approx(1, abs=1e-6)


def test_whiten_and_scale_to_unit_equal_a_plain_loop(case):
    kept = [case["advantages"][b, t] for b, length in enumerate(case["lengths"]) for t in range(length)]
    mean = sum(kept) / len(kept)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in kept) / (len(kept) - 1))
    size = math.sqrt(sum(value**2 for value in kept) / len(kept))
    given = tensors(case, "advantages", "mask")
    white, scaled = ppo_math.whiten(*given), ppo_math.scale_to_unit(*given)
    for b, t in np.ndindex(4, 7):
        value, inside = case["advantages"][b, t], t < case["lengths"][b]
        assert white[b, t].item() == pytest.approx((value - mean) / deviation if inside else 0.0, abs=1e-6)
        assert scaled[b, t].item() == pytest.approx(value / size if inside else 0.0, abs=1e-6)


def test_whiten_without_variance_is_zero():
    mask = torch.tensor([[True, True, False]])
    close(ppo_math.whiten(tensor([[3.0, 3.0, 9.0]]), mask), [[0.0, 0.0, 0.0]])
    close(ppo_math.whiten(tensor([[3.0, 3.0, 9.0]]), torch.tensor([[True, False, False]])), [[0.0, 0.0, 0.0]])


def test_scale_to_unit_keeps_signs():
    # root mean square of (1, −7) is 5
    mask = torch.tensor([[True, True, False]])
    close(ppo_math.scale_to_unit(tensor([[1.0, -7.0, 4.0]]), mask), [[0.2, -1.4, 0.0]])


# ---- losses ----


@pytest.mark.parametrize("ratio, advantage, loss, gradient", [
    # clip range [0.8, 1.3]; the gradient is that of −A·r in log r, or 0 where clipping holds
    (1.0, 1.0, -1.0, -1.0),
    (1.2, 1.0, -1.2, -1.2),
    (1.5, 1.0, -1.3, 0.0),  # a good token already pushed up: held
    (0.5, 1.0, -0.5, -0.5),  # a good token that fell: not held
    (0.5, -1.0, 0.8, 0.0),  # a bad token already pushed down: held
    (0.9, -2.0, 1.8, 1.8),
    (1.5, -1.0, 1.5, 1.5),  # a bad token that rose: not held
])
def test_policy_loss_by_hand(ratio, advantage, loss, gradient):
    logprobs = tensor([[math.log(ratio) - 2.0]]).requires_grad_()
    found = ppo_math.policy_loss(logprobs, tensor([[-2.0]]), tensor([[advantage]]), torch.tensor([[True]]), 0.2, 0.3)
    assert found.loss.item() == pytest.approx(loss, abs=1e-9)
    found.loss.backward()
    assert logprobs.grad.item() == pytest.approx(gradient, abs=1e-9)
    assert found.clip_fraction.item() == (gradient == 0)
    assert found.approx_kl.item() == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-9)


def test_policy_loss_equals_a_plain_loop_and_trl(case):
    mask, (low, high) = case["mask"], (0.2, 0.3)
    weights = np.random.default_rng(9).uniform(0, 2, size=(4, 7))
    terms, clipped = [], 0
    for b, t in zip(*np.nonzero(mask), strict=True):
        r, a = math.exp(case["logprobs"][b, t] - case["old"][b, t]), case["advantages"][b, t]
        bounded = min(max(r, 1 - low), 1 + high)
        terms.append(weights[b, t] * max(-a * r, -a * bounded))
        clipped += -a * bounded > -a * r
    names = ("logprobs", "old", "advantages", "mask")
    found = ppo_math.policy_loss(*tensors(case, *names), low, high, torch.tensor(weights))
    assert found.loss.item() == pytest.approx(sum(terms) / len(terms), abs=1e-6)
    assert found.clip_fraction.item() == pytest.approx(clipped / len(terms), abs=1e-6)
    # PPOTrainer.train, inner loop: one symmetric clip range
    ratio = np.exp(case["logprobs"] - case["old"])
    pg_losses, pg_losses2 = -case["advantages"] * ratio, -case["advantages"] * np.clip(ratio, 1 - low, 1 + low)
    expected = (np.maximum(pg_losses, pg_losses2) * mask).sum() / mask.sum()
    assert ppo_math.policy_loss(*tensors(case, *names), low, low).loss.item() == pytest.approx(expected, abs=1e-6)


def test_value_loss_by_hand():
    # V_old 0, R 1, range 0.2. V = 0.5 is cut to 0.2: max(0.25, 0.64); V = −0.5 to −0.2: max(2.25, 1.44)
    values = tensor([[0.5, -0.5]]).requires_grad_()
    found = ppo_math.value_loss(values, tensor([[0.0, 0.0]]), tensor([[1.0, 1.0]]), torch.tensor([[True, True]]), 0.2)
    assert found.loss.item() == pytest.approx(0.5 * (0.64 + 2.25) / 2, abs=1e-9)
    assert found.clip_fraction.item() == 0.5
    found.loss.backward()
    close(values.grad, [[0.0, 0.5 * 2 * -1.5 / 2]])


def test_value_loss_is_that_of_trl(case):
    vpred, old, returns, mask = (case[name] for name in ("values", "old_values", "returns", "mask"))
    vpredclipped = np.clip(vpred, old - 0.2, old + 0.2)  # PPOTrainer.train, inner loop
    vf_losses1, vf_losses2 = (vpred - returns) ** 2, (vpredclipped - returns) ** 2
    expected = 0.5 * (np.maximum(vf_losses1, vf_losses2) * mask).sum() / mask.sum()
    found = ppo_math.value_loss(*tensors(case, "values", "old_values", "returns", "mask"), 0.2)
    assert found.loss.item() == pytest.approx(expected, abs=1e-6)
    assert found.clip_fraction.item() == pytest.approx(((vf_losses2 > vf_losses1) * mask).sum() / mask.sum(), abs=1e-6)


def test_value_loss_equals_a_plain_loop(case):
    terms = []
    for b, length in enumerate(case["lengths"]):
        for t in range(length):
            value, old, target = (case[name][b, t] for name in ("values", "old_values", "returns"))
            terms.append(max((value - target) ** 2, (min(max(value, old - 0.2), old + 0.2) - target) ** 2))
    found = ppo_math.value_loss(*tensors(case, "values", "old_values", "returns", "mask"), 0.2)
    assert found.loss.item() == pytest.approx(sum(terms) / len(terms) / 2, abs=1e-6)


def test_no_gradient_reaches_padding(case):
    mask = torch.tensor(case["mask"])
    logprobs, values = (each.requires_grad_() for each in tensors(case, "logprobs", "values"))
    policy = ppo_math.policy_loss(logprobs, *tensors(case, "old", "advantages"), mask, 0.2, 0.2)
    value = ppo_math.value_loss(values, *tensors(case, "old_values", "returns"), mask, 0.2)
    (policy.loss + value.loss).backward()
    for gradient in (logprobs.grad, values.grad):
        assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).any()


# ---- importance weights ----


def test_importance_weights_by_hand():
    logprobs = tensor([[math.log(0.5), math.log(0.1), 0.0, 5.0]])
    behaviour = tensor([[math.log(0.4), math.log(0.4), -5000.0, -5.0]])
    mask = torch.tensor([[True, True, True, False]])
    weights = ppo_math.importance_weights(logprobs, behaviour, mask, cap=2.0)
    close(weights, [[1.25, 0.25, 2.0, 0.0]])  # the third would be e^5000 without the cap
    # (1.25 + 0.25 + 2)² / (3·(1.5625 + 0.0625 + 4)) = 12.25 / 16.875
    assert ppo_math.effective_sample_size(weights, mask).item() == pytest.approx(12.25 / 16.875, abs=1e-9)


def test_importance_weights_and_their_effective_sample_size_equal_a_plain_loop(case):
    weights = ppo_math.importance_weights(*tensors(case, "logprobs", "old", "mask"), 1.5)
    expected, kept = np.zeros((4, 7)), []
    for b, length in enumerate(case["lengths"]):
        for t in range(length):
            expected[b, t] = min(math.exp(case["logprobs"][b, t]) / math.exp(case["old"][b, t]), 1.5)
            kept.append(expected[b, t])
    close(weights, expected)
    size = sum(kept) ** 2 / (len(kept) * sum(weight**2 for weight in kept))
    assert ppo_math.effective_sample_size(weights, torch.tensor(case["mask"])).item() == pytest.approx(size, abs=1e-6)


def test_effective_sample_size_bounds():
    mask = torch.tensor([[True] * 4 + [False]])
    assert ppo_math.effective_sample_size(tensor([[0.7] * 5]), mask).item() == pytest.approx(1.0)
    assert ppo_math.effective_sample_size(tensor([[1.0, 0, 0, 0, 9.0]]), mask).item() == pytest.approx(0.25)
    assert ppo_math.effective_sample_size(tensor([[0.0] * 5]), mask).item() == 0.0


# ---- the rest ----


def test_explained_variance_by_hand():
    mask = torch.tensor([[True, True, True, False]])
    returns = tensor([[1.0, 2.0, 3.0, 50.0]])
    assert ppo_math.explained_variance(returns, returns, mask).item() == 1.0
    assert ppo_math.explained_variance(torch.zeros(1, 4), returns, mask).item() == 0.0
    # returns − values = (0.5, 0, −0.5): variance 1/6 of 2/3
    assert ppo_math.explained_variance(tensor([[0.5, 2.0, 3.5, 0.0]]), returns, mask).item() == pytest.approx(0.75)
    assert ppo_math.explained_variance(returns, torch.ones(1, 4), mask).item() == 0.0


@pytest.mark.parametrize("kl, factor", [
    (0.1, 1.0),  # on target
    (0.11, 1 + 0.1 * 8 / 50),  # 10% over
    (10.0, 1 + 0.2 * 8 / 50),  # cut at +0.2
    (0.0, 1 - 0.2 * 8 / 50),  # cut at −0.2
    (0.095, 1 - 0.05 * 8 / 50),
])
def test_kl_controller_by_hand(kl, factor):
    controller = ppo_math.AdaptiveKLController(0.05, target=0.1, horizon=50)
    controller.update(kl, 8)
    assert controller.beta == pytest.approx(0.05 * factor, rel=1e-9)


def test_kl_controller_acts_within_a_run_and_can_be_held():
    acting, usual, held = (ppo_math.AdaptiveKLController(0.05, 0.1, horizon) for horizon in (50, 10_000, None))
    for _ in range(62):  # 500 samples in batches of 8
        for controller in (acting, usual, held):
            controller.update(1.0, 8)
    assert acting.beta == pytest.approx(0.05 * 1.032**62, rel=1e-9) and acting.beta > 0.3
    assert usual.beta < 0.0506  # what the default horizon of the past did: nothing
    assert held.beta == 0.05


def test_kl_controller_equals_a_plain_loop():
    controller, beta = ppo_math.AdaptiveKLController(0.2, 2.0, 1000.0), 0.2
    for kl, n in zip(np.random.default_rng(0).uniform(0, 4, 300), [64] * 299 + [7]):
        controller.update(kl, n)
        error = kl / 2.0 - 1
        beta = beta * (1 + (0.2 if error > 0.2 else -0.2 if error < -0.2 else error) * n / 1000)
    assert controller.beta == pytest.approx(beta, rel=1e-9) and beta != 0.2
