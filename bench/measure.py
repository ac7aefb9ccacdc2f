"""Measuring: the order of the passes, medians, the device's limits, and the gates that a ratio stands on."""

import gc
import io
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from statistics import median
from time import perf_counter, process_time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

GIB = 2**30
PASSES = 3  # measured ones a side, after one to warm up


class Pass(NamedTuple):
    """What one run of a side did: tokens (without padding; rows for `score`), and what it took."""

    tokens: int  # of all processes, where several work together
    seconds: float
    cpu: float  # processor seconds of this process: what compares where other work shares the processor
    setup: float = 0.0  # seconds before the clock started: trainer, first updates, compilation


class Side(NamedTuple):
    """One way of doing a stage's work. models: those it needs, whose memory is its own."""

    name: str
    run: Callable[[], Pass]
    models: Sequence["torch.nn.Module"] = ()


class Gate(NamedTuple):
    """One equality: holds if what was found is at most the limit (and is a number)."""

    name: str
    found: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.found <= self.limit


class Stage(NamedTuple):
    """A stage ready to be measured. The first side is this repository's."""

    name: str
    sides: list[Side]
    gates: Callable[[], list[Gate]] = list
    limit: float | None = None  # tokens/s that the device's arithmetic or memory allows
    unit: str = "tokens"


class Measured(NamedTuple):
    """Medians over a side's measured passes."""

    name: str
    tokens: int
    seconds: float
    cpu: float  # processor seconds
    rate: float  # tokens/s
    warm_up: float  # seconds of the first pass beyond the median: compilation, first allocations
    setup: float  # seconds in every pass before its clock starts
    gib: float | None  # peak memory of the side's models and its pass; None without CUDA
    passes: list[Pass]


def timed(work: Callable[[], int]) -> Pass:
    """Runs `work`, which returns its tokens."""
    begun = clocks()
    tokens = work()
    ended = clocks()
    return Pass(tokens, ended.wall - begun.wall, ended.cpu - begun.cpu)


def order(sides: int, passes: int = PASSES) -> list[int]:
    """The sides' numbers in the order of their passes, A B B A A B: a drift of the machine falls on all alike."""
    return [side for i in range(passes) for side in (range(sides) if i % 2 == 0 else reversed(range(sides)))]


def measure(stage: Stage) -> list[Measured]:
    """A warm-up pass of each side, then the measured ones in `order`.

    A side's peak memory is that of its own models and of what its passes add: the other sides' models, which are there
    too, do not count.
    """
    from tqdm import tqdm  # not before this process knows whether others show their bars: looper.distributed

    plan = [*range(len(stage.sides)), *order(len(stage.sides))]
    passes: list[list[Pass]] = [[] for _ in stage.sides]
    peaks: list[list[float]] = [[] for _ in stage.sides]
    with tqdm(plan, desc=stage.name, unit="pass") as bar:
        for number in bar:
            side = stage.sides[number]
            bar.set_postfix_str(side.name)
            gc.collect()
            held = _start_memory()
            with redirect_stdout(io.StringIO()):  # the trainers print every update
                passes[number].append(side.run())
            peaks[number].append(_peak_memory() - held + sum(map(_bytes, side.models)))
    return [_medians(side.name, each, peak) for side, each, peak in zip(stage.sides, passes, peaks, strict=True)]


def _medians(name: str, passes: list[Pass], peaks: list[float]) -> Measured:
    first, *rest = passes
    seconds = median(each.seconds for each in rest)
    setup = median(each.setup for each in rest)
    return Measured(name, rest[0].tokens, seconds, median(each.cpu for each in rest),
                    median(each.tokens / each.seconds for each in rest),
                    max(0.0, first.seconds + first.setup - seconds - setup), setup,
                    max(peaks[1:]) / GIB if _cuda() else None, rest)


# ---- the device ----


def peak_flops(device: str, dtype: "torch.dtype") -> float:
    """FLOP/s of a large matrix product, the best of several: what no stage can exceed."""
    import torch

    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best(lambda: a @ b)


def copy_bandwidth(device: str) -> float:
    """Bytes/s of a large copy, read and written bytes together, the best of several."""
    import torch

    source = torch.zeros((4 if device == "cuda" else 1) * GIB // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source))


def _best(work: Callable[[], object], times: int = 8) -> float:
    def once() -> int:
        work()
        return 0

    return min(timed(once).seconds for _ in range(times))


class Clocks(NamedTuple):
    wall: float  # seconds
    cpu: float


def clocks() -> Clocks:
    """The time, once the device has done what it was given."""
    if _cuda():
        import torch

        torch.cuda.synchronize()
    return Clocks(perf_counter(), process_time())


def _cuda() -> bool:
    return "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized()


def _start_memory() -> int:
    if not _cuda():
        return 0
    import torch

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_reserved()


def _peak_memory() -> int:
    import torch

    return torch.cuda.max_memory_reserved() if _cuda() else 0  # what graphs compute in is reserved alone


def _bytes(model: "torch.nn.Module") -> int:
    return sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
