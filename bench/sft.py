"""SFT: this repository's `finetune` against TRL's SFTTrainer, on the same rows, weights, seed and effective batch.

Both sides are timed from the start of an update to the end of the last one: set-up, compilation and the first updates
stand apart. The gates compare loss and gradients of one update with those of accumulation row by row, and with those of
this repository without one of its speedups.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, TrainerCallback
from trl import SFTConfig, SFTTrainer

from bench.measure import Gate, Pass, Side, Stage, clocks
from bench.without import switched_off, variants
from bench.workload import (LORA, Setup, Update, equality, gradients, lengths, load, relative, watching, widened,
                            with_either_attention)
from looper.params import Sft, load_params
from looper.prompts import training_ids
from looper.sample_problems import generate
from looper.sft import finetune

BATCH = 8  # rows an update, on every side, unless another number is asked for
WARM_UP = {"cuda": 2, "cpu": 0}  # updates at the start of every pass that are not measured
OWN_WARM_UP = {"cuda": 16, "cpu": 0}  # of this repository's: until looper.graphs has met nearly every size of pass
B1_ROWS = 32  # measured a pass: row by row the rate does not depend on their number, and all of them would take minutes
# Of the loss and, in norm, of the gradients. bfloat16 keeps 8 bits, and one pass over all rows adds in another order.
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (5e-3, 5e-2)}

Train = Callable[[list[dict]], None]


def stage(setup: Setup, rows: int, against: list[str], without: Sequence[str] = (), batch: int = BATCH) -> Stage:
    own, plain = load(setup, quantised=True), load(setup, quantised=True) if against else None
    chosen = settings(batch)

    def finetuning(model: PreTrainedModel) -> Train:
        return partial(ours, setup, model, sft=chosen)

    def side(name: str, train: Train, model: PreTrainedModel, measured: int = rows) -> Side:
        warm_up = (WARM_UP if model is plain else OWN_WARM_UP)[setup.model.device]
        data = make_rows(setup, warm_up * batch + measured)
        return Side(name, lambda: run(setup, train, data, warm_up), [model])

    accumulated = partial(trl, setup, plain, batch=batch, micro_batch=1, checkpointing=True)
    batched = partial(trl, setup, plain, batch=batch, micro_batch=batch, checkpointing=False)
    models = variants(without, "sft", own, lambda: load(setup, quantised=True))
    slower = {name: switched_off(name)(finetuning(model)) for name, model in models.items()}
    sides = [side("looper", finetuning(own), own)]
    if "b1" in against:
        sides.append(side(f"B1: TRL 1 x {batch}, checkpointing", accumulated, plain, min(rows, B1_ROWS)))
    if "b2" in against:
        sides += [side(name, train, plain)
                  for name, train in with_either_attention(setup, f"B2: TRL {batch} x 1", batched).items()]
    sides += [side(f"looper without {name}", train, models[name]) for name, train in slower.items()]
    return Stage("sft", sides,
                 lambda: gates(setup, batch, finetuning(own), (accumulated, batched) if against else None, slower),
                 limit(setup, make_rows(setup, rows)))


def limit(setup: Setup, rows: list[dict]) -> float:
    """Tokens/s of the matrix products alone at the device's peak.

    Forward and the gradient of the activations, 2 FLOP a weight each, the head on labelled tokens only; nothing computed
    twice, no gradient of the frozen weights; attention, below 1% at these lengths, and the adapter are left out.
    """
    masks = [mask for _, mask in training_ids(setup.tokenizer, setup.template, rows)]
    tokens, labelled = sum(map(len, masks)), sum(map(sum, masks))
    return tokens * setup.flops / (4 * (tokens * setup.shape.body + labelled * setup.shape.head))


# ---- the sides ----


def ours(setup: Setup, model: PreTrainedModel, rows: list[dict], sft: Sft) -> None:
    with TemporaryDirectory() as folder:
        trained, _ = finetune(model, setup.tokenizer, setup.template, rows, sft, Path(folder) / "scratch",
                              Path(folder) / "live")
    trained.unload()  # the next pass starts from the same base


def settings(batch: int = BATCH) -> Sft:
    """params.yaml's way of computing (micro_batch and the like), with the measured update's settings."""
    return load_params().sft.model_copy(update={
        "lora": LORA, "learning_rate": 5e-5, "epochs": 1, "batch_size": batch, "warmup_share": 0.0, "max_tokens": 2048,
        "max_grad_norm": 1e9, "loss_on": "completion", "gradient_checkpointing": False, "save_steps": 10**9, "seed": 0})


def trl(setup: Setup, model: PreTrainedModel, rows: list[dict], batch: int, micro_batch: int, checkpointing: bool) -> None:
    """TRL for a model that is loaded already. With checkpointing as its documentation shows QLoRA, the optimiser's state
    paged, in eight bits; without, one kernel for the optimiser."""
    if not checkpointing:
        model.gradient_checkpointing_disable()
    encoded = training_ids(setup.tokenizer, setup.template, rows)
    ids, masks = zip(*encoded, strict=True)
    dataset = Dataset.from_dict({"input_ids": ids, "completion_mask": masks})
    with TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder, per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=batch // micro_batch, gradient_checkpointing=checkpointing,
            learning_rate=5e-5, max_grad_norm=1e9, completion_only_loss=True,
            max_length=None, bf16=setup.dtype == torch.bfloat16, use_cpu=not setup.cuda, num_train_epochs=1,
            optim=("paged_adamw_8bit" if checkpointing else "adamw_torch_fused") if setup.cuda else "adamw_torch",
            logging_steps=1, save_strategy="no", seed=0,
            report_to="none", dataloader_pin_memory=setup.cuda)
        lora = LoraConfig(task_type="CAUSAL_LM", r=LORA.r, lora_alpha=LORA.alpha, lora_dropout=LORA.dropout,
                          target_modules="all-linear")
        trainer = SFTTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=setup.tokenizer,
                             peft_config=lora)
        trainer.train()
        trainer.model.unload()


# ---- what they work on, and the clock ----


def make_rows(setup: Setup, count: int) -> list[dict]:
    """Prepared rows: pieces of the built-in problems, prompts and solutions of the stored lengths to a few tokens."""
    problems = generate("train", 200, seed=0)
    text = setup.tokenizer.encode(" ".join(f"{each['question']} {each['answer']}" for each in problems),
                                  add_special_tokens=False)
    (ids, _), = training_ids(setup.tokenizer, setup.template, [{"question": "", "solution": "", "gold_answer": "7"}])
    frame = len(ids)
    rows, at = [], 0
    for i, (prompt, output) in enumerate(lengths(count)):
        at = at % (len(text) - prompt - output)
        question = text[at:at + max(1, prompt - frame)]
        solution = text[at + prompt:at + prompt + output]
        rows.append({"id": f"bench-{i:05d}", "question": setup.tokenizer.decode(question),
                     "solution": setup.tokenizer.decode(solution), "gold_answer": "7"})
        at += prompt + output
    return rows


class Clock(TrainerCallback):
    """The clocks at the start of the first measured update and at the end of the last; the tokens after each update."""

    def __init__(self, warm_up: int):
        self.warm_up = warm_up
        self.tokens = {0: 0}

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.warm_up:
            self.begun = clocks()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            self.ended = clocks()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "num_tokens" in logs:  # TRL's count, without padding
            self.tokens[state.global_step] = int(logs["num_tokens"])


def run(setup: Setup, train: Train, rows: list[dict], warm_up: int) -> Pass:
    """One pass over `rows`, its clock started after `warm_up` updates.

    Raises ValueError if the trainer's count of tokens is not the rows'.
    """
    started = clocks()
    with watching(Clock(warm_up)) as clock:
        train(rows)
    last = max(clock.tokens)
    given = sum(len(ids) for ids, _ in training_ids(setup.tokenizer, setup.template, rows))
    if clock.tokens[last] != given:
        raise ValueError(f"sft: the trainer counted {clock.tokens[last]} tokens in rows of {given}; "
                         "padding must not count, and of several processes each needs a row of every pass: make --batch "
                         "and --rows multiples of their number")
    return Pass(given - clock.tokens[warm_up], clock.ended.wall - clock.begun.wall, clock.ended.cpu - clock.begun.cpu,
                clock.begun.wall - started.wall)


# ---- the gate ----


class FirstUpdate(TrainerCallback):
    """Loss and gradients of a run of one update."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = gradients(model)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.loss = logs["loss"]


def gates(setup: Setup, batch: int, own: Train, plain: tuple[Train, Train] | None,
          slower: Mapping[str, Train]) -> list[Gate]:
    """One update on each side; the adapter is as new, so that only lora_B has a gradient.

    plain: TRL's two ways, row by row and all rows at once. slower: speedups, and this repository without them.
    """
    def first_update(train: Train) -> Update:
        with watching(FirstUpdate()) as update:
            train(make_rows(setup, batch))
        return Update(update.loss, update.gradients)

    found, made, (loss, gradient) = first_update(own), [], TOLERANCE[setup.dtype]
    if plain:
        expected, other = map(first_update, plain)
        between = relative(other, expected)
        gradient = widened(gradient, between[1])
        made = equality(f"1 x {batch}", relative(found, expected), (loss, gradient), between, f"TRL {batch} x 1")
    for name, train in slower.items():
        made += equality(f"looper without {name}", relative(found, first_update(train)), (loss, gradient))
    return made
