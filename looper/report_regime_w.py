"""The report's part on Regime W: each figure of metrics/regime_w.json with a sentence on what it says."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup, escape

from looper.report_plots import Bar, bars, histograms, signless_zero
from looper.statistics import wilson
from regime_w.arms import arm_of
from regime_w.bandit import replay

COMPONENTS = ("reward", "s_end", "s_path", "s_cf", "s_wm")


class Block(NamedTuple):
    """A titled piece of the page: a sentence, and a figure or a table below it."""

    title: str
    sentence: str
    body: Markup = Markup("")


class Figures:
    """metrics/regime_w.json. `figures("arms", name, "accuracy")` raises ValueError if there is no such figure."""

    def __init__(self, content: dict[str, Any]):
        self.content = content

    def __call__(self, *keys: str) -> Any:
        value = self.content
        for i, key in enumerate(keys):
            if not isinstance(value, dict) or key not in value:
                raise ValueError(f"metrics/regime_w.json lacks {'.'.join(keys[:i + 1])}; rerun the stage score")
            value = value[key]
        return value


def regime_w_blocks(regime_w: dict[str, Any]) -> list[Block]:
    """The section's pieces, in order. Raises ValueError if metrics/regime_w.json lacks a figure that they show."""
    figures = Figures(regime_w)
    return [block(figures) for block in (_together, _arms, _components, _signal, _counterfactual, _chsh)]


def _together(figures: Figures) -> Block:
    n = figures("questions")
    mean, majority, any_right = (figures("accuracy", key) for key in ("mean", "majority", "any"))
    sentence = (
        f"On {n:,} training questions one arm is right on {_percent(mean)} on average, the most frequent answer on "
        f"{_percent(majority)}, and at least one arm on {_percent(any_right)}: the {100 * (any_right - mean):.1f} "
        "points between one arm and any arm are what training on their own answers can draw on.")
    rows = [Bar("one arm, on average", 100 * mean), _share_bar("majority of the arms", majority, n),
            _share_bar("any of the arms", any_right, n)]
    figure = bars("together", "Accuracy of one arm, of the majority and of any arm", rows, "% of the questions")
    return Block("One arm, the majority, any arm", sentence, figure)


def _arms(figures: Figures) -> Block:
    arms = figures("arms")
    rows = [_share_bar(name, figures("arms", name, "accuracy"), figures("arms", name, "answers")) for name in arms]
    best, worst = max(rows, key=lambda row: row.value), min(rows, key=lambda row: row.value)
    apart = "lie apart" if best.low > worst.high else "overlap, so that these rollouts hardly tell the two apart"
    runs = (f"All arms are right equally often ({best.value:.1f}%)" if best.value == worst.value else
            f"Accuracy runs from {worst.value:.1f}% ({worst.label}) to {best.value:.1f}% ({best.label}); their "
            f"intervals {apart}")
    sentence = (
        f"{runs}. The posterior, from a uniform prior, is what Thompson sampling would draw from. "
        f"{_range(figures, 'majority_share', 'gives the most frequent answer', _percent)}: an arm that seldom does "
        f"goes its own way. {_range(figures, 'mean_length', 'writes', '{:,.0f} tokens an answer'.format)}.")
    header = ["Arm", "Posterior mean, %", "95% of the posterior", "In the majority, %", "Mean tokens"]
    cells = [[name, *_posterior(figures, name), f"{100 * figures('arms', name, 'majority_share'):.1f}",
              f"{figures('arms', name, 'mean_length'):,.0f}"] for name in arms]
    figure = bars("arms", "Accuracy of each arm with its 95% interval", rows, "% of the questions")
    return Block("Each arm", sentence, figure + table_html(header, cells))


def _range(figures: Figures, key: str, does: str, text: Callable[[float], str]) -> str:
    """Which arm has the most of a figure, and which the least."""
    values = {name: figures("arms", name, key) for name in figures("arms")}
    most, least = max(values, key=values.get), min(values, key=values.get)
    if text(values[most]) == text(values[least]):
        return f"Each arm {does} alike ({text(values[most])})"
    return f"{most} {does} most ({text(values[most])}), {least} least ({text(values[least])})"


def _posterior(figures: Figures, arm: str) -> tuple[str, str]:
    mean, low, high = (100 * figures("arms", arm, f"posterior_{key}") for key in ("mean", "low", "high"))
    return f"{mean:.1f}", f"{low:.1f} to {high:.1f}"


def _components(figures: Figures) -> Block:
    correlations = {name: figures(name, "correlation_with_correctness") for name in COMPONENTS}
    defined = {name: value for name, value in correlations.items() if value is not None and name != "reward"}
    mean, low, high = (figures("reward", key) for key in ("mean", "min", "max"))
    end, path, cf, coherence = (figures(name, "mean") for name in COMPONENTS[1:])
    sentence = (
        f"The reward is {mean:.2f} on average and runs from {low:.2f} to {high:.2f}. {_percent(end)} of the pairs of "
        f"arms agree (s_end); the lengths give an s_path of {path:.2f}, where 1 is equal lengths and 0.5 a standard "
        f"deviation as large as the mean; s_cf is {cf:.2f}, and s_wm, the weighted sum of the three, {coherence:.2f}. ")
    if defined:
        most, least = (pick(defined, key=lambda name: abs(defined[name])) for pick in (max, min))
        sentence += (f"Of the components, {most} goes most with the share of arms that are right (correlation "
                     f"{correlation(defined[most])}) and {least} least ({correlation(defined[least])}).")
    else:
        sentence += "No component's correlation with correctness is defined: one of the two does not vary."
    header = ["", "Mean", "Standard deviation", "Minimum", "Maximum", "Correlation with correctness"]
    cells = [[name, *(f"{figures(name, key):.3f}" for key in ("mean", "std", "min", "max")), correlation(value)]
             for name, value in correlations.items()]
    panels = [(name, *_bins(figures(name, "histogram"))) for name in COMPONENTS]
    figure = histograms("components", "Distribution of the reward and of each component over questions", panels)
    return Block("Reward and components", sentence, figure + table_html(header, cells))


def _bins(histogram: dict[str, int]) -> tuple[list[float], list[int]]:
    """(edges, counts) of bins named "low..high", in order."""
    ends = [tuple(map(float, name.split(".."))) for name in histogram]
    return [ends[0][0], *(high for _, high in ends)], list(histogram.values())


def _signal(figures: Figures) -> Block:
    share, mixed = figures("signal", "share"), figures("signal", "mixed_share")
    sentence = (f"On {_percent(share)} of the questions the arms earn different rewards, and arm credit learns from "
                f"those alone; on {_percent(mixed)} some arms are right and some wrong.")
    return Block("Questions with signal", sentence)


def _counterfactual(figures: Figures) -> Block:
    share, gap = figures("counterfactual", "share"), figures("counterfactual", "gap")
    title, placeholder = "Counterfactuals", figures("counterfactual", "placeholder_share")
    if gap is None:
        return Block(title, f"No question has a counterfactual; s_cf is the placeholder on {_percent(placeholder)}.")
    original, changed = (figures("counterfactual", f"accuracy_{version}") for version in ("original", "changed"))
    repeats = figures("counterfactual", "repeats_old_gold")
    sentence = (
        f"{_percent(share)} of the questions have a counterfactual: one number changed, the answer recomputed. There "
        f"the arms are right on {_percent(original)} as asked and on {_percent(changed)} as changed, a gap of "
        f"{signless_zero(100 * gap)} points; {_percent(repeats)} of the answers to the changed question repeat the old "
        "gold. A wide gap and many repeats would speak for remembered answers. s_cf is the placeholder on "
        f"{_percent(placeholder)} of the questions.")
    shares = {"as asked": original, "one number changed": changed, "changed, old gold given": repeats}
    rows = [Bar(label, 100 * value) for label, value in shares.items()]
    figure = bars("counterfactual", "Accuracy on questions and their counterfactuals", rows, "% of the arms' answers")
    return Block(title, sentence, figure)


def _chsh(figures: Figures) -> Block:
    title, s = "CHSH", figures("chsh", "s")
    if s is None:
        return Block(title, "S is not defined: no question has a counterfactual that arms of both styles answered.")
    low, high, p_value, null, null_low, null_high = (
        figures("chsh", key) for key in ("s_low", "s_high", "p_value", "null_mean", "null_low", "null_high"))
    shown = "go right and wrong together" if p_value < 0.05 else "are not shown to go right and wrong together"
    sentence = (
        f"Mean S is {s:.2f} (95% interval {low:.2f} to {high:.2f}) over {figures('chsh', 'questions'):,} questions. "
        f"With one style's outcomes dealt anew among the questions it is {null:.2f} ({null_low:.2f} to "
        f"{null_high:.2f}, p = {p_value:.2g}): the two styles {shown} more than their accuracy alone explains. "
        "Independent arms keep the expected |S| at most 2, so S measures robustness here and nothing quantum.")
    rows = [Bar("observed", s, low, high), Bar("dealt anew", null, null_low, null_high, "base")]
    return Block(title, sentence, bars("chsh", "Mean S, observed and under the permutation null", rows, "S", ".2f"))


def _share_bar(label: str, share: float, n: int) -> Bar:
    _, low, high = wilson(round(share * n), n)  # the majority's ties count in parts: rounded for the interval alone
    return Bar(label, 100 * share, 100 * low, 100 * high)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


class Credit(NamedTuple):
    """What a way to pay the arms teaches. Shares are of the arms' answers that are wrong, right, or all.

    correlation: of an answer's advantage with its own correctness; None where either does not vary.
    """

    correlation: float | None
    wrong_reinforced: float
    right_discouraged: float
    silent: float


def rollout_blocks(rollouts: Iterable[dict[str, Any]]) -> tuple[Block, list[Block]]:
    """(credit_block, Regime W's further pieces) of scored rollouts, which are read once; the pieces come where every
    arm answered every question. Raises ValueError if there are no rollouts, or one lacks what scoring writes."""
    kept = [{"reward": row["reward"], "arm_outputs": [
        {"name": output["name"], "arm": arm_of(output), "correct": output["correct"], "advantage": output["advantage"]}
        for output in row["arm_outputs"]]} for row in rollouts]  # token ids and texts stay behind
    credit = credit_block(kept)
    arms = kept and [output["name"] for output in kept[0]["arm_outputs"]]
    full = all([output["name"] for output in row["arm_outputs"]] == arms for row in kept)
    return credit, [bandit_block(kept)] if full else []


def bandit_block(rollouts: Sequence[dict[str, Any]]) -> Block:
    """What Thompson sampling and UCB1 would have earned, one arm a question. All rows hold the same arms."""
    report = replay(rollouts)
    n, best = report["questions"], report["best_arm"]
    found = {"Uniform": report["uniform_expected"], "Thompson sampling": report["thompson"], "UCB1": report["ucb1"]}
    gains = {name: report[name]["gain_over_uniform"] for name in ("thompson", "ucb1")}
    noise = _two_standard_errors(rollouts)
    verdict = ("more than that noise: the arms differ enough for a bandit to learn which to ask"
               if max(gains.values()) > noise else
               "no more than that noise: on these questions uniform allocation loses nothing that can be shown")
    sentence = (
        f"Had one arm answered each of the {n:,} questions, the best single arm, known only afterwards, would be "
        f"{best['name']} with {_percent(best['accuracy'])}; regret is how many right answers an allocation falls short "
        f"of it. Against uniform, Thompson sampling earns {signless_zero(gains['thompson'])} right answers and UCB1 "
        f"{signless_zero(gains['ucb1'])} ({report['floor']:.0%} of their choices stay even over the arms); two standard "
        f"errors of one uniform run are {noise:.1f}. The better of the two earns {verdict}.")
    rows = [[label, _percent(each["accuracy"]), f"{each['regret']:.1f}"] for label, each in found.items()]
    rows.append([f"Best single arm ({best['name']})", _percent(best["accuracy"]), f"{0:.1f}"])
    return Block("Arms as bandits", sentence, table_html(["Allocation", "Accuracy", "Regret, right answers"], rows))


def _two_standard_errors(rollouts: Sequence[dict[str, Any]]) -> float:
    """Of the right answers of a uniform run with one random arm a question: noise, which a gain must exceed."""
    shares = np.array([np.mean([output["correct"] for output in row["arm_outputs"]]) for row in rollouts])
    return 2 * float(np.sqrt(np.sum(shares * (1 - shares))))


def credit_block(rollouts: Iterable[dict[str, Any]]) -> Block:
    """What question credit and arm credit teach on the same scored rollouts. Raises ValueError if there are none."""
    question, arm = compare_credit(rollouts)
    rows = [[name, correlation(each.correlation), *(f"{100 * share:.1f}" for share in each[1:])]
            for name, each in (("Question credit", question), ("Arm credit", arm))]
    header = ["", "Correlation with own correctness", "Wrong answers reinforced, %", "Right answers discouraged, %",
              "Answers without signal, %"]
    sentence = (
        f"Question credit pays all arms of a question alike, and so reinforces {question.wrong_reinforced:.0%} of the "
        f"wrong answers; arm credit compares each arm with its siblings, and reinforces {arm.wrong_reinforced:.0%}. "
        "An advantage teaches the better, the closer it follows its own answer's correctness: the correlation is "
        f"{correlation(question.correlation)} under question credit, {correlation(arm.correlation)} under arm credit.")
    return Block("Question credit and arm credit", sentence, table_html(header, rows))


def compare_credit(rollouts: Iterable[dict[str, Any]]) -> tuple[Credit, Credit]:
    """(question credit, arm credit) of scored rollouts.

    The advantage under question credit is the question's reward less the mean reward, under arm credit the stored
    leave-one-out advantage. Raises ValueError if there are no rollouts.
    """
    rewards, correct, arm_advantages = [], [], []
    for row in rollouts:
        for arm in row["arm_outputs"]:
            rewards.append(row["reward"])
            correct.append(arm["correct"])
            arm_advantages.append(arm["advantage"])
    if not rewards:
        raise ValueError("data/regime_w_rollouts.jsonl holds no arm's answer; rerun the stages rollouts and score")
    right = np.array(correct)
    return _credit(np.array(rewards) - np.mean(rewards), right), _credit(np.array(arm_advantages), right)


def _credit(advantages: np.ndarray, right: np.ndarray) -> Credit:
    """advantages: one an answer; right: whether that answer is."""
    tiny = 1e-9  # rewards that are equal in exact arithmetic leave rounding errors behind
    positive, negative = advantages > tiny, advantages < -tiny
    varies = np.ptp(advantages) > tiny and right.any() and not right.all()
    return Credit(
        correlation=float(np.corrcoef(advantages, right)[0, 1]) if varies else None,
        wrong_reinforced=_share(positive, ~right), right_discouraged=_share(negative, right),
        silent=float(np.mean(~positive & ~negative)))


def _share(hits: np.ndarray, among: np.ndarray) -> float:
    return float(np.mean(hits[among])) if among.any() else 0.0


def correlation(value: float | None) -> str:
    return "undefined" if value is None else f"{value:+.2f}"


def table_html(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """A table whose first column names its rows; every text is escaped."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in header)
    body = ""
    for first, *others in rows:
        cells = "".join(f"<td>{escape(text)}</td>" for text in others)
        body += f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>\n'
    return Markup(f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>')
