"""Generation in chunks: a kill loses at most one, and nothing else is taken for one."""

import json

import pytest
import torch

from looper import generation
from looper.decoding import Decoder
from looper.generation import Completion, Request, equal_chunks, generate, generate_in_chunks
from tests.looper.generation_helpers import llama, make_prompts, settings, teacher_forced


def make_requests():
    return [Request(prompt, temperature) for prompt, temperature in zip(make_prompts(), [0.0, 1.0, 0.5] * 3)]


def run_chunks(model, scratch, requests=None, **overrides):
    return generate_in_chunks(model, requests or make_requests(), scratch, chunk_size=2, **settings(**overrides))


@pytest.fixture
def count_runs(monkeypatch):
    """The number of requests in each chunk that is really generated, in order."""
    sizes, run = [], generation._run

    def counting(decoder, requests, *args):
        sizes.append(len(requests))
        return run(decoder, requests, *args)

    monkeypatch.setattr(generation, "_run", counting)
    return sizes


def test_chunks_keep_the_order_and_hold_what_generate_gives(llama, tmp_path):
    found = run_chunks(llama, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"chunk-{index:05}.jsonl" for index in range(5)]
    greedy = [index for index, request in enumerate(make_requests()) if request.temperature == 0]
    plain = generate(llama, make_prompts(), temperatures=[0.0] * 9, **settings())
    assert [found[index].token_ids for index in greedy] == [plain[index].token_ids for index in greedy]
    for request, completion in zip(make_requests(), found):
        expected = teacher_forced(llama, request.prompt, completion, request.temperature)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=2e-5)


def test_chunks_are_equal(llama, tmp_path, count_runs):
    generate_in_chunks(llama, make_requests(), tmp_path, **settings(batch_size=1))  # 9 requests: 4, 4 and 1 would be unequal
    assert count_runs == [3, 3, 3]


@pytest.mark.parametrize("requests, batch_size, size", [
    (0, 8, 1), (1, 8, 1), (32, 8, 32), (33, 8, 17),  # 4 batches at most
    (511, 8, 32), (513, 8, 33),  # 16 chunks of 4 batches, then larger ones
    (2048, 8, 128), (2049, 8, 65),  # 16 batches at most, and a multiple of 16 chunks
    (95_648, 16, 250), (23_912, 1024, 3986)])  # eight arms, twice, of all train questions; reference's targets
def test_large_sets_have_larger_chunks(requests, batch_size, size):
    assert equal_chunks(requests, batch_size) == size


def test_each_chunk_has_samples_of_its_own(llama, tmp_path):
    found = run_chunks(llama, tmp_path, [Request(make_prompts()[2], 1.0)] * 4)
    assert found[:2] != found[2:]


def test_after_a_kill_finished_chunks_stay_and_the_result_is_the_same(llama, tmp_path, monkeypatch, count_runs):
    whole = run_chunks(llama, tmp_path / "uninterrupted")
    assert count_runs == [2, 2, 2, 2, 1]
    with monkeypatch.context() as patch:
        step, calls = Decoder.step, []

        def dying(*args):
            calls.append(1)
            if len(calls) == 90:
                raise KeyboardInterrupt
            step(*args)

        patch.setattr(Decoder, "step", dying)
        with pytest.raises(KeyboardInterrupt):
            run_chunks(llama, tmp_path / "killed")
    kept = sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert 0 < len(kept) < 5 and kept == [f"chunk-{index:05}.jsonl" for index in range(len(kept))]
    count_runs.clear()
    assert run_chunks(llama, tmp_path / "killed") == whole
    assert count_runs == [2, 2, 2, 2, 1][len(kept) :]
    count_runs.clear()
    assert run_chunks(llama, tmp_path / "killed") == whole
    assert count_runs == []


@pytest.mark.parametrize("damage", ["cut", "empty", "changed", "not JSON", "lost row"])
def test_a_damaged_chunk_is_generated_again(llama, tmp_path, count_runs, damage):
    whole = run_chunks(llama, tmp_path)
    path = tmp_path / "chunk-00001.jsonl"
    text = path.read_text()
    damaged = {
        "cut": text[:-20],
        "empty": "",
        "changed": text.replace('"truncated": true', '"truncated": false').replace("[1", "[2"),
        "not JSON": "{" + text,
        "lost row": "".join(text.splitlines(keepends=True)[:-1]),
    }[damage]
    assert damaged != text
    path.write_text(damaged)
    count_runs.clear()
    assert run_chunks(llama, tmp_path) == whole
    assert count_runs == [2] and path.read_text() == text


def test_a_chunk_of_other_requests_or_settings_is_not_mistaken(llama, tmp_path, count_runs):
    run_chunks(llama, tmp_path, max_new_tokens=3)
    requests = make_requests()
    requests[2] = Request(requests[2].prompt, 0.9)
    count_runs.clear()
    run_chunks(llama, tmp_path, requests, max_new_tokens=3)
    assert count_runs == [2]
    for overrides in ({"seed": 4}, {"max_new_tokens": 2}, {"eos_token_ids": [7]}, {"batch_size": 3}):
        count_runs.clear()
        run_chunks(llama, tmp_path, requests, **{"max_new_tokens": 3} | overrides)
        assert count_runs == [2, 2, 2, 2, 1], overrides


def test_chunk_files_are_jsonl_with_rounded_logprobs(llama, tmp_path):
    found = run_chunks(llama, tmp_path)
    header, *rows = map(json.loads, (tmp_path / "chunk-00000.jsonl").read_text().splitlines())
    assert set(header) == {"requests_sha256", "body_sha256"}
    assert [Completion(**row) for row in rows] == found[:2]
    assert all(value == round(value, 6) for row in rows for value in row["logprobs"])


def test_the_progress_bar_goes_on_from_finished_chunks(llama, tmp_path, capsys):
    run_chunks(llama, tmp_path, progress="rollouts")
    shown = capsys.readouterr().err
    assert "rollouts: 100%" in shown and "9/9" in shown and "tokens/s" in shown
    (tmp_path / "chunk-00004.jsonl").unlink()
    run_chunks(llama, tmp_path, progress="rollouts")
    shown = capsys.readouterr().err
    assert "8/9" in shown and "9/9" in shown and "0/9" not in shown
    run_chunks(llama, tmp_path, max_new_tokens=3)
    assert capsys.readouterr().err == ""
