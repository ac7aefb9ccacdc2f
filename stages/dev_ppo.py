"""Stage dev_ppo: the last PPO policy on the questions of dev_eval: what settings are chosen by, before test is read.

Reads models/base, the last round's adapter, data/dev.jsonl, data/counterfactuals.jsonl and the sections `model`,
`eval`, `dev_eval` and `final`. Writes data/predictions/dev_ppo.jsonl and metrics/dev_ppo.json.
"""

from pathlib import Path

from looper.distributed import first_process_only, start_processes
from looper.params import load_params
from looper.stage import run

BASE = Path("models/base")


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
    model, tokenizer = load_for_generation(BASE, Path(params.final), params.model), load_tokenizer(BASE)
    with scratch("dev_ppo") as folder:
        template = TEMPLATES[params.model.template]
        predictions, metrics = predict_dev(model, tokenizer, template, rows, counterfactuals, params.eval, folder, "dev ppo")
        first_process_only()
        write_jsonl(Path("data/predictions/dev_ppo.jsonl"), predictions)
        write_json(Path("metrics/dev_ppo.json"), {"ppo": metrics})
    print(f"dev accuracy of ppo: {metrics['accuracy']['value']:.1%}")


if __name__ == "__main__":
    run(main, __doc__)
