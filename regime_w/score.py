"""Scoring of rollouts: one row after another, in constant memory. Schema of the rows: regime_w/README.md."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from regime_w.answer_set import AnswerSet
from regime_w.metrics import ScoreMetrics
from regime_w.reward import advantages, arm_reward_parts, regime_w_reward_parts, total
from regime_w.rows import check_row, encode, map_rows, write_lines
from regime_w.scoring import s_wm
from regime_w.settings import ScoreSettings


def score_file(source: Path, target: Path, settings: ScoreSettings = ScoreSettings()) -> dict[str, Any]:
    """Scores the rollouts file `source` into `target`, whole or not at all, and returns the metrics.

    Raises ValueError with file, line number and field if a row is broken, and if there is no row.
    """
    metrics = ScoreMetrics(settings)

    def scored(row: Any) -> bytes:
        check_row(row)
        result, arms = _score(row, settings)
        metrics.add(result, arms)
        return encode(result)

    write_lines(target, map_rows(source, scored))
    return metrics.metrics()


def score_rows(rows: Iterable[dict], settings: ScoreSettings = ScoreSettings()) -> tuple[Iterator[dict], ScoreMetrics]:
    """(scored rows, metrics): rows are scored as the iterator is consumed, and only then stand in the metrics."""
    metrics = ScoreMetrics(settings)

    def scored() -> Iterator[dict]:
        for row in rows:
            check_row(row)
            result, arms = _score(row, settings)
            metrics.add(result, arms)
            yield result

    return scored(), metrics


def score_row(row: dict, settings: ScoreSettings = ScoreSettings()) -> dict:
    """A rollouts row with its components, reward and per-arm rewards; what else it holds passes through.

    Raises ValueError that names the field if the row is broken.
    """
    check_row(row)
    return _score(row, settings)[0]


def _score(row: dict, settings: ScoreSettings) -> tuple[dict, AnswerSet]:
    arms = AnswerSet.of(row)
    end, path, cf = arms.components(settings)
    coherence = s_wm(end, path, cf, settings)
    contributions = [coherence - rest for rest in arms.s_wm_without_each(settings)]
    parts = regime_w_reward_parts(arms.correct, coherence, arms.lengths, settings)
    arm_parts = arm_reward_parts(arms.correct, contributions, arms.lengths, settings)
    rewards = [total(each) for each in arm_parts]
    outputs = [
        dict(output, correct=correct, reward=reward, reward_parts=each, advantage=advantage)
        for output, correct, reward, each, advantage
        in zip(row["arm_outputs"], arms.correct, rewards, arm_parts, advantages(rewards), strict=True)
    ]
    scored = {"reward": total(parts), "s_end": end, "s_path": path, "s_cf": cf, "s_wm": coherence,
              "reward_parts": parts, "arm_outputs": outputs, "counterfactual": row["counterfactual"]}
    head = {key: value for key, value in row.items() if key not in scored}  # what is scored comes last, in our order
    return head | scored, arms
