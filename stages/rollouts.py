"""Stage rollouts: the eight arms answer the first train questions and their counterfactuals.

Reads models/base, models/sft_lora, data/train.jsonl, data/counterfactuals.jsonl and the sections `model` and `rollouts`.
Writes data/rollouts.jsonl. A killed run goes on after its last finished chunk.
"""

from pathlib import Path

from looper.params import load_params
from looper.stage import run

BASE, ADAPTER = Path("models/base"), Path("models/sft_lora")


def main() -> None:
    params = load_params()
    from looper.adapters import load_for_generation
    from looper.base_model import load_tokenizer
    from looper.jsonl import read_jsonl, write_jsonl
    from looper.prompts import ROW, TEMPLATES
    from looper.rollouts import roll_out
    from looper.scratch import scratch

    rows = read_jsonl(Path("data/train.jsonl"), ROW)[:params.rollouts.questions]
    counterfactuals = {row["id"]: row for row in read_jsonl(Path("data/counterfactuals.jsonl"), {"id": str, "question": str})}
    model, tokenizer = load_for_generation(BASE, ADAPTER, params.model), load_tokenizer(BASE)
    with scratch("rollouts") as folder:
        made = roll_out(model, tokenizer, TEMPLATES[params.model.template], rows, counterfactuals, params.rollouts, folder)
        write_jsonl(Path("data/rollouts.jsonl"), made)


if __name__ == "__main__":
    run(main, __doc__)
