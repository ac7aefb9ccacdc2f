"""What every stage does around its work: `--help`, the hub switched off, errors as one clear text and exit 2."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Nothing leaves the host: no telemetry of any library, no experiment pushed anywhere.
PRIVATE = {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "DVC_NO_ANALYTICS": "1", "DVC_STUDIO_OFFLINE": "true"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


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
    os.environ.update(PRIVATE if network else PRIVATE | OFFLINE)
    started = time.perf_counter()
    try:
        main(*given)
    except ValueError as error:
        if not _is_ours(error):
            raise  # a library's error is a bug of ours: its traceback is what helps
        sys.exit(_fail(f"{name}: {error}"))
    print(f"{' '.join([name, *given])}: {time.perf_counter() - started:.1f} s", flush=True)


def _is_ours(error: BaseException) -> bool:
    """Whether this repository's own code raised `error`, with a text meant for the person at the keyboard."""
    frame = error.__traceback__
    while frame.tb_next:
        frame = frame.tb_next
    return Path(frame.tb_frame.f_code.co_filename).resolve().parent.name in ("stages", "looper", "regime_w")


def _fail(text: str) -> int:
    print(text, file=sys.stderr)
    return 2
