from collections import Counter

import pytest
import torch

from looper.ppo_data import PPOSample, collate, earns_alike, plan_steps, samples_from_rows
from looper.ppo_settings import KLSettings, PPOSettings


def row(number, rewards=(1.0, -0.5, 0.2)):
    arms = [{"name": f"arm{i}", "token_ids": [10 + i, 2], "logprobs": [-0.5, -0.1], "reward": reward,
             "advantage": reward - (sum(rewards) - reward) / (len(rewards) - 1)} for i, reward in enumerate(rewards)]
    return {"id": f"train-{number}", "question": f"Q{number}?", "reward": 0.9, "s_end": 0.1, "s_path": 0.2, "s_cf": 0.3,
            "s_wm": 0.4, "arm_outputs": arms}


def prompt_ids_of(question):
    return [ord(letter) for letter in question]


# ---- samples ----


def test_question_credit_draws_one_arm_a_question_and_pays_the_group_reward():
    rows = [row(number) for number in range(300)]
    samples = samples_from_rows(rows, prompt_ids_of, PPOSettings())
    assert [sample.id.split("/")[0] for sample in samples] == [each["id"] for each in rows]
    assert {sample.reward for sample in samples} == {0.9} and {sample.advantage for sample in samples} == {None}
    counts = Counter(sample.id.split("/")[1] for sample in samples)
    assert set(counts) == {"arm0", "arm1", "arm2"} and min(counts.values()) > 70  # 100 each, give or take
    first = samples[0]
    arm = int(first.id[-1])
    assert first.prompt_ids == prompt_ids_of("Q0?") and first.response_ids == [10 + arm, 2]
    assert first.components == {"s_end": 0.1, "s_path": 0.2, "s_cf": 0.3, "s_wm": 0.4}


def test_the_drawn_arm_depends_on_seed_and_question_but_not_on_the_other_rows():
    rows = [row(number) for number in range(50)]
    drawn = samples_from_rows(rows, prompt_ids_of, PPOSettings(seed=1))
    assert samples_from_rows(rows, prompt_ids_of, PPOSettings(seed=1)) == drawn
    assert samples_from_rows(rows[::-1], prompt_ids_of, PPOSettings(seed=1)) == drawn[::-1]
    assert samples_from_rows(rows, prompt_ids_of, PPOSettings(seed=2)) != drawn


def test_arm_credit_takes_every_arm_but_no_question_without_signal():
    rows = [row(0), row(1, (0.3, 0.1 + 0.2, 0.3)), row(2)]
    samples = samples_from_rows(rows, prompt_ids_of, PPOSettings(credit="arm"))
    assert [sample.id for sample in samples] == [f"train-{n}/arm{i}" for n in (0, 2) for i in range(3)]
    assert [sample.reward for sample in samples[:3]] == [1.0, -0.5, 0.2]
    assert [sample.advantage for sample in samples[:3]] == pytest.approx([1.15, -1.1, -0.05])
    assert [earns_alike(each) for each in rows] == [False, True, False]


@pytest.mark.parametrize("change, words", [
    ({"logprobs": [-0.1]}, ["train-7/arm0", "2 token_ids", "1 logprobs"]),
    ({"token_ids": [], "logprobs": []}, ["train-7/arm0", "0 token_ids"]),
    ({"logprobs": [-0.1, float("-inf")]}, ["train-7/arm0", "not finite"]),
    ({"advantage": float("nan")}, ["train-7/arm0", "not finite"]),
    ({"advantage": None}, ["train-7, arm_outputs[0]", "'advantage'", "float"]),
    ({"logprobs": "none"}, ["train-7, arm_outputs[0]", "'logprobs'", "list"]),
])
def test_a_response_that_cannot_be_trained_on_is_named(change, words):
    broken = row(7)
    broken["arm_outputs"][0] |= change
    with pytest.raises(ValueError) as error:
        samples_from_rows([row(1), broken], prompt_ids_of, PPOSettings(credit="arm"))
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("rows, credit", [([], "question"), ([row(0, (1.0, 1.0))], "arm")])
def test_no_sample_at_all_is_an_error(rows, credit):
    with pytest.raises(ValueError, match="no sample to train on"):
        samples_from_rows(rows, prompt_ids_of, PPOSettings(credit=credit))


# ---- plan ----


def test_plan_takes_every_sample_once_an_inner_epoch_and_drops_none():
    settings = PPOSettings(batch_size=4, mini_batch_size=2, ppo_epochs=3, epochs=2)
    plan = plan_steps(11, settings)  # batches of 4, 4, 3; the last has mini-batches of 2 and 1
    assert len(plan) == 2 * 3 * (2 + 2 + 2)
    assert Counter(step.batch[place] for step in plan for place in step.rows) == {i: 6 for i in range(11)}
    assert [step.number for step in plan] == sorted([*range(6)] * 6)
    for number in range(6):
        steps = [step for step in plan if step.number == number]
        assert len({step.batch for step in steps}) == 1
        assert [step.first for step in steps] == [True] + [False] * 5
        assert [step.last for step in steps] == [False] * 5 + [True]
        for inner in range(3):
            rows = [place for step in steps[2 * inner:2 * inner + 2] for place in step.rows]
            assert sorted(rows) == list(range(len(steps[0].batch)))
            if inner == 0:
                assert rows == sorted(rows)  # the batch's own order, in which the old log-probabilities are computed
    assert plan[0].batch != plan[18].batch  # another order in the second epoch


def test_plan_comes_from_the_seed_alone():
    torch.manual_seed(1)
    plan = plan_steps(20, PPOSettings(seed=3))
    torch.manual_seed(2)
    assert plan_steps(20, PPOSettings(seed=3)) == plan
    assert plan_steps(20, PPOSettings(seed=4)) != plan


# ---- tensors ----


def test_collate_by_hand():
    def sample(prompt, response):
        return PPOSample("q/a", prompt, response, [0.0] * len(response), 0.0, None, {})

    tokens = collate([sample([5, 6], [7, 8, 9]), sample([4, 3, 2], [1])], torch.device("cpu"))
    assert tokens.input_ids.tolist() == [[5, 6, 7, 8, 9, 4, 3, 2, 1]]
    assert tokens.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert tokens.rows.lengths == [5, 4] and tokens.rows.starts.tolist() == [0, 5, 9]
    assert tokens.mask.tolist() == [[True, True, True], [True, False, False]]
    assert tokens.targets.tolist() == [7, 8, 9, 1]
    assert tokens.sources.tolist() == [1, 2, 3, 7]  # the place before each response token


# ---- settings ----


def test_platinum_values_are_the_defaults():
    settings = PPOSettings()
    assert (settings.learning_rate, settings.batch_size, settings.mini_batch_size) == (5e-6, 8, 4)
    assert (settings.kl.target, settings.max_grad_norm, settings.credit) == (0.1, 1.0, "question")
    assert (settings.gamma, settings.lam) == (1.0, 0.95)


@pytest.mark.parametrize("change", [
    {"credit": "arms"}, {"learning_rate": 0.0}, {"batch_size": 0}, {"batch_size": 6}, {"mini_batch_size": -1},
    {"ppo_epochs": 0}, {"epochs": 0}, {"max_grad_norm": 0.0}, {"clip_low": 1.0}, {"clip_high": 0.0},
    {"value_clip": 0.0}, {"value_coef": -0.1}, {"gamma": 1.1}, {"lam": -0.1}, {"off_policy": "is"},
    {"importance_cap": 0.0}, {"save_steps": 0}, {"seed": -1}])
def test_impossible_settings_name_their_key(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        PPOSettings(**change)


@pytest.mark.parametrize("change", [{"initial": -1.0}, {"target": 0.0}, {"horizon": 0.0}, {"stop_multiple": 1.0}])
def test_impossible_kl_settings_name_their_key(change):
    with pytest.raises(ValueError, match=f"kl.{next(iter(change))}"):
        KLSettings(**change)
