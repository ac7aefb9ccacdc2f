"""Regime W on your own samples.

python -m regime_w score IN.jsonl OUT.jsonl    scores a rollouts file (schema: regime_w/README.md), prints a summary;
                                               score --json prints all metrics instead
python -m regime_w replay SCORED.jsonl         replays arm allocations (bandits) on a scored file
python -m regime_w bench [N]                   scores N random questions (100,000) and prints seconds and peak memory
python -m regime_w counterfactuals GSM8K.jsonl prints the share of questions that get one
python -m regime_w.demo [FILE]                 explains worked questions, or a file's, number by number
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

ARGUMENTS = {  # of each command, for what `misuse` says
    "score": "IN.jsonl and OUT.jsonl, and --json if wanted", "replay": "SCORED.jsonl",
    "bench": "at most N, an integer above 0", "counterfactuals": "GSM8K.jsonl",
}


def main(arguments: list[str]) -> int:
    """The exit status: 0, or 2 after an error, said in one line (before the usage, if the command line is wrong)."""
    match arguments:
        case [*_, "-h" | "--help"]:
            print(__doc__)
            return 0
        case ["score", "--json", source, target] | ["score", source, target, "--json"]:
            run = lambda: as_json(score_file(Path(source), Path(target)))  # noqa: E731
        case ["score", source, target] if "--json" not in (source, target):
            run = lambda: summary(score_file(Path(source), Path(target)), target)  # noqa: E731
        case ["replay", source]:
            run = lambda: as_json(replay(map_rows(Path(source), check_scored)))  # noqa: E731
        case ["bench"]:
            run = lambda: as_json(bench(100_000))  # noqa: E731
        case ["bench", count] if count.isdecimal() and int(count):
            run = lambda: as_json(bench(int(count)))  # noqa: E731
        case ["counterfactuals", source]:
            run = lambda: as_json(counterfactual_share(Path(source)))  # noqa: E731
        case _:
            print(f"{misuse(arguments)}\n\n{__doc__}", file=sys.stderr)
            return 2
    sys.stdout.reconfigure(errors="replace")  # a terminal need not have every character of a file's name
    try:
        print(run())
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def misuse(arguments: list[str]) -> str:
    """What is wrong with a command line that `main` cannot read."""
    if not arguments:
        return f"a command is missing; name one of {', '.join(ARGUMENTS)}"
    command, *given = arguments
    if command not in ARGUMENTS:
        return f"unknown command '{command}'; name one of {', '.join(ARGUMENTS)}"
    return f"{command} takes {ARGUMENTS[command]}, found {' '.join(given) or 'nothing'}"


def as_json(figures: Any) -> str:
    return json.dumps(figures, indent=2)


def summary(metrics: dict[str, Any], target: str) -> str:
    """The chief metrics as a few lines."""
    accuracy, parts = metrics["accuracy"], ("s_end", "s_path", "s_cf", "s_wm")
    changed = metrics["counterfactual"]
    gap = "no question has one" if changed["gap"] is None else (
        f"gap {100 * changed['gap']:+z.1f} points: {changed['accuracy_original']:.1%} right on q, "
        f"{changed['accuracy_changed']:.1%} on q' ({changed['share']:.1%} of questions have one)")
    return "\n".join((
        f"questions       {metrics['questions']:,}",
        f"accuracy        mean {accuracy['mean']:.1%}, any arm {accuracy['any']:.1%}, "
        f"majority {accuracy['majority']:.1%}",
        f"mean reward     {metrics['reward']['mean']:.3f}",
        "mean components " + ", ".join(f"{name} {metrics[name]['mean']:.3f}" for name in parts),
        f"counterfactual  {gap}",
        f"scored file     {target}"))


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
