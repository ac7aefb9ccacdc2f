"""`sft.micro_batch: auto`: as many rows a pass as the memory of the card holds, found by trying."""

from collections.abc import Sequence

import torch
from trl import SFTTrainer

from looper.distributed import dealt, gathered, rank, world


def fitting_passes(trainer: SFTTrainer, batch_size: int) -> int:
    """The fewest passes of equal size that make an update of `batch_size` rows and whose longest rows fit; says so.

    Each is tried: forward and backward, beside room for the optimiser's state, two numbers a weight at most. Trying leaves
    neither gradients nor random numbers behind. On the CPU, where the system would end the process rather than say that
    memory is short, it is one pass.
    Raises ValueError if not even a row a process fits.
    """
    rows = sorted(trainer.train_dataset, key=tokens, reverse=True)[:batch_size]
    for passes in (count for count in range(1, batch_size + 1) if batch_size % count == 0):
        if on_cpu(trainer) or all(gathered(_fits(trainer, dealt(rows[:batch_size // passes], tokens)[rank()] or rows[:1]))):
            if rank() == 0:
                print(f"sft.micro_batch auto: {-(-batch_size // (passes * world()))} rows a pass, "
                      f"{passes} passes an update of {batch_size}", flush=True)
            return passes
    raise ValueError(f"sft.micro_batch auto: the longest row, {len(rows[0]['input_ids'])} tokens, does not fit the GPU's "
                     "memory alone; set sft.gradient_checkpointing: true, or run on a larger card")


def on_cpu(trainer: SFTTrainer) -> bool:
    return trainer.args.use_cpu


def tokens(row: dict) -> int:
    """How many tokens a row of the training dataset has."""
    return len(row["input_ids"])


def _fits(trainer: SFTTrainer, rows: Sequence[dict]) -> bool:
    """Whether forward and backward of `rows` fit beside the optimiser's state."""
    model, room = trainer.model, []
    if trainer.args.gradient_checkpointing:  # as training will; transformers renamed it after 5.17
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()
    try:
        with torch.random.fork_rng(), trainer.accelerator.autocast():
            room = [torch.empty_like(parameter) for parameter in model.parameters() if parameter.requires_grad
                    for _ in range(2)]
            inputs = trainer._prepare_inputs(trainer.data_collator(list(rows)))
            model(**inputs, use_cache=False, fused_lm_head=True).log_probs.sum().backward()  # as TRL trains
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        del room
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
