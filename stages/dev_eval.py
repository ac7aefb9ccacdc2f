"""Stage dev_eval: Base and SFT on the first dev questions, and on their counterfactuals, before the expensive stages.

Reads models/base, models/sft_lora, data/dev.jsonl, data/counterfactuals.jsonl and the sections `model`, `eval` and
`dev_eval`. Writes data/predictions/dev_base.jsonl, dev_sft.jsonl and metrics/dev.json.
"""

import gc
from pathlib import Path

from looper.distributed import first_process_only, start_processes
from looper.params import load_params
from looper.stage import run

BASE, ADAPTER = Path("models/base"), Path("models/sft_lora")


def main() -> None:
    params = load_params()
    start_processes(params.model)
    from looper.adapters import load_for_generation
    from looper.base_model import load_tokenizer
    from looper.files import write_json
    from looper.jsonl import read_first, read_jsonl, write_jsonl
    from looper.predictions import predict_dev
    from looper.prompts import ROW, TEMPLATES
    from looper.scratch import scratch

    rows = read_first(Path("data/dev.jsonl"), params.dev_eval.questions, "dev_eval.questions", ROW)
    counterfactuals = read_jsonl(Path("data/counterfactuals.jsonl"), {"id": str, "question": str, "gold_answer": str})
    tokenizer, template = load_tokenizer(BASE), TEMPLATES[params.model.template]
    predictions, metrics = {}, {}
    with scratch("dev_eval") as folder:
        for name, adapter in (("base", None), ("sft", ADAPTER)):
            model = load_for_generation(BASE, adapter, params.model)
            predictions[name], metrics[name] = predict_dev(model, tokenizer, template, rows, counterfactuals, params.eval,
                                                           folder / name, f"dev {name}")
            del model
            gc.collect()  # its memory, before the next one is loaded
        first_process_only()
        for name, each in predictions.items():
            write_jsonl(Path(f"data/predictions/dev_{name}.jsonl"), each)
        write_json(Path("metrics/dev.json"), metrics)
    for name, each in metrics.items():
        print(f"dev accuracy of {name}: {each['accuracy']['value']:.1%}")


if __name__ == "__main__":
    run(main, __doc__)
