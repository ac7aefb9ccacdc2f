"""The report's block on bandits, from scored rollouts."""

import pytest

from looper.report_regime_w import bandit_block, regime_w_blocks, rollout_blocks
from regime_w.bandit import replay
from regime_w.score import score_rows
from regime_w.settings import ScoreSettings


def rollouts(*patterns: str, arms: str = "abcd") -> list[dict]:
    """One scored row a pattern: '1000' is right by the first arm alone."""
    return [{"reward": 1.0, "arm_outputs": [
        {"name": name, "correct": right == "1", "advantage": 0.0, "token_ids": [1]}
        for name, right in zip(arms, pattern, strict=True)]} for pattern in patterns]


@pytest.mark.slow
def test_a_bandit_finds_the_one_good_arm():
    rows = rollouts(*["0010"] * 200)
    block = bandit_block(rows)
    report = replay(rows)
    # uniform: a quarter of 200 right, 150 short of the arm that is always right; noise 2·√(200·¼·¾) = 12.2
    cells = [["Uniform", "25.0%", "150.0"],
             *([label, f"{100 * report[key]['accuracy']:.1f}%", f"{report[key]['regret']:.1f}"]
               for label, key in (("Thompson sampling", "thompson"), ("UCB1", "ucb1"))),
             ["Best single arm (c)", "100.0%", "0.0"]]
    for first, *others in cells:
        assert f'<th scope="row">{first}</th>{"".join(f"<td>{text}</td>" for text in others)}' in block.body
    assert "Had one arm answered each of the 200 questions" in block.sentence and "c with 100.0%" in block.sentence
    assert f"Thompson sampling earns {report['thompson']['gain_over_uniform']:+.1f} right answers" in block.sentence
    assert f"UCB1 {report['ucb1']['gain_over_uniform']:+.1f} (20% of their choices" in block.sentence
    assert "two standard errors of one uniform run are 12.2." in block.sentence
    assert "earns more than that noise" in block.sentence and report["thompson"]["gain_over_uniform"] > 60


def test_a_gain_within_the_noise_is_not_claimed():
    block = bandit_block(rollouts(*["0100", "1011", "0101", "1010"] * 5))  # every arm right on half: nothing to learn
    assert "earns no more than that noise" in block.sentence and "<td>50.0%</td>" in block.body


def test_the_replay_needs_every_arm_in_every_row():
    full = rollouts("10", "01", arms="ab")
    credit, (block,) = rollout_blocks(iter(full))
    assert credit.title == "Question credit and arm credit" and block.title == "Arms as bandits"
    assert rollout_blocks(full + rollouts("10", arms="ac"))[1] == []  # as Thompson sampling leaves them
    with pytest.raises(ValueError, match="no arm's answer; rerun the stages rollouts and score"):
        rollout_blocks([])


def test_every_figure_of_an_arm_and_of_a_component_is_said_in_words():
    answers = {"a": ("7", 100), "b": ("7", 300), "c": ("8", 200)}
    row = {"id": "x", "gold_answer": "7", "counterfactual": None, "arm_outputs": [
        {"name": name, "style": "wolfram", "answer": answer, "num_tokens": tokens}
        for name, (answer, tokens) in answers.items()]}
    scored, metrics = score_rows([row], ScoreSettings(resamples=100))
    assert len(list(scored)) == 1
    blocks = {block.title: block.sentence for block in regime_w_blocks(metrics.metrics())}
    assert "a gives the most frequent answer most (100.0%), c least (0.0%): an arm" in blocks["Each arm"]
    assert "b writes most (300 tokens an answer), a least (100 tokens an answer)." in blocks["Each arm"]
    # s_end 1 of 3 pairs; s_path 600² / (3 · 140,000); s_cf the placeholder; s_wm 0.4/3 + 0.3·6/7 + 0.15
    assert ("33.3% of the pairs of arms agree (s_end); the lengths give an s_path of 0.86, where" in
            blocks["Reward and components"])
    assert "s_cf is 0.50, and s_wm, the weighted sum of the three, 0.54." in blocks["Reward and components"]
