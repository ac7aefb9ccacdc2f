"""What the engine's tests share: tiny models, prompts, and what transformers gives for them."""

from functools import cache

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

EOS = [7, 8, 9, 10, 11]
FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}


def tiny_model(family="llama", **overrides):
    """Random float32 weights, spread enough that greedy choices are no ties; 2 query heads a key-value head."""
    config_class, model_class = FAMILIES[family]
    settings = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(0)
    return model_class(config_class(**settings | overrides)).eval()


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def llama():
    return tiny_model()


def make_prompts(lengths=(5, 1, 17, 2, 30, 9, 9, 3), vocabulary=300):
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(12, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    return [*prompts, prompts[0]]  # one prompt twice, as two arms have it


def settings(**overrides):
    return {"max_new_tokens": 40, "eos_token_ids": EOS, "batch_size": 4, "seed": 3} | overrides


def reference_greedy(model, prompt, max_new_tokens, eos_token_ids):
    return _reference_greedy(model, tuple(prompt), max_new_tokens, tuple(eos_token_ids))


@cache
def _reference_greedy(model, prompt, max_new_tokens, eos_token_ids):
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(eos_token_ids) or None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def teacher_forced(model, prompt, completion, temperature):
    """Log-probabilities of a completion's tokens from one full float32 forward pass without a cache."""
    ids = torch.tensor([prompt + completion.token_ids], device=model.device)
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
    targets = torch.tensor(completion.token_ids, device=model.device)
    return torch.log_softmax(logits / (temperature or 1.0), -1)[torch.arange(len(targets)), targets]
