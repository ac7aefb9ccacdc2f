"""Regime W on your own samples.

python -m regime_w score IN.jsonl OUT.jsonl    scores a rollouts file (schema: regime_w/README.md), prints the metrics
python -m regime_w replay SCORED.jsonl         replays arm allocations (bandits) on a scored file
python -m regime_w bench [N]                   scores N random questions (100,000) and prints seconds and peak memory
python -m regime_w counterfactuals GSM8K.jsonl prints the share of questions that get one
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from regime_w.bandit import replay
from regime_w.counterfactual import make_counterfactual
from regime_w.rows import check_problem, check_scored, encode, map_rows, write_lines
from regime_w.sample_rows import random_rows
from regime_w.score import score_file


def main(arguments: list[str]) -> int:
    """The exit status: 0, or 2 after an error, said in one line."""
    match arguments:
        case ["-h" | "--help"]:
            print(__doc__)
            return 0
        case ["score", source, target]:
            run = lambda: score_file(Path(source), Path(target))  # noqa: E731
        case ["replay", source]:
            run = lambda: replay(map_rows(Path(source), check_scored))  # noqa: E731
        case ["bench"]:
            run = lambda: bench(100_000)  # noqa: E731
        case ["bench", count] if count.isdecimal() and int(count):
            run = lambda: bench(int(count))  # noqa: E731
        case ["counterfactuals", source]:
            run = lambda: counterfactual_share(Path(source))  # noqa: E731
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    try:
        print(json.dumps(run(), indent=2))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def bench(count: int) -> dict[str, float]:
    """Seconds and peak memory (MiB) of scoring a file of `count` random questions, eight arms each."""
    import resource

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "in.jsonl")
        write_lines(source, map(encode, random_rows(count)))
        started = time.process_time()
        score_file(source, Path(folder, "out.jsonl"))
        seconds = time.process_time() - started
    return {"questions": count, "seconds": round(seconds, 2),
            "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)}


def counterfactual_share(source: Path) -> dict[str, float]:
    """How many questions of a GSM8K file get a counterfactual (seed 0)."""
    def gets_one(row: Any) -> bool:
        check_problem(row)
        return make_counterfactual(row["question"], row["answer"], 0) is not None

    made = list(map_rows(source, gets_one))
    return {"questions": len(made), "counterfactuals": sum(made), "share": round(sum(made) / len(made), 4)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
