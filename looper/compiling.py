"""PyTorch's compiler, for what a GPU computes: there Python, launching thousands of small kernels, is the limit.

It is imported when something is compiled, and no sooner: a stage on a processor starts, and computes, without it.
TORCH_COMPILE_DISABLE=1 in the environment leaves the plain functions.
"""

import os
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest.mock import patch

import torch

# A fused kernel rounds to bfloat16 wherever PyTorch's separate ones do. And neither the clock nor the sizes of the first
# call choose the order of a sum, so that equal runs, and resumed ones, have equal bits.
OPTIONS = {"emulate_precision_casts": True, "deterministic": True, "split_reductions": False}


def compiles_on(device: torch.device) -> bool:
    """Whether what computes there is compiled."""
    return device.type == "cuda"


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled when it is first called: one program for all sizes that its tensors take."""
    program = _compile(function, dynamic=True, options=OPTIONS)
    # Of several processes each layer is a program already: it need not be cut at what they send each other
    torch._dynamo.config.optimize_ddp = False
    return program


@cache
def compiled_by_rows(function: Callable[..., Any], exact_division: bool = True) -> Callable[..., Any]:
    """`function`, whose tensor arguments are all [rows, ...], compiled at its first call, once for any number of rows.

    All other sizes are constants to the compiler, which makes better kernels so, and a single row is a case of its own.
    exact_division: whether to divide as plain code does, which is slow where nothing else is done.
    """
    fused = _compile(function, options=OPTIONS | {"eager_numerics.division_rounding": exact_division})

    def of_rows(*arguments: Any) -> Any:
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                torch._dynamo.maybe_mark_dynamic(argument, 0)
        return fused(*arguments)

    return of_rows


def _compile(function: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    # Read here, and at imports: looper.stage sets it against those libraries that would load the compiler for nothing
    with patch.dict(os.environ, TORCHDYNAMO_DISABLE="0"):
        return torch.compile(function, **how)
