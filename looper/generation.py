"""Generation for rollouts and evaluation: one engine, every row with its own temperature, log-probabilities included.

All rows share one running batch (`looper.decoding`): a finished row's slot takes the next prompt, and the batch
shrinks when none is left. Give it a model whose adapter is merged.
"""

import json
import time
from collections.abc import Callable, Collection, Sequence
from hashlib import sha256
from math import ceil, isfinite
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm
from transformers import PreTrainedModel

from looper.decoding import Decoder, decoding_mode
from looper.distributed import agreed, gathered, rank, share, world
from looper.files import sha256_text, write_text

CUDA_POLL = 8  # steps between two looks at which rows have finished: each look waits for the device
CUDA_FEWEST = 32  # rows in a step at least, if there are slots for them: the weights are read for few as for many
CUDA_REFILL = 8  # new rows wait until 1/8 of the slots are free: a prefill pass costs as much for one row as for many


class Request(NamedTuple):
    """One row to generate: its prompt's token ids and its sampling temperature (0 = greedy)."""

    prompt: Sequence[int]
    temperature: float


class Completion(NamedTuple):
    """What the model wrote after one prompt.

    token_ids includes the end-of-sequence token where one was generated (PPO trains on it; decode with
    skip_special_tokens). logprobs, one a token, are the behaviour policy's, softmax(logits / temperature), rounded to
    6 digits; for greedy rows at temperature 1. truncated: no end-of-sequence within max_new_tokens.
    """

    token_ids: list[int]
    logprobs: list[float]
    truncated: bool


Progress = Callable[[int, int], None]  # called with the rows finished and the tokens made since the last call


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    temperatures: Sequence[float],
    max_new_tokens: int | Sequence[int],
    eos_token_ids: Collection[int],
    batch_size: int,
    seed: int,
    progress: str | None = None,
) -> list[Completion]:
    """Completions in the order of the prompts, at most `batch_size` rows running at a time.

    max_new_tokens is one number for all, or one a prompt: with no end-of-sequence tokens, measurements so fix each
    row's length.

    The same seed gives the same completions on the same machine, whatever torch's global random state. `progress`
    names a progress bar. Raises ValueError for an empty prompt, one that leaves no room for max_new_tokens in the
    model's context window, and settings out of range.
    """
    if len(temperatures) != len(prompts):
        raise ValueError(f"generate: {len(temperatures)} temperatures for {len(prompts)} prompts; give one a prompt")
    requests = [Request(prompt, temperature) for prompt, temperature in zip(prompts, temperatures)]
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    _check(model, requests, limits, batch_size)
    if not requests:
        return []
    with decoding_mode(model), _Bar(progress, len(requests)) as bar:
        decoder = _decoder(model, requests, len(requests), max(limits), eos_token_ids, batch_size)
        return _run(decoder, requests, limits, eos_token_ids, seed, bar.add)


def generate_in_chunks(
    model: PreTrainedModel,
    requests: Sequence[Request],
    scratch_dir: Path,
    *,
    max_new_tokens: int,
    eos_token_ids: Collection[int],
    batch_size: int,
    seed: int,
    chunk_size: int | None = None,
    progress: str | None = None,
) -> list[Completion]:
    """As `generate`, in chunks of requests that are kept in `scratch_dir` as they finish: a kill loses at most one.

    Called again, it reads the whole chunks and generates the others; a chunk that is damaged or was made for other
    requests or settings is generated anew. Each chunk has its own seed, so the result does not depend on
    interruptions. The model is not part of a chunk's identity: key scratch_dir by what determines it. Unless chunk_size
    says otherwise, `equal_chunks` chooses it.

    Several processes divide the chunks, which are what they are in one process, and each returns all completions. Fewer
    chunks than processes leave some of these idle: lower batch_size where one chunk holds all requests.
    """
    _check(model, requests, [max_new_tokens] * len(requests), batch_size)
    if chunk_size is None:
        chunk_size = equal_chunks(len(requests), batch_size)
    if chunk_size < 1:
        raise ValueError(f"generate_in_chunks: chunk_size is {chunk_size}; it must be at least 1")
    chunks = [requests[start : start + chunk_size] for start in range(0, len(requests), chunk_size)]
    seeds = [int(sha256_text(f"{seed}/{index}")[:15], 16) for index in range(len(chunks))]
    settings = {"max_new_tokens": max_new_tokens, "eos_token_ids": sorted(eos_token_ids), "batch_size": batch_size}
    identities = [_identity(chunk, settings | {"seed": seed}) for chunk, seed in zip(chunks, seeds)]
    paths = [Path(scratch_dir) / f"chunk-{index:05}.jsonl" for index in range(len(chunks))]
    # As the first process finds them: it may have been faster than another was to look
    finished = agreed([_read_chunk(path, identity) for path, identity in zip(paths, identities)])
    mine = share([index for index, completions in enumerate(finished) if completions is None])
    if mine:
        done = sum(len(completions) for completions in finished if completions is not None)
        with decoding_mode(model), _Bar(progress, len(requests), done) as bar:
            decoder = _decoder(model, requests, chunk_size, max_new_tokens, eos_token_ids, batch_size)
            for index in mine:
                limits = [max_new_tokens] * len(chunks[index])
                finished[index] = _run(decoder, chunks[index], limits, eos_token_ids, seeds[index], bar.add)
                _write_chunk(paths[index], identities[index], finished[index])
    for made in gathered({index: finished[index] for index in mine}):
        for index, completions in made.items():
            finished[index] = completions
    return [completion for completions in finished for completion in completions]


def equal_chunks(requests: int, batch_size: int) -> int:
    """The size of the chunks, nearly equal so that several processes have equal work: at most 4 batches up to 16 chunks,
    then 16 chunks or a multiple, of 16 batches at most.

    A chunk ends with a shrinking batch, whose steps take a GPU nearly as long for few rows as for many: a sixth to a
    third more time with 4 batches a chunk, a twentieth with 16 (LOG.md). But a kill loses a chunk, and several processes
    need some each.
    """
    few = ceil(requests / (4 * batch_size))
    count = few if few < 16 else 16 * ceil(requests / (16 * 16 * batch_size))
    return max(1, ceil(requests / max(1, count)))


def _check(model: PreTrainedModel, requests: Sequence[Request], limits: Sequence[int], batch_size: int) -> None:
    if len(limits) != len(requests):
        raise ValueError(f"generate: {len(limits)} max_new_tokens for {len(requests)} prompts; give one a prompt")
    for name, value in (("max_new_tokens", min(limits, default=1)), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"generate: {name} is {value}; it must be at least 1")
    window = getattr(model.config, "max_position_embeddings", None)
    for index, (prompt, temperature) in enumerate(requests):
        if len(prompt) == 0:
            raise ValueError(f"generate: prompt {index} is empty; the model needs at least one token to go on from")
        if not 0 <= temperature < float("inf"):
            raise ValueError(
                f"generate: temperature {temperature} of prompt {index}; it must be 0 (greedy) or a positive number"
            )
        if window is not None and len(prompt) + limits[index] > window:
            raise ValueError(
                f"generate: prompt {index} has {len(prompt)} tokens and max_new_tokens is {limits[index]}, together "
                f"more than the model's context window of {window}; lower max_new_tokens or shorten the prompt"
            )


def _decoder(
    model: PreTrainedModel,
    requests: Sequence[Request],
    rows: int,
    max_new_tokens: int,
    eos_token_ids: Collection[int],
    batch_size: int,
) -> Decoder:
    rows = min(rows, len(requests))
    return Decoder(
        model,
        slots=min(batch_size, rows),
        max_length=max(len(request.prompt) for request in requests) + max_new_tokens,
        rows=rows,
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos_token_ids,
    )


def _run(
    decoder: Decoder,
    requests: Sequence[Request],
    limits: Sequence[int],
    eos_token_ids: Collection[int],
    seed: int,
    report: Progress,
) -> list[Completion]:
    """Drives the decoder until every request is finished: refill free slots, shrink the batch, step, look."""
    cuda = decoder.device.type == "cuda"
    poll, refill_at = (CUDA_POLL, max(1, decoder.slots // CUDA_REFILL)) if cuda else (1, 1)
    sampling = any(request.temperature > 0 for request in requests)
    decoder.start(len(requests), seed, sampling, () if cuda else _beginning(requests))
    # Longest prompts first, equal ones side by side: prefill passes without padding, and each prompt computed once.
    waiting = sorted(range(len(requests)), key=lambda row: (len(requests[row].prompt), tuple(requests[row].prompt)))
    running: dict[int, int] = {}  # slot -> row
    reach: dict[int, int] = {}  # slot -> cache positions that its row may have used by now
    counted: dict[int, int] = {}  # slot -> tokens already reported
    lengths = [0] * len(requests)
    while waiting or running:
        free = [slot for slot in range(decoder.slots) if slot not in running]
        if waiting and (len(free) >= refill_at or not running):
            slots = free[: len(waiting)]
            rows = [waiting.pop() for _ in slots]
            prompts, temperatures = zip(*(requests[row] for row in rows))
            decoder.admit(slots, rows, prompts, temperatures, [limits[row] for row in rows])
            for slot, row in zip(slots, rows):
                running[slot], reach[slot], counted[slot] = row, len(requests[row].prompt), 0
        batch = _batch(len(running), decoder.slots, cuda)
        _pack(decoder, batch, running, reach, counted)
        longest = max(reach.values())
        for step in range(poll):
            decoder.step(batch, longest + step)
        done, count = decoder.status(batch)
        finished = [slot for slot in running if done[slot]]
        report(len(finished), sum(count[slot] - counted[slot] for slot in running))
        for slot in running:
            counted[slot] = count[slot]
            reach[slot] += poll
        for slot in finished:
            lengths[running.pop(slot)] = count[slot]
            del counted[slot], reach[slot]
    return _completions(decoder, lengths, eos_token_ids)


def _beginning(requests: Sequence[Request]) -> Sequence[int]:
    """The tokens that all prompts begin with, such as an instruction; at least two more follow in each.

    On the CPU a prefill pass costs what it computes; on CUDA it costs its launches, and one more pass saves nothing.
    """
    prompts = list({tuple(request.prompt) for request in requests})
    if len(prompts) < 2:
        return ()
    return commonprefix(prompts)[: max(0, min(map(len, prompts)) - 2)]


def _batch(running: int, slots: int, halving: bool) -> int:
    """Rows in a step. On CUDA only the slots' halvings, since each size needs a CUDA graph of its own."""
    if not halving:
        return running
    batch = slots
    while (batch + 1) // 2 >= max(running, CUDA_FEWEST):
        batch = (batch + 1) // 2
    return batch


def _pack(decoder: Decoder, batch: int, *tables: dict[int, int]) -> None:
    """Moves running rows into slots 0 .. batch-1; tables: what is known of each running slot, first its row."""
    running, reach, _ = tables
    outside = [slot for slot in running if slot >= batch]
    if not outside:
        return
    inside = [slot for slot in range(batch) if slot not in running][: len(outside)]
    decoder.move(outside, inside, max(reach[slot] for slot in outside))
    for table in tables:
        for source, target in zip(outside, inside):
            table[target] = table.pop(source)


def _completions(decoder: Decoder, lengths: Sequence[int], eos_token_ids: Collection[int]) -> list[Completion]:
    longest = max(lengths)
    tokens = decoder.tokens[: len(lengths), :longest].tolist()
    logprobs = decoder.logprobs[: len(lengths), :longest].double().cpu().numpy().round(6).tolist()
    for row, length in enumerate(lengths):
        if not all(isfinite(value) for value in logprobs[row][:length]):
            raise ValueError(
                f"generate: the model's logits for prompt {row} are not finite; check its weights and dtype "
                "(float16 overflows in models trained in bfloat16)"
            )
    return [
        Completion(ids[:length], values[:length], truncated=ids[length - 1] not in eos_token_ids)
        for ids, values, length in zip(tokens, logprobs, lengths)
    ]


def _identity(requests: Sequence[Request], settings: dict) -> str:
    """Hash of all that determines a chunk's completions, but for the model."""
    rows = [[list(request.prompt), request.temperature] for request in requests]
    return sha256_text(json.dumps([settings, rows]))


def _write_chunk(path: Path, identity: str, completions: Sequence[Completion]) -> None:
    body = "".join(json.dumps(completion._asdict(), allow_nan=False) + "\n" for completion in completions)
    header = {"requests_sha256": identity, "body_sha256": sha256_text(body)}
    write_text(path, json.dumps(header) + "\n" + body)


def _read_chunk(path: Path, identity: str) -> list[Completion] | None:
    """The chunk's completions, or None unless the file is whole and was made for these requests."""
    try:
        header, _, body = path.read_bytes().partition(b"\n")
        if json.loads(header) != {"requests_sha256": identity, "body_sha256": sha256(body).hexdigest()}:
            return None
    except (FileNotFoundError, ValueError):
        return None
    return [Completion(**json.loads(line)) for line in body.splitlines()]


class _Bar:
    """A progress bar over rows, with tokens/s; rows that an earlier run finished count as done but not as speed.

    Of several processes the first shows one, as if the others were as far as it is.
    """

    def __init__(self, label: str | None, rows: int, done: int = 0):
        hidden = label is None or rank() > 0
        self.bar = tqdm(total=rows, initial=done, desc=label, unit="row", disable=hidden, mininterval=1.0)
        self.tokens, self.begun = 0, time.monotonic()

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()

    def add(self, rows: int, tokens: int) -> None:
        self.tokens += tokens * world()
        rate = self.tokens / max(time.monotonic() - self.begun, 1e-9)
        self.bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self.bar.update(min(rows * world(), self.bar.total - self.bar.n) if world() > 1 else rows)
