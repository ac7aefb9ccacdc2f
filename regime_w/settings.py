"""The settings of scoring: `params.yaml`'s section `score`. Standard library only: reading params stays fast."""

from dataclasses import dataclass
from typing import Literal, get_args

CF = Literal["counterfactual", "placeholder", "chsh"]


@dataclass(frozen=True)
class ScoreSettings:
    """Regime W's weights and choices; the defaults are the definition (regime_w/README.md, The scores).

    Lengths are in tokens.
    cf: where s_cf comes from; `cf_placeholder` is its value under `placeholder`, and for a question without one.
    path_within_style: s_path as the mean over the styles, which are designed to differ in length.
    weight_end, weight_path, weight_cf: of the components in s_wm.
    reward_correct, reward_wrong: paid if any arm is right, and if none is (per arm: if that arm is right, and if not).
    coherence_weight: of s_wm in the reward.
    length_penalty, free_length: what each token beyond the free ones costs.
    resamples, seed: draws of the bootstrap, of the permutation null and of the posteriors in the metrics.
    """

    cf: CF = "counterfactual"
    cf_placeholder: float = 0.5
    path_within_style: bool = False
    weight_end: float = 0.4
    weight_path: float = 0.3
    weight_cf: float = 0.3
    reward_correct: float = 1.0
    reward_wrong: float = -0.5
    coherence_weight: float = 0.7
    length_penalty: float = 0.001
    free_length: int = 400
    resamples: int = 1000
    seed: int = 0

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}  # how pydantic reads this class

    def __post_init__(self) -> None:
        weights = {"weight_end": self.weight_end, "weight_path": self.weight_path, "weight_cf": self.weight_cf}
        not_negative = ("coherence_weight", "length_penalty", "free_length", "seed")
        problems = [text for holds, text in (
            (self.cf in get_args(CF), f"cf must be one of {', '.join(get_args(CF))}, found {self.cf!r}"),
            (0 <= self.cf_placeholder <= 1, f"cf_placeholder must lie in [0, 1], found {self.cf_placeholder}"),
            *((value >= 0, f"{name} must be 0 or more, found {value}") for name, value in weights.items()),
            (any(weights.values()), f"one of {', '.join(weights)} must be above 0, found all 0"),
            (self.reward_correct > self.reward_wrong,
             f"reward_correct must be above reward_wrong, found {self.reward_correct} and {self.reward_wrong}"),
            *((getattr(self, name) >= 0, f"{name} must be 0 or more, found {getattr(self, name)}")
              for name in not_negative),
            (self.resamples >= 100, f"resamples must be 100 or more for a 95% interval, found {self.resamples}"),
        ) if not holds]
        if problems:
            raise ValueError("\n".join(problems))
