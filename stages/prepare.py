"""Stage prepare: GSM8K, or the built-in problems, as three splits that share no question, and their counterfactuals.

Reads the section `prepare`. Writes data/{train,dev,test}.jsonl, data/counterfactuals.jsonl and metrics/data.json.
"""

from pathlib import Path

from looper.params import load_params
from looper.stage import run


def main() -> None:
    params = load_params()
    from looper.files import write_json
    from looper.gsm8k import prepare
    from looper.jsonl import write_jsonl

    splits, counterfactuals, metrics = prepare(params.prepare)
    for split, rows in splits.items():
        write_jsonl(Path(f"data/{split}.jsonl"), rows)
    write_jsonl(Path("data/counterfactuals.jsonl"), counterfactuals)
    write_json(Path("metrics/data.json"), metrics)
    print(f"rows {metrics['rows']}, dropped {metrics['dropped']}, counterfactuals {metrics['counterfactual_share']}")


if __name__ == "__main__":
    run(main, __doc__, network=True)
