import pytest
from hypothesis import given
from hypothesis import strategies as st

from regime_w.reward import (advantages, arm_reward_parts, carry_no_signal, regime_w_reward, regime_w_reward_parts,
    total)
from regime_w.settings import ScoreSettings


@pytest.mark.parametrize(("correct", "s_wm", "lengths", "reward"), [
    ([True, False], 0.5, [100, 300], 1 + 0.35),
    ([False, False], 0.5, [100, 300], -0.5 + 0.35),
    ([False, True], 0.0, [400, 400], 1.0),  # 400 tokens are free
    ([True], 1.0, [401], 1 + 0.7 - 0.001),
    ([False] * 2, 1.0, [300, 900], -0.5 + 0.7 - 0.2),  # by the mean length, 600
    ([False] * 2, 0.0, [0, 2048], -0.5 - 0.624),
    ([True] * 2, 0.0, [401, 402], 1 - 0.0015),
])
def test_group_reward_by_hand(correct: list, s_wm: float, lengths: list, reward: float) -> None:
    assert regime_w_reward(correct, s_wm, lengths) == pytest.approx(reward, abs=1e-12)


def test_group_reward_uses_every_setting() -> None:
    settings = ScoreSettings(reward_correct=2.0, reward_wrong=-3.0, coherence_weight=0.5, length_penalty=0.1,
        free_length=10)
    assert regime_w_reward_parts([True], 0.5, [12], settings) == pytest.approx(
        {"correctness": 2.0, "coherence": 0.25, "length": -0.2}, abs=1e-12)
    assert regime_w_reward([False], 0.5, [12], settings) == pytest.approx(-3 + 0.25 - 0.2, abs=1e-12)
    assert arm_reward_parts([False], [0.5], [12], settings) == [pytest.approx(
        {"correctness": -3.0, "coherence": 0.0, "length": -0.2}, abs=1e-12)]


def test_the_parts_are_named_and_no_length_costs_nothing() -> None:
    parts = regime_w_reward_parts([True], 0.5, [100])
    assert parts == {"correctness": 1.0, "coherence": 0.35, "length": 0.0}
    assert str(parts["length"]) == "0.0"  # not -0.0 in a file


def test_a_reward_needs_an_arm() -> None:
    with pytest.raises(ValueError, match="at least one arm, found none"):
        regime_w_reward([], 0.5, [])


def test_arm_rewards_by_hand() -> None:
    parts = arm_reward_parts([True, False], [0.1, 0.2], [500, 100])
    assert parts == [pytest.approx({"correctness": 1.0, "coherence": 0.07, "length": -0.1}, abs=1e-12),
                     {"correctness": -0.5, "coherence": 0.0, "length": 0.0}]  # a wrong arm is not paid for coherence
    assert [total(each) for each in parts] == pytest.approx([0.97, -0.5], abs=1e-12)


def test_a_missing_entry_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        arm_reward_parts([True, False], [0.1], [1, 1])


def test_advantages_by_hand() -> None:
    assert advantages([1.0, -0.5, -0.5]) == pytest.approx([1.5, -0.75, -0.75], abs=1e-12)
    assert advantages([1.0, 0.0]) == [1.0, -1.0]
    assert advantages([0.7]) == [0.0]
    assert advantages([]) == []
    assert advantages([0.3, 0.3, 0.3]) == [0.0, 0.0, 0.0]
    assert advantages([0.1 + 0.2, 0.3]) == [0.0, 0.0]  # rounding makes no signal


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=9))
def test_advantages_sum_to_zero_and_follow_the_rewards(rewards: list) -> None:
    found = advantages(rewards)
    assert sum(found) == pytest.approx(0, abs=1e-9)
    k = len(rewards)
    mean = sum(rewards) / k
    if not carry_no_signal(rewards):
        assert found == pytest.approx([(r - mean) * k / (k - 1) for r in rewards], abs=1e-9)


def test_signal() -> None:
    assert carry_no_signal([]) is True
    assert carry_no_signal([1.0, 1.0])
    assert carry_no_signal([1.0, 1.0 + 9e-13])
    assert not carry_no_signal([1.0, 1.0 + 3e-12])
    assert not carry_no_signal([1.0, 1.0, 0.0])


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3000)), min_size=1, max_size=9), st.floats(0, 1))
def test_parts_add_up_to_the_reward(arms: list, s_wm: float) -> None:
    correct, lengths = [each[0] for each in arms], [each[1] for each in arms]
    parts = regime_w_reward_parts(correct, s_wm, lengths)
    assert regime_w_reward(correct, s_wm, lengths) == sum(parts.values())
    assert regime_w_reward([True, *correct[1:]], s_wm, lengths) >= regime_w_reward(correct, s_wm, lengths)
