import random

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from looper import ppo_math
from looper.ppo_data import COMPONENTS, PPOSample, collate
from looper.ppo_policy import PolicyWithValue
from looper.ppo_settings import PPOSettings
from tests.looper.ppo_helpers import (KillAt, Killed, Recorder, assert_same_bits, make_model, make_nf4_model,
                                      make_samples, naive_logprobs, run, trainable,
                                      with_lora)


def test_log_probabilities_of_a_padded_batch_are_those_of_each_sample_alone():
    model, samples = make_model(), make_samples()
    tokens = collate(samples, torch.device("cpu"))
    logprobs, values, entropies = PolicyWithValue(model, False)(tokens)
    for row, sample in zip(logprobs, samples, strict=True):
        length = len(sample.response_ids)
        assert row[:length].tolist() == pytest.approx(naive_logprobs(model, sample), abs=2e-5)
        assert (row[length:] == 0).all()
    assert (values == 0).all()  # a new critic expects nothing
    assert ((entropies > 0) == tokens.mask).all()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_dropout_acts_and_the_same_bits_come_with_and_without_gradient(dtype, checkpointing):
    policy = PolicyWithValue(make_model(dtype), checkpointing).train()
    tokens = collate(make_samples(), torch.device("cpu"))
    with torch.no_grad():
        first, again = policy(tokens)[0], policy(tokens)[0]
    assert torch.equal(first, again) and torch.equal(first, policy(tokens)[0])
    assert first.dtype == torch.float32


def test_only_the_layers_know_whether_it_trains():
    policy = PolicyWithValue(make_model(), True)
    layers = list(policy.policy.get_base_model().model.layers)
    for mode in (True, False, True):
        policy.train(mode)
        assert [each.training for each in policy.modules()] == [mode and each in layers for each in policy.modules()]


def test_gradient_checkpointing_recomputes_the_layers_and_changes_nothing():
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = make_model()
        layer = model.get_base_model().model.layers[0].mlp
        calls.append(0)
        layer.register_forward_pre_hook(lambda *_: calls.__setitem__(-1, calls[-1] + 1))
        policy = PolicyWithValue(model, checkpointing).train()
        policy(collate(make_samples(), torch.device("cpu")))[0].sum().backward()
        gradients.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
    assert calls == [1, 2]
    assert_same_bits(gradients[1], gradients[0])


def test_only_adapter_and_value_head_are_trained_in_float32_on_a_bfloat16_base():
    model = make_model(torch.bfloat16)
    for parameter in trainable(model):
        model.get_parameter(parameter).data = model.get_parameter(parameter).data.bfloat16()
    policy = PolicyWithValue(model, False)
    kinds = {("lora" in name or "value_head" in name, parameter.dtype, parameter.requires_grad)
             for name, parameter in policy.named_parameters()}
    assert kinds == {(True, torch.float32, True), (False, torch.bfloat16, False)}


def test_a_frozen_adapter_and_a_trained_head_are_refused():
    frozen = make_model().requires_grad_(False)
    with pytest.raises(ValueError, match="is_trainable=True"):
        PolicyWithValue(frozen, False)
    with pytest.raises(ValueError, match="leave lm_head out"):
        PolicyWithValue(make_model(target_modules=["q_proj", "lm_head"]), False)


@pytest.mark.parametrize("change", [{"model_type": "gemma2"}, {"use_sliding_window": True}])
def test_a_model_whose_rows_cannot_be_laid_end_to_end_is_refused(change):
    model = make_model()
    for name, value in change.items():
        setattr(model.get_base_model().config, name, value)
    with pytest.raises(ValueError, match="has a sliding window; it must be one of llama, qwen2 with full attention"):
        PolicyWithValue(model, False)


# ---- on a GPU ----

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def make_gpu_model(folder, quantised):
    config = dict(vocab_size=32_000, hidden_size=512, intermediate_size=1024, num_hidden_layers=4,
                  num_attention_heads=8, num_key_value_heads=4)
    if quantised:
        return make_nf4_model(folder, "cuda", 0.02, **config)
    torch.manual_seed(0)
    return with_lora(LlamaForCausalLM(LlamaConfig(**config)).to("cuda", torch.bfloat16), 0.02)


def make_gpu_samples(count=10):
    rng = random.Random(0)
    return [PPOSample(f"q{i}/a", [rng.randrange(32_000) for _ in range(rng.randint(50, 150))],
                      response := [rng.randrange(32_000) for _ in range(rng.randint(20, 300))], [-10.0] * len(response),
                      rng.uniform(-0.5, 1.7), None, dict.fromkeys(COMPONENTS, 0.5)) for i in range(count)]


@pytest.mark.parametrize("quantised", [pytest.param(quantised, marks=on_gpu) for quantised in (False, True)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gpu_run_starts_at_ratio_one_and_resumes(tmp_path, monkeypatch, quantised, checkpointing):
    ratios, plain = [], ppo_math.policy_loss

    def spy(logprobs, old_logprobs, *rest):
        ratios.append((logprobs - old_logprobs).detach().exp())
        return plain(logprobs, old_logprobs, *rest)

    monkeypatch.setattr(ppo_math, "policy_loss", spy)
    settings = PPOSettings(learning_rate=1e-3, gradient_checkpointing=checkpointing, save_steps=1, ppo_epochs=2)
    recorder, killer = Recorder(), KillAt(5)
    folder, samples = tmp_path / "run", make_gpu_samples()
    unbroken, _ = run(folder, settings, samples, make_gpu_model(tmp_path / "base", quantised), [recorder])
    assert (ratios[0] == 1).all() and (ratios[1] != 1).any()
    assert recorder.batches[0]["kl"] == 0.0 and recorder.batches[1]["kl"] > 0
    assert all(np.isfinite(list(logs.values())).all() for logs in recorder.batches)
    with pytest.raises(Killed):
        run(tmp_path / "killed", settings, samples, make_gpu_model(tmp_path / "base", quantised), [killer])
    resumed, _ = run(tmp_path / "killed", settings, samples, make_gpu_model(tmp_path / "base", quantised))
    for name, expected in unbroken.items():
        assert torch.equal(resumed[name], expected), name


@pytest.mark.parametrize("rows", [pytest.param(700, marks=on_gpu)])
def test_gpu_log_softmax_of_bfloat16_keeps_float32_logits(rows):
    torch.manual_seed(0)
    hidden = (torch.randn(rows, 512, device="cuda") * 2).bfloat16().requires_grad_()
    weight = torch.randn(32_000, 512, device="cuda").bfloat16()
    targets = torch.randint(32_000, (rows,), device="cuda")
    logprobs, entropy = ppo_math.selective_log_softmax(hidden, weight, targets)
    (gradient,) = torch.autograd.grad(logprobs.sum(), hidden)
    reference = hidden.detach().double().requires_grad_()
    exact = (reference @ weight.double().T).log_softmax(-1)
    chosen = exact[torch.arange(rows), targets]
    (exact_gradient,) = torch.autograd.grad(chosen.sum(), reference)
    torch.testing.assert_close(logprobs.double(), chosen, rtol=0, atol=1e-3)  # bfloat16 logits are off by 0.2 here
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(-1), rtol=0, atol=1e-3)
    assert (gradient.double() - exact_gradient).norm() < 0.01 * exact_gradient.norm()
