"""The real sides on the tiny model in float32: their gates hold, and fail where a result is another."""

import json
import re
from dataclasses import replace
from statistics import mean

import pytest
import torch
from tiny import tiny_tokenizer

from bench import __main__ as command
from bench import generation, ppo, sft, workload
from bench.generation import Row, batches
from bench.random_8b import small_tokenizer
from bench.without import SPEEDUPS, Speedup
from bench.workload import Shape, lengths, load, merged, random_ids, relative_error, with_adapter
from looper.decoding import choose
from looper.prompts import TEMPLATES, prompt_ids, training_ids

pytestmark = pytest.mark.slow  # each runs several trainers
BOTH = ["b1", "b2"]


def run(stage):
    """One pass of each side."""
    gates = stage.gates()
    assert gates and all(gate.holds for gate in gates), gates
    return [side.run() for side in stage.sides]


# ---- what both sides work on ----

def test_the_stored_lengths_are_those_of_gsm8k():
    prompts, outputs = zip(*lengths(1319))
    assert (min(prompts), max(prompts), min(outputs), max(outputs)) == (60, 150, 22, 300)
    assert mean(prompts) == pytest.approx(98.5, abs=0.1) and mean(outputs) == pytest.approx(110.3, abs=0.1)
    assert lengths(1321)[1319:] == lengths(2), "after its end the list begins again"


def test_equal_adapters_on_equal_bases(setup):
    first, second = (with_adapter(load(setup, quantised=True)) for _ in range(2))
    weights = [{name: each for name, each in model.named_parameters() if "lora_" in name} for model in (first, second)]
    assert weights[0].keys() == weights[1].keys() and len(weights[0]) == 28
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]) and weight.abs().max() > 0
    ids = torch.tensor([random_ids(setup, 20, "a")])
    with torch.no_grad():
        unmerged, together = first.eval()(ids).logits, merged(setup)(ids).logits
        plain = load(setup, quantised=True)(ids).logits
    torch.testing.assert_close(unmerged, together, rtol=0, atol=1e-4)
    assert (unmerged - plain).abs().max() > 1e-2, "the adapter does something"


def test_the_small_tokenizer_serves_every_template():
    tokenizer = small_tokenizer()
    for template in TEMPLATES.values():
        assert len(tokenizer.encode(template.end, add_special_tokens=False)) == 1
    assert len(tokenizer) <= 1000 and tokenizer.decode(tokenizer.encode("Ann has 3 apples.")) == "Ann has 3 apples."


# ---- SFT ----

def test_sft_sides_count_the_same_tokens_and_no_padding(setup):
    passes = run(sft.stage(setup, 8, BOTH, batch=4))  # two updates
    sizes = [len(ids) for ids, _ in training_ids(setup.tokenizer, setup.template, sft.make_rows(setup, 8))]
    assert [each.tokens for each in passes] == [sum(sizes)] * 3 and sum(sizes) < 8 * max(sizes)
    assert all(each.seconds > 0 and each.setup > 0 for each in passes)


def test_sft_warm_up_updates_are_not_counted(setup):
    model, rows = load(setup, quantised=True), sft.make_rows(setup, 16)
    sizes = [len(ids) for ids, _ in training_ids(setup.tokenizer, setup.template, rows)]
    one = sft.run(setup, lambda data: sft.ours(setup, model, data, sft.settings()), rows, 1)
    # 8 of the 16 rows, whichever the seed drew: between the 8 shortest and the 8 longest
    assert sum(sorted(sizes)[:8]) <= one.tokens <= sum(sorted(sizes)[8:]) < sum(sizes)


def test_sft_rows_have_the_stored_lengths(setup):
    rows = sft.make_rows(setup, 50)
    stored = [sum(pair) for pair in lengths(50)]
    found = [len(ids) for ids, _ in training_ids(setup.tokenizer, setup.template, rows)]
    assert mean(found) == pytest.approx(mean(stored), rel=0.05)


def test_sft_refuses_a_count_that_is_not_the_rows(setup):
    rows = sft.make_rows(setup, 32)
    model = load(setup, quantised=True)
    with pytest.raises(ValueError, match="padding must not count"):
        sft.run(setup, lambda _: sft.ours(setup, model, rows[:24], sft.settings()), rows, 0)


def test_the_sft_gate_sees_another_loss(setup, monkeypatch):
    right = sft.settings
    monkeypatch.setattr(sft, "settings", lambda batch: right(batch).model_copy(update={"loss_on": "full"}))
    gates = sft.stage(setup, 8, ["b1"]).gates()
    assert len(gates) == 2 and not any(gate.holds for gate in gates)


def test_the_limit_of_sft_by_hand(setup):
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
    head = 32 * len(tiny_tokenizer())
    assert setup.shape == Shape(2 * layer, head, 2 * 2 * 2 * 8, len(tiny_tokenizer()))
    row = {"id": "a", "question": "How many?", "solution": "Seven.", "gold_answer": "7"}
    (ids, mask), = training_ids(setup.tokenizer, setup.template, [row])
    seconds = 4 * (2 * layer * len(ids) + head * sum(mask)) / 1e9
    assert sft.limit(setup, [row]) == pytest.approx(len(ids) / seconds) and 0 < sum(mask) < len(ids)


def test_a_side_without_a_speedup_is_measured_by_one_command(base, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(workload, "peak_flops", lambda *_: 1e9)
    monkeypatch.setattr(workload, "copy_bandwidth", lambda _: 1e8)
    assert command.main(["--stage", "sft", "--model", str(base), "--device", "cpu", "--rows", "8", "--against", "none",
                         "--without", "filling", "--json", str(tmp_path / "figures.json")]) == 0
    written = json.loads((tmp_path / "figures.json").read_text())
    (stage,) = written["stages"]
    assert [side["name"] for side in stage["sides"]] == ["looper", "looper without filling"]
    assert [gate["found"] for gate in stage["gates"]] == [0.0, 0.0], "on a processor it is the same"
    assert (written["batch"], written["machine"]["quantization"]) == (8, "none")
    assert "gate gradients against looper without filling" in capsys.readouterr().out


@pytest.mark.parametrize("stage, name, other", [
    (sft.stage, "looper.sft.training_ids", lambda *given: [(ids, [1] * len(ids)) for ids, _ in training_ids(*given)]),
    (ppo.stage, "looper.ppo_math.whiten", lambda advantages, mask: 2 * advantages * mask),
])
def test_the_gates_see_another_result_without_a_speedup(setup, monkeypatch, stage, name, other):
    monkeypatch.setitem(SPEEDUPS, "filling", Speedup(("sft", "ppo"), {name: other}))
    gates = stage(setup, 8, [], ["filling"]).gates()
    assert len(gates) == 2 and not any(gate.holds for gate in gates), gates


# ---- generation ----

@pytest.mark.parametrize("make", [generation.rollouts, generation.evaluation])
def test_generation_counts_the_asked_tokens(setup, make):
    passes = run(make(setup, 8, BOTH, ["compiling"]))
    assert [each.tokens for each in passes] == [sum(output for _, output in lengths(8))] * 4


def test_a_batch_of_generate_has_one_temperature():
    rows = [Row([i], temperature, 1) for i, temperature in enumerate([0.2] * 5 + [0.3] * 2)]
    assert [[row.prompt[0] for row in some] for some in batches(rows, 3)] == [[0, 1, 2], [3, 4], [5, 6]]


def test_arms_of_a_style_share_their_prompt(setup, monkeypatch):
    made = []
    monkeypatch.setattr(generation, "_stage", lambda name, setup, rows, *_: made.extend(rows))
    generation.rollouts(setup, 16, BOTH)
    assert [row.temperature for row in made] == [0.2, 0.3, 0.4, 0.5] * 4
    prompts = [tuple(row.prompt) for row in made]
    assert len(set(prompts)) == 4 and all(prompts[i] == prompts[4 * (i // 4)] for i in range(16))
    assert [len(prompt) for prompt in prompts] == [lengths(2)[0][0]] * 8 + [lengths(2)[1][0]] * 8
    assert [row.length for row in made] == [output for _, output in lengths(16)]


def test_prompts_begin_as_real_ones_do_and_go_on_each_by_itself(setup):
    real = prompt_ids(setup.tokenizer, setup.template, "How many?")
    made = [generation.make_prompt(setup, length, str(length)) for length in (60, 61)]
    assert [len(prompt) for prompt in made] == [60, 61]
    assert made[0][:30] == made[1][:30] == real[:30] and made[0][30:40] != made[1][30:40]


def test_another_number_of_tokens_is_refused():
    with pytest.raises(ValueError, match="another number of tokens"):
        generation.count([[1, 2]], [Row([0], 0.0, 3)])


@pytest.mark.parametrize("change, failing", [
    (lambda one: one._replace(token_ids=[*one.token_ids[:3], one.token_ids[3] ^ 1, *one.token_ids[4:]]), 0),
    (lambda one: one._replace(logprobs=[one.logprobs[0] + 3e-5, *one.logprobs[1:]]), 1),
])
def test_the_generation_gate_sees_another_token_and_another_log_probability(setup, monkeypatch, change, failing):
    right = generation.ours
    monkeypatch.setattr(generation, "ours", lambda *given: [change(one) for one in right(*given)])
    gates = generation.evaluation(setup, 4, ["b2"]).gates()
    assert not gates[failing].holds and gates[failing].found > gates[failing].limit


def test_the_generation_gate_of_a_side_without_a_speedup_is_its_own(setup, monkeypatch):
    def least_likely(logits, temperatures, uniforms):
        return choose(-logits, temperatures, uniforms)

    monkeypatch.setitem(SPEEDUPS, "compiling", Speedup(("eval",), {"looper.decoding.choose": least_likely}))
    gates = generation.evaluation(setup, 4, [], ["compiling"]).gates()
    assert [gate.holds for gate in gates] == [True] * 3 + [False] * 3
    assert [gate.name.endswith(", without compiling") for gate in gates] == [False] * 3 + [True] * 3


def test_the_limit_of_generation_by_hand(setup):
    rows = [Row([1, 2, 3], 0.2, 4), Row([1, 2, 3], 0.3, 2)]
    toy = setup._replace(shape=Shape(body=1000, head=200, kv=10, vocabulary=9), flops=1e4, bandwidth=100.0)
    # 6 tokens in 3 steps of 2; keys and values read: 4*3 + (1+2+3+4) and 2*3 + (1+2) = 31 tokens of 10 numbers
    memory, compute, prefill = (3 * 1200 + 31 * 10) * 4 / 100, 2 * 1200 * 6 / 1e4, 2 * 1000 * 3 / 1e4
    assert generation.limit(toy, rows, 2) == pytest.approx(6 / (prefill + memory)) and memory > compute
    wide = toy._replace(bandwidth=1e9)
    assert generation.limit(wide, rows, 2) == pytest.approx(6 / (prefill + compute))


# ---- PPO ----

def test_ppo_sides_train_the_same_tokens(setup):
    passes = run(ppo.stage(setup, 8, BOTH))
    assert [each.tokens for each in passes] == [4 * sum(prompt + output for prompt, output in lengths(8))] * 3


def test_every_ppo_pass_starts_from_the_same_adapter(setup):
    samples, model = ppo.make_samples(setup, 8), with_adapter(load(setup, quantised=True))
    seen = []
    for _ in range(2):
        first = ppo.FirstBatch()
        ppo.run(samples, lambda: ppo.ours(model, samples, ppo.SETTINGS, [first]), model)
        seen.append(first)
    assert seen[0].loss == seen[1].loss and torch.equal(seen[0].gradients, seen[1].gradients)


@pytest.mark.parametrize(("change", "in_bfloat16"), [
    ({"gamma": 0.9}, True), ({"lam": 0.8}, True), ({"value_clip": 1e-3, "learning_rate": 1e-2}, True),
    ({"learning_rate": 1e-12}, False)])
def test_the_ppo_gate_sees_another_loss(setup, monkeypatch, change, in_bfloat16):
    right = ppo.ours
    monkeypatch.setattr(ppo, "ours", lambda model, samples, settings, callbacks: right(
        model, samples, replace(settings, **change), callbacks))
    loss, _ = ppo.stage(setup, 8, ["b2"]).gates()
    assert not loss.holds and (loss.found > ppo.TOLERANCE[torch.bfloat16][0]) is in_bfloat16


def test_the_plain_way_row_by_row_is_the_plain_way(setup):
    samples, settings = ppo.make_samples(setup, 3), replace(ppo.SETTINGS, max_grad_norm=1e9)
    batched, by_row = ([ppo.plain(with_adapter(load(setup, quantised=True)), None, samples, settings, by_row=each)
                        for each in (False, True)])
    assert [each.loss for each in by_row] == pytest.approx([each.loss for each in batched], rel=1e-4, abs=1e-6)
    assert relative_error(by_row[0].gradients, batched[0].gradients) < 1e-5


def test_the_ppo_gate_is_as_wide_as_the_plain_ways_are_apart(setup, monkeypatch):
    right = ppo._forward_by_row
    monkeypatch.setattr(ppo, "_forward_by_row", lambda *given: tuple(1.1 * each for each in right(*given)))
    for gate in ppo.stage(setup, 8, ["b2"]).gates():
        apart = float(re.search(r"row by row: (.*)\)", gate.name)[1])
        assert apart > 1e-3 and gate.limit == pytest.approx(1.5 * apart, rel=0.01) and gate.found < 1e-5


def test_no_gate_is_wider_than_its_ceiling():
    assert [workload.widened(0.01, between) for between in (0.0, 0.1, 0.2, 5.0)] == pytest.approx([0.01, 0.15, 0.3, 0.3])


def test_the_limit_of_ppo_by_hand(setup):
    toy = setup._replace(shape=Shape(body=1000, head=200, kv=10, vocabulary=9), flops=1e4)
    samples = ppo.make_samples(setup, 1)
    prompt, output = len(samples[0].prompt_ids), len(samples[0].response_ids)
    seconds = 20 * ((prompt + output) * 1000 + output * 200) / 1e4  # 2 + 2 + 4 epochs × 4 FLOP a weight
    assert ppo.limit(toy, samples) == pytest.approx(4 * (prompt + output) / seconds)
