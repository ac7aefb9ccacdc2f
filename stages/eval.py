"""Stage eval: greedy answers of one model on the whole test split.

The arguments are the model's name (base, sft or ppo) and its adapter's folder (for base, which has none, its manifest).
Reads models/base, that adapter, data/test.jsonl and the sections `model` and `eval`.
Writes data/predictions/NAME.jsonl and metrics/eval_NAME.json.
"""

from pathlib import Path

from looper.distributed import first_process_only, start_processes
from looper.params import load_params
from looper.stage import run

BASE = Path("models/base")
NAMES = ("base", "sft", "ppo")


def main(name: str, adapter: str) -> None:
    if name not in NAMES:
        raise ValueError(f"there is no model {name!r} to compare; it must be one of {', '.join(NAMES)}")
    params = load_params()
    start_processes(params.model)
    from looper.adapters import WEIGHTS, load_for_generation
    from looper.base_model import load_tokenizer
    from looper.evaluation import evaluation_metrics
    from looper.files import sha256, write_json
    from looper.jsonl import read_jsonl, write_jsonl
    from looper.predictions import predict
    from looper.prompts import ROW, TEMPLATES
    from looper.scratch import scratch

    rows = read_jsonl(Path("data/test.jsonl"), ROW)
    model = load_for_generation(BASE, None if name == "base" else Path(adapter), params.model)
    tokenizer = load_tokenizer(BASE)
    with scratch(f"eval@{name}", Path(adapter)) as folder:
        template = TEMPLATES[params.model.template]
        predictions = predict(model, tokenizer, template, rows, params.eval, folder, f"test {name}")
        first_process_only()
        write_jsonl(Path(f"data/predictions/{name}.jsonl"), predictions)
        metrics = evaluation_metrics(predictions)
        weights = None if name == "base" else sha256(Path(adapter) / WEIGHTS)
        write_json(Path(f"metrics/eval_{name}.json"), {"adapter_sha256": weights, **metrics})
    print(f"test accuracy of {name}: {metrics['accuracy']['value']:.1%}")


if __name__ == "__main__":
    run(main, __doc__, arguments=("NAME", "ADAPTER"))
