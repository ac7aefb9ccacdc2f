"""Each switch turns off what it names, where the repository does it, and a stage has the sides of its own speedups."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model

from bench import generation, ppo, sft
from bench.without import SPEEDUPS, switched_off
from bench.workload import load, with_adapter, with_either_attention
from looper import compiling, decoding, graphs, layers, packing
from looper import ppo as looper_ppo
from looper import sft as looper_sft

CUDA = torch.device("cuda")  # its name: there need not be one


def layer():
    """Of a bfloat16 layer on a GPU what `layers.compiles` looks at."""
    weight = SimpleNamespace(device=CUDA, dtype=torch.bfloat16, is_floating_point=lambda: True)
    attention = SimpleNamespace(config=SimpleNamespace(_attn_implementation=packing.ATTENTION))
    return SimpleNamespace(parameters=lambda: [weight], self_attn=attention)


def test_without_compiling_layers_in_training_are_plain():
    assert layers.compiles(layer())
    with switched_off("compiling"):
        assert not layers.compiles(layer())
    assert layers.compiles(layer())


def test_without_compiling_pieces_and_sampler_in_decoding_are_plain(monkeypatch):
    compiled, model = [], tiny_model()
    monkeypatch.setattr(decoding, "compiles_on", lambda device: True)
    monkeypatch.setattr(decoding, "compiled_pieces", lambda model: compiled.append("pieces") or nullcontext())
    monkeypatch.setattr(decoding, "compiled_by_rows", lambda function, **_: compiled.append("sampler") or function)
    rows = [generation.Row([1, 2, 3], 0.5, 2)]
    switched_off("compiling")(generation.ours)(model, rows, 1)
    assert not compiled
    generation.ours(model, rows, 1)
    assert compiled == ["pieces", "sampler"]


def test_without_filling_passes_on_a_gpu_stay_as_long_as_they_are():
    assert packing.filling(100, CUDA) == 28
    with switched_off("filling"):
        assert packing.filling(100, CUDA) == 0


def test_without_graphs_layers_that_could_be_recorded_are_not():
    layers = [layer()]
    assert graphs.graphs(layers)
    with switched_off("graphs"):
        assert not graphs.graphs(layers)


class TrainingBegins(Exception):
    pass


@pytest.mark.parametrize("library, following, train", [
    (looper_sft, "packed", lambda setup, model: sft.ours(setup, model, sft.make_rows(setup, 8), sft.settings())),
    (looper_ppo, "compiled_layers", lambda setup, model: ppo.ours(with_adapter(model), ppo.make_samples(setup, 1))),
], ids=["sft", "ppo"])
def test_without_unpacking_no_weight_is_unpacked(setup, monkeypatch, library, following, train):
    def begins(*_):
        raise TrainingBegins

    unpacked = []
    monkeypatch.setattr(library, "unpack_if_room", unpacked.append)
    monkeypatch.setattr(library, following, begins)  # what comes after it
    for run, times in ((switched_off("unpacking")(train), 0), (train, 1)):
        with pytest.raises(TrainingBegins):
            run(setup, load(setup, quantised=True))
        assert len(unpacked) == times


def test_a_speedup_that_is_no_longer_there_cannot_be_switched_off(monkeypatch):
    monkeypatch.delattr(packing, "filling")
    with pytest.raises(AttributeError, match="filling"), switched_off("filling"):
        pass


# ---- the sides ----

@pytest.mark.parametrize("make, names", [
    (sft.stage, ["compiling", "filling", "graphs", "unpacking"]),
    (ppo.stage, ["compiling", "filling", "graphs", "unpacking"]),
    (generation.rollouts, ["compiling"]), (generation.evaluation, ["compiling"]),
])
def test_a_stage_has_a_side_without_each_speedup_of_its_own(setup, make, names):
    ours, *others = make(setup, 8, [], list(SPEEDUPS)).sides
    assert ours.name == "looper" and [side.name for side in others] == [f"looper without {name}" for name in names]
    for side in others:  # unpacked, a model cannot be packed again
        assert (side.models[0] is ours.models[0]) == (side.name != "looper without unpacking")


@pytest.mark.parametrize("module, make", [
    (sft, sft.stage), (ppo, ppo.stage), (generation, generation.rollouts), (generation, generation.evaluation)])
def test_a_side_runs_without_its_speedup_on_its_own_model(setup, monkeypatch, module, make):
    def ours(*given, **_):
        model = next(each for each in given if isinstance(each, torch.nn.Module))
        seen.append((packing.filling(100, CUDA), compiling.compiles_on(CUDA), model))

    seen = []
    monkeypatch.setattr(module, "ours", ours)
    monkeypatch.setattr(sft, "run", lambda setup, train, rows, warm_up: train(rows))  # its clock needs updates
    monkeypatch.setattr(generation, "count", lambda written, rows: 1)
    for side in make(setup, 8, [], list(SPEEDUPS)).sides:
        side.run()
        off = side.name.removeprefix("looper without ")
        assert seen.pop() == (0 if off == "filling" else 28, off != "compiling", side.models[0]) and not seen


def test_the_batch_of_sft_is_that_of_all_sides(setup):
    assert sft.settings(4).batch_size == 4
    names = [side.name for side in sft.stage(setup, 8, ["b1", "b2"], batch=4).sides]
    assert names == ["looper", "B1: TRL 1 x 4, checkpointing", "B2: TRL 4 x 1"]


def test_the_best_plain_setting_is_measured_with_either_attention_on_a_gpu(setup):
    def cudnn(*given, **named):
        return torch.backends.cuda.cudnn_sdp_enabled(), given, named

    assert with_either_attention(setup, "B2", cudnn) == {"B2": cudnn}
    both = with_either_attention(setup._replace(model=setup.model.model_copy(update={"device": "cuda"})), "B2", cudnn)
    assert {name: [way(1, a=2) for _ in range(2)] for name, way in both.items()} == {
        "B2": [(True, (1,), {"a": 2})] * 2, "B2, no cuDNN attention": [(False, (1,), {"a": 2})] * 2}
