"""Stage ppo: offline PPO on the scored rollouts, from the SFT adapter.

Reads models/base, models/sft_lora, data/regime_w_rollouts.jsonl and the sections `model` and `ppo`. Writes
models/ppo_regime_w (adapter, card, value head), metrics/ppo.json and the live metrics in metrics/live/ppo. A killed run
goes on from its last checkpoint.
"""

from dataclasses import asdict
from pathlib import Path

from looper.params import load_params
from looper.stage import run

BASE, SFT, ROLLOUTS = Path("models/base"), Path("models/sft_lora"), Path("data/regime_w_rollouts.jsonl")


def main() -> None:
    params = load_params()
    from looper.adapters import load_trainable, save_adapter
    from looper.base_model import load_tokenizer
    from looper.files import sha256, write_json
    from looper.jsonl import read_jsonl
    from looper.live import LiveMetrics
    from looper.ppo import VALUE_HEAD, samples_from_rows, train_ppo
    from looper.prompts import TEMPLATES, prompt_ids
    from looper.scratch import scratch

    rows = read_jsonl(ROLLOUTS, {"id": str, "question": str, "reward": float, "arm_outputs": list})
    tokenizer, template = load_tokenizer(BASE), TEMPLATES[params.model.template]
    samples = samples_from_rows(rows, lambda question: prompt_ids(tokenizer, template, question), params.ppo)
    model = load_trainable(BASE, SFT, params.model)
    with scratch("ppo") as folder:
        value_head = folder / VALUE_HEAD
        metrics = train_ppo(model, samples, params.ppo, folder, value_head, [LiveMetrics(Path("metrics/live/ppo"))])
        card = {"data_sha256": sha256(ROLLOUTS), "sft_sha256": sha256(SFT / "adapter_model.safetensors"),
                "model": params.model.model_dump(), "ppo": asdict(params.ppo)}
        save_adapter(model, Path("models/ppo_regime_w"), BASE, card, beside=[value_head])
        write_json(Path("metrics/ppo.json"), metrics)


if __name__ == "__main__":
    run(main, __doc__)
