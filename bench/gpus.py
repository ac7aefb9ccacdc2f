"""This repository on N GPUs against one, in one run: the same rows, weights and batch, as a ratio of tokens/s.

    python -m bench.gpus 2 --stage sft,rollouts --model 8b-shape

Four runs of `python -m bench`, one after the other in the order 1, N, N, 1, so that a drift of the machine falls on both
sides alike. Each loads and compiles anew and reports the median of its three passes; a side's rate is the mean of its two
medians. On the processor, N processes that share it. If a run fails, its exit status is this one's. Speed alone is compared:
that N processes make what one makes is what tests/looper/test_distributed.py tests.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from bench.__main__ import add_common, aligned, device, positive

STAGES = ("sft", "rollouts", "ppo", "eval")  # those whose work several processes divide
# Plain processes on this host and any free port, whatever accelerate's configuration says; without GPUs too
LAUNCH = ("-m", "accelerate.commands.launch", "--multi_gpu", "--gpu_ids", "all", "--num_machines", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    plan, runs = [1, options.processes, options.processes, 1], []
    with TemporaryDirectory() as folder, tqdm(plan, desc="gpus", unit="run") as bar:
        for i, processes in enumerate(bar):
            bar.set_postfix_str(f"{processes} process{'es' if processes > 1 else ''}")
            file = Path(folder) / f"{i}.json"
            # Its table says again what stands in the file; its bars and errors are for the user
            status = subprocess.run(command(options, processes, file), stdout=subprocess.DEVNULL).returncode
            if status:
                return status if status > 0 else 128 - status  # as a shell says that a signal ended it
            runs.append(json.loads(file.read_text(encoding="utf-8")))
    try:
        stages = compare(runs)
    except ValueError as error:
        print(f"bench.gpus: {error}", file=sys.stderr)
        return 1
    print(table(stages), flush=True)
    if options.json:
        content = {"machine": runs[0]["machine"], "model": options.model, "batch": options.batch, "stages": stages}
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench.gpus", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("processes", type=positive, metavar="N", help="GPUs, one process each; at least 2")
    add_common(parser, STAGES)
    options = parser.parse_args(arguments)
    options.device = device(options.device)
    if options.processes < 2:
        parser.error("1 process is what N are compared with; give 2 or more")
    if options.device == "cuda":
        import torch

        if options.processes > torch.cuda.device_count():
            parser.error(f"{options.processes} processes need as many GPUs, and this host has {torch.cuda.device_count()}; "
                         "give a smaller N")
    return options


def command(options: argparse.Namespace, processes: int, file: Path) -> list[str]:
    """The command line of one run, which writes its figures into `file`."""
    launch = ["-m", "bench"] if processes == 1 else [*LAUNCH, "--num_processes", str(processes), "--module", "bench"]
    rows = ["--rows", str(options.rows)] if options.rows else []
    return [sys.executable, *launch, "--against", "none", "--stage", ",".join(options.stage), "--model", options.model,
            "--device", options.device, "--batch", str(options.batch), *rows, "--json", str(file)]


def compare(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each stage's two sides, one process and N, from what the four runs wrote, in their order.

    Raises ValueError if the runs of a stage did not do the same work.
    """
    stages = []
    for figures in zip(*(run["stages"] for run in runs), strict=True):
        name, unit = figures[0]["stage"], figures[0]["unit"]
        alone, together, again, last = (stage["sides"][0] | {"processes": run["processes"]}
                                        for stage, run in zip(figures, runs, strict=True))
        counts = [each["tokens"] for each in (alone, together, again, last)]
        if len(set(counts)) > 1:
            raise ValueError(f"{name}: the four runs counted {', '.join(map(str, counts))} {unit}; they must do the same "
                             "work: leave params.yaml and the code as they are while the bench runs")
        one, several = _side(alone, last), _side(together, again)
        stages.append({"stage": name, "unit": unit, "ratio": several["rate"] / one["rate"], "sides": [one, several]})
    return stages


def _side(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    return {"processes": first["processes"], "tokens": first["tokens"], "rate": mean((first["rate"], second["rate"])),
            "runs": [first, second]}


def table(stages: Sequence[dict[str, Any]]) -> str:
    """One line a side: the medians of both runs, their mean, and N's ratio to one process."""
    lines = [["stage", "processes", "tokens", "first run, tokens/s", "second run", "mean", "ratio"]]
    for stage in stages:
        for side in stage["sides"]:
            ratio = f"{stage['ratio']:.2f}x" if side is stage["sides"][1] else ""
            lines.append([stage["stage"], str(side["processes"]), f"{side['tokens']:,}",
                          *(f"{run['rate']:,.0f}" for run in side["runs"]), f"{side['rate']:,.0f}", ratio])
    return f"\n{aligned(lines)}\n"


if __name__ == "__main__":
    sys.exit(main())
