"""A base in four bits, unpacked once for training where the card has room: bitsandbytes unpacks it in every pass."""

import torch
from peft import PeftModel
from torch import nn

from looper.distributed import rank
from looper.gpu_memory import unused_bytes


def unpack_if_room(model: PeftModel) -> None:
    """Unpacks the frozen NF4 layers of `model` if it is on a GPU of which half then stays free for activations; says what
    it chose. What the model computes stays the same."""
    if model.device.type != "cuda" or not (layers := four_bit_layers(model)):
        return
    unpacks = _has_room(sum(_unpacked_bytes(layer) - layer.weight.nbytes for layer in layers.values()))
    if unpacks:
        unpack(model)
    if rank() == 0:
        print("NF4 base: unpacked once for all passes" if unpacks else
              "NF4 base: unpacked anew in each pass, the GPU's memory being too small for all of it", flush=True)


def unpack(model: PeftModel) -> None:
    """Replaces each NF4 layer by a plain one of the numbers that bitsandbytes multiplies with."""
    for name, layer in four_bit_layers(model).items():
        model.set_submodule(name, _plain(layer))


def four_bit_layers(model: PeftModel) -> dict[str, nn.Module]:
    if not getattr(model, "is_loaded_in_4bit", False):
        return {}
    from bitsandbytes.nn import Linear4bit  # not on every system

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def _unpacked_bytes(layer: nn.Module) -> int:
    return layer.in_features * layer.out_features * layer.compute_dtype.itemsize


def _has_room(more: int) -> bool:
    """Whether half of what this process may take of the GPU is free beside `more` bytes. 8B parameters need 10 GB more than
    in four bits: 80 GB have room for that, 24 have not."""
    _, total = torch.cuda.mem_get_info()
    return unused_bytes() - more >= total * torch.cuda.get_per_process_memory_fraction() / 2


def _plain(layer: nn.Module) -> nn.Linear:
    from bitsandbytes.functional import dequantize_4bit

    plain = nn.Linear(layer.in_features, layer.out_features, device="meta")
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(layer.compute_dtype)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = None if layer.bias is None else nn.Parameter(layer.bias.to(layer.compute_dtype), requires_grad=False)
    return plain.train(layer.training)
