"""Random weights of the 8B shape as a base model, to see that a profile runs and what it needs without the real ones.

    python tests/random_8b.py models/base

Needs a CUDA GPU and 16 GB of disk. The tokenizer is the tests' tiny one: every id it makes is below the vocabulary's end.
"""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from looper.base_model import MANIFEST, digest
from looper.files import sha256, write_json
from tiny import tiny_tokenizer


def main(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
                         num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131_072,
                         tie_word_embeddings=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                         pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    files = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    write_json(folder / MANIFEST, {"source": "random", "files": files, "digest": digest(files)})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
