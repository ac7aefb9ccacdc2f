"""What every stage does around its work: `--help`, the hub switched off, errors as one clear text and exit 2."""

import gc
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

# Nothing leaves the host: no telemetry of any library, no experiment pushed anywhere.
PRIVATE = {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "DVC_NO_ANALYTICS": "1", "DVC_STUDIO_OFFLINE": "true"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
# Read when PyTorch is imported. cuBLAS gives equal runs equal bits only with a workspace of its own. And only what
# looper.compiling compiles is: without this, bitsandbytes loads PyTorch's compiler, two seconds in every stage that has
# an adapter. Passes of many sizes leave gaps in the GPU's memory that no larger one can use; segments that grow do not:
# they are for whoever has set nothing else.
TORCH = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TORCHDYNAMO_DISABLE": "1",
         "PYTORCH_CUDA_ALLOC_CONF": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")}

# Of several processes the one that knows best what is wrong shall say it, and its end then ends the others: these wait
# so many seconds before they say it themselves. All may meet the same error: the first process says it.
HEAD_START = 5

# What lowers a stage's need of GPU memory: first what leaves its result as it is.
LESS_MEMORY = {
    "sft": "lower sft.micro_batch (the updates stay the same) or set sft.gradient_checkpointing: true (the optimiser's "
           "state then has eight bits)",
    "targets": "lower sft.self.batch_size",
    "rollouts": "lower rollouts.batch_size or rollouts.max_new_tokens",
    "ppo": "set ppo.gradient_checkpointing: true (the updates stay the same) or lower ppo.mini_batch_size",
    **dict.fromkeys(("dev_eval", "dev_ppo", "eval"), "lower eval.batch_size or eval.max_new_tokens"),
}


def set_up_libraries(network: bool = False) -> None:
    """What the libraries read when they are imported. network: whether they may ask the hub."""
    os.environ.update(PRIVATE | TORCH | ({} if network else OFFLINE))
    # It misses an optional kernel for four bits on a processor, in each process, and does without
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def run(main: Callable[..., None], doc: str, network: bool = False, arguments: tuple[str, ...] = ()) -> None:
    """Runs a stage's `main`.

    doc: the stage's docstring, printed by `--help`.
    network: whether the stage may ask the hub (only `base` and `prepare`).
    arguments: the names of what the stage takes on its command line, such as ROUND; they reach `main` as text.
    """
    given = sys.argv[1:]
    name = Path(sys.argv[0]).stem
    if "-h" in given or "--help" in given:
        print(doc.strip())
        return
    if len(given) != len(arguments):
        usage = " ".join([f"python -m stages.{name}", *arguments])
        sys.exit(_fail(f"usage: {usage}; found {' '.join(given) or 'nothing'}"))
    set_up_libraries(network)
    warnings.simplefilter("ignore", FutureWarning)  # what libraries will rename is for us, not for who runs the stage
    gc.set_threshold(10_000, 10, 10)  # importing PyTorch makes a million objects, and no garbage
    started = time.perf_counter()
    try:
        main(*given)
    except KeyboardInterrupt:
        print(f"{name}: interrupted; what it finished is kept: the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        text = f"{name}: {error}" if isinstance(error, ValueError) and _is_ours(error) else _out_of_memory(name, error)
        if text is None:
            if "LOCAL_RANK" in os.environ:
                time.sleep(HEAD_START)  # it may be for want of another process, whose end then ends this one
            raise  # a library's error is a bug of ours: its traceback is what helps
        if "DVC_STAGE" in os.environ:
            text += ("\nDVC has removed this stage's former outputs; once this is mended, dvc repro brings them back, or "
                     "makes new ones")
        sys.exit(_fail(text))
    print(f"{' '.join([name, *given])}: {time.perf_counter() - started:.1f} s", flush=True)
    if {"DVC_STAGE", "LOCAL_RANK"} & set(os.environ):  # DVC waits for this process, or others work with it
        leave()
    gc.freeze()  # the process ends here: looking through all that PyTorch loaded for garbage takes another second


def leave(status: int = 0) -> NoReturn:
    """Ends this process at once. All must be stored: Python's own end, object by object, is left out.

    With a GPU that takes a second, and of a process that has worked with others it sometimes is an abort: a thread of
    theirs asks for Python when there is none any more.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _is_ours(error: BaseException) -> bool:
    """Whether this repository's own code raised `error`, with a text meant for the person at the keyboard."""
    frame = error.__traceback__
    while frame.tb_next:
        frame = frame.tb_next
    return Path(frame.tb_frame.f_code.co_filename).resolve().parent.name in ("stages", "looper", "regime_w")


def _out_of_memory(name: str, error: Exception) -> str | None:
    """What to do about PyTorch's out-of-memory error; None for any other error. PyTorch is not imported for it."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, torch.OutOfMemoryError):
        return None
    free, total = torch.cuda.mem_get_info()
    has, held, left = (f"{size / 2**30:.1f} GiB" for size in (total, torch.cuda.memory_allocated(), free))
    asked = re.search(r"Tried to allocate (\S+ \S+)\.", str(error))
    return (f"{name}: the GPU's memory is too small for these settings: it has {has}; this stage holds {held} and asked for "
            f"{asked[1] if asked else 'more'}, {left} were left (what else runs there counts too: nvidia-smi); "
            f"{LESS_MEMORY.get(name, 'take a smaller base model')}, or run on a larger card")


def _fail(text: str) -> int:
    if os.environ.get("RANK", "0") != "0":
        time.sleep(HEAD_START)
    print(text, file=sys.stderr, flush=True)
    return 2
