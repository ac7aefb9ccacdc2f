"""The engine against transformers' own `generate`, full forward passes, and exact distributions, on tiny models."""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from looper.decoding import Decoder, decoding_mode
from looper.generation import Request, _batch, generate, generate_in_chunks
from tests.looper.generation_helpers import (
    EOS,
    llama,
    make_prompts,
    model,
    reference_greedy,
    settings,
    teacher_forced,
    tiny_model,
)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_greedy_tokens_equal_transformers_generate(model, batch_size):
    prompts = make_prompts()
    found = generate(model, prompts, temperatures=[0.0] * 9, **settings(batch_size=batch_size))
    expected = [reference_greedy(model, prompt, 40, EOS) for prompt in prompts]
    assert [completion.token_ids for completion in found] == expected
    assert [completion.truncated for completion in found] == [tokens[-1] not in EOS for tokens in expected]
    lengths = {len(tokens) for tokens in expected}
    assert 40 in lengths and min(lengths) < 20, "the fixture should have truncated and early rows"


def test_a_batch_of_sampled_and_greedy_rows_keeps_the_greedy_ones_greedy(model):
    prompts = make_prompts()
    temperatures = [0.0, 0.7, 0.0, 1.5, 0.0, 0.2, 1.0, 0.0, 1.0]
    found = generate(model, prompts, temperatures=temperatures, **settings())
    for prompt, temperature, completion in zip(prompts, temperatures, found):
        is_greedy = completion.token_ids == reference_greedy(model, prompt, 40, EOS)
        assert is_greedy == (temperature == 0)


def test_logprobs_equal_a_full_forward_pass_at_each_rows_temperature(model):
    prompts = make_prompts()
    temperatures = [0.0, 0.7, 0.0, 1.5, 0.3, 0.2, 1.0, 2.0, 1.0]
    for completion, prompt, temperature in zip(
        generate(model, prompts, temperatures=temperatures, **settings()), prompts, temperatures
    ):
        expected = teacher_forced(model, prompt, completion, temperature)
        assert len(completion.logprobs) == len(completion.token_ids)
        tolerance = 1e-5 / min(temperature or 1.0, 1.0)  # a low temperature multiplies the logits' rounding
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=tolerance)


def test_bfloat16_logprobs_are_near_a_full_forward_pass():
    model = tiny_model(initializer_range=0.05).to(torch.bfloat16)
    prompts = make_prompts()
    for completion, prompt in zip(generate(model, prompts, temperatures=[1.0] * 9, **settings()), prompts):
        expected = teacher_forced(model, prompt, completion, 1.0)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-2)


def test_each_row_is_sampled_from_its_own_temperatures_distribution():
    model = tiny_model(vocab_size=12, initializer_range=0.2)
    rows, temperatures = 4000, (0.3, 1.0, 2.5)
    with torch.no_grad():
        logits = model(torch.tensor([[5]])).logits[0, -1]
    found = generate(
        model,
        [[5]] * rows * 3,
        temperatures=[temperature for temperature in temperatures for _ in range(rows)],
        **settings(max_new_tokens=1, eos_token_ids=[], batch_size=12000),
    )
    for index, temperature in enumerate(temperatures):
        tokens = torch.tensor([completion.token_ids[0] for completion in found[index * rows : (index + 1) * rows]])
        expected = torch.softmax(logits / temperature, -1) * rows
        counts = torch.bincount(tokens, minlength=12)
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert chi_square < 24.7, (temperature, counts, expected)  # the 99% quantile of 11 degrees of freedom


def test_the_seed_alone_determines_the_samples(llama):
    prompts, temperatures = make_prompts(), [1.0] * 9
    torch.manual_seed(10)
    first = generate(llama, prompts, temperatures=temperatures, **settings())
    state = torch.get_rng_state()
    torch.manual_seed(11)
    assert generate(llama, prompts, temperatures=temperatures, **settings()) == first
    torch.manual_seed(10)
    assert torch.equal(torch.get_rng_state(), state), "the global random state was used"
    assert generate(llama, prompts, temperatures=temperatures, **settings(seed=4)) != first
    by_one = generate(llama, prompts, temperatures=temperatures, **settings(batch_size=1))
    assert [completion.token_ids for completion in by_one] == [completion.token_ids for completion in first]
    assert first[0].token_ids != first[8].token_ids, "the same prompt twice takes two samples"


def test_one_new_token(llama):
    prompts = make_prompts()
    found = generate(llama, prompts, temperatures=[0.0] * 9, **settings(max_new_tokens=1))
    assert [completion.token_ids for completion in found] == [reference_greedy(llama, p, 1, EOS) for p in prompts]


def test_an_end_of_sequence_as_the_last_allowed_token_is_not_truncation(llama):
    found = generate(llama, make_prompts(), temperatures=[0.0] * 9, **settings())
    prompt, whole = next(pair for pair in zip(make_prompts(), found) if 1 < len(pair[1].token_ids) < 40)
    length = len(whole.token_ids)
    assert whole.token_ids[-1] in EOS and not whole.truncated
    (exact,) = generate(llama, [prompt], temperatures=[0.0], **settings(max_new_tokens=length))
    assert (exact.token_ids, exact.truncated) == (whole.token_ids, False)
    (cut,) = generate(llama, [prompt], temperatures=[0.0], **settings(max_new_tokens=length - 1))
    assert (cut.token_ids, cut.truncated) == (whole.token_ids[:-1], True)


def test_without_end_of_sequence_tokens_every_row_runs_to_the_limit(llama):
    found = generate(llama, make_prompts(), temperatures=[0.5] * 9, **settings(eos_token_ids=[]))
    assert [(len(c.token_ids), c.truncated) for c in found] == [(40, True)] * 9


def test_each_row_may_have_its_own_limit(llama):
    limits = [3, 1, 20, 8, 40, 2, 5, 30, 3]
    found = generate(llama, make_prompts(), temperatures=[0.0] * 9, **settings(eos_token_ids=[], max_new_tokens=limits))
    assert [c.token_ids for c in found] == [reference_greedy(llama, p, n, []) for p, n in zip(make_prompts(), limits)]


def test_a_row_may_fill_the_context_window_to_the_last_token(llama):
    prompt = make_prompts([216])[0]
    (found,) = generate(llama, [prompt], temperatures=[0.0], **settings(eos_token_ids=[]))
    assert found.token_ids == reference_greedy(llama, prompt, 40, [])


def test_a_prompt_shared_by_arms_is_prefilled_once_a_chunk(llama, tmp_path):
    shared, other = make_prompts()[2], make_prompts()[4]
    passes = []
    hook = llama.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        generate(llama, [shared, other] * 4, temperatures=[1.0] * 8, **settings(batch_size=3))
        assert sorted(shape for shape in passes if shape[1] > 1) == [(1, 16), (1, 29)]
        passes.clear()
        # Not across chunks: what a chunk computes must not depend on whether the one before it was run or read.
        generate_in_chunks(llama, [Request(shared, 1.0)] * 8, tmp_path, chunk_size=4, **settings())
        assert [shape for shape in passes if shape[1] > 1] == [(1, 16)] * 2
    finally:
        hook.remove()


@pytest.mark.parametrize("batch_size", [3, 16])
def test_what_all_prompts_begin_with_is_computed_once(model, batch_size):
    begin, rests = make_prompts((19,))[0], make_prompts()
    prompts, passes = [begin + rest for rest in rests], []
    hook = model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: passes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    found = generate(model, prompts, temperatures=[0.0] * 9, **settings(batch_size=batch_size))
    hook.remove()
    # A prompt is `begin` and one more token: that token is the first step's, and the one before it is a pass's.
    assert passes.count((1, 18)) == 1 and passes[0] == (1, 18)
    assert max(width for _, width in passes[1:]) == 1 + 30 - 1, "the longest prompt's rest"
    for prompt, completion in zip(prompts, found):
        assert completion.token_ids == reference_greedy(model, prompt, 40, EOS)
        expected = teacher_forced(model, prompt, completion, 0.0)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-5)


def test_the_flash_kernel_is_told_each_rows_own_keys(llama, monkeypatch):
    """What CUDA in bfloat16 does, with a plain attention in the kernel's place."""

    def kernel(query, key, value, query_starts, key_starts, max_q, max_k, *, scale, seqused_k, **kwargs):
        rows = []
        for row, (start, used) in enumerate(zip(key_starts[:-1], seqused_k, strict=True)):
            groups = query.shape[1] // key.shape[1]
            keys, values = (states[start : start + used].repeat_interleave(groups, 1) for states in (key, value))
            weights = torch.softmax(torch.einsum("hd,khd->hk", query[row], keys) * scale, -1)
            rows.append(torch.einsum("hk,khd->hd", weights, values))
        assert query_starts.tolist() == list(range(len(query) + 1)) and max_q == 1 and seqused_k.max() <= max_k
        assert query_starts.dtype == key_starts.dtype == seqused_k.dtype == torch.int32
        return (torch.stack(rows),)

    init = Decoder.__init__

    def with_flash(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.flash = True

    plain = generate(llama, make_prompts(), temperatures=[0.0] * 9, **settings())
    monkeypatch.setattr(Decoder, "__init__", with_flash)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", kernel)
    found = generate(llama, make_prompts(), temperatures=[0.0] * 9, **settings())
    assert [completion.token_ids for completion in found] == [completion.token_ids for completion in plain]


def test_slots_keep_account_of_the_prompts_they_hold(llama):
    """A prompt is copied from a slot that is refilled in the same breath, not from one that another row moved into."""
    first, second, third, fourth = (make_prompts()[index] for index in (2, 4, 5, 6))
    with decoding_mode(llama):
        decoder = Decoder(llama, slots=4, max_length=64, rows=8, max_new_tokens=8, eos_token_ids=[])
        decoder.start(8, seed=0, sampling=False)
        decoder.admit([0, 2, 3], [0, 1, 2], [first, fourth, third], [0.0] * 3, [8] * 3)
        decoder.move([3], [2], 64)  # onto row 1, as if that had finished
        decoder.admit([3], [3], [fourth], [0.0], [8])
        decoder.admit([0, 1], [4, 5], [second, first], [0.0] * 2, [8] * 2)  # as if row 0 had finished
        for _ in range(8):
            decoder.step(4, 64)
    for row, prompt in {2: third, 3: fourth, 4: second, 5: first}.items():
        assert decoder.tokens[row, :8].tolist() == reference_greedy(llama, prompt, 8, []), row


def test_no_prompts_no_completions(llama, tmp_path):
    assert generate(llama, [], temperatures=[], **settings()) == []
    assert generate_in_chunks(llama, [], tmp_path, chunk_size=2, **settings()) == []


@pytest.mark.parametrize(
    ("prompts", "temperatures", "overrides", "message"),
    [
        ([[5], []], [0.0, 0.0], {}, "prompt 1 is empty"),
        ([[5] * 200], [0.0], {"max_new_tokens": 57}, "prompt 0 has 200 tokens and max_new_tokens is 57.*window of 256"),
        ([[5], [6]], [1.0, -0.1], {}, "temperature -0.1 of prompt 1"),
        ([[5]], [float("nan")], {}, "temperature nan of prompt 0"),
        ([[5]], [1.0, 1.0], {}, "2 temperatures for 1 prompts"),
        ([[5]], [1.0], {"max_new_tokens": [3, 3]}, "2 max_new_tokens for 1 prompts"),
        ([[5]], [1.0], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[5]], [1.0], {"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_bad_input_is_refused_with_its_place(llama, prompts, temperatures, overrides, message):
    with pytest.raises(ValueError, match=message):
        generate(llama, prompts, temperatures=temperatures, **settings(**overrides))


@pytest.mark.parametrize(
    ("running", "slots", "rows"),
    [(1024, 1024, 1024), (513, 1024, 1024), (512, 1024, 512), (129, 1024, 256), (33, 1024, 64), (32, 1024, 32), (1, 1024, 32),
     (3, 8, 8), (50, 100, 50), (26, 100, 50)],
)
def test_a_gpus_batch_is_halved_while_all_rows_fit_and_enough_are_left(running, slots, rows):
    assert _batch(running, slots, halving=True) == rows
    assert _batch(running, slots, halving=False) == running


def test_cudnns_attention_is_not_taken_while_it_generates():
    assert torch.backends.cuda.cudnn_sdp_enabled()
    with decoding_mode(tiny_model()):
        assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_the_model_is_left_as_it_was_even_after_an_error():
    model = tiny_model().train()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(ValueError, match="logits for prompt 0 are not finite"):
        generate(model, [[5, 6]], temperatures=[1.0], **settings())
    assert model.training and model.config._attn_implementation == "sdpa"
    assert model(torch.tensor([[5, 6]])).logits.requires_grad


def test_sliding_window_attention_is_refused_where_the_window_would_matter():
    config = MistralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, sliding_window=16,
    )  # fmt: skip
    with pytest.raises(ValueError, match="window 16"):
        generate(MistralForCausalLM(config), [[5] * 30], temperatures=[0.0], **settings())
