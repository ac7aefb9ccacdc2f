"""LoRA layers that train in the precision of their base, with no float32 copy of an activation."""

from functools import cache

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
            layer.__class__ = _in_base_precision(type(layer))


class _InBasePrecision:
    """The forward pass. It stands in a class, not in a closure a layer: a compiler takes all layers for one."""

    def forward(self, x: Tensor) -> Tensor:
        name, = self.active_adapters
        down, up = self.lora_A[name], self.lora_B[name]
        out = self.base_layer(x)
        low = F.linear(self.lora_dropout[name](x), down.weight.to(x.dtype))
        up_t = up.weight.to(x.dtype).T
        return torch.addmm(out.flatten(0, -2), low.flatten(0, -2), up_t, alpha=self.scaling[name]).view_as(out)


@cache
def _in_base_precision(kind: type[LoraLayer]) -> type[LoraLayer]:
    """`kind`, one of PEFT's classes of LoRA layers, with that forward pass."""
    return kind if issubclass(kind, _InBasePrecision) else type(kind.__name__, (_InBasePrecision, kind), {})
