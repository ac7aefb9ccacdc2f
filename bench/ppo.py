"""PPO: this repository's `train_ppo` against the plain way: the same samples, weights, order of updates and settings.

The plain way pads every batch, holds the logits of all positions, and computes reference and values by whole passes; it
uses `looper.ppo_math` for what follows from log-probabilities and values, which costs next to nothing. A pass is a
whole run: the reference's log-probabilities, then one epoch. The gates compare the first PPO batch's loss and its first
gradients, with the plain way's and with those of this repository without one of its speedups.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback

from bench.measure import Gate, Pass, Side, Stage, timed
from bench.without import switched_off, variants
from bench.workload import (CEILING, Setup, Update, equality, gradients, lengths, load, random_ids, relative_error,
                            seed_adapter, widened, with_adapter, with_either_attention)
from looper import ppo_math
from looper.ppo import PPOSample, train_ppo
from looper.ppo_data import COMPONENTS, collate, padded, plan_steps
from looper.ppo_settings import PPOSettings

SETTINGS = PPOSettings(save_steps=10**9)  # the defaults: platinum's, without checkpointing
B1_ROWS = 16
# Of the loss, whose unit is an advantage, and of the gradients, in norm. bfloat16 keeps 8 bits, and a full row of logits is
# rounded to them; of a mean of hundreds of terms, errors of either sign leave less.
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2**-9, 5e-2)}
CEILINGS = 2**-6, CEILING  # no gate is wider
MEASURE = "in advantages"


def stage(setup: Setup, rows: int, against: list[str], without: Sequence[str] = ()) -> Stage:
    def load_policy() -> PeftModel:
        return with_adapter(load(setup, quantised=True))

    def looper(name: str, model: PeftModel, train: Callable[..., None]) -> Side:
        return Side(name, lambda: run(samples, lambda: train(model, samples), model), [model])

    samples = make_samples(setup, rows)
    own, policy = load_policy(), load_policy() if against else None
    slower = variants(without, "ppo", own, load_policy)
    sides = [looper("looper", own, ours)]
    if "b1" in against:
        critic, first = load_policy(), samples[:B1_ROWS]
        sides.append(Side("B1: critic trunk, full logits, checkpointing",
                          lambda: run(first, lambda: plain(policy, critic, first, checkpointing=True), policy, critic),
                          [policy, critic]))
    if "b2" in against:
        sides += [Side(name, lambda way=way: run(samples, lambda: way(policy, None, samples), policy), [policy])
                  for name, way in with_either_attention(setup, "B2: one trunk, full logits", plain).items()]
    sides += [looper(f"looper without {name}", model, switched_off(name)(ours)) for name, model in slower.items()]
    return Stage("ppo", sides, lambda: gates(setup, own, policy, slower), limit(setup, samples))


def make_samples(setup: Setup, rows: int) -> list[PPOSample]:
    """Random responses of the stored lengths, with random rewards."""
    rng = random.Random(0)
    return [PPOSample(f"bench-{i:05d}/arm", random_ids(setup, prompt, f"ppo/{i}"),
                      random_ids(setup, output, f"response/{i}"), [-1.0] * output, rng.uniform(-0.5, 1.7), None,
                      dict.fromkeys(COMPONENTS, 0.5))
            for i, (prompt, output) in enumerate(lengths(rows))]


def trained_tokens(samples: Sequence[PPOSample]) -> int:
    return SETTINGS.ppo_epochs * sum(len(each.prompt_ids) + len(each.response_ids) for each in samples)


def limit(setup: Setup, samples: Sequence[PPOSample]) -> float:
    """Trained tokens/s of the matrix products alone at the device's peak.

    2 FLOP a weight each: the reference's forward pass, the old policy's, and forward and backward of every inner epoch;
    the head on response tokens only.
    """
    responses = sum(len(each.response_ids) for each in samples)
    tokens = trained_tokens(samples) // SETTINGS.ppo_epochs
    flops = (4 + 4 * SETTINGS.ppo_epochs) * (tokens * setup.shape.body + responses * setup.shape.head)
    return trained_tokens(samples) / (flops / setup.flops)


# ---- the sides ----


def run(samples: Sequence[PPOSample], train: Callable[[], object], *models: PeftModel) -> Pass:
    """One pass, from the same adapters as every other."""
    for model in models:
        seed_adapter(model)

    def work() -> int:
        train()
        return trained_tokens(samples)

    return timed(work)


def ours(model: PeftModel, samples: Sequence[PPOSample], settings: PPOSettings = SETTINGS,
         callbacks: Sequence[TrainerCallback] = ()) -> None:
    with TemporaryDirectory() as folder:
        train_ppo(model, samples, settings, Path(folder), Path(folder) / "value_head.safetensors", callbacks)


def plain(policy: PeftModel, critic: PeftModel | None, samples: Sequence[PPOSample], settings: PPOSettings = SETTINGS,
          checkpointing: bool = False, by_row: bool = False) -> list[Update]:
    """One epoch of PPO in the plain way; a critic of its own, or None for a value head on the policy.

    by_row: each sample has a pass of its own, without padding, instead of one with all others.
    Returns its optimiser steps, the first with its gradients.
    """
    forward = _forward_by_row if by_row else _forward
    models = [policy] if critic is None else [policy, critic]
    for model in models:
        model.train()  # no dropout is in it; checkpointing asks for it
        language_model = model.get_base_model()
        if checkpointing:
            language_model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            language_model.gradient_checkpointing_disable()
    head = nn.Linear(policy.config.hidden_size, 1, device=policy.device)
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, sum(sample.reward for sample in samples) / len(samples))
    weights = [each for model in (*models, head) for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0)
    controller = ppo_math.AdaptiveKLController(settings.kl.initial, settings.kl.target, settings.kl.horizon)
    plan, reference, updates = plan_steps(len(samples), settings), {}, []
    with torch.no_grad():
        for step in plan:
            if step.first:
                reference[step.number] = forward(policy, critic, head, [samples[i] for i in step.batch])[0]
    for step in plan:
        if step.first:
            batch = [samples[i] for i in step.batch]
            with torch.no_grad():
                old_logprobs, old_values = forward(policy, critic, head, batch)
            mask, advantages, returns = start(batch, old_logprobs, old_values, reference[step.number], controller.beta,
                                              settings)
        rows = list(step.rows)
        logprobs, values = forward(policy, critic, head, [batch[row] for row in rows])
        width = logprobs.shape[1]
        some = [each[rows, :width] for each in (mask, old_logprobs, old_values, advantages, returns)]
        surrogate = ppo_math.policy_loss(logprobs, some[1], some[3], some[0], settings.clip_low, settings.clip_high)
        value = ppo_math.value_loss(values, some[2], some[4], some[0], settings.value_clip)
        loss = surrogate.loss + settings.value_coef * value.loss
        optimizer.zero_grad()
        loss.backward()
        updates.append(Update(loss.item(), None if updates else gradients(policy)))
        nn.utils.clip_grad_norm_(weights, settings.max_grad_norm)
        optimizer.step()
        if step.last:
            drift = ppo_math.kl_estimate(reference[step.number], old_logprobs, "k3").sum(1).mean().item()
            controller.update(drift, len(batch))
    return updates


def start(batch: Sequence[PPOSample], logprobs: Tensor, values: Tensor, reference: Tensor, beta: float,
          settings: PPOSettings) -> tuple[Tensor, Tensor, Tensor]:
    """(mask, whitened advantages, returns) of a PPO batch, by the old policy's log-probabilities and values; all [B, T]."""
    mask = collate(batch, logprobs.device).mask
    scores = torch.tensor([sample.reward for sample in batch], device=logprobs.device)
    penalty = ppo_math.kl_estimate(logprobs, reference, "k1")
    rewards = ppo_math.token_rewards(penalty, scores, mask, beta)
    advantages, returns = ppo_math.gae(rewards, values, mask, settings.gamma, settings.lam)
    return mask, ppo_math.whiten(advantages, mask), returns


def _forward_by_row(policy: PeftModel, critic: PeftModel | None, head: nn.Linear,
                    batch: Sequence[PPOSample]) -> tuple[Tensor, Tensor]:
    """As `_forward`, a row at a time."""
    rows = [_forward(policy, critic, head, [sample]) for sample in batch]
    return tuple(pad_sequence([each[0] for each in one], batch_first=True) for one in zip(*rows, strict=True))


def _forward(policy: PeftModel, critic: PeftModel | None, head: nn.Linear,
             batch: Sequence[PPOSample]) -> tuple[Tensor, Tensor]:
    """(log-probabilities, values) of the response tokens, each [B, T]; log-softmax over all positions, padding too."""
    whole = [[*each.prompt_ids, *each.response_ids] for each in batch]
    ids = padded(whole, torch.long).to(policy.device)
    mask = padded([[1] * len(row) for row in whole], torch.long).to(policy.device)
    response = collate(batch, policy.device).mask
    starts = torch.tensor([len(each.prompt_ids) for each in batch], device=policy.device)
    # The position before each response token; 0 where a shorter response has none
    sources = (starts[:, None] - 1 + torch.arange(response.shape[1], device=policy.device)) * response
    out = policy(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=critic is None)
    everywhere = out.logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    if critic is not None:
        trunk = critic.get_base_model().base_model
        hidden = trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    else:
        hidden = out.hidden_states[-1]
    values = head(hidden.float())[..., 0]
    return everywhere.gather(1, sources) * response, values.gather(1, sources) * response


# ---- the gate ----


class FirstBatch(TrainerCallback):
    """The mean loss of the first PPO batch's updates, and the gradients of the first."""

    def __init__(self):
        self.loss = self.gradients = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.gradients is None:
            self.gradients = gradients(model)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.loss is None and "policy_loss" in logs:
            self.loss = logs["policy_loss"] + SETTINGS.value_coef * logs["value_loss"]


def _first(updates: Sequence[Update]) -> Update:
    """The mean loss of `updates`, and the gradients of the first."""
    return Update(sum(update.loss for update in updates) / len(updates), updates[0].gradients)


def apart(found: Update, expected: Update) -> tuple[float, float]:
    """How far `found`'s loss is from `expected`'s, and its gradients relative to these.

    The loss is a mean of terms as large as the advantages, which whitening makes 1, and they cancel to some hundredths
    (the value loss beside them is smaller still): what rounding does to it is in proportion to the terms, not to what is
    left of them. In bfloat16 it sees wrong advantages and steps that are too large; that a step is missing, or another
    value loss, only float32 shows.
    """
    return abs(found.loss - expected.loss), relative_error(found.gradients, expected.gradients)


def gates(setup: Setup, own: PeftModel, policy: PeftModel | None, slower: Mapping[str, PeftModel]) -> list[Gate]:
    """One PPO batch on each side, the same adapter on all at its start.

    policy: the plain way's, or None without it. slower: speedups, and the models of the sides without them.
    """
    samples = make_samples(setup, SETTINGS.batch_size)
    settings = replace(SETTINGS, max_grad_norm=1e9)

    def first_batch(model: PeftModel, train: Callable[..., None]) -> Update:
        first = FirstBatch()
        train(seed_adapter(model), samples, settings, [first])
        return Update(first.loss, first.gradients)

    found, made = first_batch(own, ours), []
    if policy is not None:
        expected, other = (_first(plain(seed_adapter(policy), None, samples, settings, by_row=by_row))
                           for by_row in (False, True))
        between = apart(other, expected)
        limits = list(map(widened, TOLERANCE[setup.dtype], between, CEILINGS))
        made = equality("the padded reference", apart(found, expected), limits, between, "row by row", MEASURE)
    for name, model in slower.items():
        made += equality(f"looper without {name}", apart(found, first_batch(model, switched_off(name)(ours))),
                         TOLERANCE[setup.dtype], measure=MEASURE)
    return made
