"""A tiny Llama and its tokenizer, made in-process: what every test that needs a model loads instead of a real one."""

from functools import cache
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from looper.base_model import fetch_base
from looper.params import FolderBase, Model, Sft
from looper.prompts import INSTRUCTION

# Every token that one of the three templates writes as one token.
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>",
           "<｜Assistant｜>"]
PLAIN = ["<think>", "</think>"]  # one token each, but part of the text: no decoder leaves them out
TEXT = [INSTRUCTION, "Ann has 3 apples and buys 4 more. How many apples does Ann have now?", "She has 3+4=7 apples.",
        "#### 7", "system user assistant You are Qwen, created by Alibaba Cloud. You are a helpful assistant."]

CPU = Model(device="cpu", dtype="float32", quantization="none", template="chatml")


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 350 tokens; its end of sequence is ChatML's."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=350, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.add_tokens([AddedToken(token, normalized=False) for token in PLAIN])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    """Two layers, hidden size 32, random float32 weights."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.3,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)).eval()


def save_tiny(folder: Path, seed: int = 0) -> Path:
    """A source folder, as base's `folder` source reads it: safetensors and tokenizer, no manifest."""
    tiny_model(seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_base(target: Path, seed: int = 0) -> Path:
    """`target` as the stage base leaves models/base: the tiny model with its manifest."""
    source = save_tiny(target.with_name(f"{target.name}-source"), seed)
    fetch_base(FolderBase(source="folder", path=str(source), digest=None, licence="none"), target)
    return target


def tiny_rows(count: int = 16) -> list[dict]:
    """Prepared rows: sums of two small numbers, of several lengths."""
    rows = []
    for i in range(count):
        a, b, more = 1 + i % 7, 2 + i % 5, " more" * (i % 4)
        rows.append({"id": f"train-{i:05d}", "question": f"Ann has {a} apples and buys {b}{more}. How many?",
                     "solution": f"She has {a}+{b}={a + b} apples.", "gold_answer": str(a + b)})
    return rows


def tiny_sft(**changes) -> Sft:
    """Settings of a run of a few updates."""
    lora = {"r": 4, "alpha": 8, "dropout": 0.0} | changes.pop("lora", {})
    own = {"samples": 2, "temperature": 0.7, "max_new_tokens": 12, "batch_size": 8, "seed": 0}
    return Sft(**{"targets": "gold", "self": own, "lora": lora, "learning_rate": 1e-2, "epochs": 1,
                  "batch_size": 8, "micro_batch": 8, "warmup_share": 0.0, "max_tokens": 512, "max_grad_norm": 1.0,
                  "loss_on": "completion", "gradient_checkpointing": False, "save_steps": 1000, "seed": 0} | changes)
