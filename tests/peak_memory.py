"""Runs a stage inside a share of the GPU's memory and prints its peak: does it fit a smaller card?

    python tests/peak_memory.py GIB MODULE [ARGUMENT]     e.g.  python tests/peak_memory.py 22 stages.sft
"""

import runpy
import sys

import torch

GIB = 2**30


def main(limit: float, module: str, arguments: list[str]) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit * GIB / total))
    sys.argv = [f"{module.replace('.', '/')}.py", *arguments]
    try:
        runpy.run_module(module, run_name="__main__")
    finally:
        print(f"{module}: peak {torch.cuda.max_memory_allocated() / GIB:.2f} GiB allocated, "
              f"{torch.cuda.max_memory_reserved() / GIB:.2f} GiB reserved, limit {limit} GiB")


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2], sys.argv[3:])
