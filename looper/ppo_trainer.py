"""Offline PPO on `transformers.Trainer`: one Trainer step is one mini-batch, so that clipping of the gradient, logging,
checkpoints and resume are the Trainer's own. docs/metrics.md defines what is logged.

Several processes divide the rows of each mini-batch; what does not touch the model, each computes for all rows."""

import hashlib
import time
from collections import defaultdict
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from looper import compiling, ppo_math
from looper.distributed import AveragesGradients, agreed, dealt, rank, total, undivided, world
from looper.files import read_json, replacing, write_json
from looper.ppo_data import COMPONENTS, PPOSample, Step, collate, mini_batches, padded, plan_steps
from looper.ppo_policy import PolicyWithValue
from looper.ppo_settings import PPOSettings
from looper.quick_updates import QuickUpdates

ADAPTER = "adapter_model.safetensors"
VALUE_HEAD = "value_head.safetensors"
PPO_STATE = "ppo_state.json"


class NonFiniteError(ValueError):
    """A loss, gradient or log-probability became infinite or not a number; the policy was not updated with it."""


class Batch(NamedTuple):
    """A PPO batch as its update sees it, all [B, T] and fixed until the next batch starts."""

    mask: Tensor
    old_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor


class OfflinePPOTrainer(QuickUpdates, AveragesGradients, Trainer):
    """PPO over stored responses. The policy as it comes in is the reference, whose log-probabilities are computed once.

    The behaviour's come with the responses, and the critic's first values are one number, the mean reward.
    folder: where checkpoints and the reference's log-probabilities are kept; an untracked one, of this run alone.
    """

    def __init__(self, model: PolicyWithValue, samples: Sequence[PPOSample], settings: PPOSettings, folder: Path,
                 callbacks: Sequence[TrainerCallback] = ()) -> None:
        device = model.value_head.weight.device
        arguments = TrainingArguments(
            output_dir=str(folder / "checkpoints"), per_device_train_batch_size=1, num_train_epochs=1,
            learning_rate=settings.learning_rate, lr_scheduler_type="constant", weight_decay=0.0,
            optim="adamw_torch_fused" if device.type == "cuda" else "adamw_torch",
            max_grad_norm=settings.max_grad_norm, train_sampling_strategy="sequential", logging_strategy="no",
            save_strategy="no", save_total_limit=1, logging_nan_inf_filter=False, remove_unused_columns=False,
            report_to="none", seed=settings.seed, use_cpu=device.type == "cpu", dataloader_pin_memory=False,
            ddp_find_unused_parameters=False)
        arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs in sight must not turn into DataParallel
        model.value_head.requires_grad_(settings.credit == "question")  # arm credit has no critic
        self.samples, self.settings, self.folder = samples, settings, folder
        self.plan = plan_steps(len(samples), settings)
        self.kl = ppo_math.AdaptiveKLController(settings.kl.initial, settings.kl.target, settings.kl.horizon)
        self.stopped_early = False
        self.batch: Batch | None = None
        self._sums: dict[str, list[float]] = defaultdict(list)
        # A dataset of step numbers: what a step trains on stands in the plan
        super().__init__(model=model, args=arguments, train_dataset=[{"step": i} for i in range(len(self.plan))],
                         data_collator=lambda steps: steps[0], callbacks=[_BatchEnds(self), *callbacks])
        if settings.credit == "question":
            # A critic that starts at 0 sees every reward as a surprise: GAE then credits the last tokens, whitening turns
            # that into blame for the first ones, and the policy unlearns its own answers. The mean reward is the honest
            # first guess.
            torch.nn.init.constant_(model.value_head.bias, sum(sample.reward for sample in samples) / len(samples))
        self.reference = self._reference_logprobs()

    def get_train_dataloader(self) -> DataLoader:
        return undivided(super().get_train_dataloader())

    # ---- before training: the reference ----

    def _reference_logprobs(self) -> list[Tensor]:
        """The reference's log-probabilities of every sample, computed once and cached in the folder."""
        path = self.folder / "reference.safetensors"
        digest = hashlib.sha256(repr([(s.id, list(s.prompt_ids), list(s.response_ids)) for s in self.samples]).encode())
        key = f"logprobs_{digest.hexdigest()}"
        if agreed(path.exists()) and key in (cached := load_file(path)):
            return list(cached[key].split([len(sample.response_ids) for sample in self.samples]))
        found: dict[int, Tensor] = {}
        # The groups in which the first pass takes the samples: its first KL is then exactly 0
        for step in self.plan:
            if step.first and step.batch[0] not in found:
                logprobs, _ = self._evaluate_batch(step.batch)
                for i, row in zip(step.batch, logprobs, strict=True):
                    found[i] = row[:len(self.samples[i].response_ids)].cpu()
        reference = [found[i] for i in range(len(self.samples))]
        if rank() == 0:
            with replacing(path) as temporary:
                save_file({key: torch.cat(reference)}, temporary)
        return reference

    @torch.no_grad()
    def _evaluate_batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Log-probabilities and values of a PPO batch's samples under the present policy, each [B, T]."""
        longest = max(len(self.samples[i].response_ids) for i in indices)
        logprobs, values = torch.zeros(2, len(indices), longest, device=self.args.device)
        for rows in mini_batches(range(len(indices)), self.settings):
            rows, passes = self._dealt(rows, indices)
            if rows:
                tokens = collate([self.samples[indices[row]] for row in rows], self.args.device, passes)
                width = tokens.mask.shape[1]
                # Compiled, it is one program with gradients and another without, whose last bits may differ: the one that
                # trains makes the first ratio exactly 1
                with torch.set_grad_enabled(compiling.compiles_on(self.args.device)):
                    logprobs[rows, :width], values[rows, :width], _ = map(Tensor.detach, self.model(tokens))
        total(logprobs), total(values)  # each row stands in one process, and is 0 in the others
        for rows in mini_batches(range(len(indices)), self.settings):
            if not logprobs[list(rows)].isfinite().all():
                raise self._non_finite("log-probability", [indices[row] for row in rows])
        return logprobs, values

    # ---- one PPO batch ----

    def _start_batch(self, step: Step) -> Batch:
        """π_old, the penalised rewards and the advantages of a batch, under the policy as it is now."""
        settings, device = self.settings, self.args.device
        samples = [self.samples[i] for i in step.batch]
        mask = collate(samples, device).mask
        old_logprobs, old_values = self._evaluate_batch(step.batch)
        reference = padded([self.reference[i] for i in step.batch], torch.float32).to(device)
        behaviour = padded([sample.behaviour_logprobs for sample in samples], torch.float32).to(device)
        # k1 is signed: as a reward it draws π back whichever way it moved. k3 would push down what is already unlearnt
        penalty = ppo_math.kl_estimate(old_logprobs, reference, "k1")
        if settings.credit == "question":
            scores = torch.tensor([sample.reward for sample in samples], device=device)
            rewards = ppo_math.token_rewards(penalty, scores, mask, self.kl.beta)
            advantages, returns = ppo_math.gae(rewards, old_values, mask, settings.gamma, settings.lam)
            advantages = ppo_math.whiten(advantages, mask)
        else:
            # The leave-one-out advantage has its baseline already: no critic, and no shift that could turn its sign
            rewards = ppo_math.token_rewards(penalty, torch.zeros(len(samples), device=device), mask, self.kl.beta)
            returns = torch.zeros_like(rewards)
            penalties, _ = ppo_math.gae(rewards, returns, mask, settings.gamma, settings.lam)
            scores = torch.tensor([sample.advantage for sample in samples], device=device)
            advantages = ppo_math.scale_to_unit((scores[:, None] + penalties) * mask, mask)
        weights = ppo_math.importance_weights(old_logprobs, behaviour, mask, settings.importance_cap)
        # Drift is measured from the reference's side, KL(π_ref‖π_old): the responses were drawn near the reference, so
        # that this estimate is sound and never negative. log π_old − log π_ref falls below 0 as bad ones are unlearnt.
        # In float64: a token that the reference thought all but impossible is e^100 in it.
        drift = ppo_math.kl_estimate(reference.double(), old_logprobs.double(), "k3").sum(1).mean().item()
        if not isfinite(drift):
            raise self._non_finite("KL from the reference", step.batch)
        self._log_batch(samples, drift, (old_logprobs - reference).sum(1).mean().item(), weights, mask)
        if settings.credit == "question":
            self._add(explained_variance=ppo_math.explained_variance(old_values, returns, mask).item())
        limit = settings.kl.stop_multiple
        self.stopped_early = limit is not None and drift > limit * settings.kl.target
        return Batch(mask, old_logprobs, old_values, advantages, returns, weights)

    def training_step(self, model: PolicyWithValue, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        step = self.plan[inputs["step"]]
        if step.first:
            self._batch_started = time.perf_counter()
            self.batch = self._start_batch(step)
        if self.stopped_early:  # nothing has a gradient, so the Trainer's optimiser step does nothing
            return torch.zeros((), device=self.args.device)
        return super().training_step(model, inputs, num_items_in_batch)

    def _clip_grad_norm(self, model: PolicyWithValue) -> Tensor:
        norm = super()._clip_grad_norm(model)
        if not self.stopped_early:
            self._gradients_made(self.plan[self.state.global_step], norm.item())
        return norm

    def _gradients_made(self, step: Step, norm: float) -> None:
        """After the gradients of a mini-batch, before the optimiser takes them: the device has done all of it by now."""
        if not isfinite(norm):
            raise self._non_finite("gradient", [step.batch[row] for row in step.rows])
        self._add(grad_norm=norm)
        if step.last:
            self.kl.update(self._sums["kl"][-1], len(step.batch))
            seconds = time.perf_counter() - self._batch_started
            self._add(tokens_per_second=self._trained_tokens(step) / seconds)

    def compute_loss(self, model: PolicyWithValue, inputs: dict[str, Any], return_outputs: bool = False,
                     num_items_in_batch: Any = None) -> Tensor:
        """The loss of one mini-batch: the clipped surrogate, plus the weighted value loss under question credit."""
        step, settings = self.plan[inputs["step"]], self.settings
        rows, passes = self._dealt(step.rows, step.batch)
        weight = self._responses(step, rows) / self._responses(step, step.rows)
        rows = rows or [step.rows[0]]  # of no weight: the other processes wait for this one's gradients
        tokens = collate([self.samples[step.batch[row]] for row in rows], self.args.device, passes)
        width = tokens.mask.shape[1]
        batch = Batch(*(tensor[rows, :width] for tensor in self.batch))
        logprobs, values, entropies = model(tokens)
        weights = batch.weights if settings.off_policy == "truncated_is" else None
        policy = ppo_math.policy_loss(logprobs, batch.old_logprobs, batch.advantages, batch.mask, settings.clip_low,
                                      settings.clip_high, weights)
        loss = policy.loss
        means = {"policy_loss": policy.loss, "clip_fraction": policy.clip_fraction, "approx_kl": policy.approx_kl,
                 "entropy": ppo_math.masked_mean(entropies, batch.mask)}
        if settings.credit == "question":
            value = ppo_math.value_loss(values, batch.old_values, batch.returns, batch.mask, settings.value_clip)
            loss = loss + settings.value_coef * value.loss
            means |= {"value_loss": value.loss, "value_clip_fraction": value.clip_fraction}
        # All at once: a GPU waits for each number that is asked of it
        parts = [weight * mean for mean in torch.stack([*means.values(), loss]).tolist()]
        whole = total(torch.tensor(parts, dtype=torch.float64)).tolist()
        if not isfinite(whole.pop()):
            raise self._non_finite("loss", [step.batch[row] for row in step.rows])
        self._add(**dict(zip(means, whole, strict=True)))
        return loss * (weight * world())  # the gradients' mean over the processes is then that of the whole mini-batch

    def _dealt(self, rows: Sequence[int], batch: Sequence[int]) -> tuple[list[int], list[list[int]]]:
        """(this process's part of a mini-batch's `rows`, which count into the batch's sample numbers; the lengths in every
        process's)."""
        parts = dealt(rows, lambda row: self._tokens(batch[row]))
        return list(parts[rank()]), [[self._tokens(batch[row]) for row in part] for part in parts]

    def _responses(self, step: Step, rows: Sequence[int]) -> int:
        """How many response tokens a mini-batch's `rows` have."""
        return sum(len(self.samples[step.batch[row]].response_ids) for row in rows)

    def _non_finite(self, what: str, indices: Sequence[int]) -> NonFiniteError:
        names = ", ".join(self.samples[i].id for i in indices)
        return NonFiniteError(
            f"ppo: the {what} of optimiser step {self.state.global_step + 1} is not finite; the samples were {names}. "
            "The policy was not updated with it, and the last checkpoint is kept. Look at these rows of the scored "
            "rollouts; lower ppo.learning_rate or ppo.max_grad_norm, or set model.dtype to float32, and run again")

    # ---- metrics ----

    def _add(self, **metrics: float) -> None:
        for name, value in metrics.items():
            self._sums[name].append(value)

    def _log_batch(self, samples: Sequence[PPOSample], kl: float, kl_k1: float, weights: Tensor, mask: Tensor) -> None:
        def mean(values: Sequence[float]) -> float:
            return sum(values) / len(values)

        self._add(reward=mean([sample.reward for sample in samples]), kl=kl, kl_k1=kl_k1, beta=self.kl.beta,
                  **{name: mean([sample.components[name] for sample in samples]) for name in COMPONENTS},
                  ess=ppo_math.effective_sample_size(weights, mask).item(),
                  response_tokens=mean([len(sample.response_ids) for sample in samples]))

    def _tokens(self, index: int) -> int:
        return len(self.samples[index].prompt_ids) + len(self.samples[index].response_ids)

    def _trained_tokens(self, step: Step) -> int:
        return self.settings.ppo_epochs * sum(map(self._tokens, step.batch))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means over a PPO batch's updates to what the Trainer logs at the batch's end."""
        if "loss" in logs:
            logs |= {name: sum(values) / len(values) for name, values in self._sums.items()}
            self._sums.clear()
        super().log(logs, start_time)

    # ---- checkpoints ----

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if rank():  # the Trainer asks every process
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(get_peft_model_state_dict(self.model.policy, save_embedding_layers=False), folder / ADAPTER)
        save_file(self.model.value_head.state_dict(), folder / VALUE_HEAD)
        write_json(folder / PPO_STATE, {"beta": self.kl.beta})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PolicyWithValue | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        set_peft_model_state_dict(self.model.policy, load_file(folder / ADAPTER))
        self.model.value_head.load_state_dict(load_file(folder / VALUE_HEAD))
        self.kl.beta = read_json(folder / PPO_STATE)["beta"]


class _BatchEnds(TrainerCallback):
    """Logs at the end of each PPO batch, saves at the end of every `save_steps`-th, stops where the trainer says so.

    Between batches there is no old policy to remember, so that a checkpoint needs none of the batch's tensors.
    """

    def __init__(self, trainer: OfflinePPOTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> Any:
        step = self.trainer.plan[state.global_step - 1]
        if self.trainer.stopped_early:
            control.should_log = control.should_training_stop = True
        elif step.last:
            control.should_log = True
            control.should_save = (step.number + 1) % self.trainer.settings.save_steps == 0
        return control
