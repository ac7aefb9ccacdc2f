"""What both sides of a stage work on: one model, one adapter, lists of token ids of stored lengths."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers import trainer as transformers_trainer

from bench.measure import Gate, copy_bandwidth, peak_flops
from looper.base_model import compute_dtype, load_base, load_tokenizer
from looper.decoding import KERNELS
from looper.distributed import world
from looper.params import Lora, Model
from looper.prompts import TEMPLATES, Template

LENGTHS = Path(__file__).with_name("lengths.txt")
LORA = Lora(r=32, alpha=16, dropout=0.0)  # no dropout: each side would draw other masks, and no result could be equal


class Shape(NamedTuple):
    """What a model's arithmetic and memory follow from."""

    body: int  # weights of the matrix products of all layers
    head: int  # weights of the language model's head
    kv: int  # numbers in the keys and values of one token
    vocabulary: int


class Setup(NamedTuple):
    """One machine and one model."""

    folder: Path
    model: Model  # how this repository loads it for training; generation dequantises NF4
    tokenizer: PreTrainedTokenizerBase
    template: Template
    shape: Shape
    dtype: torch.dtype
    flops: float  # FLOP/s of large matrix products in `dtype`, of all processes' devices together
    bandwidth: float  # bytes/s of a large copy, read and written together, likewise

    @property
    def cuda(self) -> bool:
        return self.model.device == "cuda"


def set_up(folder: Path, device: str, quantization: str) -> Setup:
    """Reads the model's shape and measures the device. quantization: none or nf4, of the base in training.

    Raises ValueError if `folder` is not a base model as the stage base leaves it.
    """
    tokenizer = load_tokenizer(folder)
    name, template = next((name, each) for name, each in TEMPLATES.items()
                          if len(tokenizer.encode(each.end, add_special_tokens=False)) == 1)
    model = Model(device=device, dtype="bfloat16", quantization=quantization, template=name)
    dtype = compute_dtype(model)
    return Setup(folder, model, tokenizer, template, shape_of(folder), dtype, peak_flops(device, dtype) * world(),
                 copy_bandwidth(device) * world())


def shape_of(folder: Path) -> Shape:
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = [each.weight.numel() for each in model.modules() if isinstance(each, nn.Linear)]
    head = model.get_output_embeddings().weight.numel()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    return Shape(sum(linear) - head, head, kv, config.vocab_size)


# ---- models ----


def load(setup: Setup, quantised: bool) -> PreTrainedModel:
    """A copy of the base: NF4 where the setup trains so and `quantised`, else what generation merges into."""
    model = load_base(setup.folder, setup.model)
    return model if quantised or setup.model.quantization == "none" else model.dequantize()


def with_adapter(model: PreTrainedModel) -> PeftModel:
    """LoRA on all linear layers, trainable; the same weights whenever it is called, and none of them zero."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=LORA.r, lora_alpha=LORA.alpha, lora_dropout=LORA.dropout,
                      target_modules="all-linear")
    return seed_adapter(get_peft_model(model, lora))


@torch.no_grad()
def seed_adapter(model: PeftModel) -> PeftModel:
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
    return model


def merged(setup: Setup) -> PreTrainedModel:
    """The adapter merged into the dequantised base, as this repository generates."""
    return with_adapter(load(setup, quantised=False)).merge_and_unload().eval()


# ---- rows ----


def with_either_attention(setup: Setup, name: str, plain: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """`plain` by its side's name; on CUDA also without cuDNN's attention, which PyTorch prefers on Hopper GPUs and which makes
    a plan for each new size. The best plain setting is the faster one."""
    return {name: plain} | ({f"{name}, no cuDNN attention": sdpa_kernel(KERNELS)(plain)} if setup.cuda else {})


def lengths(count: int) -> list[tuple[int, int]]:
    """The first `count` (prompt, output) lengths of the stored list, in tokens; it begins again after its end."""
    lines = [line.split() for line in LENGTHS.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return list(islice(cycle((int(prompt), int(output)) for prompt, output in lines), count))


def random_ids(setup: Setup, length: int, seed: str) -> list[int]:
    """`length` token ids that the model and its tokenizer know."""
    known = min(setup.shape.vocabulary, len(setup.tokenizer))
    return random.Random(seed).choices(range(known), k=length)


# ---- comparing ----


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return ((found - expected).norm() / expected.norm()).item()


class Update(NamedTuple):
    """What a side reports of an optimiser step, or of several."""

    loss: float
    gradients: Tensor | None  # of the first


# In a deep model in bfloat16 the order of sums alone may exceed a tolerance: a gate may be so many times as wide as two
# plain ways lie apart, up to CEILING. A wider one would show nothing.
OF_PLAIN = 1.5
CEILING = 0.3


def widened(tolerance: float, between: float, ceiling: float = CEILING) -> float:
    """The limit of a gate: `tolerance`, or what two plain ways that are `between` apart allow."""
    return max(tolerance, min(OF_PLAIN * between, ceiling))


def equality(name: str, apart: Sequence[float], limits: Sequence[float], between: Sequence[float] = (), ways: str = "",
             measure: str = "relative") -> list[Gate]:
    """The gates of loss and gradients against `name`'s: how far `apart` both are, and `limits`.

    between: how far apart two plain ways, which `ways` names, are: said beside what was found. measure: of the loss.
    """
    notes = [f" ({ways}: {each:.2e})" for each in between] or ["", ""]
    return [Gate(f"loss against {name}, {measure}{notes[0]}", apart[0], limits[0]),
            Gate(f"gradients against {name}, relative norm{notes[1]}", apart[1], limits[1])]


def relative(found: Update, expected: Update) -> tuple[float, float]:
    """How far `found`'s loss and gradients are from `expected`'s, relative to these."""
    return (abs(found.loss - expected.loss) / abs(expected.loss), relative_error(found.gradients, expected.gradients))


def gradients(model: nn.Module) -> Tensor:
    """All gradients of LoRA weights as one float32 vector on the CPU, in the order of their names."""
    named = sorted((name, each.grad) for name, each in model.named_parameters()
                   if "lora_" in name and each.grad is not None)
    return torch.cat([grad.detach().float().flatten().cpu() for _, grad in named])


@contextmanager
def watching(callback: TrainerCallback) -> Iterator[TrainerCallback]:
    """Every Trainer made in the block calls `callback` too, whoever makes it."""
    transformers_trainer.DEFAULT_CALLBACKS.append(callback)
    try:
        yield callback
    finally:
        transformers_trainer.DEFAULT_CALLBACKS.remove(callback)
