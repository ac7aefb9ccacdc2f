"""The compiled pieces against the plain ones, on the CPU, where the stages compile nothing, and on a GPU."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers.models.qwen2 import modeling_qwen2

from looper import decoding
from looper.compiling import compiled_by_rows
from looper.generation import generate
from looper.pieces import compiled_pieces
from looper.sampler import choose
from tests.looper.generation_helpers import EOS, make_prompts, reference_greedy, settings, tiny_model

GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
pytestmark = pytest.mark.slow  # some seconds a piece


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()
    compiled_by_rows.cache_clear()
    counters.clear()


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_round_as_plain_ones_do(device, dtype):
    """A norm's sum of squares has another order: it may differ in float32's last bit, so now and then in bfloat16's."""
    model = tiny_model("qwen2", hidden_size=64, intermediate_size=96).to(device, dtype)
    layer, generator = model.model.layers[0], torch.Generator().manual_seed(4)

    def pieces(batch, tokens):
        states, query, key, table = (torch.randn(batch, tokens, *shape, generator=generator).to(device, dtype)
                                     for shape in ((64,), (4, 16), (2, 16), (16,)))  # fmt: skip
        tables = (table[:1] if tokens > 1 else table).cos(), (table[:1] if tokens > 1 else table).sin()
        rotated = modeling_qwen2.apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), *tables)
        return layer.input_layernorm(states), layer.mlp(states), *rotated

    with torch.inference_mode():
        for shape in ((5, 60), (300, 1), (2, 1), (1, 1)):  # a prefill pass, where positions are shared, and steps
            state = generator.get_state()
            norm, *others = pieces(*shape)
            generator.set_state(state)
            with compiled_pieces(model):
                compiled_norm, *compiled_others = pieces(*shape)
            step = torch.finfo(dtype).eps
            of_others = 0 if device == "cpu" else 4 * step  # a GPU's exponential may be the compiler's own
            for plain, found in zip(others, compiled_others):
                torch.testing.assert_close(found, plain, rtol=of_others, atol=of_others)
            torch.testing.assert_close(compiled_norm, norm, rtol=2 * step, atol=1e-6)
            assert dtype == torch.float32 or (compiled_norm != norm).float().mean() < 1e-2


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [768, 37 * 128, 1000])
def test_the_compiled_sampler_chooses_the_same(device, dtype, vocabulary):
    generator = torch.Generator().manual_seed(6)
    fused = compiled_by_rows(choose, exact_division=False)
    for rows in (400, 8):
        logits = (torch.randn(rows, vocabulary, generator=generator) * 4).to(device, dtype)
        temperatures = torch.tensor([0.0, 0.7, 1.0, 1.5], device=device).repeat(rows // 4)
        for uniforms in (torch.rand(rows, dtype=torch.float64, generator=generator).to(device), None):
            (tokens, logprobs), (expected, expected_logprobs) = (
                each(logits, temperatures, uniforms) for each in (fused, choose)
            )
            assert torch.equal(tokens, expected)
            torch.testing.assert_close(logprobs, expected_logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_each_piece_is_compiled_once_for_all_layers_and_batches(device, monkeypatch):
    monkeypatch.setattr(decoding, "compiles_on", lambda device: True)
    model = tiny_model("qwen2", num_hidden_layers=3).to(device)
    plain = modeling_qwen2.Qwen2MLP.forward, modeling_qwen2.apply_rotary_pos_emb
    prompts = make_prompts([5, 3, 17, 4, 30, 9, 9, 3] * 2)
    # The norms, the MLPs, the rotary embedding and the sampler; and all of these for a single row
    for batch_size, graphs in ((8, 4), (5, 4), (1, 8)):
        found = generate(model, prompts, temperatures=[0.0, 1.0] * 8 + [0.0], **settings(batch_size=batch_size))
        for prompt, completion in list(zip(prompts, found))[::2]:
            assert completion.token_ids == reference_greedy(model, prompt, 40, EOS)
        assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
    assert plain == (modeling_qwen2.Qwen2MLP.forward, modeling_qwen2.apply_rotary_pos_emb)
