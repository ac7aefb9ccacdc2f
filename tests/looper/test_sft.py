"""Fine-tuning by TRL's own trainer, the tiny model in float32: what is trained on, and that a kill changes nothing."""

import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_rows, tiny_sft
from transformers import TrainerCallback

from looper import micro_batch, packing, quick_updates, sft
from looper.prompts import TEMPLATES, end_token_ids, training_ids
from looper.sft import finetune, tokenize

CHATML = TEMPLATES["chatml"]


class Killed(BaseException):
    """As a signal: nothing of the trainer catches it."""


class Watch(TrainerCallback):
    """The gradients that the optimiser got, and how many positions the head saw in each pass; dies after `kill_at` updates."""

    def __init__(self, kill_at=None):
        self.kill_at, self.gradients, self.positions = kill_at, [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.hook = model.register_forward_hook(lambda _, args, output: self.positions.append(output.log_probs.numel()))

    def on_train_end(self, args, state, control, **kwargs):
        self.hook.remove()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()
                               if parameter.grad is not None})

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.kill_at:
            raise Killed


@pytest.fixture
def train(tokenizer, tmp_path, monkeypatch):
    """Fine-tunes the tiny model; returns (adapter's weights, metrics, trainer, watch)."""
    trainers, real = [], sft.SFTTrainer

    def run(rows=None, settings=None, watch=None, name="run", template=CHATML, model=None):
        watch = watch or Watch()

        def build(**options):
            trainers.append(real(**options | {"callbacks": [*options["callbacks"], watch]}))
            return trainers[-1]

        monkeypatch.setattr(sft, "SFTTrainer", build)
        trained, metrics = finetune(model or tiny_model(), tokenizer, template, rows or tiny_rows(),
                                    settings or tiny_sft(), tmp_path / name / "scratch", tmp_path / name / "live")
        weights = {key: parameter.detach().clone() for key, parameter in trained.named_parameters()
                   if parameter.requires_grad}
        return weights, metrics, trainers[-1], watch

    return run


def plain_loss(tokenizer, rows, loss_on, template=CHATML):
    """Mean cross-entropy over the trained tokens, a row at a time: no padding, no mask, no TRL."""
    model, total, count = tiny_model(), 0.0, 0
    for encoded in training_ids(tokenizer, template, rows):
        ids, mask = map(torch.tensor, encoded)
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids[None]).logits[0, :-1], -1)
        losses = -logprobs[torch.arange(len(ids) - 1), ids[1:]]
        chosen = mask[1:].bool() if loss_on == "completion" else torch.ones(len(ids) - 1, dtype=torch.bool)
        total, count = total + losses[chosen].sum().item(), count + int(chosen.sum())
    return total / count


def same_bits(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def assert_close(found, expected, atol=1e-5):
    assert found.keys() == expected.keys() and found
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=atol,
                                   msg=lambda text, name=name: f"{name}: {text}")


# ---- what is trained on ----

@pytest.mark.parametrize(("lengths", "parts"), [((3, 9, 2, 7), [[9, 2], [7, 3]]), ((5,), [[5], [2]])])
def test_each_of_two_processes_takes_its_part_of_a_pass_and_knows_the_others(monkeypatch, lengths, parts):
    rows = [{"input_ids": [7] * length, "labels": [7] * length} for length in lengths]
    monkeypatch.setattr("looper.distributed.world", lambda: 2)
    for number, part in enumerate(parts):
        monkeypatch.setattr(sft, "rank", lambda: number)
        for unpadded, known in ((True, {"passes": parts}), (False, {})):
            made = sft._collate_share(lambda taken: {"taken": taken}, unpadded, rows)
            taken = made.pop("taken")
            assert [len(row["input_ids"]) for row in taken] == part and made == known
            learns = {label != -100 for row in taken for label in row["labels"]}
            assert learns == {number == 0 or len(lengths) > 1}, "who has no row learns nothing"


@pytest.mark.parametrize("name", TEMPLATES)
def test_labels_are_the_completion_and_its_end_token(train, tokenizer, name):
    template, rows = TEMPLATES[name], tiny_rows(8)
    _, _, trainer, _ = train(rows, template=template)
    assert set(trainer.train_dataset.column_names) >= {"input_ids", "labels"}
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    assert batch["input_ids"].shape == batch["labels"].shape
    assert (batch["attention_mask"] == 0).any(), "there is padding"
    in_batch = zip(batch["input_ids"], batch["labels"], strict=True)
    together = zip(rows, training_ids(tokenizer, template, rows), trainer.train_dataset, in_batch, strict=True)
    for row, (expected, mask), prepared, (ids, labels) in together:
        expected_labels = [token if bit else -100 for token, bit in zip(expected, mask, strict=True)]
        assert prepared["input_ids"] == expected and prepared["labels"] == expected_labels
        assert ids.tolist()[:len(expected)] == expected and labels.tolist()[:len(expected)] == expected_labels
        assert set(labels.tolist()[len(expected):]) <= {-100}, "padding is not trained on"
        text = tokenizer.decode([token for token in labels.tolist() if token != -100])
        assert text == template.completion(row["solution"], row["gold_answer"]) and text.endswith(template.end)
        assert expected_labels[-1] in end_token_ids(tokenizer, template)


@pytest.mark.parametrize("loss_on", ["completion", "full"])
def test_the_loss_is_the_mean_over_the_tokens_that_count(train, tokenizer, loss_on):
    rows = tiny_rows(8)
    _, metrics, trainer, _ = train(rows, tiny_sft(loss_on=loss_on))
    expected = plain_loss(tokenizer, rows, loss_on)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-5)
    assert metrics["loss"] == pytest.approx(dict.fromkeys(("mean", "first_tenth", "last_tenth"), expected), abs=1e-5)
    other = plain_loss(tokenizer, rows, {"completion": "full", "full": "completion"}[loss_on])
    assert abs(expected - other) > 1e-2
    trained = sum(label != -100 for row in trainer.train_dataset for label in row["labels"])
    assert (trained == metrics["tokens"]) == (loss_on == "full")


def test_what_the_loss_does_not_need_is_left_out_and_not_missed(train, monkeypatch):
    """No padding and no mask, and the head on the positions that have a label alone."""
    def passes_seen():
        model, seen = tiny_model(), []
        model.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
        return model, seen

    model, seen = passes_seen()
    lean = train(settings=tiny_sft(), model=model, name="lean")
    assert len(seen) == 2 and sum(each["input_ids"].numel() for each in seen) == lean[1]["tokens"], "no padding"
    assert all(each.get("attention_mask") is None and each["position_ids"].max() < 100 for each in seen)
    trained = sum(label != -100 for row in lean[2].train_dataset for label in row["labels"])
    assert len(lean[3].positions) == 2 and sum(lean[3].positions) == trained, "the head saw what is trained on"
    assert model.config._attn_implementation == "sdpa", "the model is as it was when training is over"
    monkeypatch.setattr(sft, "packed", lambda model: nullcontext())
    model, seen = passes_seen()
    plain = train(settings=tiny_sft(), model=model, name="plain")
    assert len(seen) == 2 and all((each["attention_mask"] == 0).any() for each in seen), "there is padding"
    assert sum(plain[3].positions) > 2 * trained
    for name in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"):
        logged = [[entry[name] for entry in run[2].state.log_history if name in entry] for run in (lean, plain)]
        assert len(logged[0]) == 2 and logged[0] == pytest.approx(logged[1], abs=1e-5)
    for step in range(2):
        assert_close(lean[3].gradients[step], plain[3].gradients[step])
    assert_close(lean[0], plain[0])


# ---- training ----

@pytest.mark.slow
def test_the_loss_falls_and_the_end_is_learnt(train, tokenizer):
    rows = tiny_rows(8)
    settings = tiny_sft(lora={"r": 16, "alpha": 32}, epochs=10, learning_rate=3e-2, batch_size=4, micro_batch=4)
    weights, metrics, trainer, _ = train(rows, settings)
    assert metrics["loss"]["first_tenth"] > 5.5 and metrics["loss"]["last_tenth"] < 2
    assert (metrics["steps"], metrics["rows"]) == (20, 8) and metrics["tokens"] == sum(
        len(ids) for ids, _ in training_ids(tokenizer, CHATML, rows))
    assert len(weights) == 28 and all(parameter.dtype is torch.float32 for parameter in weights.values())
    ids, _ = training_ids(tokenizer, CHATML, rows)[0]
    with torch.no_grad():
        end = trainer.model.eval()(torch.tensor([ids[:-1]])).logits[0, -1].argmax().item()
    assert end == ids[-1] == tokenizer.eos_token_id, "after the answer the model stops"


@pytest.mark.slow
def test_what_saves_memory_gives_the_same_update(train):
    rows = tiny_rows(16)
    weights, metrics, _, watch = train(rows, tiny_sft(learning_rate=1e-3), name="expected")
    assert max(gradient.abs().max() for gradient in watch.gradients[0].values()) > 1e-2
    for number, changes in enumerate(({"micro_batch": 4}, {"micro_batch": 1}, {"gradient_checkpointing": True})):
        found = train(rows, tiny_sft(learning_rate=1e-3, **changes), name=f"found-{number}")
        assert len(found[3].gradients) == len(watch.gradients) == 2
        for step in range(2):
            assert_close(found[3].gradients[step], watch.gradients[step])
        assert_close(found[0], weights)
        assert found[1]["loss"]["mean"] == pytest.approx(metrics["loss"]["mean"], abs=1e-5)


def fail_above(monkeypatch, limit):
    """A card that holds `limit` tokens of a pass, padding included; returns the shape of each pass that was tried."""
    real, tried = packing._scores, []

    def scores(causal, input_ids, **inputs):
        tried.append(tuple(input_ids.shape))
        if input_ids.numel() > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(causal, input_ids, **inputs)

    monkeypatch.setattr(packing, "_scores", scores)
    monkeypatch.setattr(micro_batch, "on_cpu", lambda trainer: False)
    return tried


def test_auto_takes_as_many_rows_a_pass_as_fit(train, monkeypatch, capsys, tokenizer):
    """The longest rows are tried, and nothing of the trial is left: the update is that of the number given by hand."""
    rows, settings = tiny_rows(16), {"lora": {"dropout": 0.3}, "learning_rate": 1e-3}
    expected, metrics, _, _ = train(rows, tiny_sft(**settings, micro_batch=4), name="expected")
    longest = sorted((len(ids) for ids, _ in training_ids(tokenizer, CHATML, rows)), reverse=True)
    tried = fail_above(monkeypatch, 4 * longest[0])
    capsys.readouterr()
    found, found_metrics, trainer, _ = train(rows, tiny_sft(**settings, micro_batch="auto"), name="found")
    assert "sft.micro_batch auto: 4 rows a pass, 2 passes an update of 8" in capsys.readouterr().out
    assert tried[:2] == [(8, longest[0]), (4, longest[0])] and len(tried) == 2 + 4
    assert_close(found, expected, atol=1e-6)  # with other dropout it would be off by 1e-3
    assert found_metrics["loss"]["mean"] == pytest.approx(metrics["loss"]["mean"], abs=2e-6)
    assert trainer.args.gradient_accumulation_steps == 2


def test_auto_says_when_not_even_a_row_fits(train, monkeypatch):
    fail_above(monkeypatch, 1)
    with pytest.raises(ValueError, match=r"micro_batch auto: the longest row, \d+ tokens, does not fit .* alone"):
        train(settings=tiny_sft(micro_batch="auto"))


def test_auto_is_one_pass_on_the_cpu(train):
    _, _, trainer, _ = train(settings=tiny_sft(micro_batch="auto"))
    assert (trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps) == (8, 1)


def test_only_the_adapter_is_trained_and_the_gradient_norm_is_clipped(train):
    model = tiny_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    _, _, trainer, watch = train(tiny_rows(8), tiny_sft(max_grad_norm=0.01), model=model)
    after = {name.replace(".base_layer", ""): parameter for name, parameter in model.named_parameters()
             if "lora_" not in name}
    assert same_bits(after, before)
    norm = torch.cat([gradient.flatten() for gradient in watch.gradients[0].values()]).norm().item()
    assert norm == pytest.approx(0.01, rel=1e-3) and trainer.state.log_history[0]["grad_norm"] > 0.1


def test_the_settings_reach_the_trainer(train, tmp_path):
    settings = tiny_sft(lora={"r": 2, "alpha": 6, "dropout": 0.25}, warmup_share=0.5, epochs=2, micro_batch=4, seed=5)
    _, _, trainer, _ = train(settings=settings)
    config, arguments = trainer.model.peft_config["default"], trainer.args
    assert (config.r, config.lora_alpha, config.lora_dropout) == (2, 6, 0.25)
    assert (arguments.seed, arguments.data_seed, arguments.gradient_accumulation_steps) == (5, 5, 2)
    assert arguments.optim == "adamw_torch" and not arguments.bf16 and arguments.max_length is None
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates == pytest.approx([0, 5e-3, 1e-2, 5e-3]), "two updates of warm-up, then a cosine to zero"
    files = {path.stem for path in (tmp_path / "run" / "live" / "plots" / "metrics").iterdir()}
    assert files >= {"loss", "learning_rate", "grad_norm", "tokens_per_second"}


# ---- a kill ----

def test_a_run_killed_and_resumed_gives_the_same_bits(train, tmp_path):
    settings = tiny_sft(lora={"dropout": 0.3}, epochs=2.5, save_steps=2, learning_rate=1e-3)  # 5 updates, 2 an epoch
    expected, metrics, _, _ = train(settings=settings, name="whole")
    with pytest.raises(Killed):
        train(settings=settings, watch=Watch(kill_at=3), name="killed")
    checkpoints = tmp_path / "killed" / "scratch" / "checkpoints"
    assert [path.name for path in checkpoints.glob("checkpoint-*")] == ["checkpoint-2"]
    shutil.copytree(checkpoints / "checkpoint-2", checkpoints / "checkpoint-4")
    (checkpoints / "checkpoint-4" / "trainer_state.json").unlink()  # killed once more, while it saved
    found, resumed_metrics, _, watch = train(settings=settings, name="killed")
    assert len(watch.gradients) == 3, "three updates were left"
    assert same_bits(found, expected) and resumed_metrics == metrics
    curves = [(tmp_path / name / "live" / "plots" / "metrics" / "loss.tsv").read_text() for name in ("whole", "killed")]
    assert curves[0] == curves[1] and len(curves[0].splitlines()) == 6


def test_equal_runs_are_equal_and_another_seed_is_not(train):
    rows, settings = tiny_rows(8), tiny_sft(lora={"dropout": 0.3})
    torch.manual_seed(1)
    first = train(rows, settings, name="a")
    torch.manual_seed(2)
    second = train(rows, settings, name="b")
    assert same_bits(first[0], second[0]) and first[1] == second[1]
    assert not same_bits(train(rows, tiny_sft(lora={"dropout": 0.3}, seed=1), name="c")[0], first[0])


def test_updates_without_walks_give_the_same_bits_and_take_none(train, monkeypatch):
    """With dropout and two updates: a layer that was not switched to training, or an old gradient, would change the adapter."""
    settings, walks = tiny_sft(lora={"dropout": 0.3}, epochs=2), []
    walk = torch.nn.Linear.train
    monkeypatch.setattr(torch.nn.Linear, "train", lambda module, mode=True: walks.append(mode) or walk(module, mode))
    found, metrics, trainer, _ = train(settings=settings, name="quick")
    updates, linears = trainer.state.global_step, sum(isinstance(each, torch.nn.Linear) for each in trainer.model.modules())
    once = walks.count(True)
    monkeypatch.delattr(quick_updates.QuickUpdates, "_run_epoch")
    walks.clear()
    expected, plain_metrics, _, _ = train(settings=settings, name="plain")
    assert same_bits(found, expected) and metrics == plain_metrics
    assert walks.count(True) - once == (updates - 2) * linears, "a walk an epoch instead of one an update"


# ---- what is refused ----

def test_a_row_that_is_too_long_is_refused(train, tokenizer, tmp_path):
    rows = tiny_rows(8)
    length, longest = max((len(ids), row["id"]) for row, (ids, _) in zip(rows, training_ids(tokenizer, CHATML, rows)))
    assert len(tokenize(tokenizer, CHATML, rows, length)) == 8
    with pytest.raises(ValueError, match=f"{longest} is {length} tokens, sft.max_tokens is {length - 1}; raise"):
        train(rows, tiny_sft(max_tokens=length - 1))
    assert not list(Path(tmp_path).iterdir())


def test_a_template_whose_end_is_no_token_is_refused(train):
    with pytest.raises(ValueError, match=r"model\.template: its end token '<\|eot\|>'"):
        train(template=CHATML._replace(end="<|eot|>"))


def test_a_loss_that_is_not_finite_stops_the_run(train, tmp_path):
    with pytest.raises(ValueError, match=r"sft: the (loss|grad_norm) of update \d is (nan|inf); .*learning_rate"):
        train(settings=tiny_sft(learning_rate=1e25, epochs=3, save_steps=1))
    kept = [path.name for path in (tmp_path / "run" / "scratch" / "checkpoints").glob("checkpoint-*")]
    assert kept == ["checkpoint-1"], "the last one before"
