"""What one process and several must make alike: `python -m tests.looper.distributed_worker FOLDER cpu|cuda`, alone or,
started as a launcher starts its processes, together with others; each leaves FOLDER/rank-N.pt."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from tiny import CPU, tiny_model, tiny_rows, tiny_sft, tiny_tokenizer
from transformers import TrainerCallback

from looper import packing
from looper.distributed import barrier, first_process_only, rank, start_processes, world
from looper.generation import Request, generate_in_chunks
from looper.params import Eval, Rollouts
from looper.ppo import VALUE_HEAD, train_ppo
from looper.ppo_settings import KLSettings
from looper.predictions import predict_dev
from looper.prompts import TEMPLATES
from looper.rollouts import roll_out
from looper.sft import finetune
from looper.targets import self_targets
from tests.looper import compile_helpers, generation_helpers, ppo_helpers
from tests.looper.compile_helpers import filled_rows
from tests.looper.ppo_helpers import Killed, KillAt

CHATML = TEMPLATES["chatml"]
TOKENIZER = tiny_tokenizer()


def work(folder: Path, device: str) -> dict[str, Any]:
    """folder: shared by all processes."""
    model = tiny_model().to(device)
    made = {
        "sft": sft(folder / "sft", device),
        "sft with dropout": sft(folder / "dropout", device, dropout=0.3),
        "seed": torch.initial_seed(),
        "passes": passes(folder / "passes", device),
        "sft killed": sft(folder / "killed", device, dropout=0.3, kill_at=3),
        "chunks": chunks(folder, device),
        "targets": targets(model, folder / "targets"),
        "predict_dev": predict_dev(model, TOKENIZER, CHATML, tiny_rows(11), tiny_rows(7),
                                   Eval(max_new_tokens=8, batch_size=1), folder / "dev", "dev"),
    }
    for credit in ("question", "arm"):
        made[f"ppo {credit}"] = ppo(folder / credit, device, credit)
    made["ppo question killed"] = ppo(folder / "question-killed", device, "question", kill_at=8)
    if device == "cpu":
        with graphs_on_a_processor():
            made["sft as graphs"] = sft(folder / "graphs", device)
            for credit in ("question", "arm"):
                made[f"ppo {credit} as graphs"] = ppo(folder / f"{credit}-graphs", device, credit)
    half = {"dtype": torch.bfloat16}  # on a GPU layers are compiled, and launched as graphs, in halves alone
    for task, run in {"sft": sft, "ppo question": partial(ppo, credit="question"), "ppo arm": partial(ppo, credit="arm"),
                      "sft with dropout": partial(sft, dropout=0.3)}.items():
        made[f"{task} in halves"] = run(folder / f"{task} halves", device, **half)
    made["sft killed in halves"] = sft(folder / "killed-halves", device, dropout=0.3, kill_at=3, **half)
    made["ppo question killed in halves"] = ppo(folder / "question-killed-halves", device, "question", kill_at=8, **half)
    for allocation in ("uniform", "thompson"):
        made[f"rollouts {allocation}"] = rollouts(model, folder / allocation, allocation)
    return made


@contextmanager
def graphs_on_a_processor() -> Iterator[None]:
    """Within the block the layers' passes are as on a GPU, but that a graph is its function, called again."""
    with (patch.multiple("looper.graphs", graphs=bool, record=lambda run, layers: run),
          patch("looper.packing._has_flash_kernel", lambda query: True), patch("looper.ppo_data.rows_of", filled_rows),
          patch("looper.packing.varlen_attn", compile_helpers.varlen)):
        yield


def sft(folder: Path, device: str, dropout: float = 0.0, kill_at: int | None = None,
        dtype: torch.dtype = torch.float32) -> tuple[dict, dict]:
    """Three updates an epoch, of eight, eight and five rows, in passes of four and of one: for that one there is no row
    for a second process."""
    settings = tiny_sft(lora={"dropout": dropout}, epochs=2, batch_size=8, micro_batch=4 // world(), learning_rate=1e-3,
                        save_steps=2)

    def run(*callbacks: TrainerCallback) -> tuple[Any, dict]:
        with patch("looper.sft._OnlyFinite", lambda: callbacks[0] if callbacks else TrainerCallback()):
            model = tiny_model().to(device, dtype)
            return finetune(model, TOKENIZER, CHATML, tiny_rows(21), settings, folder, folder / "live")

    if kill_at:
        killed(run, KillAt(kill_at))
    model, metrics = run()
    barrier()  # the first process has written what was logged
    for file in sorted((folder / "live" / "plots" / "metrics").iterdir()):
        if file.stem != "tokens_per_second":
            metrics[f"logged {file.stem}"] = [float(line.split("\t")[1]) for line in file.read_text().splitlines()[1:]]
    return ppo_helpers.trainable(model), metrics


def passes(folder: Path, device: str) -> list[list[list[int]]]:
    """What reached each pass of fine-tuning of every process's rows."""
    name, found = "_scores" if device == "cpu" else "_unpadded", []
    own = getattr(packing, name)

    def noting(*given: Any, **inputs: Any) -> Any:
        found.append(inputs.get("passes"))
        return own(*given, **inputs)

    with patch.object(packing, name, noting):
        sft(folder, device)
    return found


def ppo(folder: Path, device: str, credit: str, kill_at: int | None = None,
        dtype: torch.dtype = torch.float32) -> tuple[dict, dict]:
    """Batches of four samples and of one, mini-batches of two and of one: of one row, one process of two has none."""
    settings = replace(ppo_helpers.QUICK, credit=credit, epochs=2, learning_rate=1e-3, save_steps=1,
                       kl=KLSettings(horizon=20), off_policy="truncated_is")

    def run(*callbacks: TrainerCallback) -> tuple[Any, dict]:
        model = ppo_helpers.make_model(dtype).to(device)
        samples = ppo_helpers.make_samples(5, credit)
        return model, train_ppo(model, samples, settings, folder, folder / VALUE_HEAD, callbacks)

    if kill_at:
        killed(run, KillAt(kill_at))
    model, metrics = run()
    barrier()  # the first process has written the value head
    return ppo_helpers.trainable(model) | load_file(folder / VALUE_HEAD, device=device), metrics


def killed(run, killer: KillAt) -> None:
    try:
        run(killer)
    except Killed:
        barrier()
        return
    raise AssertionError("the run was over before its kill")


def chunks(folder: Path, device: str) -> list:
    """Nine rows in five chunks, of which some may be there: those in the folder beside."""
    prompts = generation_helpers.make_prompts()
    requests = [Request(prompt, temperature) for prompt, temperature in zip(prompts, [0.0, 1.0, 0.5] * 3)]
    source, target = folder.parent / "some-chunks", folder / "chunks"
    if rank() == 0 and source.exists():
        shutil.copytree(source, target)
    model = generation_helpers.tiny_model().to(device)
    return generate_in_chunks(model, requests, target, chunk_size=2, **generation_helpers.settings())


def targets(model, folder: Path) -> tuple[list, dict]:
    settings = tiny_sft(self={"samples": 3, "temperature": 0.9, "max_new_tokens": 8, "batch_size": 1, "seed": 0}).self
    return self_targets(model, TOKENIZER, CHATML, tiny_rows(5), settings, 512, folder)


def rollouts(model, folder: Path, allocation: str) -> list:
    settings = Rollouts(questions=3, allocation=allocation, max_new_tokens=6, batch_size=2, seed=0)
    rows = tiny_rows(3)
    changed = {"question": rows[2]["question"], "gold_answer": "1", "changed_from": 2, "changed_to": 3}
    counterfactuals = {rows[1]["id"]: {**rows[1], **changed}}
    return roll_out(model, TOKENIZER, CHATML, rows, counterfactuals, settings, folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    here, device = Path(sys.argv[1]), sys.argv[2]
    start_processes(CPU.model_copy(update={"device": device}))
    own = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else "cpu"
    torch.save(work(here, own), here / f"rank-{rank()}.pt")
    first_process_only()
