"""Generation, for rollouts and evaluation: this repository's engine against `generate` of transformers.

Nobody ends early: each row writes as many tokens as the stored list says. `generate` has one temperature and one length
a batch, so it takes a temperature's rows together and runs all to the longest; only the listed tokens count.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from itertools import groupby
from math import ceil
from typing import NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel

from bench.measure import Gate, Side, Stage, timed
from bench.without import switched_off, variants
from bench.workload import Setup, lengths, load, merged, random_ids, with_adapter, with_either_attention
from looper.distributed import gathered, share, world
from looper.generation import Completion, generate
from looper.prompts import prompt_ids
from regime_w.arms import ARMS

BATCH = {"cuda": 512, "cpu": 64}  # this repository's: rows running at once
# The yardsticks take two batches and one: their rate does not depend on the number, and all rows would take an hour.
B1_BATCH, B1_ROWS = 8, 16
B2_BATCH = {"cuda": 256, "cpu": 64}
GATE_ROWS = 16
# In nats: of the largest and of the mean difference from a full pass in the next longer type. In bfloat16 a logit of 20 is
# off by up to 0.06, so the mean is held to 0.01 and a single token to 0.1, and greedy tokens may part where two are nearer
# than both their errors.
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-1, 1e-2)}
EXACT = {torch.float32: torch.float64, torch.bfloat16: torch.float32}
# A full pass in the model's own type may itself be off by more: the errors may be so many times its own.
OF_FULL_PASS = (3, 1.5)


class Row(NamedTuple):
    prompt: list[int]
    temperature: float  # 0 = greedy
    length: int  # tokens to write


def rollouts(setup: Setup, rows: int, against: list[str], without: Sequence[str] = ()) -> Stage:
    """Eight arms a question: each style has a prompt of its own, which its four temperatures share."""
    stored, made = lengths(rows), []
    for i, (_, output) in enumerate(stored):
        arm, question = ARMS[i % len(ARMS)], i // len(ARMS)
        length, _ = stored[question]
        ids = make_prompt(setup, length, f"{arm.style}/{question}", arm.instruction)
        made.append(Row(ids, arm.temperature, output))
    return _stage("rollouts", setup, made, against, without)


def evaluation(setup: Setup, rows: int, against: list[str], without: Sequence[str] = ()) -> Stage:
    """Greedy answers to as many questions."""
    made = [Row(make_prompt(setup, prompt, f"eval/{i}"), 0.0, output)
            for i, (prompt, output) in enumerate(lengths(rows))]
    return _stage("eval", setup, made, against, without)


def make_prompt(setup: Setup, length: int, seed: str, instruction: str = "") -> list[int]:
    """`length` tokens that begin as the prompts of this repository do, with at most half of them; then random ones."""
    beginning = prompt_ids(setup.tokenizer, setup.template, "", instruction)[:length // 2]
    return beginning + random_ids(setup, length - len(beginning), seed)


def _stage(name: str, setup: Setup, rows: list[Row], against: list[str], without: Sequence[str]) -> Stage:
    device = setup.model.device
    model = merged(setup)
    slower = list(variants(without, name, model, lambda: merged(setup)))
    by_arm, mine = sorted(rows, key=lambda row: row.temperature), own_share(rows)

    def looper(called: str, write: Callable[..., list[Completion]]) -> Side:
        def work() -> int:
            return sum(gathered(count(write(model, mine, BATCH[device]), mine)))  # ends when every process has ended

        return Side(called, lambda: timed(work), [model])

    sides = [looper("looper", ours)]
    if "b1" in against:
        unmerged = with_adapter(load(setup, quantised=True)).eval()
        first = by_arm[:B1_ROWS]
        sides.append(Side(f"B1: generate, unmerged, {B1_BATCH} per arm",
                          lambda: timed(lambda: count(plain(unmerged, first, B1_BATCH), first)), [unmerged]))
    if "b2" in against:
        batch = B2_BATCH[device]
        some = by_arm[:batch]
        b2 = f"B2: generate, merged, batch {max(map(len, batches(some, batch)))}"
        sides += [Side(called, lambda way=way: timed(lambda: count(way(model, some, batch), some)), [model])
                  for called, way in with_either_attention(setup, b2, plain).items()]
    sides += [looper(f"looper without {each}", switched_off(each)(ours)) for each in slower]

    def checked() -> list[Gate]:
        made = gates(setup, model, rows) if against or slower else []
        for each in slower:
            made += [gate._replace(name=f"{gate.name}, without {each}")
                     for gate in switched_off(each)(gates)(setup, model, rows)]
        return made

    return Stage(name, sides, checked, limit(setup, rows, min(BATCH[device], ceil(len(rows) / world()))))


def own_share(rows: Sequence[Row]) -> list[Row]:
    """This process's rows. Those of one prompt stay together, as in a chunk: one process prefills it, and once."""
    prompts = [list(some) for _, some in groupby(rows, key=lambda row: row.prompt)]
    return [row for some in share(prompts) for row in some]


def limit(setup: Setup, rows: Sequence[Row], batch: int) -> float:
    """Tokens/s of a batch that is always full; batch: of each process.

    Prefill at the peak of matrix products, then steps that read all weights and each row's keys and values once at the
    speed of a copy, or compute at that peak, whichever takes longer.
    A prompt is prefilled once, however many rows begin with it.
    """
    shape, width = setup.shape, torch.finfo(setup.dtype).bits // 8
    tokens = sum(row.length for row in rows)
    prompts = sum(map(len, {tuple(row.prompt) for row in rows}))
    weights = shape.body + shape.head
    context = sum(row.length * len(row.prompt) + row.length * (row.length + 1) // 2 for row in rows)
    memory = (tokens / batch * weights + context * shape.kv) * width / setup.bandwidth
    return tokens / (2 * shape.body * prompts / setup.flops + max(memory, 2 * weights * tokens / setup.flops))


# ---- the sides ----


def ours(model: PreTrainedModel, rows: Sequence[Row], batch: int) -> list[Completion]:
    return generate(model, [row.prompt for row in rows], temperatures=[row.temperature for row in rows],
                    max_new_tokens=[row.length for row in rows], eos_token_ids=(), batch_size=batch, seed=0)


@torch.inference_mode()
def plain(model: PreTrainedModel, rows: Sequence[Row], batch: int) -> list[list[int]]:
    """`generate` on left-padded batches, a temperature at a time; each row's tokens, cut to its length."""
    torch.manual_seed(0)
    # No end of sequence: every batch runs to its longest row
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0, bos_token_id=None)
    written = []
    for some in batches(rows, batch):
        width, longest = max(len(row.prompt) for row in some), max(row.length for row in some)
        padding = [[0] * (width - len(row.prompt)) for row in some]
        ids = torch.tensor([pad + row.prompt for pad, row in zip(padding, some)], device=model.device)
        mask = torch.tensor([pad + [1] * len(row.prompt) for pad, row in zip(padding, some)], device=model.device)
        temperature = some[0].temperature
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=longest, **sampling)
        written += [new[:row.length] for new, row in zip(out[:, width:].tolist(), some, strict=True)]
    return written


def batches(rows: Sequence[Row], size: int) -> Iterator[list[Row]]:
    """Rows in their order, at most `size` together, never two temperatures."""
    for _, group in groupby(rows, key=lambda row: row.temperature):
        group = list(group)
        yield from (group[start:start + size] for start in range(0, len(group), size))


def count(written: Sequence[Completion | list[int]], rows: Sequence[Row]) -> int:
    """The tokens that were asked for. Raises ValueError if a row has another number of them."""
    found = [len(each.token_ids if isinstance(each, Completion) else each) for each in written]
    if found != [row.length for row in rows]:
        raise ValueError("generation: a side wrote another number of tokens than the stored lengths say")
    return sum(found)


# ---- the gate ----


@torch.inference_mode()
def gates(setup: Setup, model: PreTrainedModel, rows: Sequence[Row]) -> list[Gate]:
    """Greedy tokens against `generate`'s and log-probabilities against a more exact pass over each whole row, on the
    first rows. Where a row parts from `generate`'s, the gap is that between the two tokens' log-probabilities: a tie, or
    an error.
    """
    rows = [row._replace(temperature=0.0) for row in rows[:GATE_ROWS]]
    exact = deepcopy(model).to(EXACT[setup.dtype])
    errors, of_full_pass, gaps = [], [], []
    for row, own, other in zip(rows, ours(model, rows, GATE_ROWS), plain(model, rows, GATE_ROWS), strict=True):
        reference = full_pass(exact, row, own.token_ids)
        tokens = torch.tensor(own.token_ids)[:, None]
        expected = reference.gather(1, tokens)[:, 0]
        errors.append((torch.tensor(own.logprobs, dtype=reference.dtype) - expected).abs())
        of_full_pass.append((full_pass(model, row, own.token_ids).gather(1, tokens)[:, 0] - expected).abs())
        parted = next((i for i, pair in enumerate(zip(own.token_ids, other)) if pair[0] != pair[1]), None)
        gaps.append(None if parted is None else abs((reference[parted, other[parted]] - expected[parted]).item()))
    errors, of_full_pass = torch.cat(errors), torch.cat(of_full_pass)
    passes = of_full_pass.max().item(), of_full_pass.mean().item()
    largest, mean = (max(fixed, times * own) for fixed, times, own in zip(TOLERANCE[setup.dtype], OF_FULL_PASS, passes))
    same = gaps.count(None)
    return [Gate(f"greedy tokens: {same} of {len(rows)} rows as generate's, gap where the others part",
                 max((gap for gap in gaps if gap is not None), default=0.0), 2 * largest),
            Gate(f"log-probabilities, largest error (a full pass: {passes[0]:.1e})", errors.max().item(), largest),
            Gate(f"log-probabilities, mean error (a full pass: {passes[1]:.1e})", errors.mean().item(), mean)]


def full_pass(model: PreTrainedModel, row: Row, written: Sequence[int]) -> torch.Tensor:
    """The log-probabilities [tokens written, vocabulary] of one pass over the whole row, on the CPU."""
    ids = torch.tensor([[*row.prompt, *written]], device=model.device)
    logits = model(ids).logits[0, len(row.prompt) - 1:-1]
    return (logits if logits.dtype is torch.float64 else logits.float()).log_softmax(-1).cpu()
