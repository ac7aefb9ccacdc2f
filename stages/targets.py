"""Stage targets: what sft learns to write: the gold solutions, or the base model's own right answers where it has some.

Reads models/base, data/train.jsonl, the section `model` and, of the section `sft`, `targets`, `self` and `max_tokens`.
Writes data/sft_targets.jsonl and metrics/targets.json. A killed run goes on after its last finished chunk of samples.
"""

from pathlib import Path

from looper.distributed import first_process_only, start_processes
from looper.params import load_params
from looper.stage import run

BASE, TRAIN = Path("models/base"), Path("data/train.jsonl")


def main() -> None:
    params = load_params()
    from looper.jsonl import read_jsonl
    from looper.prompts import ROW, TEMPLATES
    from looper.targets import gold_targets, self_targets

    rows = read_jsonl(TRAIN, ROW)
    if params.sft.targets == "gold":
        first_process_only()
        write(*gold_targets(rows))
        return
    start_processes(params.model)
    from looper.adapters import load_for_generation
    from looper.base_model import load_tokenizer
    from looper.scratch import scratch

    model, tokenizer = load_for_generation(BASE, None, params.model), load_tokenizer(BASE)
    with scratch("targets") as folder:
        targets, metrics = self_targets(model, tokenizer, TEMPLATES[params.model.template], rows, params.sft.self,
                                        params.sft.max_tokens, folder)
        first_process_only()
        write(targets, metrics)


def write(targets: list[dict], metrics: dict) -> None:
    from looper.files import write_json
    from looper.jsonl import write_jsonl

    write_jsonl(Path("data/sft_targets.jsonl"), targets)
    write_json(Path("metrics/targets.json"), metrics)
    print(f"rows {metrics['rows']}, of the model's own {metrics['self_share']}")


if __name__ == "__main__":
    run(main, __doc__)
