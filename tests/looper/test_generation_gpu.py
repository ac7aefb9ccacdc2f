"""The engine on CUDA: graphs, refills and the flash kernel against transformers' own."""

import time

import pytest
import torch

from looper.generation import generate
from tests.looper.generation_helpers import (
    EOS,
    FAMILIES,
    make_prompts,
    reference_greedy,
    settings,
    teacher_forced,
    tiny_model,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture
def shrinking(monkeypatch):
    """A batch of a few rows shrinks to two, as one of hundreds does to 32."""
    monkeypatch.setattr("looper.generation.CUDA_FEWEST", 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_gpu_greedy_tokens_equal_generate_with_graphs_and_refills(family, shrinking):
    model = tiny_model(family).cuda()
    prompts = make_prompts([5, 1, 17, 2, 30, 9, 9, 3] * 4)
    found = generate(model, prompts, temperatures=[0.0] * 33, **settings(max_new_tokens=100, batch_size=8))
    assert [completion.token_ids for completion in found] == [reference_greedy(model, p, 100, EOS) for p in prompts]


@pytest.mark.parametrize(("dtype", "mean", "largest"), [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 1e-2, 5e-2)])
def test_gpu_logprobs_equal_a_full_forward_pass(dtype, mean, largest, shrinking):
    """In bfloat16 a logit of 4 is rounded by up to 0.016, and a temperature of 0.5 doubles that."""
    model = tiny_model(initializer_range=0.05, hidden_size=256, vocab_size=2000).to("cuda", dtype)
    prompts = make_prompts([5, 1, 17, 2, 30, 9, 9, 3] * 4, 2000)
    temperatures = [0.0, 0.5, 1.0] * 11
    found = generate(model, prompts, temperatures=temperatures, **settings(max_new_tokens=100, batch_size=8))
    assert found == generate(model, prompts, temperatures=temperatures, **settings(max_new_tokens=100, batch_size=8))
    for completion, prompt, temperature in zip(found, prompts, temperatures):
        expected = teacher_forced(model, prompt, completion, temperature).cpu()
        difference = (torch.tensor(completion.logprobs) - expected).abs()
        assert difference.mean() <= mean and difference.max() <= largest


def test_gpu_bfloat16_greedy_tokens_are_the_best_within_rounding():
    """Qwen's vocabulary. Of so many tokens two are often as good: equality with `generate` holds up to such a tie."""
    model = tiny_model("qwen2", hidden_size=256, vocab_size=151_936).to("cuda", torch.bfloat16)
    prompts = make_prompts([5, 1, 17, 2, 30, 9, 9, 3] * 4, 151_936)
    same_length = settings(max_new_tokens=100, eos_token_ids=[], batch_size=16)
    chosen_is_best = []
    for prompt, completion in zip(prompts, generate(model, prompts, temperatures=[0.0] * 33, **same_length)):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion.token_ids], device="cuda")).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(completion.token_ids, device="cuda")[:, None])[:, 0].float()
        best = logits.amax(-1).float()
        assert ((best - chosen) <= 0.05 * best).all()
        chosen_is_best.append(chosen == best)
    assert torch.cat(chosen_is_best).float().mean() > 0.9


def test_gpu_throughput_beats_generate_at_a_small_models_shape(capsys):
    """SmolLM2-135M's shape, random bfloat16 weights, 256 rows of 128 tokens: the same work on both sides."""
    model = tiny_model(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048, initializer_range=0.02,
    ).to("cuda", torch.bfloat16)  # fmt: skip
    prompts = make_prompts([100] * 255, 49152)
    ids = torch.tensor(prompts, device="cuda")

    def ours():
        same_work = settings(max_new_tokens=128, eos_token_ids=[], batch_size=256)
        generate(model, prompts, temperatures=[0.5] * 256, **same_work)

    def theirs():
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, min_new_tokens=128, max_new_tokens=128)

    seconds = {}
    for name, work in (("ours", ours), ("generate", theirs)):
        work()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - begun
    with capsys.disabled():
        print({name: f"{256 * 128 / value:,.0f} tokens/s" for name, value in seconds.items()})
    assert seconds["ours"] < seconds["generate"]
