"""Stage sft: fine-tunes a LoRA adapter on the train split's targets with TRL's SFTTrainer (QLoRA where it is NF4).

Reads models/base, data/sft_targets.jsonl and the sections `model` and `sft`. Writes models/sft_lora (adapter and card),
metrics/sft.json and the live metrics in metrics/live/sft. A killed run goes on from its last checkpoint.
"""

from pathlib import Path

from looper.distributed import first_process_only, start_processes
from looper.params import load_params
from looper.stage import run

BASE, TARGETS, ADAPTER = Path("models/base"), Path("data/sft_targets.jsonl"), Path("models/sft_lora")


def main() -> None:
    params = load_params()
    start_processes(params.model)
    from looper.adapters import save_adapter
    from looper.base_model import load_base, load_tokenizer
    from looper.files import sha256, write_json
    from looper.jsonl import read_jsonl
    from looper.prompts import ROW, TEMPLATES
    from looper.scratch import scratch
    from looper.sft import finetune

    rows = read_jsonl(TARGETS, ROW)
    model, tokenizer = load_base(BASE, params.model), load_tokenizer(BASE)
    with scratch("sft") as folder:
        trained, metrics = finetune(model, tokenizer, TEMPLATES[params.model.template], rows, params.sft, folder,
                                    Path("metrics/live/sft"))
        first_process_only()
        card = {"data_sha256": sha256(TARGETS), "model": params.model.model_dump(), "sft": params.sft.model_dump()}
        save_adapter(trained, ADAPTER, BASE, card)
        write_json(Path("metrics/sft.json"), metrics)


if __name__ == "__main__":
    run(main, __doc__)
