"""Stage rollouts: the eight arms answer train questions and their counterfactuals. The argument names the round: 1, 2, …

Reads models/base, the adapter that the round starts from, data/train.jsonl, data/counterfactuals.jsonl and the
sections `model`, `rollouts` and `rounds`. Writes data/rollouts.jsonl (with the round's suffix). A killed run goes on
after its last finished chunk.
"""

from pathlib import Path

from looper.distributed import first_process_only, start_processes
from looper.params import load_params, round_of
from looper.stage import run

BASE = Path("models/base")


def main(name: str) -> None:
    params = load_params()
    this = round_of(params.rounds, name)
    start_processes(params.model)
    from looper.adapters import load_for_generation
    from looper.base_model import load_tokenizer
    from looper.jsonl import read_jsonl, write_jsonl
    from looper.prompts import ROW, TEMPLATES
    from looper.rollouts import questions_of_round, roll_out
    from looper.scratch import scratch

    rows = questions_of_round(read_jsonl(Path("data/train.jsonl"), ROW), params.rollouts.questions, int(name))
    changed = read_jsonl(Path("data/counterfactuals.jsonl"), {
        "id": str, "question": str, "gold_answer": str, "changed_from": str, "changed_to": str})
    counterfactuals = {row["id"]: row for row in changed}
    model, tokenizer = load_for_generation(BASE, Path(this.start), params.model), load_tokenizer(BASE)
    with scratch(f"rollouts@{name}") as folder:
        template = TEMPLATES[params.model.template]
        made = roll_out(model, tokenizer, template, rows, counterfactuals, params.rollouts, folder)
        first_process_only()
        write_jsonl(Path(f"data/rollouts{this.suffix}.jsonl"), made)


if __name__ == "__main__":
    run(main, __doc__, arguments=("ROUND",))
