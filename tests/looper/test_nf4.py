"""A base unpacked once computes what bitsandbytes computes when it unpacks in every pass; room decides, and is said."""

import pytest
import torch
from tests.looper.ppo_helpers import make_model, make_nf4_model
from torch import nn

from looper import nf4
from looper.nf4 import four_bit_layers, unpack, unpack_if_room
from looper.packing import ATTENTION, Rows

GB = 10**9


def logits_and_gradients(model, length, vocabulary, **inputs):
    """Of one pass over random tokens, with the same dropout each time. In evaluation bitsandbytes packs anew on a CPU."""
    torch.manual_seed(0)
    ids = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    logits = model.train()(ids, **inputs).logits
    logits.float().square().mean().backward()
    return logits.detach(), {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def assert_unpacking_changes_nothing(model, *arguments, equal, **inputs):
    logits, gradients = logits_and_gradients(model, *arguments, **inputs)
    model.zero_grad()
    layers = four_bit_layers(model)
    unpack(model)
    assert len(layers) == 7 * model.config.num_hidden_layers and not four_bit_layers(model)
    plain = [model.get_submodule(name) for name in layers]
    assert {(type(each), each.weight.dtype, each.weight.requires_grad) for each in plain} == {
        (nn.Linear, torch.bfloat16, False)}
    found, found_gradients = logits_and_gradients(model, *arguments, **inputs)
    assert found_gradients.keys() == gradients.keys() and len(gradients) == 2 * len(layers)
    for one, other in [(found, logits), *((found_gradients[name], gradients[name]) for name in gradients)]:
        assert other.abs().max() > 0
        assert torch.equal(one, other) if equal else (one - other).norm() < 0.03 * other.norm()


def test_an_unpacked_base_computes_what_the_packed_one_does(tmp_path):
    assert_unpacking_changes_nothing(make_nf4_model(tmp_path), 40, 23, equal=True)


def test_a_processor_and_a_base_that_is_not_packed_stay_as_they_are(tmp_path, capsys):
    model = make_nf4_model(tmp_path)
    unpack_if_room(model)
    unpack_if_room(make_model())
    assert len(four_bit_layers(model)) == 14 and not four_bit_layers(make_model()) and not capsys.readouterr().out


@pytest.mark.parametrize("card, share, unpacks", [(24 * GB, 1.0, False), (40 * GB, 1.0, True), (80 * GB, 1.0, True),
                                                  (80 * GB, 0.275, False), (80 * GB, 0.5, True)])
def test_8b_parameters_are_unpacked_where_half_of_what_may_be_taken_stays_free(card, share, unpacks, monkeypatch):
    packed, unpacked = 6 * GB, 16 * GB
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (card - packed - GB, card))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: packed + GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: packed)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: share)
    assert nf4._has_room(unpacked - packed) == unpacks


# ---- on a GPU ----

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_unpacking_changes_no_bit(tmp_path, monkeypatch, capsys):
    model = make_nf4_model(tmp_path, "cuda", 0.02, vocab_size=32_000, hidden_size=512, intermediate_size=1024,
                           num_attention_heads=8, num_key_value_heads=4)
    model.get_base_model().set_attn_implementation(ATTENTION)
    # Tokens enough that bitsandbytes unpacks: for fewer it has kernels of its own, which add in another order
    starts = torch.tensor([0, 900, 2048], dtype=torch.int32, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        assert_unpacking_changes_nothing(model, 2048, 32_000, equal=True, rows=Rows([900, 1148], starts, 1148),
                                         position_ids=torch.arange(2048, device="cuda")[None])
    finally:
        torch.use_deterministic_algorithms(False)
    for room in (False, True):
        model = make_nf4_model(tmp_path, "cuda")
        monkeypatch.setattr(nf4, "_has_room", lambda more: room)
        unpack_if_room(model)
        assert bool(four_bit_layers(model)) != room and "NF4 base: unpacked" in capsys.readouterr().out
