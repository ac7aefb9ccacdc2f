"""The report's part on robustness: each model on dev questions as asked, and with one number changed."""

from collections.abc import Mapping
from typing import Any

from looper.report_plots import Bar, bars, signless_zero
from looper.report_regime_w import Block, table_html


def robustness_block(dev: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str]) -> Block:
    """dev: by model, what metrics/dev.json and metrics/dev_ppo.json hold. labels: the models' names, in order.

    Raises ValueError if a model or its counterfactual figures are missing.
    """
    for model in labels:
        if "counterfactual" not in dev.get(model, {}):
            file, stage = ("dev_ppo", "dev_ppo") if model == "ppo" else ("dev", "dev_eval")
            raise ValueError(f"metrics/{file}.json lacks {model}.counterfactual; rerun the stage {stage}")
    found = {model: dev[model]["counterfactual"] for model in labels}
    n = min(each["n"] for each in found.values())
    title = "One number changed"
    if n == 0:
        return Block(title, "None of the dev questions asked has a counterfactual.")
    sentence = (
        f"On {n:,} dev questions that have a counterfactual: accuracy as asked, and with one number changed and the "
        "answer recomputed. A model that calculates loses little; one that recites loses much, and repeats the old answer.")
    rows, cells = [], []
    for model, label in labels.items():
        for version, text in (("original", "as asked"), ("changed", "one number changed")):
            ends = (100 * found[model][version][end] for end in ("value", "low", "high"))
            rows.append(Bar(f"{label}, {text}", *ends, model))
        gap = found[model]["gap"]
        cells.append([label, f"{100 * dev[model]['accuracy']['value']:.1f}", *(
            f"{100 * found[model][version]['value']:.1f}" for version in ("original", "changed")),
            "{} ({} to {})".format(*(signless_zero(100 * gap[end]) for end in ("value", "low", "high"))),
            f"{100 * found[model]['repeats_old_gold']:.1f}"])
    header = ["Model", "All dev questions asked, %", "As asked, %", "Changed, %", "Gap, points", "Old answer repeated, %"]
    description = "Accuracy on dev questions as asked and with one number changed"
    figure = bars("robustness", description, rows, "% of the questions")
    return Block(title, sentence, figure + table_html(header, cells))
