"""One PPO batch against its equations, whole runs against a plain loop, and what stops a run."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from looper import ppo_math
from looper.ppo import VALUE_HEAD, NonFiniteError, PPOSample
from looper.ppo_policy import PolicyWithValue
from looper.ppo_settings import KLSettings, PPOSettings
from looper.ppo_trainer import OfflinePPOTrainer
from tests.looper.ppo_helpers import (QUICK, KillAt, Killed, Recorder, assert_same_bits, make_model, make_nf4_model,
                                      make_samples, naive_logprobs, run, trainable)

GLOSSARY = Path(__file__).parents[2] / "docs" / "metrics.md"


# ---- one PPO batch ----


class Spy(OfflinePPOTrainer):
    """Keeps every batch, with the β it was made under, and every mini-batch's log-probabilities."""

    def _start_batch(self, step):
        beta = self.kl.beta
        batch = super()._start_batch(step)
        self.__dict__.setdefault("batches", []).append((step, beta, batch))
        return batch


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "nf4"])
def test_first_ratio_is_exactly_one_and_first_kl_zero(tmp_path, monkeypatch, kind, checkpointing):
    ratios = []
    plain = ppo_math.policy_loss

    def spy(logprobs, old_logprobs, *rest):
        ratios.append((logprobs - old_logprobs).detach().exp())
        return plain(logprobs, old_logprobs, *rest)

    monkeypatch.setattr(ppo_math, "policy_loss", spy)
    recorder = Recorder()
    model = make_nf4_model(tmp_path / "base") if kind == "nf4" else make_model(getattr(torch, kind))
    run(tmp_path / "run", replace(QUICK, gradient_checkpointing=checkpointing), model=model, callbacks=[recorder])
    assert (ratios[0] == 1).all()
    assert (ratios[1] != 1).any()  # the policy moved
    assert (ratios[4] == 1).all()  # the second batch starts with its own old policy
    assert recorder.batches[0]["kl"] == recorder.batches[0]["kl_k1"] == 0.0
    assert recorder.batches[1]["kl"] > 0


def test_updates_do_not_walk_through_the_modules(tmp_path, monkeypatch):
    walks, walk = [], PolicyWithValue.train
    monkeypatch.setattr(PolicyWithValue, "train", lambda policy, mode=True: walks.append(mode) or walk(policy, mode))
    recorder = Recorder()
    run(tmp_path / "run", model=make_model(), callbacks=[recorder])
    assert len(recorder.norms) > 3 and walks == [True] * 2, "when it was made, and before the first update"


def plain_whiten(rows):
    flat = np.concatenate(rows)
    return [(row - flat.mean()) / np.sqrt(flat.var(ddof=1) + 1e-8) for row in rows]


@pytest.mark.parametrize("credit", ["question", "arm"])
def test_batch_follows_the_equations(tmp_path, credit):
    settings = replace(QUICK, credit=credit, kl=KLSettings(initial=0.5))
    samples = make_samples(8, credit)
    trainer = Spy(PolicyWithValue(make_model(), False), samples, settings, tmp_path)
    trainer.train()
    step, beta, batch = trainer.batches[1]  # the policy has moved and the critic has learnt
    assert beta != 0.5 and (batch.old_values[batch.mask].std() > 0) == (credit == "question")
    expected_advantages, expected_returns = [], []
    for row, index in enumerate(step.batch):
        sample, length = samples[index], len(samples[index].response_ids)
        old, values = (each[row, :length].double().numpy() for each in (batch.old_logprobs, batch.old_values))
        logr = trainer.reference[index].double().numpy() - old
        rewards = beta * logr
        rewards[-1] += sample.reward if credit == "question" else 0.0
        advantages, following = np.zeros(length), 0.0
        for t in reversed(range(length)):
            delta = rewards[t] + (values[t + 1] if t + 1 < length else 0.0) - values[t]
            advantages[t] = following = delta + 0.95 * following
        expected_returns.append(advantages + values)
        expected_advantages.append(advantages + (sample.advantage if credit == "arm" else 0.0))
        weights = np.minimum(np.exp(old - np.array(sample.behaviour_logprobs)), 2.0)
        np.testing.assert_allclose(batch.weights[row, :length], weights, rtol=1e-5)
    if credit == "question":
        expected_advantages = plain_whiten(expected_advantages)
    else:
        size = np.sqrt(np.mean(np.concatenate(expected_advantages) ** 2))
        expected_advantages = [row / size for row in expected_advantages]
    for row, expected in enumerate(expected_advantages):
        np.testing.assert_allclose(batch.advantages[row, :len(expected)], expected, rtol=1e-4, atol=1e-5)
        if credit == "question":
            np.testing.assert_allclose(batch.returns[row, :len(expected)], expected_returns[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("credit, off_policy", [("question", "none"), ("question", "truncated_is"), ("arm", "none")])
def test_run_equals_a_plain_ppo_loop(tmp_path, credit, off_policy):
    """One batch of four, two inner epochs of two mini-batches, against a loop over single unpadded samples with full
    logits, a critic of its own, plain AdamW and plain clipping."""
    settings = replace(QUICK, credit=credit, off_policy=off_policy, max_grad_norm=0.05, value_coef=0.5, clip_high=0.3)
    samples = make_samples(4, credit)
    found, _ = run(tmp_path, settings, samples)
    model = make_model().eval()
    head = torch.nn.Linear(16, 1)
    mean = sum(sample.reward for sample in samples) / len(samples)
    torch.nn.init.zeros_(head.weight), torch.nn.init.constant_(head.bias, mean)
    parameters = [p for p in [*model.parameters(), *head.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)

    def forward(sample):
        output = model(torch.tensor([[*sample.prompt_ids, *sample.response_ids]]), output_hidden_states=True)
        start, length = len(sample.prompt_ids) - 1, len(sample.response_ids)
        logprobs = output.logits[0].log_softmax(-1)[range(start, start + length), list(sample.response_ids)]
        return logprobs, head(output.hidden_states[-1][0, start:start + length]).squeeze(-1)

    plan = Spy(PolicyWithValue(make_model(), False), samples, settings, tmp_path / "other").plan
    batch = [samples[i] for i in plan[0].batch]
    with torch.no_grad():
        old = [forward(sample)[0] for sample in batch]
    surprises = [torch.tensor([0.95**k * (sample.reward - mean) for k in reversed(range(len(sample.response_ids)))])
                 for sample in batch]  # the critic says the mean everywhere, no KL yet: A = (R − mean)·λ^(distance to the end)
    returns = [surprise + mean for surprise in surprises]
    if credit == "question":
        advantages = [torch.tensor(row) for row in plain_whiten([row.double().numpy() for row in surprises])]
    else:
        flat = torch.cat([torch.full((len(sample.response_ids),), sample.advantage) for sample in batch])
        advantages = [torch.full((len(sample.response_ids),), sample.advantage) / flat.square().mean().sqrt()
                      for sample in batch]
    for step in plan:
        losses, errors = [], []
        for row in step.rows:
            logprobs, values = forward(batch[row])
            ratio = (logprobs - old[row]).exp()
            loss = torch.maximum(-advantages[row] * ratio, -advantages[row] * ratio.clamp(0.8, 1.3))
            if off_policy == "truncated_is":
                loss = loss * (old[row] - torch.tensor(batch[row].behaviour_logprobs)).exp().clamp(max=2.0)
            losses.append(loss)
            errors.append(torch.maximum((values - returns[row])**2, (values.clamp(mean - 0.2, mean + 0.2) - returns[row])**2))
        total = torch.cat(losses).mean()
        if credit == "question":
            total = total + 0.5 * 0.5 * torch.cat(errors).mean()
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 0.05)
        optimizer.step()
    before = trainable(make_model())
    for name, parameter in [*trainable(model).items(), ("weight", head.weight.detach())]:
        difference = (found[name] - parameter).abs()
        # steps of 1e-2; Adam makes a whole step of a gradient that is rounding noise, so a few entries may stray
        assert difference.mean() < 3e-5 and difference.max() < 2e-3, name
        assert name == "weight" or (found[name] - before[name]).abs().mean() > 1e-3
    assert (found["weight"] == 0).all() == (credit == "arm")  # arm credit has no critic


def test_equal_rewards_teach_nothing(tmp_path):
    """The critic starts at the mean reward: where every response earns it, no token is better or worse than expected."""
    samples = [replace(sample, reward=0.7) for sample in make_samples(8, "question")]
    found, _ = run(tmp_path, replace(QUICK, kl=KLSettings(initial=0.0)), samples)
    before = trainable(make_model())
    assert max((found[name] - value).abs().max() for name, value in before.items()) < 1e-6

# ---- a run ----


@pytest.mark.slow
@pytest.mark.parametrize("credit", ["question", "arm"])
def test_rewarded_responses_become_likelier_and_punished_ones_rarer(tmp_path, credit):
    samples = []
    for number in range(16):
        good = number % 2 == 0
        samples.append(PPOSample(f"q{number}/a", [number % 7, 1], [3, 4] if good else [5, 6], [-3.0, -3.0],
                                 1.0 if good else -0.5, (1.0 if good else -1.0) if credit == "arm" else None,
                                 dict.fromkeys(("s_end", "s_path", "s_cf", "s_wm"), 0.5)))
    model = make_model()
    before = [sum(naive_logprobs(model, sample)) for sample in samples]
    run(tmp_path, replace(QUICK, credit=credit, epochs=3, learning_rate=5e-3), samples, model)
    change = [sum(naive_logprobs(model, sample)) - old for sample, old in zip(samples, before, strict=True)]
    assert min(change[::2]) > 0.3 and max(change[1::2]) < -0.3


def test_gradient_clipping_acts(tmp_path):
    results = {}
    for limit in (0.05, 1e6):
        recorder = Recorder()
        results[limit], _ = run(tmp_path / str(limit), replace(QUICK, max_grad_norm=limit), callbacks=[recorder])
        if limit == 0.05:
            assert recorder.norms == pytest.approx([0.05] * 6, rel=1e-3)  # what the optimiser got
            assert min(logs["grad_norm"] for logs in recorder.batches) > 0.1  # what there was before
        else:
            means = [np.mean(recorder.norms[:4]), np.mean(recorder.norms[4:])]
            assert [logs["grad_norm"] for logs in recorder.batches] == pytest.approx(means, rel=1e-5)
    assert any(not torch.equal(results[0.05][name], results[1e6][name]) for name in results[0.05])


def test_behaviour_log_probabilities_act_under_truncated_is_alone(tmp_path):
    other = [replace(sample, behaviour_logprobs=[-0.1] * len(sample.response_ids)) for sample in make_samples()]
    results = {}
    for off_policy in ("none", "truncated_is"):
        settings = replace(QUICK, off_policy=off_policy)
        results[off_policy] = [run(tmp_path / f"{off_policy}{i}", settings, samples)
                               for i, samples in enumerate((make_samples(), other))]
    (plain, metrics), (plain_other, metrics_other) = results["none"]
    assert_same_bits(plain, plain_other)
    assert 0 < metrics["ess"] < 1 and metrics["ess"] != metrics_other["ess"]
    assert any(not torch.equal(each, results["truncated_is"][1][0][name])
               for name, each in results["truncated_is"][0][0].items())


def test_the_controller_moves_beta_with_the_kl(tmp_path):
    recorder = Recorder()
    settings = replace(QUICK, kl=KLSettings(initial=0.1, target=1e-4, horizon=20))
    _, metrics = run(tmp_path, settings, make_samples(12), callbacks=[recorder])
    betas = [logs["beta"] for logs in recorder.batches]
    # first batch: KL 0, e = −0.2; then far above target, e = +0.2; n / horizon = 4 / 20
    assert betas == pytest.approx([0.1, 0.1 * 0.96, 0.1 * 0.96 * 1.04])
    assert metrics["last_beta"] == pytest.approx(0.1 * 0.96 * 1.04**2)
    assert metrics["last_kl"] == recorder.batches[-1]["kl"]


@pytest.mark.slow
def test_a_strong_penalty_holds_the_policy_nearer_to_the_reference(tmp_path):
    kls = []
    for initial in (0.0, 5.0):
        settings = replace(QUICK, epochs=4, kl=KLSettings(initial=initial, horizon=None))
        kls.append(run(tmp_path / str(initial), settings)[1]["last_kl"])
    assert kls[1] < 0.5 * kls[0]


def test_early_stop_at_a_multiple_of_the_target(tmp_path):
    samples = make_samples(12)
    settings = replace(QUICK, kl=KLSettings(target=1e-4, stop_multiple=2.0))
    stopped, metrics = run(tmp_path / "a", settings, samples)
    assert metrics["stopped_early"] and metrics["batches"] == 1 and metrics["last_kl"] > 2e-4
    assert metrics["updates"] == 4  # of the first batch: at the fifth step there was nothing to update by
    # the batch at whose start the KL was found too high changed nothing: the policy is that of the first batch's end
    first = PPOSettings(**{**vars(settings), "kl": KLSettings(target=1e-4)})
    halfway = KillAt(4)
    with pytest.raises(Killed):
        run(tmp_path / "b", first, samples, callbacks=[halfway])
    assert_same_bits({name: each for name, each in stopped.items() if "lora" in name}, halfway.seen)
    _, metrics = run(tmp_path / "c", first, samples)
    assert not metrics["stopped_early"] and metrics["batches"] == 3


def test_logs_and_summary_hold_what_the_glossary_defines(tmp_path):
    recorder = Recorder()
    samples = make_samples(6)
    _, metrics = run(tmp_path, samples=samples, callbacks=[recorder])
    assert len(recorder.batches) == 2  # one entry a PPO batch
    glossary = GLOSSARY.read_text(encoding="utf-8")
    wanted = {"reward", "s_end", "s_path", "s_cf", "s_wm", "kl", "beta", "clip_fraction", "entropy", "approx_kl",
              "value_loss", "explained_variance", "policy_loss", "grad_norm", "ess", "response_tokens",
              "tokens_per_second"}
    assert wanted <= recorder.batches[0].keys()
    for name in recorder.batches[0].keys() | metrics.keys():
        assert f"| `{name}` |" in glossary, name
    assert (metrics["samples"], metrics["batches"], metrics["updates"]) == (6, 2, 6)
    json.dumps(metrics, allow_nan=False)
    # the two batches of four and of two samples hold each sample once
    logged = [(logs["reward"], logs["s_wm"], logs["response_tokens"]) for logs in recorder.batches]
    totals = (4 * np.array(logged[0]) + 2 * np.array(logged[1])) / 6
    expected = [np.mean([s.reward for s in samples]), np.mean([s.components["s_wm"] for s in samples]),
                np.mean([len(s.response_ids) for s in samples])]
    assert totals == pytest.approx(expected)


def test_the_reference_is_computed_once_and_only_trusted_for_its_samples(tmp_path):
    samples = make_samples()
    first = OfflinePPOTrainer(PolicyWithValue(make_model(), False), samples, QUICK, tmp_path).reference
    for logprobs, sample in zip(first, samples, strict=True):
        assert logprobs.tolist() == pytest.approx(naive_logprobs(make_model(), sample), abs=2e-5)
    moved = make_model()
    with torch.no_grad():
        for parameter in trainable(moved):
            moved.get_parameter(parameter).add_(0.1)
    again = OfflinePPOTrainer(PolicyWithValue(moved, False), samples, QUICK, tmp_path).reference
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = OfflinePPOTrainer(PolicyWithValue(moved, False), make_samples(seed=5), QUICK, tmp_path).reference
    assert len(other) == 6 and not torch.equal(other[0], first[0])


# ---- what is not finite ----


def poison(model, when):
    """From the `when`-th backward pass on, one adapter weight gets a gradient that is not a number."""
    count = [0]

    def hook(gradient):
        count[0] += 1
        return gradient * float("nan") if count[0] >= when else gradient

    next(p for n, p in model.named_parameters() if "lora_B" in n).register_hook(hook)


def test_a_gradient_that_is_not_finite_stops_the_run_with_the_ids(tmp_path):
    model, samples = make_model(), make_samples()
    poison(model, when=3)
    keep = KillAt(2)
    with pytest.raises(Killed):
        run(tmp_path / "a", samples=samples, callbacks=[keep])
    with pytest.raises(NonFiniteError) as error:
        run(tmp_path / "b", samples=samples, model=model)
    plan = OfflinePPOTrainer(PolicyWithValue(make_model(), False), samples, QUICK, tmp_path / "c").plan
    ids = [samples[plan[2].batch[row]].id for row in plan[2].rows]
    assert "gradient of optimiser step 3" in str(error.value) and all(name in str(error.value) for name in ids)
    assert sum(sample.id in str(error.value) for sample in samples) == 2
    assert "ppo.learning_rate" in str(error.value)
    assert_same_bits(trainable(model), keep.seen)  # two good updates, nothing of the third


def test_a_loss_that_is_not_finite_stops_the_run_with_the_ids(tmp_path, monkeypatch):
    plain = ppo_math.value_loss
    monkeypatch.setattr(ppo_math, "value_loss", lambda *a: plain(*a)._replace(loss=plain(*a).loss * float("inf")))
    model = make_model()
    before = trainable(model)
    with pytest.raises(NonFiniteError, match=r"loss of optimiser step 1 .*train-\d/arm, train-\d/arm"):
        run(tmp_path, model=model)
    assert_same_bits(trainable(model), before)


def test_a_broken_policy_is_found_before_training(tmp_path):
    model = make_model()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "down_proj.lora_B" in n).fill_(float("inf"))
    with pytest.raises(NonFiniteError, match="log-probability"):
        run(tmp_path, model=model)
    assert not (tmp_path / VALUE_HEAD).exists() and not (tmp_path / "reference.safetensors").exists()


@pytest.mark.parametrize("nats", [100, 800])
def test_a_token_all_but_impossible_to_the_reference(tmp_path, monkeypatch, nats):
    """e^100 is a KL that float32 does not hold, and e^800 none that float64 does."""
    plain = OfflinePPOTrainer._reference_logprobs

    def reference(trainer):
        found = plain(trainer)
        found[2] = found[2] - torch.tensor([nats, *[0] * (len(found[2]) - 1)])
        return found

    monkeypatch.setattr(OfflinePPOTrainer, "_reference_logprobs", reference)
    if nats == 100:
        recorder = Recorder()
        run(tmp_path, callbacks=[recorder])
        assert 1e42 < max(batch["kl"] for batch in recorder.batches) < 1e44  # a quarter of e^100, and what training moved
    else:
        with pytest.raises(NonFiniteError, match="KL from the reference of optimiser step .*train-2/arm"):
            run(tmp_path)
