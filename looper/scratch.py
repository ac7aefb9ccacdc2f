"""Where a stage keeps what it may need after a kill: an untracked folder named by a hash of the stage's inputs.

DVC deletes a stage's outputs before it runs the stage, so checkpoints and finished chunks cannot live there.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from looper.adapters import CARD
from looper.base_model import MANIFEST
from looper.distributed import agreed, barrier, rank
from looper.files import sha256
from looper.params import PARAMS, parse
from looper.pipeline import lookup, resolved_stages

SCRATCH = Path(".scratch")


@contextmanager
def scratch(stage: str, *given: Path) -> Iterator[Path]:
    """The scratch folder of `stage` (a name in dvc.yaml, such as "sft" or "eval@ppo").

    given: inputs that the command line names: dvc.yaml may name others.

    It is kept when the block ends with an error and removed when the stage is done. The same inputs give the same
    folder; folders of this stage for other inputs are removed at the start: nobody will go on with them. Several
    processes share one folder, whatever their number was before a kill.
    """
    folder = SCRATCH / f"{stage}-{inputs_hash(stage, *given)}"
    if rank() == 0:
        for other in SCRATCH.glob(f"{stage}-*"):
            if other != folder:
                shutil.rmtree(other)
        folder.mkdir(parents=True, exist_ok=True)
    barrier()
    yield folder
    if rank() == 0:
        shutil.rmtree(folder)


def last_checkpoint(scratch: Path) -> str | None:
    """The newest of the Trainer's checkpoints in `scratch`/checkpoints that was written to its end, or None."""
    def is_whole(checkpoint: Path) -> bool:
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))  # written last
        except (OSError, ValueError):
            return False
        return True

    checkpoints = sorted((scratch / "checkpoints").glob("checkpoint-*"), key=lambda each: int(each.name.split("-")[1]))
    last = agreed(next((str(each) for each in reversed(checkpoints) if is_whole(each)), None))
    if last and rank() == 0:
        print(f"going on from {last}", flush=True)
    return last


def inputs_hash(stage: str, *given: Path) -> str:
    """A short hash over what dvc.yaml names as the stage's inputs, its dependencies' bytes and its keys of params.yaml,
    and over what is `given` besides.

    A model folder counts by its manifest or card, which holds the hashes of the weights.
    """
    values = parse(PARAMS.read_bytes())
    entry = resolved_stages(yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8")), values)[stage]
    total = hashlib.sha256(stage.encode())
    for dep in map(Path, [*entry["deps"], *given]):
        total.update(f"{dep} {sha256(_identity(dep))}\n".encode())
    for key in entry["params"]:
        total.update(f"{key} {lookup(values, key)!r}\n".encode())
    return total.hexdigest()[:16]


def _identity(dep: Path) -> Path:
    if not dep.exists():
        raise ValueError(f"{dep} is not here; run the stage that writes it (dvc repro), or bring it back: dvc pull {dep}")
    if not dep.is_dir():
        return dep
    for path in (dep / CARD, dep / MANIFEST):
        if path.exists():
            return path
    raise ValueError(f"{dep} holds neither {CARD} nor {MANIFEST}; bring it back: dvc checkout {dep}")
