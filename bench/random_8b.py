"""Random weights of the 8B shape as a base model: what a profile needs and how fast it is, without the real ones.

    python -m bench.random_8b models/base

Needs a CUDA GPU and 16 GB of disk. The tokenizer is a small one: every id it makes is below the vocabulary's end.
"""

import sys
from pathlib import Path

from looper.base_model import MANIFEST, digest
from looper.files import replacing, sha256, write_json
from looper.prompts import INSTRUCTION, TEMPLATES
from looper.sample_problems import generate


def make_8b(folder: Path) -> Path:
    """Writes the model into `folder`, whole or not at all; one that is there already stays. Returns `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if (folder / MANIFEST).exists():
        return folder
    tokenizer = small_tokenizer()
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131_072, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    with replacing(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        files = {path.name: sha256(path) for path in sorted(temporary.iterdir())}
        write_json(temporary / MANIFEST, {"source": "random", "files": files, "digest": digest(files)})
    return folder


def small_tokenizer():
    """A byte-level BPE of a thousand tokens, from the built-in problems; every template's end is one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    marks = ["<|endoftext|>", "<|im_start|>", *sorted({template.end for template in TEMPLATES.values()}),
             "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [INSTRUCTION, *(problem[key] for problem in generate("train", 200, 0) for key in ("question", "answer"))]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1000, special_tokens=marks, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<｜end▁of▁sentence｜>", pad_token="<|endoftext|>")


if __name__ == "__main__":
    make_8b(Path(sys.argv[1]))
