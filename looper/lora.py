"""LoRA layers that train in the precision of their base, with no float32 copy of an activation."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor


def compute_in_base_precision(model: PeftModel) -> None:
    """Has each LoRA layer of `model`, whose weights stay float32 for the optimiser, multiply in the type of its input.

    PEFT casts a bfloat16 input to float32 and keeps that copy, multiplies it without tensor cores and adds in float32: of a
    small model's update that is more than the base itself takes. Of a float32 base the results are PEFT's, up to the
    order of sums; of a bfloat16 one they are rounded once more, as under autocast.
    """
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.forward = _forward_of(layer)


def _forward_of(layer: LoraLayer) -> Callable[[Tensor], Tensor]:
    name, = layer.active_adapters
    base, scaling, dropout = layer.base_layer, layer.scaling[name], layer.lora_dropout[name]
    down, up = layer.lora_A[name], layer.lora_B[name]

    def forward(x: Tensor) -> Tensor:
        out = base(x)
        low = F.linear(dropout(x), down.weight.to(x.dtype))
        return torch.addmm(out.flatten(0, -2), low.flatten(0, -2), up.weight.to(x.dtype).T, alpha=scaling).view_as(out)

    return forward
