"""Stage ppo: offline PPO on the scored rollouts. The argument names the round: 1, 2, …

Reads models/base, the adapter that the round starts from (the SFT adapter, then the round's before),
data/regime_w_rollouts.jsonl and the sections `model`, `ppo` and `rounds`. Writes models/ppo_regime_w (adapter, card,
value head), metrics/ppo.json and the live metrics in metrics/live/ppo; these names, and that of the rollouts, end in
the round's suffix. A killed run goes on from its last checkpoint.
"""

from dataclasses import asdict
from pathlib import Path

from looper.distributed import first_process_only, start_processes
from looper.params import load_params, round_of
from looper.stage import run

BASE = Path("models/base")


def main(name: str) -> None:
    params = load_params()
    this = round_of(params.rounds, name)
    start_processes(params.model)
    from looper.adapters import WEIGHTS, load_trainable, save_adapter
    from looper.base_model import load_tokenizer
    from looper.files import sha256, write_json
    from looper.jsonl import read_jsonl
    from looper.live import LiveMetrics
    from looper.ppo import VALUE_HEAD, samples_from_rows, train_ppo
    from looper.ppo_data import ROW
    from looper.prompts import TEMPLATES, prompt_ids
    from looper.scratch import scratch

    start, rollouts = Path(this.start), Path(f"data/regime_w_rollouts{this.suffix}.jsonl")
    rows = read_jsonl(rollouts, ROW)
    tokenizer, template = load_tokenizer(BASE), TEMPLATES[params.model.template]
    samples = samples_from_rows(rows, lambda question: prompt_ids(tokenizer, template, question), params.ppo)
    model = load_trainable(BASE, start, params.model)
    with scratch(f"ppo@{name}") as folder:
        value_head = folder / VALUE_HEAD
        live = LiveMetrics(Path(f"metrics/live/ppo{this.suffix}"))
        metrics = train_ppo(model, samples, params.ppo, folder, value_head, [live])
        first_process_only()
        card = {"data_sha256": sha256(rollouts), "start_sha256": sha256(start / WEIGHTS),
                "model": params.model.model_dump(), "ppo": asdict(params.ppo)}
        save_adapter(model, Path(this.adapter), BASE, card, beside=[value_head])
        write_json(Path(f"metrics/ppo{this.suffix}.json"), metrics)


if __name__ == "__main__":
    run(main, __doc__, arguments=("ROUND",))
