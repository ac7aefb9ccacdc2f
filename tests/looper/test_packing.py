"""What fine-tuning on a processor computes without padding is what the plain way computes, gradients included."""

import time
from contextlib import nullcontext
from itertools import accumulate

import pytest
import torch
from tiny import tiny_model

from looper import packing, ppo_data
from looper.packing import ATTENTION, HEAD_POSITIONS, Head, Rows, packed, row_attention
from looper.ppo_policy import PolicyWithValue
from tests.looper.compile_helpers import filling_up
from tests.looper.ppo_helpers import make_model, make_samples

COUNTS = [0, 1, HEAD_POSITIONS, 2 * HEAD_POSITIONS + 3]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", COUNTS)
def test_the_head_is_log_softmax_of_the_logits(count):
    hidden, weight = drawn(count, 32).requires_grad_(), drawn(90, 32, seed=1)
    targets = torch.randint(90, (count,), generator=torch.Generator().manual_seed(2))
    targets[::2] = (hidden @ weight.T).argmax(-1)[::2]  # every second is the likeliest
    log_probs, entropies, is_top1 = Head.apply(hidden, weight, targets)
    same = hidden.detach().double().requires_grad_()
    expected = torch.log_softmax(same @ weight.double().T, -1)
    torch.testing.assert_close(log_probs.double(), expected[torch.arange(count), targets], rtol=0, atol=1e-5)
    torch.testing.assert_close(entropies.double(), -(expected.exp() * expected).sum(-1), rtol=0, atol=1e-5)
    assert torch.equal(is_top1, expected.argmax(-1) == targets) and is_top1[::2].all()
    by_log_prob = drawn(count, seed=3)
    log_probs.backward(by_log_prob)
    expected[torch.arange(count), targets].backward(by_log_prob.double())
    torch.testing.assert_close(hidden.grad.double(), same.grad, rtol=0, atol=1e-4)
    assert count == 0 or same.grad.abs().max() > 0.1


def test_a_row_attends_to_its_own_past_alone():
    lengths = [3, 1, 5]
    query, key, value = drawn(1, 4, 9, 8), drawn(1, 2, 9, 8, seed=1), drawn(1, 2, 9, 8, seed=2)
    rows = Rows(lengths, torch.tensor([0, 3, 4, 9]), 5)
    out, _ = row_attention(None, query, key, value, None, scaling=0.3, rows=rows)
    assert out.shape == (1, 9, 4, 8)
    row = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    allowed = (row[:, None] == row) & torch.ones(9, 9).tril().bool()
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.3
    expected = scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=0, atol=1e-6)


class Wrapped(torch.nn.Module):
    """As a PeftModel, so far as `packed` asks."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def get_base_model(self):
        return self.model


def test_a_pass_scores_the_labelled_positions_of_every_row():
    model = tiny_model()
    rows = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17]]
    ids = torch.tensor([row + [0] * (6 - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (6 - len(row)) for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :3] = labels[2, :1] = -100  # what nothing precedes, and a prompt
    with torch.no_grad(), packed(Wrapped(model)):
        scores = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
    expected = []
    for row, kept in zip(rows, [3, 1, 1]):
        with torch.no_grad():
            log_p = model(torch.tensor([row])).logits[0].log_softmax(-1)
        expected += [log_p[at - 1, row[at]] for at in range(kept, len(row))]
    assert scores.label_mask.sum() == len(expected) == 8
    torch.testing.assert_close(scores.log_probs, torch.stack(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", [{"model_type": "gemma2"}, {"model_type": "qwen2", "use_sliding_window": True}])
def test_a_model_of_another_kind_keeps_its_way(change, monkeypatch):
    model = tiny_model()
    before = model.forward
    with packed(Wrapped(model)):
        assert model.config._attn_implementation == ATTENTION and model.forward != before
    assert model.forward == before
    for name, value in change.items():
        setattr(model.config, name, value)
    with packed(Wrapped(model)):
        assert model.config._attn_implementation == "sdpa" and model.forward == before
    assert "llama" in packing.PLAIN


# ---- on a GPU ----

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_the_flash_kernel_gives_what_each_row_alone_gives():
    lengths = [300, 1, 57]
    starts = torch.tensor([0, 300, 301, 358], dtype=torch.int32, device="cuda")
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        states = [drawn(1, heads, 358, 64, seed=heads + i).to("cuda", dtype).requires_grad_()
                  for i, heads in enumerate((4, 2, 2))]
        out, _ = row_attention(None, *states, None, scaling=0.125, rows=Rows(lengths, starts, 300))
        out.backward(drawn(*out.shape, seed=9).to("cuda", dtype))
        results.append([out.detach().float(), *(each.grad.float() for each in states)])
    for exact, found in zip(*results):
        assert (found - exact).norm() < 0.01 * exact.norm() and exact.norm() > 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_a_pass_end_to_end_has_the_padded_pass_gradients():
    from peft import LoraConfig, get_peft_model
    from trl.trainer.utils import add_fused_lm_head

    ids = torch.randint(10, 300, (4, 90), generator=torch.Generator().manual_seed(0)).cuda()
    mask = (torch.arange(90) < torch.tensor([90, 3, 41, 77])[:, None]).long().cuda()
    labels = ids.masked_fill(mask == 0, -100)
    found = []
    for block in (nullcontext, packed):
        model = get_peft_model(tiny_model().to("cuda", torch.bfloat16), LoraConfig(target_modules="all-linear"))
        add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        with block(model) if block is packed else nullcontext():
            model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False,
                  fused_lm_head=True).log_probs.sum().backward()
        found.append(torch.cat([each.grad.flatten().float() for each in model.parameters() if each.requires_grad]))
    assert (found[0] - found[1]).norm() < 0.03 * found[0].norm() and found[0].norm() > 1


@pytest.fixture
def filled():
    with filling_up():
        yield


def test_a_pass_of_fine_tuning_is_filled_up_with_a_row_that_learns_nothing(filled):
    ids, real = torch.arange(12).view(3, 4) + 7, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    given = packing._unpadded(lambda **inputs: inputs, ids, real, ids.masked_fill(real == 0, -100))
    assert given["input_ids"].tolist() == [[7, 8, 9, 10, 11, 12, 15, 16, 17] + [0] * 119]
    assert given["labels"].tolist() == [[-100, 8, 9, 10, -100, 12, -100, 16, 17] + [-100] * 119]
    assert given["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2, *range(119)]]
    assert given["rows"].lengths == [4, 2, 3, 119] and given["rows"].starts.tolist() == [0, 4, 6, 9, 128]
    assert given["rows"].longest == 119


@pytest.mark.parametrize("passes", [
    [[260, 200, 180, 140], [250, 240, 170, 150]],  # the longest rows are on both sides of a power of two
    [[430, 3], [210, 140]],
    [[300, 299], [2]],  # the filling is longer than any row
])
def test_passes_of_several_processes_become_of_one_size(filled, passes):
    made = [packing.rows_of(lengths, torch.device("cpu"), passes) for lengths in passes]
    assert len({sum(rows.lengths) for rows in made}) == len({rows.longest for rows in made}) == 1
    for rows, lengths in zip(made, passes, strict=True):
        assert rows.lengths[:-1] == lengths and rows.starts.tolist() == [0, *accumulate(rows.lengths)]
        assert rows.longest >= max(rows.lengths) and sum(rows.lengths) % packing.PASS_TOKENS == 0


def test_a_processor_fills_no_pass_up_for_others():
    assert packing.rows_of([3, 2], torch.device("cpu"), [[3, 2], [9]]).lengths == [3, 2]


def test_a_pass_of_fine_tuning_knows_the_others(filled):
    ids = torch.arange(6).view(2, 3)
    given = packing._unpadded(lambda **inputs: inputs, ids, torch.ones(2, 3), ids, passes=[[3, 3], [100, 30]])
    assert given["rows"].lengths == [3, 3, 250] and given["input_ids"].shape == (1, 256) and "passes" not in given


def test_a_pass_of_fine_tuning_is_of_this_processs_rows(filled, monkeypatch):
    monkeypatch.setattr(packing, "rank", lambda: 1)
    ids = torch.arange(6).view(2, 3)
    given = packing._unpadded(lambda **inputs: inputs, ids, torch.ones(2, 3), ids, passes=[[100], [3, 2]])
    assert given["rows"].lengths[:2] == [3, 2] and given["input_ids"][0, :6].tolist() == [0, 1, 2, 3, 4, 0]


def test_filling_changes_no_log_probability_of_ppo():
    policy, samples = PolicyWithValue(make_model(), gradient_checkpointing=False), make_samples(5)
    plain = ppo_data.collate(samples, torch.device("cpu"))
    with filling_up():
        tokens = ppo_data.collate(samples, torch.device("cpu"))
    assert tokens.input_ids.shape == tokens.positions.shape and tokens.input_ids.shape[1] % packing.PASS_TOKENS == 0
    assert plain.input_ids.shape[1] < tokens.input_ids.shape[1]
    with torch.no_grad():
        for one, other in zip(policy(tokens), policy(plain), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_rows_are_laid_end_to_end_without_waiting_for_it():
    ids = torch.arange(2 * 8192, device="cuda").view(2, 8192)
    for cycles in (1, 4_000_000_000):  # the first allocates; then the GPU is busy for two seconds
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)
        begun = time.perf_counter()
        given = packing._unpadded(lambda **inputs: inputs, ids, torch.ones_like(ids), ids, passes=[[8192, 8000]])
        took = time.perf_counter() - begun
    assert took < 0.5 and given["input_ids"][0, [0, 8191, 8192]].tolist() == [0, 8191, 8192]
