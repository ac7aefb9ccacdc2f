"""Offline PPO as one library call: a policy and scored rollouts in, an improved adapter out."""

from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel
from safetensors.torch import save_file
from transformers import TrainerCallback

from looper.determinism import deterministic
from looper.distributed import rank
from looper.files import replacing
from looper.graphs import graphed_layers
from looper.layers import compiled_layers
from looper.live import show_progress
from looper.nf4 import unpack_if_room
from looper.ppo_data import PPOSample, earns_alike, samples_from_rows
from looper.ppo_policy import PolicyWithValue
from looper.ppo_settings import PPOSettings
from looper.ppo_trainer import VALUE_HEAD, NonFiniteError, OfflinePPOTrainer
from looper.scratch import last_checkpoint

__all__ = ["VALUE_HEAD", "NonFiniteError", "PPOSample", "earns_alike", "samples_from_rows", "train_ppo"]


def train_ppo(model: PeftModel, samples: Sequence[PPOSample], settings: PPOSettings, scratch: Path,
              value_head_path: Path, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, float | int | bool]:
    """Trains `model`'s adapter in place and writes the value head to `value_head_path`; returns the run's summary.

    model: base + SFT adapter, loaded with is_trainable=True, on its device. It is the reference too, as it comes in.
    scratch: an untracked folder of this run's inputs alone. A killed run goes on from its last checkpoint there; the
    caller removes it when the outputs are stored. Every process of several returns the same; the first writes.
    Raises NonFiniteError (a ValueError) if a loss or gradient is not finite, ValueError for a model it cannot train.
    """
    policy = PolicyWithValue(model, settings.gradient_checkpointing)
    unpack_if_room(model)
    with deterministic(), compiled_layers(policy), graphed_layers(policy, settings.gradient_checkpointing):
        trainer = OfflinePPOTrainer(policy, samples, settings, scratch, callbacks)
        show_progress(trainer, "ppo")
        trainer.train(resume_from_checkpoint=last_checkpoint(scratch))
    if rank() == 0:
        with replacing(value_head_path) as temporary:
            save_file(trainer.model.value_head.state_dict(), temporary)
    return summary(trainer)


def summary(trainer: OfflinePPOTrainer) -> dict[str, float | int | bool]:
    """What metrics/ppo.json keeps: counts, the KL and β at the end, and the mean over PPO batches of what was logged.

    Nothing that depends on the clock: the same run gives the same numbers, whether it was resumed or not.
    """
    batches = [entry for entry in trainer.state.log_history if "policy_loss" in entry]
    skipped = {"step", "epoch", "learning_rate", "tokens_per_second", "loss", "kl_k1", "beta"}
    means = {name: sum(entry[name] for entry in batches) / len(batches)
             for name in (batches[0] if batches else ()) if name not in skipped}
    last = next((entry for entry in reversed(trainer.state.log_history) if "kl" in entry), {})
    updates = trainer.state.global_step - trainer.stopped_early  # the step at which it stopped had no gradient
    return {"samples": len(trainer.samples), "batches": len(batches), "updates": updates,
            "stopped_early": trainer.stopped_early, "last_kl": last.get("kl", 0.0), "last_beta": trainer.kl.beta,
            **means}
