"""What the tests of offline PPO share: a Llama of two layers, random samples, callbacks that watch and kill, a tolerance."""

import gc
import random

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TrainerCallback

from looper.ppo import VALUE_HEAD, PPOSample, train_ppo
from looper.ppo_settings import PPOSettings

gc.freeze()  # the Trainer collects garbage at each start: keep it from walking through every imported library again

VOCABULARY = 23
QUICK = PPOSettings(batch_size=4, mini_batch_size=2, ppo_epochs=2, learning_rate=1e-2, save_steps=1000)


def make_model(dtype=torch.float32, **lora):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, attention_dropout=0.1, initializer_range=0.3)
    return with_lora(LlamaForCausalLM(config).to(dtype), 0.1, **lora)


def make_nf4_model(folder, device="cpu", lora_b=0.1, **config):
    """A bfloat16 Llama quantised to NF4 on its way from disk, with LoRA as after SFT."""
    torch.manual_seed(0)
    config = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
              "num_attention_heads": 2, "num_key_value_heads": 1} | config
    LlamaForCausalLM(LlamaConfig(**config)).bfloat16().save_pretrained(folder)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                             bnb_4bit_compute_dtype=torch.bfloat16)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": device},
                                             quantization_config=nf4)
    return with_lora(model, lora_b)


def with_lora(model, lora_b, **lora):
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.5, "target_modules": "all-linear"} | lora
    model = get_peft_model(model, LoraConfig(**lora))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # as after SFT: the adapter does something
            torch.nn.init.normal_(parameter, std=lora_b)
    return model


def make_samples(count=6, credit="question", seed=0):
    rng = random.Random(seed)
    samples = []
    for number in range(count):
        prompt, response = ([rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 7))] for _ in range(2))
        samples.append(PPOSample(
            f"train-{number}/arm", prompt, response, [rng.uniform(-4, -1) for _ in response], rng.uniform(-0.5, 1.7),
            rng.uniform(-1, 1) if credit == "arm" else None,
            {"s_end": rng.random(), "s_path": rng.random(), "s_cf": rng.random(), "s_wm": rng.random()}))
    return samples


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def close(found, expected):
    """`found`, a tensor or numbers, is `expected` to 1e-6."""
    found = found.detach() if torch.is_tensor(found) else found
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-6, atol=1e-6)


def trainable(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def run(folder, settings=QUICK, samples=None, model=None, callbacks=()):
    """→ the trained adapter and value head, and the summary."""
    model = model or make_model()
    samples = samples or make_samples(credit=settings.credit)
    metrics = train_ppo(model, samples, settings, folder, folder / VALUE_HEAD, callbacks)
    return trainable(model) | load_file(folder / VALUE_HEAD), metrics


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name


class Recorder(TrainerCallback):
    """What was logged, and the norm of the gradient that the optimiser got."""

    def __init__(self):
        self.logs, self.norms = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        self.norms.append(torch.nn.utils.get_total_norm(gradients).item())

    @property
    def batches(self):
        return [logs for logs in self.logs if "policy_loss" in logs]


def naive_logprobs(model, sample):
    """One sample by itself, unpadded, through the model's own head."""
    model.eval()
    with torch.no_grad():
        logits = model(torch.tensor([[*sample.prompt_ids, *sample.response_ids]])).logits[0].double()
    logprobs = logits.log_softmax(-1)
    start = len(sample.prompt_ids) - 1
    return [logprobs[start + t, token].item() for t, token in enumerate(sample.response_ids)]


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    """Ends the run after `step` optimiser steps, before anything of that step's end is logged or saved."""

    def __init__(self, step, event="on_step_end"):
        self.step, self.seen = step, None
        setattr(self, event, self.kill)

    def kill(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.seen = trainable(getattr(model, "policy", model))
            raise Killed
