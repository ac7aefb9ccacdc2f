"""What one process and several must make alike. `python -m tests.looper.distributed_worker FOLDER`, started as a launcher
starts its processes, does it as one of them and leaves FOLDER/rank-N.pt."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny import CPU, tiny_model, tiny_rows, tiny_sft, tiny_tokenizer

from looper.distributed import barrier, first_process_only, rank, start_processes
from looper.generation import Request, generate_in_chunks
from looper.params import Eval, Rollouts
from looper.ppo import VALUE_HEAD, train_ppo
from looper.ppo_settings import KLSettings
from looper.predictions import dev_metrics
from looper.prompts import TEMPLATES, end_token_ids
from looper.rollouts import roll_out
from looper.sft import finetune
from looper.targets import self_targets
from tests.looper import generation_helpers, ppo_helpers

CHATML = TEMPLATES["chatml"]
TOKENIZER = tiny_tokenizer()


def work(folder: Path) -> dict[str, Any]:
    """folder: shared by all processes."""
    made = {"sft": sft(folder), "chunks": chunks(folder), "targets": targets(folder)}
    for credit in ("question", "arm"):
        made[f"ppo {credit}"] = ppo(folder / f"ppo-{credit}", credit)
    for allocation in ("uniform", "thompson"):
        made[f"rollouts {allocation}"] = rollouts(folder / allocation, allocation)
    made["dev_metrics"] = dev_metrics(tiny_model(), TOKENIZER, CHATML, tiny_rows(11), tiny_rows(7),
                                      Eval(max_new_tokens=8, batch_size=1), folder / "dev", "dev")
    return made


def sft(folder: Path) -> tuple[dict, dict, list]:
    """Three updates an epoch: two of eight rows in passes of four, and one of the row that is left."""
    settings = tiny_sft(epochs=2, batch_size=8, micro_batch=2, learning_rate=1e-3, save_steps=2)
    model, metrics = finetune(tiny_model(), TOKENIZER, CHATML, tiny_rows(17), settings, folder / "sft", folder / "live")
    return ppo_helpers.trainable(model), metrics, (folder / "live/plots/metrics/loss.tsv").read_text().splitlines()


def ppo(folder: Path, credit: str) -> tuple[dict, dict]:
    """Batches of four and one samples, mini-batches of two and one: of one row, one process of two has none."""
    settings = replace(ppo_helpers.QUICK, credit=credit, epochs=2, learning_rate=1e-3, save_steps=1,
                       kl=KLSettings(horizon=20), off_policy="truncated_is")
    model = ppo_helpers.make_model()
    metrics = train_ppo(model, ppo_helpers.make_samples(5, credit), settings, folder, folder / VALUE_HEAD)
    barrier()  # the first process has written the value head
    return ppo_helpers.trainable(model) | load_file(folder / VALUE_HEAD), metrics


def chunks(folder: Path) -> list:
    """Nine rows in five chunks, of which two are there."""
    prompts = generation_helpers.make_prompts()
    requests = [Request(prompt, temperature) for prompt, temperature in zip(prompts, [0.0, 1.0, 0.5] * 3)]
    source, target = folder.parent / "some-chunks", folder / "chunks"
    if rank() == 0 and source.exists():
        shutil.copytree(source, target)
    return generate_in_chunks(generation_helpers.tiny_model(), requests, target, chunk_size=2,
                              **generation_helpers.settings())


def targets(folder: Path) -> tuple[list, dict]:
    settings = tiny_sft(self={"samples": 3, "temperature": 0.9, "max_new_tokens": 8, "batch_size": 1, "seed": 0}).self
    return self_targets(tiny_model(), TOKENIZER, CHATML, tiny_rows(5), settings, 512, folder / "targets")


def rollouts(folder: Path, allocation: str) -> list:
    settings = Rollouts(questions=3, allocation=allocation, max_new_tokens=6, batch_size=2, seed=0)
    rows = tiny_rows(3)
    counterfactuals = {rows[1]["id"]: {**rows[1], "question": rows[2]["question"], "gold_answer": "1", "changed_from": 2,
                                       "changed_to": 3}}
    return roll_out(tiny_model(), TOKENIZER, CHATML, rows, counterfactuals, settings, folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    start_processes(CPU)
    here = Path(sys.argv[1])
    torch.save(work(here), here / f"rank-{rank()}.pt")
    first_process_only()
