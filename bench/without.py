"""This repository with one of its speedups switched off, to be measured beside the whole: what each of them is worth.

On a processor, or without a base in four bits, most of them are not there to begin with: such a side is the whole again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

if TYPE_CHECKING:
    from torch import nn


class Speedup(NamedTuple):
    stages: tuple[str, ...]  # those that have it
    instead: dict[str, Any]  # what stands in the place of which name, in each module that has imported it
    own_model: bool = False  # it changes the model for good: a side without it cannot share that model


SPEEDUPS = {
    # In training the decoder layers, and PPO's log-softmax with them; in generation the pieces and the sampler
    "compiling": Speedup(("sft", "rollouts", "ppo", "eval"), dict.fromkeys(
        ("looper.compiling.compiles_on", "looper.decoding.compiles_on"), lambda device: False)),
    "filling": Speedup(("sft", "ppo"), {"looper.packing.filling": lambda tokens, device: 0}),
    # In training the decoder layers' passes: launched as one, for each size of pass
    "graphs": Speedup(("sft", "ppo"), {"looper.graphs.graphs": lambda layers: False}),
    # Compiling and graphs go with it: looper.layers leaves layers in four bits plain
    "unpacking": Speedup(("sft", "ppo"), dict.fromkeys(
        ("looper.sft.unpack_if_room", "looper.ppo.unpack_if_room"), lambda model: None), own_model=True),
}


@contextmanager
def switched_off(name: str) -> Iterator[None]:
    """Within the block, or in a function that this decorates, the speedup `name` is not taken.

    Raises AttributeError if the repository no longer has what is to be switched off.
    """
    with ExitStack() as stack:
        for target, other in SPEEDUPS[name].instead.items():
            stack.enter_context(patch(target, other))
        yield


def variants(names: Sequence[str], stage: str, own: "nn.Module",
             load: Callable[[], "nn.Module"]) -> dict[str, "nn.Module"]:
    """Those of `names` that `stage` has, each with the model of the side without it: `own`, or one that `load` makes."""
    return {name: load() if SPEEDUPS[name].own_model else own for name in names if stage in SPEEDUPS[name].stages}
