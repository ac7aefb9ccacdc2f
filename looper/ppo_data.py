"""What offline PPO trains on: samples made of stored rollouts, the order in which they are taken, padded tensors."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from looper.jsonl import check_row
from looper.packing import Rows, rows_of
from looper.ppo_settings import PPOSettings

COMPONENTS = ("s_end", "s_path", "s_cf", "s_wm")
# What a row of data/regime_w_rollouts.jsonl must have, and each of its arm_outputs.
ROW = {"id": str, "question": str, "reward": float, "arm_outputs": list, **dict.fromkeys(COMPONENTS, float)}
ARM = {"name": str, "token_ids": list, "logprobs": list, "reward": float, "advantage": float}
SAME_REWARD = 1e-9  # two arms' rewards nearer than this are the same: rounding, not signal


@dataclass(frozen=True)
class PPOSample:
    """One stored response. `advantage` is set under arm credit alone; log-probabilities are in nats, one a token."""

    id: str  # the question's id and the arm's name: "train-00012/wolfram-0.2"
    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    behaviour_logprobs: Sequence[float]
    reward: float
    advantage: float | None
    components: Mapping[str, float]  # COMPONENTS of its question


def samples_from_rows(rows: Iterable[Mapping[str, Any]], prompt_ids_of: Callable[[str], list[int]],
                      settings: PPOSettings) -> list[PPOSample]:
    """The samples that `settings.credit` trains on, from rows of data/regime_w_rollouts.jsonl.

    prompt_ids_of: a question's text → token ids of the neutral tutoring prompt.
    `question`: one arm a row, drawn with the seed and the row's id, with the row's reward. `arm`: every arm with its
    own reward and advantage, except on questions where all arms earn the same (`earns_alike`).
    Raises ValueError, naming question and arm, for a response that cannot be trained on or lacks a field, or if no sample
    is left.
    """
    samples = []
    for row in rows:
        for i, arm in enumerate(row["arm_outputs"]):
            check_row(arm, ARM, f"scored rollouts, {row['id']}, arm_outputs[{i}]")
        prompt_ids = prompt_ids_of(row["question"])
        if settings.credit == "question":
            arm = random.Random(f"{settings.seed}/{row['id']}").choice(row["arm_outputs"])
            samples.append(_sample(row, arm, prompt_ids, row["reward"], None))
        elif not earns_alike(row):
            samples.extend(_sample(row, arm, prompt_ids, arm["reward"], arm["advantage"]) for arm in row["arm_outputs"])
    if not samples:
        raise ValueError("ppo: no sample to train on: there are no rollouts, or under ppo.credit: arm all arms of "
                         "every question earn the same; raise rollouts.questions, or set ppo.credit to question")
    return samples


def earns_alike(row: Mapping[str, Any]) -> bool:
    """Whether all arms of a scored row earn the same reward: such a question carries no signal under arm credit."""
    rewards = [arm["reward"] for arm in row["arm_outputs"]]
    return max(rewards) - min(rewards) < SAME_REWARD


def _sample(row: Mapping[str, Any], arm: Mapping[str, Any], prompt_ids: list[int], reward: float,
            advantage: float | None) -> PPOSample:
    name = f"{row['id']}/{arm['name']}"
    tokens, logprobs = arm["token_ids"], arm["logprobs"]
    if not tokens or len(tokens) != len(logprobs):
        raise ValueError(f"rollouts: {name} has {len(tokens)} token_ids and {len(logprobs)} logprobs; each token needs "
                         "one and there must be a token: rerun the stage rollouts")
    if not all(map(isfinite, [reward, advantage or 0.0, *logprobs])):
        raise ValueError(f"rollouts: {name} holds a logprob, reward or advantage that is not finite: rerun the stages "
                         "rollouts and score")
    return PPOSample(name, prompt_ids, tokens, logprobs, reward, advantage, {key: row[key] for key in COMPONENTS})


class Step(NamedTuple):
    """One optimiser step: a mini-batch of a PPO batch."""

    number: int  # of the PPO batch, from 0
    batch: tuple[int, ...]  # the PPO batch's samples
    rows: tuple[int, ...]  # the mini-batch's places in `batch`
    first: bool  # of its PPO batch
    last: bool


def plan_steps(samples: int, settings: PPOSettings) -> list[Step]:
    """Every optimiser step of the run, in order; no sample is dropped, so the last batch of an epoch may be smaller.

    The order comes from the seed alone, never from a global generator: a resumed run takes the same one. In its first
    inner epoch a batch is taken in its own order (see `mini_batches`), later in a new random one each.
    """
    steps, number = [], 0
    generator = random.Random(settings.seed)
    for _ in range(settings.epochs):
        for batch in _chunks(generator.sample(range(samples), samples), settings.batch_size):
            rows = list(range(len(batch)))
            for inner in range(settings.ppo_epochs):
                if inner:
                    generator.shuffle(rows)
                chunks = list(mini_batches(rows, settings))
                steps += [Step(number, tuple(batch), tuple(chunk), first=inner == i == 0,
                               last=inner == settings.ppo_epochs - 1 and i == len(chunks) - 1)
                          for i, chunk in enumerate(chunks)]
            number += 1
    return steps


def mini_batches(items: Sequence[int], settings: PPOSettings) -> Iterator[Sequence[int]]:
    """The mini-batches of a batch in its own order.

    Old log-probabilities are computed over exactly these: the same rows, padded the same, give the same bits, so the
    ratio of the first update is exactly 1.
    """
    return _chunks(items, settings.mini_batch_size)


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (items[start:start + size] for start in range(0, len(items), size))


class Tokens(NamedTuple):
    """B samples end to end: L tokens of prompts, responses and, on a GPU, some filling behind them, N of responses."""

    input_ids: Tensor  # [1, L]
    positions: Tensor  # [1, L]: each token's place in its sample
    rows: Rows  # where each sample stands in L
    sources: Tensor  # [N]: the place in L whose hidden state predicts the response token
    targets: Tensor  # [N]: the responses' token ids
    mask: Tensor  # [B, T]: true at response tokens, T of the longest; its trues are the N, row by row


def collate(samples: Sequence[PPOSample], device: torch.device, passes: Sequence[Sequence[int]] = ()) -> Tokens:
    """The samples as a pass; passes: see `looper.packing.rows_of`."""
    prompts, responses = ([len(ids) for ids in each] for each in zip(*((s.prompt_ids, s.response_ids) for s in samples)))
    lengths = [prompt + response for prompt, response in zip(prompts, responses)]
    ends = list(accumulate(lengths, initial=0))
    rows = rows_of(lengths, device, passes)
    fill = rows.lengths[len(lengths):]  # a last row that predicts nothing
    # A response token is predicted from the token before it
    sources = [range(end - response - 1, end - 1) for end, response in zip(ends[1:], responses)]
    mask = torch.arange(max(responses)) < torch.tensor(responses)[:, None]

    def flat(rows: Iterable[Iterable[int]]) -> Tensor:
        return torch.tensor([*chain.from_iterable(rows)]).to(device)

    ids = [(*s.prompt_ids, *s.response_ids) for s in samples]
    return Tokens(flat([*ids, *([0] * extra for extra in fill)])[None], flat(map(range, lengths + fill))[None],
                  rows, flat(sources), flat(s.response_ids for s in samples), mask.to(device))


def padded(rows: Sequence[Sequence[float] | Tensor], dtype: torch.dtype) -> Tensor:
    """Rows of different lengths → [B, longest], zeros at the right."""
    return pad_sequence([torch.as_tensor(row, dtype=dtype) for row in rows], batch_first=True)
