"""This repository against the plain way: the same process, weights, token ids and seeds, passes in the order A B B A.

B1 is what the libraries' documentation shows, B2 the best plain setting of the same libraries; `--without` adds this
repository with one of its speedups switched off. A ratio is printed only if the stage's gates hold, which compare the
results; if one fails the exit status is 1.

Started by a launcher as several processes, they do each stage's work together, and the first one reports; `bench.gpus`
compares that with one process. The plain way is one process: there is no ratio to it then.
"""

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.measure import Gate, Measured, Stage, measure
from bench.without import SPEEDUPS
from looper.base_model import MANIFEST
from looper.distributed import barrier, first_process_only, rank, start_processes, world
from looper.params import load_params
from looper.stage import HEAD_START, leave, set_up_libraries

if TYPE_CHECKING:
    from bench.workload import Setup

STAGES = ("sft", "rollouts", "ppo", "eval", "score")
RANDOM_8B = "8b-shape"
FOLDER_8B = Path(".scratch/8b-shape")
ROWS = {"cuda": {"sft": 256, "rollouts": 1024, "ppo": 64, "eval": 1319, "score": 20_000},
        "cpu": {"sft": 24, "rollouts": 256, "ppo": 16, "eval": 128, "score": 20_000}}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    set_up_libraries()
    try:
        if "LOCAL_RANK" in os.environ:  # else start_processes might start several: a bench alone is one process
            join(options)
        setup = prepare(options) if options.stage != ["score"] else None
    except ValueError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(HEAD_START)  # all may meet the same error: the first process says it, and its end ends the others
        print(f"bench: {error}", file=sys.stderr, flush=True)
        return 2
    reports = [report(build(name, setup, options)) for name in options.stage]
    processes = world()
    first_process_only()
    if options.json:
        content = {"machine": machine(setup), "processes": processes, "model": options.model, "batch": options.batch,
                   "stages": reports}
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0 if all(each["gates_hold"] for each in reports) else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    add_common(parser, STAGES)
    parser.add_argument("--against", type=lambda text: [] if text == "none" else one_of(("b1", "b2"))(text),
                        default=["b1", "b2"], help="b1, b2 or both, or none")
    parser.add_argument("--without", type=one_of(tuple(SPEEDUPS)), default=[],
                        help=f"some of {','.join(SPEEDUPS)}: a side without each, in the stages that have it")
    return parser.parse_args(arguments)


def add_common(parser: argparse.ArgumentParser, stages: tuple[str, ...]) -> None:
    """The arguments that `bench.gpus` takes too."""
    parser.add_argument("--stage", type=one_of(stages), default=list(stages), help=f"some of {','.join(stages)}")
    parser.add_argument("--model", default="models/base", help=f"a base model's folder, or {RANDOM_8B}: random weights")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the figures there too, every pass with them")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    parser.add_argument("--rows", type=positive, help="rows a pass, instead of each stage's own number")
    parser.add_argument("--batch", type=positive, default=8, help="rows an update of sft (default: 8)")


def one_of(names: tuple[str, ...]):
    def several(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(names):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} is none of {','.join(names)}")
        return list(dict.fromkeys(text.split(",")))
    return several


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def device(named: str | None) -> str:
    """The device that was named, or cuda where there is one."""
    if named:
        return named
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def join(options: argparse.Namespace) -> None:
    """This process, which a launcher started, joins the others.

    Raises ValueError if there are several, and something is asked for that is one process's work.
    """
    options.device = device(options.device)
    start_processes(load_params().model.model_copy(update={"device": options.device, "quantization": "none"}))
    if world() > 1 and options.against:
        raise ValueError(f"--against {','.join(options.against)} is one process's work, and a launcher started {world()}; "
                         "give --against none, or start python -m bench without a launcher")
    if world() > 1 and "score" in options.stage:
        raise ValueError(f"--stage score is one process's work, and a launcher started {world()}; leave score out")


def prepare(options: argparse.Namespace) -> "Setup":
    """The model's folder and the device's limits. On CUDA the 8B shape trains in NF4, another base as params.yaml says.

    Raises ValueError for a folder that is no base model, and for a params.yaml that is wrong.
    """
    from bench.workload import set_up

    options.device = device(options.device)
    if options.model == RANDOM_8B:
        if options.device == "cpu":
            raise ValueError(f"--model {RANDOM_8B} needs a CUDA GPU; give the folder of a small model instead")
        from bench.random_8b import make_8b

        if rank() == 0:
            make_8b(FOLDER_8B)
        barrier()
    folder = FOLDER_8B if options.model == RANDOM_8B else Path(options.model)
    if not (folder / MANIFEST).exists():
        raise ValueError(f"{folder}/{MANIFEST} is missing; --model must be a base model as the stage base leaves it: "
                         "dvc repro base")
    nf4 = options.device == "cuda" and (options.model == RANDOM_8B or load_params().model.quantization == "nf4")
    return set_up(folder, options.device, "nf4" if nf4 else "none")


def build(name: str, setup: "Setup | None", options: argparse.Namespace) -> Stage:
    rows = options.rows or ROWS[options.device or "cpu"][name]
    if name == "score":
        from bench import score

        return score.stage(rows)
    from bench import generation, ppo, sft

    make = {"sft": partial(sft.stage, batch=options.batch), "ppo": ppo.stage,
            "rollouts": generation.rollouts, "eval": generation.evaluation}[name]
    return make(setup, rows, options.against, options.without)


# ---- what is printed ----


def report(stage: Stage) -> dict[str, Any]:
    """Gates, then passes; prints the stage's table and returns what stands in the JSON."""
    with redirect_stdout(io.StringIO()):  # the trainers print every update
        gates = stage.gates()
    measured = measure(stage)
    holds = all(gate.holds for gate in gates)
    print(table(stage, measured, gates), flush=True)
    return {
        "stage": stage.name, "unit": stage.unit, "limit": stage.limit, "gates_hold": holds,
        "gates": [{**gate._asdict(), "holds": gate.holds} for gate in gates],
        "sides": [{**side._asdict(), "passes": [each._asdict() for each in side.passes],
                   "share_of_limit": stage.limit and side.rate / stage.limit,
                   "ratio": measured[0].rate / side.rate if holds and side is not measured[0] else None}
                  for side in measured]}


def table(stage: Stage, measured: list[Measured], gates: list[Gate]) -> str:
    """The stage's figures as text: one line a side, then the gates."""
    unit, ours = stage.unit, measured[0]
    holds = all(gate.holds for gate in gates)
    head = [stage.name, unit, "seconds", "CPU s", f"{unit}/s", "warm-up s", "set-up s", "peak GiB", "of the limit",
            "looper is"]
    lines = [head]
    for side in measured:
        ratio = "" if side is ours else f"{ours.rate / side.rate:.2f}x" if holds else "(gate failed)"
        lines.append([side.name, f"{side.tokens:,}", f"{side.seconds:.2f}", f"{side.cpu:.2f}", f"{side.rate:,.0f}",
                      f"{side.warm_up:.1f}", f"{side.setup:.1f}", "" if side.gib is None else f"{side.gib:.1f}",
                      f"{side.rate / stage.limit:.1%}" if stage.limit else "", ratio])
    kept = [i for i in range(len(head)) if i == 0 or any(line[i] for line in lines[1:])]  # no empty columns
    text = aligned([[line[i] for i in kept] for line in lines])
    if stage.limit:
        text += f"\nlimit: {stage.limit:,.0f} {unit}/s"
    for gate in gates:
        verdict = "holds" if gate.holds else f"FAILED: exceeds the limit by {gate.found - gate.limit:.2e}"
        text += f"\ngate {gate.name}: {gate.found:.2e} (at most {gate.limit:.0e}): {verdict}"
    return f"\n{text}\n"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns, the first one's text at the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = [[cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths))]
             for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in cells)


def machine(setup: "Setup | None") -> dict[str, Any]:
    import platform
    from importlib.metadata import version

    known = {"python": platform.python_version(),
             **{name: version(name) for name in ("torch", "transformers", "trl", "peft", "bitsandbytes")}}
    if setup is None:
        return known
    import torch

    name = torch.cuda.get_device_name() if setup.cuda else f"{platform.machine()}, {torch.get_num_threads()} threads"
    return {"device": name, "dtype": str(setup.dtype), "quantization": setup.model.quantization,
            "flops": setup.flops, "bandwidth": setup.bandwidth, **known}


if __name__ == "__main__":
    status = main()
    if "LOCAL_RANK" in os.environ:
        leave(status)
    sys.exit(status)
