"""The mathematics of PPO on stored rollouts, as pure functions over tensors.

Shapes: B samples of up to T response tokens, padded at the right; N tokens in all; hidden size D; vocabulary V.
`mask` [B, T] is true at response tokens. Log-probabilities, KL and entropy are in nats. Results are zero where the mask
is false. Position t of every [B, T] tensor belongs to response token t and to the state before it was written.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from looper import compiling

EPSILON = 1e-8  # keeps whitening finite where a batch has no variance


class _Logits(torch.autograd.Function):
    """hidden [N, D] × weight [V, D] in half precision → logits [N, V] in float32, not rounded to half on the way out.

    A bfloat16 logit of 20 is off by up to 0.06, which is as much as a PPO update moves a log-probability.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        gradient = gradient.to(weight.dtype)
        return (gradient @ weight if ctx.needs_input_grad[0] else None,
                gradient.t() @ hidden if ctx.needs_input_grad[1] else None)


def _chunk_log_softmax(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    if hidden.is_cuda and hidden.dtype == weight.dtype and hidden.dtype in (torch.bfloat16, torch.float16):
        logits = _Logits.apply(hidden, weight)
    else:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logits = F.linear(hidden.to(dtype), weight.to(dtype))
    of_logits = compiling.compiled(_one_pass_log_softmax) if compiling.compiles_on(logits.device) else _log_softmax
    return of_logits(logits, targets)


def _log_softmax(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits [N, V] and targets [N]: log-probabilities [N] (differentiable) and entropies [N] (not)."""
    log_total = logits.logsumexp(-1)
    logprobs = logits.gather(-1, targets[:, None]).squeeze(-1) - log_total
    return logprobs, _entropy(logits, log_total)


def _one_pass_log_softmax(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same where a compiler joins elementwise steps: the gradient is made in one pass, without a gather to undo."""
    log_total = logits.logsumexp(-1)
    chosen = torch.arange(logits.shape[-1], device=logits.device) == targets[:, None]
    return logits.where(chosen, 0).sum(-1) - log_total, _entropy(logits, log_total)


def _entropy(logits: Tensor, log_total: Tensor) -> Tensor:
    with torch.no_grad():
        all_logprobs = logits - log_total[:, None]
        return -(all_logprobs.exp() * all_logprobs).sum(-1)


def selective_log_softmax(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 256) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token, and the entropy of its distribution, without ever holding all logits.

    hidden [N, D], weight [V, D] (the language model's head), targets [N] → logprobs [N] (differentiable), entropy [N]
    (not). At most `chunk` rows of logits exist at a time: the backward pass makes them again.
    """
    logprobs, entropies = [], []
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        arguments = (hidden[rows], weight, targets[rows])
        needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        results = (checkpoint(_chunk_log_softmax, *arguments, use_reentrant=False, preserve_rng_state=False)
                   if needs_gradient else _chunk_log_softmax(*arguments))
        logprobs.append(results[0])
        entropies.append(results[1])
    return torch.cat(logprobs), torch.cat(entropies)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values [B, T] over the mask [B, T] → scalar."""
    return (values * mask).sum() / mask.sum()


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """values [B, T] → the same with mean 0, variance 1 (unbiased) over the mask; zeros where there is no variance."""
    centred = (values - masked_mean(values, mask)) * mask
    variance = (centred**2).sum() / (mask.sum() - 1).clamp(min=1)
    return centred * torch.rsqrt(variance + EPSILON)


def scale_to_unit(values: Tensor, mask: Tensor) -> Tensor:
    """values [B, T] → the same divided by their root mean square over the mask: the size of 1, every sign kept."""
    return values * mask * torch.rsqrt(masked_mean(values**2, mask) + EPSILON)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: Literal["k1", "k3"]) -> Tensor:
    """Estimate of KL(π‖π_ref) at each token, both [B, T], from tokens that π wrote.

    http://joschu.net/blog/kl-approx.html:
    k1 = log π − log π_ref: unbiased, signed. k3 = π_ref/π − 1 − log(π_ref/π): unbiased, never negative.
    """
    log_ratio = ref_logprobs - logprobs
    return -log_ratio if estimator == "k1" else torch.expm1(log_ratio) - log_ratio


def token_rewards(kl: Tensor, scores: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Reward of each token: −β·KL everywhere, plus the sequence's score at its last token.

    kl [B, T], scores [B], mask [B, T] (at least one token each) → [B, T].
    """
    rewards = -beta * kl * mask
    last = mask.sum(1) - 1
    rows = torch.arange(len(rewards), device=rewards.device)
    rewards[rows, last] += scores
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016): rewards, values, mask → advantages, returns, all [B, T].

    δ_t = r_t + γ·V_{t+1} − V_t, A_t = Σ_k (γλ)^k·δ_{t+k}, returns = A + V. The value after the last token is 0.
    The sum is one product with a triangular matrix of powers, not T small steps.
    """
    values = values * mask
    deltas = (rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values) * mask
    steps = torch.arange(rewards.shape[1], device=rewards.device)
    decay = torch.full((), gamma * lam, dtype=deltas.dtype, device=deltas.device)
    powers = decay ** (steps[:, None] - steps).clamp(min=0)
    advantages = (deltas @ torch.tril(powers)) * mask
    return advantages, advantages + values


class PolicyLoss(NamedTuple):
    loss: Tensor  # scalar, differentiable
    clip_fraction: Tensor  # scalar: the share of tokens whose gradient the clipping removed
    approx_kl: Tensor  # scalar: KL(π_old‖π) a token, estimator k3


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_low: float,
                clip_high: float, weights: Tensor | None = None) -> PolicyLoss:
    """The clipped surrogate of PPO (Schulman et al. 2017, eq. 7), negated, mean over the mask's tokens. All [B, T].

    max(−A·r, −A·clip(r, 1 − clip_low, 1 + clip_high)) with r = π/π_old; `weights`, where given, multiply each token's
    term.
    """
    log_ratio = (logprobs - old_logprobs) * mask
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    losses = torch.maximum(plain, clipped)
    if weights is not None:
        losses = losses * weights
    with torch.no_grad():
        clip_fraction = masked_mean((clipped > plain).to(ratio.dtype), mask)
        approx_kl = masked_mean(torch.expm1(log_ratio) - log_ratio, mask)
    return PolicyLoss(masked_mean(losses, mask), clip_fraction, approx_kl)


class ValueLoss(NamedTuple):
    loss: Tensor  # scalar, differentiable
    clip_fraction: Tensor  # scalar: the share of tokens whose gradient the clipping removed


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float) -> ValueLoss:
    """½·mean of max((V − R)², (clip(V, V_old ± clip) − R)²) over the mask's tokens. All [B, T]."""
    clipped = values.clamp(old_values - clip, old_values + clip)
    plain_errors, clipped_errors = (values - returns) ** 2, (clipped - returns) ** 2
    with torch.no_grad():
        clip_fraction = masked_mean((clipped_errors > plain_errors).to(values.dtype), mask)
    return ValueLoss(0.5 * masked_mean(torch.maximum(plain_errors, clipped_errors), mask), clip_fraction)


def importance_weights(logprobs: Tensor, behaviour_logprobs: Tensor, mask: Tensor, cap: float) -> Tensor:
    """min(π/μ, cap) at each token, μ being the distribution that wrote it. All [B, T]; zero outside the mask."""
    # Clamping the logarithm keeps a huge ratio from overflowing before it is cut.
    log_cap = torch.tensor(cap, dtype=logprobs.dtype, device=logprobs.device).log()
    return torch.minimum(logprobs - behaviour_logprobs, log_cap).exp() * mask


def effective_sample_size(weights: Tensor, mask: Tensor) -> Tensor:
    """(Σw)² / (n·Σw²) over the mask's n tokens → scalar in (0, 1]: the share of the data that counts (Kish)."""
    weights = weights * mask
    return weights.sum() ** 2 / (mask.sum() * (weights**2).sum()).clamp(min=torch.finfo(weights.dtype).tiny)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(returns − values) / Var(returns) over the mask's tokens → scalar; 0 where returns do not vary."""
    def variance(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

    total = variance(returns)
    return torch.where(total > 0, 1 - variance(returns - values) / total, torch.zeros_like(total))


class AdaptiveKLController:
    """β that steers a KL to a target (Ziegler et al. 2019, section 2.2).

    e = clip(KL/target − 1, −0.2, 0.2), β ← β·(1 + e·n/horizon). A horizon of None holds β fixed.
    """

    def __init__(self, beta: float, target: float, horizon: float | None) -> None:
        self.beta, self.target, self.horizon = beta, target, horizon

    def update(self, kl: float, n: int) -> None:
        """kl: nats a sequence, mean over the batch; n: samples in the batch."""
        if self.horizon is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.beta *= 1 + error * n / self.horizon
