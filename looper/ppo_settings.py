"""The settings of offline PPO: `params.yaml`'s section `ppo`. Standard library only: reading params stays fast."""

from dataclasses import dataclass, field
from typing import Literal

# How pydantic reads these dataclasses as a section of params.yaml: unknown keys and other types are errors.
_PYDANTIC = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


def _require(*conditions: tuple[bool, str]) -> None:
    """Raises ValueError with the text of each condition that does not hold, one a line."""
    problems = [text for holds, text in conditions if not holds]
    if problems:
        raise ValueError("\n".join(problems))


@dataclass(frozen=True)
class KLSettings:
    """How the policy is held near the reference, the policy that the round starts from.

    KL is in nats a sequence (summed over its tokens).

    initial: the first β, the penalty's weight.
    target: the KL that the controller steers to, and that `stop_multiple` multiplies.
    horizon: samples over which β can change by e: β ← β·(1 + e·n/horizon), n samples a batch, |e| ≤ 0.2; null holds β.
    stop_multiple: training stops when the KL exceeds this multiple of the target; null never stops.
    """

    initial: float = 0.05
    target: float = 0.1
    horizon: float | None = 50.0
    stop_multiple: float | None = None

    __pydantic_config__ = _PYDANTIC

    def __post_init__(self) -> None:
        _require(
            (self.initial >= 0, f"kl.initial must be 0 (no penalty) or more, found {self.initial}"),
            (self.target > 0, f"kl.target must be positive (nats a sequence), found {self.target}"),
            (self.horizon is None or self.horizon > 0,
             f"kl.horizon must be positive (samples), or null for a fixed beta, found {self.horizon}"),
            (self.stop_multiple is None or self.stop_multiple > 1,
             f"kl.stop_multiple must be above 1 (or null: never stop), found {self.stop_multiple}"))


@dataclass(frozen=True)
class PPOSettings:
    """What `looper.ppo.train_ppo` trains with. Defaults are those of the platinum profile.

    credit: `question` = one arm a question, drawn with `seed`, paid the group's reward R through critic and GAE;
        `arm` = every arm, with its leave-one-out advantage on each of its tokens, no critic.
    batch_size, mini_batch_size: samples a PPO batch (old log-probabilities, whitening, β) and an optimiser step.
    ppo_epochs, epochs: passes over each batch, and over all the stored rollouts.
    clip_low, clip_high: the ratio is clipped to [1 − clip_low, 1 + clip_high].
    value_clip, value_coef: range of the clipped value loss, and its weight.
    off_policy: `truncated_is` weighs each token by min(π_old/μ, importance_cap), μ being what generated it.
    save_steps: a checkpoint every so many PPO batches.
    """

    credit: Literal["question", "arm"] = "question"
    learning_rate: float = 5e-6
    batch_size: int = 8
    mini_batch_size: int = 4
    ppo_epochs: int = 4
    epochs: int = 1
    max_grad_norm: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    value_clip: float = 0.2
    value_coef: float = 0.1
    gamma: float = 1.0
    lam: float = 0.95
    kl: KLSettings = field(default_factory=KLSettings)
    off_policy: Literal["none", "truncated_is"] = "none"
    importance_cap: float = 2.0
    gradient_checkpointing: bool = False
    save_steps: int = 10
    seed: int = 0

    __pydantic_config__ = _PYDANTIC

    def __post_init__(self) -> None:
        positive = ("learning_rate", "batch_size", "mini_batch_size", "ppo_epochs", "epochs", "max_grad_norm",
                    "clip_high", "value_clip", "importance_cap", "save_steps")
        _require(
            *((getattr(self, name) > 0, f"{name} must be positive, found {getattr(self, name)}") for name in positive),
            (self.mini_batch_size <= 0 or self.batch_size % self.mini_batch_size == 0,
             f"batch_size {self.batch_size} must be a multiple of mini_batch_size {self.mini_batch_size}"),
            (0 < self.clip_low < 1, f"clip_low must lie between 0 and 1, as a ratio does, found {self.clip_low}"),
            (self.value_coef >= 0, f"value_coef must be 0 or more, found {self.value_coef}"),
            *((0 <= getattr(self, name) <= 1, f"{name} must lie in [0, 1], found {getattr(self, name)}")
              for name in ("gamma", "lam")),
            (self.credit in ("question", "arm"), f"credit must be question or arm, found {self.credit!r}"),
            (self.off_policy in ("none", "truncated_is"),
             f"off_policy must be none or truncated_is, found {self.off_policy!r}"),
            (self.seed >= 0, f"seed must be 0 or more, found {self.seed}"))
