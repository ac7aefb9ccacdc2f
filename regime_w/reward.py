"""Rewards: one for all arms of a question, or one an arm with its leave-one-out advantage.

Each comes as parts that add up to it, to be stored beside the total. Formulas: regime_w/README.md, The scores.
"""

from collections.abc import Sequence

from regime_w.settings import ScoreSettings

Parts = dict[str, float]  # correctness, coherence, length


def regime_w_reward(correct: Sequence[bool], s_wm: float, lengths: Sequence[int],
                    settings: ScoreSettings = ScoreSettings()) -> float:
    """R = (+1.0 if any arm is right, else −0.5) + 0.7·s_wm − 0.001·max(0, mean length − 400)."""
    return total(regime_w_reward_parts(correct, s_wm, lengths, settings))


def regime_w_reward_parts(correct: Sequence[bool], s_wm: float, lengths: Sequence[int],
                          settings: ScoreSettings = ScoreSettings()) -> Parts:
    """The parts of R. Raises ValueError if there is no arm."""
    if not lengths:
        raise ValueError("a reward needs at least one arm, found none")
    return _parts(any(correct), s_wm, sum(lengths) / len(lengths), settings)


def arm_reward_parts(correct: Sequence[bool], contributions: Sequence[float], lengths: Sequence[int],
                     settings: ScoreSettings = ScoreSettings()) -> list[Parts]:
    """The parts of each rᵢ = (+1.0 if arm i is right, else −0.5) + 0.7·cᵢ·contribution − 0.001·max(0, ℓᵢ − 400).

    contributions: s_wm − s_wm without arm i. Only a right arm is paid for what it adds to coherence (cᵢ = 1).
    """
    return [_parts(right, contribution if right else 0.0, length, settings)
            for right, contribution, length in zip(correct, contributions, lengths, strict=True)]


def advantages(rewards: Sequence[float]) -> list[float]:
    """Aᵢ = rᵢ − mean of the other arms' rewards (leave one out); they sum to 0. A single arm has no advantage: 0."""
    if carry_no_signal(rewards):
        return [0.0] * len(rewards)
    whole, others = sum(rewards), len(rewards) - 1
    return [reward - (whole - reward) / others for reward in rewards]


def carry_no_signal(rewards: Sequence[float]) -> bool:
    """Whether all arms earn the same, so that no arm is better than another: counted, not trained on."""
    return not rewards or max(rewards) - min(rewards) < 1e-12  # rounding must not make a signal


def total(parts: Parts) -> float:
    """What the parts add up to, in their order."""
    return sum(parts.values())


def _parts(right: bool, coherence: float, length: float, settings: ScoreSettings) -> Parts:
    return {
        "correctness": settings.reward_correct if right else settings.reward_wrong,
        "coherence": settings.coherence_weight * coherence,
        "length": settings.length_penalty * (settings.free_length - length) if length > settings.free_length else 0.0,
    }
