"""PyTorch's compiler, for what a GPU computes: there Python, launching thousands of small kernels, is the limit.

It is imported when something is compiled, and no sooner: a stage on a processor starts, and computes, without it.
"""

import os
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest.mock import patch

import torch

# Where PyTorch's own kernels round to bfloat16, so do the compiled ones.
OPTIONS = {"emulate_precision_casts": True}


def compiles_on(device: torch.device) -> bool:
    """Whether what computes there is compiled."""
    return device.type == "cuda"


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled when it is first called: one program for all sizes that its tensors take."""
    # looper.stage switches the compiler off, for the libraries that would load it for nothing
    with patch.dict(os.environ, TORCHDYNAMO_DISABLE="0"):
        program = torch.compile(function, dynamic=True, options=OPTIONS)
    # Of several processes each layer is a program already: it need not be cut at what they send each other
    torch._dynamo.config.optimize_ddp = False
    return program
