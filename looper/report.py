"""The comparison of Base, SFT and PPO: `metrics/summary.json`, the table at the end of `dvc repro`, and the page."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from looper.comparison import GAINS, compare
from looper.files import write_text
from looper.report_plots import Bar, bars, read_curve, signless_zero, training_curves
from looper.report_regime_w import regime_w_blocks, rollout_blocks
from looper.report_robustness import robustness_block

MODELS = {"base": "Base", "sft": "SFT", "ppo": "PPO"}
PAIRS = {"sft_vs_base": ("base", "sft"), "ppo_vs_sft": ("sft", "ppo"), "ppo_vs_base": ("base", "ppo")}  # name: old, new
FIGURES = ("accuracy", "format_rate", "strict_match", "flexible_extract")  # each with its interval
SHARES = ("strict_match", "flexible_extract", "format_rate", "truncation_rate")  # the tables' columns
NOTES = (
    "strict, flexible: lm-evaluation-harness's filters on the same texts. format: in the form asked for.",
    "A difference is the sum of its last three columns. format: the wrong answer is unreadable or did",
    "not end; reasoning: both are in the form asked for, or the wrong one never writes the right number;",
    "either: the rest, which may be one or the other.",
)
TEMPLATE = Path(__file__).with_name("report.html.j2")
SMALL = 200  # test questions; with fewer, the page says what so few can show
EXAMPLES = 2  # questions shown of each pattern of right and wrong models
SHOWN = 3000  # characters of an answer that the page shows

Predictions = dict[str, list[dict[str, Any]]]


def summarise(predictions: Predictions, metrics: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What metrics/summary.json holds: every figure by model, then the paired comparisons.

    predictions, metrics: by "base", "sft" and "ppo", the rows of data/predictions/ and what metrics/eval_*.json holds.
    Shares are fractions of the questions. Raises ValueError if a model or a figure is missing, or if the models did not
    answer the same questions in the same order.
    """
    _check(predictions, metrics)
    intervals = {model: {end: metrics[model]["accuracy"][end] for end in ("low", "high")} for model in MODELS}
    return {
        "questions": len(predictions["base"]),
        "accuracy": {model: metrics[model]["accuracy"]["value"] for model in MODELS},
        "interval": intervals,
        **{name: {model: metrics[model][name]["value"] for model in MODELS} for name in FIGURES[1:]},
        **{name: {model: metrics[model][name] for model in MODELS} for name in ("truncation_rate", "mean_tokens")},
        "paired": {pair: compare(predictions[old], predictions[new]) for pair, (old, new) in PAIRS.items()},
    }


def _check(predictions: Predictions, metrics: dict[str, dict[str, Any]]) -> None:
    for model in MODELS:
        rerun = f"rerun the stage eval@{model}"
        if not predictions.get(model):
            raise ValueError(f"data/predictions/{model}.jsonl holds no predictions; {rerun}")
        if model not in metrics:
            raise ValueError(f"metrics/eval_{model}.json was not given; {rerun}")
        file = f"metrics/eval_{model}.json"
        _require_keys(metrics[model], (*FIGURES, "n", "truncation_rate", "mean_tokens"), file, rerun)
        for name in FIGURES:
            _require_keys(metrics[model][name], ("value", "low", "high"), f"{file}: {name}", rerun)
        if metrics[model]["n"] != len(predictions[model]):
            raise ValueError(f"metrics/eval_{model}.json counts {metrics[model]['n']} questions, "
                             f"data/predictions/{model}.jsonl holds {len(predictions[model])}; {rerun}")
        if [row["id"] for row in predictions[model]] != [row["id"] for row in predictions["base"]]:
            raise ValueError(f"data/predictions/{model}.jsonl and base.jsonl answer different questions, or in another "
                             f"order: nothing can be paired; {rerun} and eval@base on the same data/test.jsonl")


def _require_keys(found: Any, keys: Sequence[str], where: str, what_to_do: str) -> None:
    missing = [key for key in keys if not isinstance(found, dict) or key not in found]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} missing; {what_to_do}")


def table(summary: dict[str, Any]) -> str:
    """The comparison as plain text of up to 100 columns: each model's figures, then the paired differences."""
    lines = [f"Test split: {summary['questions']:,} questions, greedy answers. In percent, intervals at 95%.", "",
             f"{'':12}{'accuracy':>10}{'interval':>15}{'strict':>9}{'flexible':>10}{'format':>9}{'truncated':>11}"
             f"{'tokens':>9}"]
    for model, label in MODELS.items():
        strict, flexible, form, truncated = (100 * summary[name][model] for name in SHARES)
        lines.append(f"{label:12}{100 * summary['accuracy'][model]:10.1f}{_range(summary['interval'][model]):>15}"
                     f"{strict:9.1f}{flexible:10.1f}{form:9.1f}{truncated:11.1f}{summary['mean_tokens'][model]:9.0f}")
    lines += ["", "Paired on the same questions, in points:", "",
              f"{'':12}{'difference':>10}{'interval':>15}{'gained':>9}{'lost':>10}{'McNemar p':>12}"
              f"  ={'format':>7}{'reasoning':>10}{'either':>8}"]
    for pair, (old, new) in PAIRS.items():
        test = summary["paired"][pair]
        form, reasoning, either = (100 * test["gain"][name]["difference"] for name in GAINS)
        lines.append(f"{MODELS[new] + ' - ' + MODELS[old]:12}{signless_zero(100 * test['difference']):>10}"
                     f"{_range(test, '+'):>15}"
                     f"{test['gained']:9}{test['lost']:10}{p_text(test['p_value']):>12}"
                     f"   {signless_zero(form):>7}{signless_zero(reasoning):>10}{signless_zero(either):>8}")
    return "\n".join([*lines, "", *NOTES])


def about(base: Mapping[str, Any], questions: Mapping[str, Any], counts: Mapping[str, int],
          settings: Mapping[str, Any]) -> dict[str, str]:
    """What names the run: label and text. No date, so that the same run gives the same page.

    base, questions: the sections base and prepare of params.yaml. counts: rows by split, of metrics/data.json.
    settings: further labels and values, taken as they are.
    """
    name = base.get("repo") or Path(base.get("file") or base["path"]).name
    pin = next((f"{key} {base[key][:12]}" for key in ("revision", "sha256", "digest") if base.get(key)), "not pinned")
    source = {"sample": "the built-in problems"}.get(questions["source"]) or questions.get("repo") or questions["path"]
    rows = ", ".join(f"{counts[split]:,} {split}" for split in ("train", "dev", "test"))
    return {"Base model": f"{name} ({base['source']}, {pin})", "Questions": f"{source} ({rows})",
            **{label: str(value) for label, value in settings.items()}}


def verdict(summary: dict[str, Any], pair: str) -> str:
    """One sentence on a paired comparison, as far as its test allows."""
    old, new = (MODELS[model] for model in PAIRS[pair])
    test = summary["paired"][pair]
    size = f"{signless_zero(100 * test['difference'])} points ({_range(test, '+')}, p {_equals(test['p_value'])})"
    if test["p_value"] < 0.05:
        return f"{new} is {'above' if test['difference'] > 0 else 'below'} {old}: {size}."
    text = f"No difference shown between {new} and {old}: {size}."
    if test["gained"] + test["lost"] == 0 or test["detectable"] >= 1:
        return text  # too few questions that differ for the approximation to say anything
    return f"{text} A true difference of {100 * test['detectable']:.1f} points would show in 80% of such tests."


def caveat(summary: dict[str, Any]) -> str:
    """How little a small test split can show; empty from SMALL questions on.

    Half the width is of the Wilson intervals on the page. The detectable difference is that of `detectable_difference`
    where it means anything: the normal approximation needs discordant pairs, and a difference cannot exceed 100 points.
    """
    if summary["questions"] >= SMALL:
        return ""
    half = max(100 * (each["high"] - each["low"]) / 2 for each in summary["interval"].values())
    found = [f"{MODELS[new]} − {MODELS[old]} {100 * test['detectable']:.1f} points"
             for pair, (old, new) in PAIRS.items()
             if (test := summary["paired"][pair])["gained"] + test["lost"] and test["detectable"] < 1]
    text = (f"With {summary['questions']:,} questions these figures are rough: an accuracy is known to within about "
            f"{half:.0f} points either way.")
    if not found:
        return f"{text} Too few questions differ between the models to say what difference a test could show."
    return f"{text} The smallest true difference that the paired test would show in 80% of cases: {', '.join(found)}."


def p_text(p_value: float) -> str:
    return "< 0.0001" if p_value < 0.0001 else f"{p_value:.2g}" if p_value < 0.1 else f"{p_value:.2f}"


def _equals(p_value: float) -> str:
    text = p_text(p_value)
    return text if text.startswith("<") else f"= {text}"


def _range(interval: dict[str, float], sign: str = "") -> str:
    low, high = (signless_zero(100 * interval[end], f"{sign}.1f") for end in ("low", "high"))
    return f"{low} to {high}"


def plot_rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """What `dvc plots` draws: one row a model with its accuracy and interval."""
    return [{"model": label, "accuracy": summary["accuracy"][model], **summary["interval"][model]}
            for model, label in MODELS.items()]


def write_report(path: Path, summary: dict[str, Any], predictions: Predictions, curves: Sequence[tuple[str, Path]],
                 regime_w: dict[str, Any], rollouts: Iterable[dict[str, Any]], metrics: Mapping[str, Any],
                 run: Mapping[str, str], weights: Mapping[str, str | None]) -> None:
    """Writes the page: one HTML file that fetches nothing and runs no script, equal bytes for equal input.

    summary: of `summarise`, for these predictions. curves: titles and DVCLive files; a title that begins with SFT or
    PPO takes that model's colour. regime_w: what metrics/regime_w.json holds. rollouts: the rows of
    data/regime_w_rollouts.jsonl, read once. metrics: by name, what the page lists in full at its end; robustness is
    read from "dev" and "dev_ppo". run: of `about`. weights: by model, the SHA-256 of its adapter where one is known.
    Raises ValueError if a curve's file, a key of regime_w or a model's counterfactual figures are missing; nothing is
    written then.
    """
    read = [read_curve(title, file, _colour(title)) for title, file in curves]
    credit, replayed = rollout_blocks(rollouts)
    robustness = robustness_block({**metrics["dev"], **metrics["dev_ppo"]}, MODELS)
    page = _environment().from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        summary=summary, caveat=caveat(summary), run=run, weights=weights, models=MODELS, pairs=PAIRS,
        verdicts={pair: verdict(summary, pair) for pair in PAIRS},
        accuracy_figure=_accuracy_figure(summary), gain_figure=_gain_figure(summary),
        curves_figure=training_curves("training", "Training curves of SFT and PPO", read) if read else "",
        regime_w_blocks=regime_w_blocks(regime_w) + replayed, credit=credit, robustness=robustness,
        agreement=_agreement(predictions), groups=_groups(predictions),
        metrics={name: _flat(content) for name, content in metrics.items()})
    write_text(path, page)


def _environment() -> Environment:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        percent=lambda share: f"{100 * share:.1f}", points=lambda share: signless_zero(100 * share),
        interval=_range, p_value=p_text, shorten=_shorten)
    return environment


def _colour(title: str) -> str:
    first = title.split()[0].strip(":").lower()
    return first if first in MODELS else "accent"


def _accuracy_figure(summary: dict[str, Any]) -> str:
    rows = []
    for model, label in MODELS.items():
        interval = summary["interval"][model]
        values = (100 * each for each in (summary["accuracy"][model], interval["low"], interval["high"]))
        rows.append(Bar(label, *values, model))
    return bars("accuracy", "Test accuracy of each model with its 95% interval", rows, "accuracy, % of the questions")


def _gain_figure(summary: dict[str, Any]) -> str:
    rows = []
    for pair, (old, new) in PAIRS.items():
        for name, part in summary["paired"][pair]["gain"].items():
            values = (100 * part[key] for key in ("difference", "low", "high"))
            rows.append(Bar(f"{MODELS[new]} − {MODELS[old]}: {name}", *values, new))
    return bars("gain", "Each difference in accuracy as the sum of three parts", rows, "points of accuracy", "+.1f")


def _agreement(predictions: Predictions) -> str:
    outcomes = list(zip(*([row["correct"] for row in predictions[model]] for model in MODELS), strict=True))
    n, all_right, none = len(outcomes), sum(map(all, outcomes)), sum(not any(each) for each in outcomes)
    return (f"All three models answer {all_right:,} of {n:,} questions rightly ({all_right / n:.1%}) and all fail on "
            f"{none:,} ({none / n:.1%}); they differ on {n - all_right - none:,}. The first questions of each kind:")


def _groups(predictions: Predictions) -> list[dict[str, Any]]:
    """The questions on which the models differ, by the pattern of who is right; most frequent first."""
    groups: dict[tuple[bool, ...], list[dict[str, Any]]] = {}
    for rows in zip(*(predictions[model] for model in MODELS), strict=True):
        pattern = tuple(row["correct"] for row in rows)
        if len(set(pattern)) > 1:
            groups.setdefault(pattern, []).append(dict(zip(MODELS, rows, strict=True)))
    return [{"pattern": pattern, "count": len(found),
             "examples": [{key: rows["base"][key] for key in ("id", "question", "gold_answer")} | {"rows": rows}
                          for rows in found[:EXAMPLES]]}
            for pattern, found in sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))]


def _shorten(text: str) -> str:
    if len(text) <= SHOWN:
        return text
    head, tail = text[:SHOWN * 2 // 3], text[-SHOWN // 3:]
    return f"{head}\n\n[… {len(text) - len(head) - len(tail):,} characters left out …]\n\n{tail}"


def _flat(content: Any, path: str = "") -> list[tuple[str, str]]:
    """(dotted key, value as JSON) for each leaf."""
    if isinstance(content, dict) and content:
        return [leaf for key, value in content.items() for leaf in _flat(value, f"{path}.{key}" if path else str(key))]
    return [(path, json.dumps(content, ensure_ascii=False))]
