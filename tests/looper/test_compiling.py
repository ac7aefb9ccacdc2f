"""Compiled layers compute what plain ones do, are compiled once for all layers and lengths, and leave resuming exact."""

import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from tests.looper.compile_helpers import compiled_here, opaque_attention  # noqa: F401, fixtures
from tests.looper.ppo_helpers import (QUICK, KillAt, Killed, Recorder, assert_same_bits, make_nf4_model, make_samples,
                                      run, trainable, with_lora)
from tiny import tiny_model, tiny_rows, tiny_sft
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from looper import compiling, ppo_math
from looper.compiling import compiled
from looper.determinism import deterministic
from looper.layers import compiled_layers, compiles
from looper.nf4 import unpack
from looper.ppo import PPOSample
from looper.ppo_data import COMPONENTS, collate
from looper.ppo_policy import PolicyWithValue
from looper.prompts import TEMPLATES
from looper.sft import finetune

KINDS = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen2": (Qwen2ForCausalLM, Qwen2Config)}
BATCHES = [[0, 1, 2, 3], [4, 5], [6], list(range(20)), [7, 8, 9]]  # several numbers of rows, and of tokens


def make_policy(kind, dtype, checkpointing=False, device="cpu", **config):
    torch.manual_seed(0)
    model, settings = KINDS[kind]
    config = {"vocab_size": 23, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
              "num_attention_heads": 4, "num_key_value_heads": 2} | config
    return PolicyWithValue(with_lora(model(settings(**config)).to(device, dtype), 0.1), checkpointing).train()


def passes(policy, samples, batches, device="cpu"):
    """Log-probabilities and gradients of each batch."""
    found = []
    for batch in batches:
        policy.zero_grad()
        logprobs, values, _ = policy(collate([samples[i] for i in batch], torch.device(device)))
        (logprobs.sum() + values.sum()).backward()
        gradients = [each.grad.flatten() for each in policy.parameters() if each.grad is not None]
        found.append((logprobs.detach(), torch.cat(gradients)))
    return found


def far(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize("kind, dtype, checkpointing, limit", [
    ("llama", torch.float32, False, 1e-5), ("qwen2", torch.bfloat16, True, 0.03)])
def test_all_layers_and_lengths_share_a_program_that_compute_what_plain_layers_do(
        compiled_here, kind, dtype, checkpointing, limit):
    policy, samples = make_policy(kind, dtype, checkpointing), make_samples(20)
    with deterministic():
        expected = passes(policy, samples, BATCHES)
        plain = [type(each) for each in policy.modules()]
        with compiled_layers(policy):
            found = passes(policy, samples, BATCHES)
    assert 1 <= compiled_here() <= 3  # one of the layers; the logits' own
    assert [type(each) for each in policy.modules()] == plain
    for (logprobs, gradients), (expected_logprobs, expected_gradients) in zip(found, expected, strict=True):
        assert far(logprobs, expected_logprobs) < limit and far(gradients, expected_gradients) < limit
        assert expected_gradients.norm() > 1


def test_layers_in_halves_with_their_rows_end_to_end_compile_on_a_gpu_alone(monkeypatch, tmp_path):
    def found(model):
        return compiles(model.get_base_model().model.layers[0])

    half = make_policy("qwen2", torch.bfloat16).policy
    assert not found(half)
    monkeypatch.setattr(compiling, "compiles_on", lambda device: True)
    assert found(half) and not found(make_policy("qwen2", torch.float32).policy)
    nf4 = PolicyWithValue(make_nf4_model(tmp_path), False).policy
    assert not found(nf4)
    unpack(nf4)
    assert found(nf4)
    half.get_base_model().set_attn_implementation("sdpa")
    assert not found(half)


def test_a_processor_compiles_nothing_and_does_not_load_the_compiler():
    policy = make_policy("llama", torch.float32)
    kinds = [type(each) for each in policy.modules()]
    with compiled_layers(policy):
        assert [type(each) for each in policy.modules()] == kinds
    code = ("import sys, torch, looper.sft, looper.ppo\n"
            "with looper.ppo.compiled_layers(torch.nn.Linear(2, 2)): pass\n"
            "assert 'torch._inductor.compile_fx' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_log_softmax_in_one_pass_is_log_softmax(compiled_here):
    logits, targets = torch.randn(9, 501), torch.randint(501, (9,))
    results = []
    for function in (ppo_math._log_softmax, compiled(ppo_math._one_pass_log_softmax)):
        leaf = logits.clone().requires_grad_()
        logprobs, entropies = function(leaf, targets)
        assert logprobs.requires_grad and not entropies.requires_grad
        logprobs.backward(torch.linspace(-1, 1, 9))
        results.append((logprobs.detach(), entropies, leaf.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert compiled_here() == 1


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_fine_tuning_with_dropout_killed_and_resumed_gives_the_same_bits(
        compiled_here, tokenizer, tmp_path, monkeypatch, checkpointing):
    settings = tiny_sft(lora={"dropout": 0.3}, save_steps=2, batch_size=4, micro_batch=2, epochs=2,
                        gradient_checkpointing=checkpointing)

    def train(folder):
        model, _ = finetune(tiny_model(), tokenizer, TEMPLATES["chatml"], tiny_rows(), settings, folder / "scratch",
                            folder / "live")
        return trainable(model)

    unbroken = train(tmp_path / "a")
    callbacks = transformers.trainer.DEFAULT_CALLBACKS
    monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [*callbacks, KillAt(5)])
    with pytest.raises(Killed):
        train(tmp_path / "b")
    monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", callbacks)
    torch.rand(7)  # the generator's state comes from the checkpoint alone
    assert_same_bits(train(tmp_path / "b"), unbroken)
    assert 1 <= compiled_here() <= 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype, checkpointing", [(torch.float32, False), (torch.bfloat16, True)])
def test_compiled_ppo_starts_at_ratio_one_and_resumes_to_the_same_bits(
        compiled_here, tmp_path, monkeypatch, dtype, checkpointing):
    plain, ratios, recorder = ppo_math.policy_loss, [], Recorder()

    def spy(logprobs, old_logprobs, *rest):
        ratios.append((logprobs - old_logprobs).detach().exp())
        return plain(logprobs, old_logprobs, *rest)

    def model():
        return make_policy("llama", dtype).policy

    monkeypatch.setattr(ppo_math, "policy_loss", spy)
    settings = replace(QUICK, save_steps=1, gradient_checkpointing=checkpointing)
    unbroken, _ = run(tmp_path / "a", settings, model=model(), callbacks=[recorder])
    assert (ratios[0] == 1).all() and (ratios[1] != 1).any() and (ratios[4] == 1).all()
    assert recorder.batches[0]["kl"] == 0.0 and recorder.batches[1]["kl"] > 0
    with pytest.raises(Killed):
        run(tmp_path / "b", settings, model=model(), callbacks=[KillAt(5)])
    assert_same_bits(run(tmp_path / "b", settings, model=model())[0], unbroken)
    assert 1 <= compiled_here() <= 3  # one of the layers; the logits', and again for a single position


# ---- on a GPU ----

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind, checkpointing", [("llama", False), ("qwen2", True)])
def test_gpu_compiled_layers_compute_what_plain_ones_do(monkeypatch, kind, checkpointing):
    config = {"vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8,
              "num_key_value_heads": 4}
    policy = make_policy(kind, torch.bfloat16, checkpointing, "cuda", **config)
    rng = random.Random(0)
    samples = [PPOSample(f"q{i}/a", [rng.randrange(32_000) for _ in range(rng.randint(50, 150))],
                         response := [rng.randrange(32_000) for _ in range(rng.randint(20, 300))], [-10.0] * len(response),
                         0.5, None, dict.fromkeys(COMPONENTS, 0.5)) for i in range(20)]
    torch._dynamo.reset()
    counters.clear()
    with deterministic():
        with monkeypatch.context() as plainly:
            plainly.setattr(compiling, "compiles_on", lambda device: False)
            expected = passes(policy, samples, BATCHES, "cuda")
        with compiled_layers(policy):
            found = passes(policy, samples, BATCHES, "cuda")
            again = passes(policy, samples, BATCHES, "cuda")
    assert 2 <= counters["stats"]["unique_graphs"] <= 4 and not counters["graph_break"]
    for one, other, plain in zip(found, again, expected, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
        assert far(one[0], plain[0]) < 0.01 and far(one[1], plain[1]) < 0.05 and plain[1].norm() > 0.1
