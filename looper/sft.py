"""Supervised fine-tuning: a LoRA adapter on the base by TRL's SFTTrainer, resumed where a kill left it."""

from collections.abc import Callable
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import SFTConfig
from trl import SFTTrainer as TRLTrainer

from looper.determinism import deterministic
from looper.distributed import AveragesGradients, dealt, rank, undivided, world
from looper.graphs import graphed_layers
from looper.late_logs import LateLogs
from looper.layers import compiled_layers
from looper.live import LiveMetrics, show_progress
from looper.lora import compute_in_base_precision
from looper.micro_batch import fitting_passes, tokens
from looper.nf4 import unpack_if_room
from looper.packing import IGNORED, is_plain, packed
from looper.params import Sft
from looper.prompts import Template, end_token_ids, training_ids
from looper.quick_updates import QuickUpdates
from looper.scratch import last_checkpoint


class SFTTrainer(LateLogs, QuickUpdates, AveragesGradients, TRLTrainer):
    """TRL's, in which several processes divide the rows of each pass; TRL takes the mean over all processes' tokens."""

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # the Trainer would look through all modules at every pass to count them, and nobody reads it

    def get_train_dataloader(self) -> DataLoader:
        unpadded = is_plain(self.model.get_base_model())
        if world() > 1 or (unpadded and not self.args.use_cpu):
            self.data_collator = partial(_collate_share, self.data_collator, unpadded)
        return undivided(super().get_train_dataloader())


def _collate_share(collate: Callable[[list[dict]], dict[str, Any]], unpadded: bool, rows: list[dict]) -> dict[str, Any]:
    """This process's rows of a pass. One that has none takes two tokens with nothing to learn: its zeros belong to the
    gradients' mean, for which the others wait.

    unpadded: whether looper.packing takes the pass, and so wants to know the lengths of every process's rows.
    """
    blank = {name: values[:2] for name, values in rows[0].items()} | {"labels": [IGNORED] * 2}
    parts = [part or [blank] for part in dealt(rows, tokens)]
    return collate(parts[rank()]) | ({"passes": [list(map(tokens, part)) for part in parts]} if unpadded else {})


def finetune(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: Template, rows: list[dict], sft: Sft,
             scratch: Path, live: Path) -> tuple[Any, dict[str, Any]]:
    """Trains a new adapter on `rows`; returns (the PeftModel, metrics).

    scratch: the folder of checkpoints; training goes on from the last one there. live: the folder of live metrics.
    Every process of several returns the same; dropout differs with their number, and so does what it makes.
    Raises ValueError for a row longer than sft.max_tokens (cutting it would cut the answer off), for a template whose end the
    tokenizer does not know, and for a loss or gradient that is not finite.
    """
    dataset = tokenize(tokenizer, template, rows, sft.max_tokens)
    on_gpu = model.device.type == "cuda"
    steps = max(1, round(sft.epochs * len(dataset) / sft.batch_size))
    passes = 1 if sft.micro_batch == "auto" else passes_an_update(sft, world())
    arguments = SFTConfig(
        output_dir=str(scratch / "checkpoints"),
        per_device_train_batch_size=sft.batch_size // passes,  # of all processes together: see SFTTrainer
        gradient_accumulation_steps=passes,
        num_train_epochs=sft.epochs,
        learning_rate=sft.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(sft.warmup_share * steps),
        max_grad_norm=sft.max_grad_norm,
        optim=_optimizer(on_gpu, sft.gradient_checkpointing),
        bf16=model.dtype == torch.bfloat16,
        use_cpu=not on_gpu,
        gradient_checkpointing=sft.gradient_checkpointing,
        completion_only_loss=sft.loss_on == "completion",
        max_length=None,
        logging_steps=1,  # of every update: a resumed run then logs what an uninterrupted one does
        logging_nan_inf_filter=False,  # which would hide what _OnlyFinite looks for
        save_steps=sft.save_steps,
        save_total_limit=1,
        seed=sft.seed,
        data_seed=sft.seed,
        report_to="none",
        dataloader_pin_memory=on_gpu,
        accelerator_config={"non_blocking": on_gpu},  # else each batch's way to the GPU waits for all it was given before
        ddp_find_unused_parameters=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs in sight of one process must not turn into DataParallel
    lora = LoraConfig(task_type="CAUSAL_LM", r=sft.lora.r, lora_alpha=sft.lora.alpha, lora_dropout=sft.lora.dropout,
                      target_modules="all-linear")
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer, peft_config=lora,
                         callbacks=[LiveMetrics(live), _OnlyFinite()])
    show_progress(trainer, "sft")
    if rank():
        torch.manual_seed(sft.seed + rank())  # other rows, other dropout
    compute_in_base_precision(trainer.model)
    unpack_if_room(trainer.model)
    with packed(trainer.model), deterministic(), compiled_layers(trainer.model):
        if sft.micro_batch == "auto":
            passes = fitting_passes(trainer, sft.batch_size)
            arguments.gradient_accumulation_steps = trainer.accelerator.gradient_accumulation_steps = passes
            arguments.per_device_train_batch_size = trainer._train_batch_size = sft.batch_size // passes
        with graphed_layers(trainer.model, sft.gradient_checkpointing):
            trainer.train(resume_from_checkpoint=last_checkpoint(scratch))
    return trainer.model, _metrics(trainer, dataset)


def _optimizer(on_gpu: bool, memory_is_short: bool) -> str:
    """Where memory is short, states of eight bits that may leave the GPU: half a gigabyte less at the 8B shape. They are
    updated weight by weight, and Python launches hundreds of kernels for it; elsewhere one updates all."""
    if not on_gpu:
        return "adamw_torch"
    return "paged_adamw_8bit" if memory_is_short else "adamw_torch_fused"


def passes_an_update(sft: Sft, processes: int) -> int:
    """The fewest passes of equal size that make an update of batch_size rows, at most micro_batch rows a process."""
    return next(passes for passes in range(1, sft.batch_size + 1)
                if sft.batch_size % passes == 0 and sft.batch_size <= passes * sft.micro_batch * processes)


def tokenize(tokenizer: PreTrainedTokenizerBase, template: Template, rows: list[dict], max_tokens: int) -> Dataset:
    """A dataset of input_ids and completion_mask. Raises ValueError for a row of more than `max_tokens` tokens."""
    end_token_ids(tokenizer, template)  # raises if the end is not one token: the model would not learn to stop
    encoded = training_ids(tokenizer, template, rows)
    for row, (ids, _) in zip(rows, encoded, strict=True):
        if len(ids) > max_tokens:
            raise ValueError(f"{row['id']} is {len(ids)} tokens, sft.max_tokens is {max_tokens}; raise sft.max_tokens")
    return Dataset.from_dict({"input_ids": [ids for ids, _ in encoded], "completion_mask": [mask for _, mask in encoded]})


class _OnlyFinite(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "grad_norm"):
            if not isfinite(logs.get(name, 0.0)):
                raise ValueError(f"sft: the {name} of update {state.global_step} is {logs[name]}; nothing stored, the last "
                                 "checkpoint is kept; lower sft.learning_rate or sft.max_grad_norm")


def _metrics(trainer: SFTTrainer, dataset: Dataset) -> dict[str, Any]:
    """Nothing that a clock or an interruption decides, so that equal runs give equal files."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tenth = max(1, len(losses) // 10)
    return {"loss": {"mean": round(sum(losses) / len(losses), 6), "first_tenth": round(sum(losses[:tenth]) / tenth, 6),
                     "last_tenth": round(sum(losses[-tenth:]) / tenth, 6)},
            "steps": trainer.state.global_step, "rows": len(dataset), "tokens": sum(map(len, dataset["input_ids"]))}
