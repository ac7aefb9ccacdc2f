"""Layers launched as graphs compute what compiled ones do, and leave resuming exact. On a processor nothing can be recorded:
there a graph is its function, called again, so that all but the recording is tested."""

from dataclasses import replace

import pytest
import torch
import transformers
from tests.looper.compile_helpers import compiled_here, filled_rows, opaque_attention  # noqa: F401, fixtures
from tests.looper.ppo_helpers import QUICK, KillAt, Killed, assert_same_bits, make_samples, run, trainable
from tests.looper.test_compiling import BATCHES, far, make_policy, passes
from tiny import tiny_model, tiny_rows, tiny_sft
from torch._dynamo.utils import counters

from looper import graphs, packing, ppo_data
from looper.determinism import deterministic
from looper.graphs import graphed_layers
from looper.layers import compiled_layers
from looper.packing import filling, rows_of
from looper.ppo_data import collate
from looper.prompts import TEMPLATES
from looper.sft import finetune

STEP = 8  # small enough that the tests' passes have several sizes


@pytest.fixture
def recorded(monkeypatch, opaque_attention):
    """A processor goes the way of a GPU; yields a list of the sizes that were recorded."""
    sizes, plain = [], graphs.Pass.__init__

    def init(self, layers, hidden, position_embeddings, rows):
        sizes.append((hidden.shape[1], len(rows.starts), rows.longest))
        plain(self, layers, hidden, position_embeddings, rows)

    monkeypatch.setattr(graphs.Pass, "__init__", init)
    monkeypatch.setattr(graphs, "graphs", bool)
    monkeypatch.setattr(graphs, "record", lambda run, layers: run)
    monkeypatch.setattr(ppo_data, "rows_of", filled_rows)
    monkeypatch.setattr(packing, "PASS_TOKENS", STEP)
    return sizes


@pytest.fixture
def plainly(monkeypatch):
    return lambda: monkeypatch.setattr(graphs, "graphs", lambda layers: False)


def test_layers_without_room_for_graphs_compute_as_they_are(recorded, plainly, monkeypatch, capsys):
    policy, samples = make_policy("llama", torch.float32), make_samples(20)
    monkeypatch.setattr(graphs, "has_room", lambda size: False)
    with graphed_layers(policy, checkpointing=False):
        found = passes(policy, samples, BATCHES)
    assert not recorded and capsys.readouterr().out.count("too small to launch passes as graphs") == 1
    plainly()
    for one, expected in zip(found, passes(policy, samples, BATCHES), strict=True):
        assert all(map(torch.equal, one, expected))


def test_room_is_four_times_what_a_pass_keeps(recorded, monkeypatch):
    held, asked = iter([100, 107]), []
    monkeypatch.setattr(graphs, "allocated_bytes", lambda device: next(held))
    monkeypatch.setattr(graphs, "unused_bytes", lambda: asked.append("GPU") or 28)
    policy, samples = make_policy("llama", torch.float32), make_samples(4)
    with graphed_layers(policy, checkpointing=False):
        passes(policy, samples, [[0, 1], [2, 3]])
    assert recorded and asked == ["GPU"]
    assert graphs.has_room(28) and not graphs.has_room(29)


class Autocasting(torch.autograd.Function):
    """The sum of both, which notes whether autocast was on, on its way forward and back."""

    seen = []

    @staticmethod
    def forward(ctx, hidden, weight):
        Autocasting.seen.append(("forward", torch.is_autocast_enabled("cpu")))
        return hidden + weight

    @staticmethod
    def backward(ctx, gradient):
        Autocasting.seen.append(("backward", torch.is_autocast_enabled("cpu")))
        return gradient, gradient.sum((0, 1))


class AutocastingLayer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))

    def forward(self, hidden, **given):
        return Autocasting.apply(hidden, self.weight)


def test_the_way_back_is_outside_autocast_as_the_trainers_is(recorded):
    layer, position = AutocastingLayer(), torch.zeros(1, 3, 2)
    layers = graphs.Layers([layer])
    Autocasting.seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        out = layers(torch.ones(1, 3, 2), position_embeddings=(position, position), rows=rows_of([3], torch.device("cpu")))
    out.sum().backward()
    assert layer.weight.grad.tolist() == [3, 3] and len(recorded) == 1
    assert {("forward", True), ("backward", False)} <= set(Autocasting.seen) and ("backward", True) not in Autocasting.seen


@pytest.mark.parametrize(("bound", "found"), [(16, [16, 32]), (graphs.BOUND, [512])])
def test_a_pass_of_the_same_size_has_another_graph_where_a_row_exceeds_the_bound(recorded, monkeypatch, bound, found):
    monkeypatch.setattr(graphs, "BOUND", bound)
    policy, rows = make_policy("llama", torch.float32), make_samples(2)
    even, uneven = ([replace(row, prompt_ids=[1] * length, response_ids=[2] * 4, behaviour_logprobs=[-1.0] * 4)
                     for row, length in zip(rows, lengths, strict=True)] for lengths in ((12, 12), (2, 22)))
    with graphed_layers(policy, checkpointing=False):
        passes(policy, even + uneven, [[0, 1], [2, 3]])
    (tokens, count, _), *_ = recorded
    assert list(recorded) == [(tokens, count, longest) for longest in found]


def test_what_is_launched_as_graphs(monkeypatch):
    layer = make_policy("llama", torch.bfloat16).policy.get_base_model().model.layers[0]
    monkeypatch.setattr(graphs, "compiles", lambda layer: True)
    assert graphs.graphs([layer]) and not graphs.graphs([])
    monkeypatch.undo()
    assert not graphs.graphs([layer])  # on a processor it is not compiled


def test_embeddings_that_learn_leave_the_layers_as_they_are(recorded):
    policy = make_policy("llama", torch.float32)
    policy.policy.get_input_embeddings().weight.requires_grad_()
    with graphed_layers(policy, checkpointing=False):
        assert not changed(policy)


def changed(policy):
    """The layers that do not compute as their class does."""
    return [each for each in policy.modules() if "forward" in vars(each) and hasattr(each, "self_attn")]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_graphs_of_all_sizes_compute_what_the_layers_do(recorded, plainly, kind):
    policy, samples = make_policy(kind, torch.float32), make_samples(20)
    with graphed_layers(policy, checkpointing=False):
        found = passes(policy, samples, [*BATCHES, *BATCHES])
    assert len(set(recorded)) == len(recorded) > 2  # each size once
    assert all(longest.bit_count() == 1 for _, _, longest in recorded)
    plainly()
    expected = passes(policy, samples, BATCHES)
    for (logprobs, gradients), (expected_logprobs, expected_gradients) in zip(found, [*expected, *expected], strict=True):
        assert torch.equal(logprobs, expected_logprobs) and torch.equal(gradients, expected_gradients)
        assert expected_gradients.norm() > 1


def test_gradients_of_several_passes_add_up(recorded, plainly):
    policy, samples = make_policy("llama", torch.float32), make_samples(20)

    def both():
        policy.zero_grad()
        for batch in BATCHES[:2]:
            policy(collate([samples[i] for i in batch], torch.device("cpu")))[0].sum().backward()
        return torch.cat([each.grad.flatten() for each in policy.policy.parameters() if each.grad is not None])

    with graphed_layers(policy, checkpointing=False):
        found = [both(), both()]
    plainly()
    expected = both()
    assert torch.equal(found[0], expected) and torch.equal(found[1], expected) and expected.norm() > 1


def test_a_pass_that_began_too_early_is_an_error(recorded):
    policy, samples = make_policy("llama", torch.float32), make_samples(4)
    with graphed_layers(policy, checkpointing=False):
        first = policy(collate(samples[:2], torch.device("cpu")))[0]
        policy(collate(samples[2:], torch.device("cpu")))
        with pytest.raises(RuntimeError, match="began before the backward pass of the one before"):
            first.sum().backward()


def test_outside_the_block_the_layers_are_as_they_were(recorded):
    policy, samples = make_policy("llama", torch.float32), make_samples(4)
    with graphed_layers(policy, checkpointing=True):
        assert not changed(policy)
    with graphed_layers(policy, checkpointing=False):
        assert len(changed(policy)) == 4
        passes(policy, samples, [[0, 1]])
        whole = changed(policy)[0].forward
        assert len(whole.passes) == 1
    assert not changed(policy) and not whole.passes


def test_a_processor_records_nothing():
    policy = make_policy("llama", torch.float32)
    with graphed_layers(policy, checkpointing=False):
        assert not changed(policy)


@pytest.mark.slow
def test_graphs_need_no_programs_of_their_own(recorded, compiled_here):
    policy, samples = make_policy("llama", torch.float32, num_hidden_layers=12), make_samples(20)  # the compiler gives up at 8
    with deterministic(), compiled_layers(policy), graphed_layers(policy, checkpointing=False):
        found = passes(policy, samples, BATCHES)
    assert len(changed(policy)) == 0 and 1 <= compiled_here() <= 3
    expected = passes(policy, samples, BATCHES)
    for (logprobs, gradients), (expected_logprobs, expected_gradients) in zip(found, expected, strict=True):
        assert far(logprobs, expected_logprobs) < 1e-5 and far(gradients, expected_gradients) < 1e-5


def test_recording_draws_nothing_from_the_generators(recorded):
    policy, samples = make_policy("llama", torch.float32), make_samples(4)
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):
            torch.nn.Module.train(module)
    torch.manual_seed(1)
    with graphed_layers(policy, checkpointing=False):
        found = [passes(policy, samples, [[0, 1]]) for _ in range(2)]
    torch.manual_seed(1)
    expected = [passes(policy, samples, [[0, 1]]) for _ in range(2)]
    assert not torch.equal(found[0][0][0], found[1][0][0])
    for (one,), (other,) in zip(found, expected, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_large_passes_have_few_sizes():
    cuda = torch.device("cuda")
    assert [tokens + filling(tokens, cuda) for tokens in (1, 127, 128, 1650, 2047, 2048, 7000, 13_000)] == [
        128, 128, 256, 1664, 2048, 2304, 7168, 13_312]
    assert len({tokens + filling(tokens, cuda) for tokens in range(4096, 8192)}) == 8
    assert filling(1650, torch.device("cpu")) == 0


@pytest.fixture
def killed(tokenizer, tmp_path, monkeypatch):
    """A function → what a run of fine-tuning with dropout has learnt, and what one that was killed and resumed has."""
    def train(name, micro_batch, model):
        settings = tiny_sft(lora={"dropout": 0.3}, save_steps=2, batch_size=4, micro_batch=micro_batch, epochs=2)
        model, _ = finetune(model(), tokenizer, TEMPLATES["chatml"], tiny_rows(), settings, tmp_path / name / "scratch",
                            tmp_path / name / "live")
        return trainable(model)

    def both(micro_batch, model):
        unbroken, callbacks = train("unbroken", micro_batch, model), transformers.trainer.DEFAULT_CALLBACKS
        monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [*callbacks, KillAt(5)])
        with pytest.raises(Killed):
            train("killed", micro_batch, model)
        monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", callbacks)
        return unbroken, train("killed", micro_batch, model)

    both.train = train
    return both


@pytest.mark.parametrize("micro_batch", [4, 2])
def test_fine_tuning_with_dropout_killed_and_resumed_gives_the_same_bits(recorded, plainly, killed, micro_batch):
    unbroken, resumed = killed(micro_batch, tiny_model)
    assert len(recorded) > 1
    assert_same_bits(resumed, unbroken)
    plainly()
    assert_same_bits(killed.train("plain", micro_batch, tiny_model), unbroken)


@pytest.mark.parametrize("credit", ["question", "arm"])
def test_ppo_is_the_same_to_the_last_bit(recorded, plainly, tmp_path, credit):
    settings, samples = replace(QUICK, credit=credit), make_samples(10, credit)
    found, metrics = run(tmp_path / "a", settings, samples)
    assert len(recorded) > 1
    plainly()
    expected, expected_metrics = run(tmp_path / "b", settings, samples)
    assert_same_bits(found, expected)
    assert metrics == expected_metrics


# ---- on a GPU ----

CONFIG = {"vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8,
          "num_key_value_heads": 4, "num_hidden_layers": 12}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_gpu_graphs_compute_what_compiled_layers_do(kind):
    policy, samples = make_policy(kind, torch.bfloat16, device="cuda", **CONFIG), make_samples(20)
    torch._dynamo.reset()
    counters.clear()
    with deterministic(), compiled_layers(policy):
        expected = passes(policy, samples, BATCHES, "cuda")
        programs = counters["stats"]["unique_graphs"]
        with graphed_layers(policy, checkpointing=False):
            assert len(changed(policy)) == 12
            found = passes(policy, samples, [*BATCHES, *BATCHES], "cuda")
    assert counters["stats"]["unique_graphs"] == programs
    for one, plain in zip(found, [*expected, *expected], strict=True):
        assert torch.equal(one[0], plain[0]) and far(one[1], plain[1]) < 1e-6 and plain[1].norm() > 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_graphs_of_many_sizes_share_their_memory():
    policy, samples = make_policy("llama", torch.bfloat16, device="cuda", **CONFIG), make_samples(256)
    batches = [range(count) for count in (256, 32, 200, 64, 128, 96, 160, 256)]

    def reserved():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        passes(policy, samples, batches, "cuda")
        return torch.cuda.max_memory_reserved()

    with deterministic(), compiled_layers(policy):
        plain = reserved()
        with graphed_layers(policy, checkpointing=False):
            assert reserved() < 1.5 * plain


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("micro_batch", [4, 2])
def test_gpu_fine_tuning_with_dropout_killed_and_resumed_gives_the_same_bits(killed, monkeypatch, micro_batch):
    made, record = [], graphs.record
    monkeypatch.setattr(graphs, "record", lambda run, layers: made.append(run) or record(run, layers))
    unbroken, resumed = killed(micro_batch, lambda: tiny_model().to("cuda", torch.bfloat16))
    assert made and all(each.norm() > 0 for each in unbroken.values())
    assert_same_bits(resumed, unbroken)
