"""Scoring: Regime W's rows a second, on random rollouts in memory. There is no plain way to compare with."""

from bench.measure import Side, Stage, timed
from regime_w.sample_rows import random_rows
from regime_w.score import score_rows


def stage(rows: int) -> Stage:
    made = list(random_rows(rows))

    def work() -> int:
        scored, metrics = score_rows(made)
        count = sum(1 for _ in scored)
        metrics.metrics()
        return count

    return Stage("score", [Side("regime_w", lambda: timed(work))], unit="rows")
