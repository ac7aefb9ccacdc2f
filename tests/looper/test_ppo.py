"""Runs that were killed and resumed: bit for bit what an unbroken run gives."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from looper.ppo import VALUE_HEAD, last_checkpoint
from looper.ppo_settings import KLSettings
from tests.looper.ppo_helpers import QUICK, KillAt, Killed, assert_same_bits, run


@pytest.fixture(scope="module", params=["question", "arm"])
def unbroken(request, tmp_path_factory):
    settings = replace(QUICK, credit=request.param, epochs=2, save_steps=1, kl=KLSettings(horizon=20))
    return settings, run(tmp_path_factory.mktemp("unbroken"), settings)


# Updates 1 to 12, PPO batches end at 4, 6, 10 and 12: first, inside a batch, at a batch's end, after an epoch, last
@pytest.mark.parametrize("step", [
    pytest.param(step, marks=[] if step in (1, 6) else pytest.mark.slow) for step in range(1, 13)])
def test_a_run_killed_at_any_step_and_resumed_gives_the_same_bits(tmp_path, unbroken, step):
    settings, (expected, metrics) = unbroken
    with pytest.raises(Killed):
        run(tmp_path, settings, callbacks=[KillAt(step)])
    last = max((end for end in (4, 6, 10, 12) if end < step), default=None)
    found = last_checkpoint(tmp_path)
    assert (found and int(found.split("-")[-1])) == last
    resumed, resumed_metrics = run(tmp_path, settings)
    assert_same_bits(resumed, expected)
    assert resumed_metrics == metrics


def test_a_run_killed_twice_and_while_it_saves_gives_the_same_bits(tmp_path, unbroken):
    settings, (expected, metrics) = unbroken
    for killer in (KillAt(4, "on_save"), KillAt(11)):
        with pytest.raises(Killed):
            run(tmp_path, settings, callbacks=[killer])
    # the kill came while the last checkpoint was written: its last file is cut short
    state = tmp_path / "checkpoints" / "checkpoint-10" / "trainer_state.json"
    shutil.copytree(state.parent, tmp_path / "checkpoints" / "checkpoint-12")
    broken = tmp_path / "checkpoints" / "checkpoint-12" / "trainer_state.json"
    broken.write_text(state.read_text()[:100])
    (broken.parent / "adapter_model.safetensors").write_bytes(b"")
    resumed, resumed_metrics = run(tmp_path, settings)
    assert_same_bits(resumed, expected)
    assert resumed_metrics == metrics


def test_a_finished_run_called_again_gives_the_same_bits(tmp_path, unbroken):
    settings, (expected, metrics) = unbroken
    run(tmp_path, settings)
    resumed, resumed_metrics = run(tmp_path, settings)
    assert_same_bits(resumed, expected)
    assert resumed_metrics == metrics


def test_a_checkpoint_holds_all_it_needs(tmp_path):
    run(tmp_path, replace(QUICK, save_steps=2))
    folder = Path(last_checkpoint(tmp_path))
    assert folder.name == "checkpoint-6"  # the second PPO batch's end
    assert {"adapter_model.safetensors", VALUE_HEAD, "optimizer.pt", "scheduler.pt", "rng_state.pth", "ppo_state.json",
            "trainer_state.json"} <= {path.name for path in folder.iterdir()}
    assert json.loads((folder / "ppo_state.json").read_text())["beta"] != QUICK.kl.initial
