"""Stage report: the comparison of Base, SFT and PPO that a person reads.

Reads the settings that name the run, the predictions, the metrics, and of the first round the scored rollouts and the
training curves. Writes metrics/summary.json (what `dvc metrics diff` compares), metrics/plots/accuracy.json and
reports/report.html, and prints the table.
"""

from pathlib import Path

from looper.params import load_params
from looper.stage import run

METRICS = {"data": "data", "sft": "sft", "dev": "dev", "regime_w, round 1": "regime_w", "ppo, round 1": "ppo",
           "dev_ppo": "dev_ppo"}  # what the page calls each, and its file
SFT, PPO = Path("metrics/live/sft/plots/metrics"), Path("metrics/live/ppo/plots/metrics")
CURVES = {
    "SFT loss": SFT / "loss.tsv",
    "SFT gradient norm": SFT / "grad_norm.tsv",
    "PPO policy loss, round 1": PPO / "policy_loss.tsv",
    "PPO KL to SFT, round 1": PPO / "kl.tsv",
    "PPO beta, round 1": PPO / "beta.tsv",
    "PPO gradient norm, round 1": PPO / "grad_norm.tsv",
}


def main() -> None:
    params = load_params()
    from looper.evaluation import PREDICTION_FIELDS
    from looper.files import read_json, write_json
    from looper.jsonl import iterate_jsonl, read_jsonl
    from looper.report import MODELS, about, plot_rows, summarise, table, write_report

    predictions = {name: read_jsonl(Path("data/predictions") / f"{name}.jsonl", PREDICTION_FIELDS)
                   for name in MODELS}
    figures = {name: read_json(Path("metrics") / f"eval_{name}.json") for name in MODELS}
    metrics = {name: read_json(Path("metrics") / f"{file}.json") for name, file in METRICS.items()}
    summary = summarise(predictions, figures)
    named = about(params.base.model_dump(), params.prepare.model_dump(), metrics["data"]["rows"], {
        "Template": params.model.template,
        "SFT": f"targets {params.sft.targets}, epochs {params.sft.epochs:g}, "
               f"learning rate {params.sft.learning_rate:g}",
        "PPO": f"credit {params.ppo.credit}, rounds {len(params.rounds)}, learning rate {params.ppo.learning_rate:g}",
        "Seeds": f"questions {params.prepare.seed}, SFT {params.sft.seed}, rollouts {params.rollouts.seed}, "
                 f"PPO {params.ppo.seed}",
    })
    weights = {name: figures[name].get("adapter_sha256") for name in MODELS}
    write_report(Path("reports/report.html"), summary, predictions, list(CURVES.items()), metrics["regime_w, round 1"],
                 iterate_jsonl(Path("data/regime_w_rollouts.jsonl")), metrics, named, weights)
    write_json(Path("metrics/plots/accuracy.json"), plot_rows(summary))
    write_json(Path("metrics/summary.json"), summary)
    print(table(summary))


if __name__ == "__main__":
    run(main, __doc__)
