"""Stage eval: greedy answers of one model on the whole test split. The argument names the model: base, sft or ppo.

Reads models/base, that model's adapter, data/test.jsonl and the sections `model` and `eval`.
Writes data/predictions/MODEL.jsonl and metrics/eval_MODEL.json.
"""

from pathlib import Path

from looper.params import load_params
from looper.stage import run

BASE = Path("models/base")
ADAPTERS = {"base": None, "sft": Path("models/sft_lora"), "ppo": Path("models/ppo_regime_w")}


def main(name: str) -> None:
    params = load_params()
    from looper.adapters import load_for_generation
    from looper.base_model import load_tokenizer
    from looper.evaluation import evaluation_metrics
    from looper.files import write_json
    from looper.jsonl import read_jsonl, write_jsonl
    from looper.predictions import predict
    from looper.prompts import ROW, TEMPLATES
    from looper.scratch import scratch

    rows = read_jsonl(Path("data/test.jsonl"), ROW)
    model, tokenizer = load_for_generation(BASE, ADAPTERS[name], params.model), load_tokenizer(BASE)
    with scratch(f"eval@{name}") as folder:
        predictions = predict(model, tokenizer, TEMPLATES[params.model.template], rows, params.eval, folder, f"test {name}")
        write_jsonl(Path(f"data/predictions/{name}.jsonl"), predictions)
        write_json(Path(f"metrics/eval_{name}.json"), evaluation_metrics(predictions))


if __name__ == "__main__":
    run(main, __doc__, arguments=tuple(ADAPTERS))
