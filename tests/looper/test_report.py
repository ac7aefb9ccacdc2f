import copy
import json
import re
from html.parser import HTMLParser

import pytest

from looper.evaluation import evaluation_metrics, judge
from looper.report import MODELS, about, caveat, plot_rows, summarise, table, verdict, write_report
from looper.report_plots import Curve, read_curve, signless_zero, training_curves
from looper.report_regime_w import compare_credit
from regime_w.arms import ARMS
from regime_w.score import score_rows
from regime_w.settings import ScoreSettings

NASTY = "<script>alert(1)</script> & <b>bold</b>"


def answers(texts: list[str], truncated: bool = False) -> list[dict]:
    rows = [{"id": f"test-{i:05}", "question": f"{i}: {NASTY}", "gold_answer": "18"} for i in range(len(texts))]
    return [judge(row, text, 10 + len(text), truncated) for row, text in zip(rows, texts, strict=True)]


@pytest.fixture(scope="module")
def predictions() -> dict[str, list[dict]]:
    """Ten questions, gold 18. Base is right on 0–2, SFT on 0–4, PPO on 1–5."""
    return {
        "base": answers(["it is 18"] * 3 + ["it is 5"] * 5 + ["none", f"so 7 {NASTY}"]),
        "sft": answers(["#### 18"] * 5 + ["#### 4"] * 5),
        "ppo": answers(["#### 3"] + ["#### 18"] * 5 + ["#### 4"] * 4),
    }


@pytest.fixture(scope="module")
def metrics(predictions) -> dict[str, dict]:
    return {model: evaluation_metrics(rows) for model, rows in predictions.items()}


@pytest.fixture(scope="module")
def summary(predictions, metrics) -> dict:
    return summarise(predictions, metrics)


def test_summary_by_hand(summary, metrics):
    assert summary["questions"] == 10
    assert summary["accuracy"] == {"base": 0.3, "sft": 0.5, "ppo": 0.5}
    assert summary["interval"]["base"] == {"low": 0.107791, "high": 0.603222}  # Wilson, 3 of 10
    assert summary["format_rate"] == {"base": 0.0, "sft": 1.0, "ppo": 1.0}
    assert summary["strict_match"] == {"base": 0.0, "sft": 0.5, "ppo": 0.5}
    assert summary["flexible_extract"] == {"base": 0.3, "sft": 0.5, "ppo": 0.5}
    assert summary["truncation_rate"] == {"base": 0.0, "sft": 0.0, "ppo": 0.0}
    assert summary["mean_tokens"] == {model: metrics[model]["mean_tokens"] for model in MODELS}


def test_paired_comparisons_by_hand(summary):
    sft_base, ppo_sft, ppo_base = (summary["paired"][pair] for pair in ("sft_vs_base", "ppo_vs_sft", "ppo_vs_base"))
    assert (sft_base["difference"], sft_base["gained"], sft_base["lost"]) == (0.2, 2, 0)
    assert sft_base["p_value"] == 0.5  # 2 / 2²
    assert (ppo_sft["difference"], ppo_sft["gained"], ppo_sft["lost"], ppo_sft["p_value"]) == (0.0, 1, 1, 1.0)
    assert (ppo_base["difference"], ppo_base["gained"], ppo_base["lost"]) == (0.2, 3, 1)
    assert ppo_base["p_value"] == 0.625  # 2 · (1 + 4) / 2⁴
    for test in summary["paired"].values():
        assert test["low"] <= test["difference"] <= test["high"]


def test_summary_is_plain_json(summary):
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_the_parts_add_up_to_the_difference(predictions, summary):
    for test in summary["paired"].values():
        assert sum(part["difference"] for part in test["gain"].values()) == pytest.approx(test["difference"], abs=3e-6)
        assert sum(part["questions"] for part in test["gain"].values()) == test["gained"] + test["lost"]


def test_summarise_names_what_is_missing(predictions, metrics):
    with pytest.raises(ValueError, match=r"predictions/sft.jsonl holds no predictions; rerun the stage eval@sft"):
        summarise({**predictions, "sft": []}, metrics)
    with pytest.raises(ValueError, match=r"eval_ppo.json was not given; rerun the stage eval@ppo"):
        summarise(predictions, {"base": metrics["base"], "sft": metrics["sft"]})
    broken = copy.deepcopy(metrics)
    del broken["ppo"]["strict_match"]["low"]
    with pytest.raises(ValueError, match=r"eval_ppo.json: strict_match: low missing; rerun the stage eval@ppo"):
        summarise(predictions, broken)
    del broken["ppo"]["strict_match"], broken["ppo"]["mean_tokens"]
    with pytest.raises(ValueError, match=r"eval_ppo.json: strict_match, mean_tokens missing"):
        summarise(predictions, broken)


def test_summarise_refuses_what_cannot_be_paired(predictions, metrics):
    with pytest.raises(ValueError, match=r"eval_sft.json counts 10 questions, data/predictions/sft.jsonl holds 9"):
        summarise({**predictions, "sft": predictions["sft"][:9]}, metrics)
    with pytest.raises(ValueError, match=r"predictions/ppo.jsonl and base.jsonl answer different questions"):
        summarise({**predictions, "ppo": predictions["ppo"][::-1]}, metrics)


def test_table_shows_every_figure(summary):
    text = table(summary)
    lines = text.splitlines()
    base = next(line for line in lines if line.startswith("Base "))
    assert base.split()[1:] == ["30.0", "10.8", "to", "60.3", "0.0", "30.0", "0.0", "0.0", "21"]
    ppo = next(line for line in lines if line.startswith("PPO - Base"))
    assert ppo.split()[3:] == ["+20.0", "-20.0", "to", "+60.0", "3", "1", "0.62", "0.0", "+20.0", "0.0"]
    assert max(map(len, lines)) <= 100
    text.encode("ascii")  # it is printed in any terminal


def test_verdicts_claim_no_more_than_the_test_shows(summary):
    assert verdict(summary, "ppo_vs_base") == (
        "No difference shown between PPO and Base: +20.0 points (-20.0 to +60.0, p = 0.62). "
        "A true difference of 56.0 points would show in 80% of such tests.")  # (1.960 + 0.842) · √4 / 10
    same = copy.deepcopy(summary)
    same["paired"]["ppo_vs_base"] |= {"gained": 0, "lost": 0, "difference": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0}
    assert verdict(same, "ppo_vs_base") == (
        "No difference shown between PPO and Base: 0.0 points (0.0 to 0.0, p = 1.00).")
    clear = copy.deepcopy(summary)
    clear["paired"]["ppo_vs_base"] |= {"p_value": 0.00001, "difference": -0.2, "low": -0.3, "high": -0.1}
    assert verdict(clear, "ppo_vs_base") == "PPO is below Base: -20.0 points (-30.0 to -10.0, p < 0.0001)."


def test_a_figure_that_rounds_to_nothing_has_no_sign():
    assert [signless_zero(value) for value in (-0.04, 0.0, 0.04, -0.06, 0.06)] == ["0.0", "0.0", "0.0", "-0.1", "+0.1"]
    assert signless_zero(-0.001, ".2f") == "0.00"


def test_few_questions_come_with_a_caveat(summary):
    """The widest interval is of 5 of 10: Wilson's 23.7 to 76.3."""
    assert caveat(summary) == (
        "With 10 questions these figures are rough: an accuracy is known to within about 26 points either way. "
        "The smallest true difference that the paired test would show in 80% of cases: SFT − Base 39.6 points, "
        "PPO − SFT 39.6 points, PPO − Base 56.0 points.")  # (1.960 + 0.842) · √2 / 10, √4 / 10
    assert caveat({**summary, "questions": 200}) == ""


def test_a_lone_point_of_a_curve_is_drawn():
    """A line through one point has no length: only its marker is seen."""
    assert "<use" in _lines(training_curves("t", "T", [Curve("x", [(1, 0.5)])]))
    assert "<use" not in _lines(training_curves("t", "T", [Curve("x", [(1, 0.5), (2, 0.25)])]))


def _lines(svg: str) -> str:
    """The figure's part in the accent's colour: its curves."""
    return "".join(each for each in re.findall(r"<use [^>]*>", svg) if "--accent" in each)


def test_the_run_is_named():
    counts = {"train": 1000, "dev": 20, "test": 52}
    wheel = {"source": "wheel", "requirement": "x==1", "file": "x/tiny.gguf", "sha256": "0123456789abcdef"}
    assert about(wheel, {"source": "sample"}, counts, {"Seed": 0}) == {
        "Base model": "tiny.gguf (wheel, sha256 0123456789ab)",
        "Questions": "the built-in problems (1,000 train, 20 dev, 52 test)", "Seed": "0"}
    hub = {"source": "hub", "repo": "a/b", "revision": "f" * 40}
    named = about(hub, {"source": "path", "path": "gsm8k"}, counts, {})
    assert named["Base model"] == "a/b (hub, revision ffffffffffff)"
    assert named["Questions"].startswith("gsm8k (")
    folder = about({"source": "folder", "path": "weights/tiny", "digest": None}, {"source": "sample"}, counts, {})
    assert folder["Base model"] == "tiny (folder, not pinned)"


def test_plot_rows(summary):
    assert plot_rows(summary)[0] == {"model": "Base", "accuracy": 0.3, "low": 0.107791, "high": 0.603222}
    assert [row["model"] for row in plot_rows(summary)] == ["Base", "SFT", "PPO"]


class Page(HTMLParser):
    """Collects the tags, the ids and the text of a page, and that tags nest."""

    VOID = {"meta", "br", "link", "img", "input", "hr"}

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.ids, self.texts, self.open, self.links = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href"):
                self.links.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def report(tmp_path_factory, predictions, summary):
    """write_report's other arguments, by name: real scored rollouts of two questions, one curve."""
    rollouts, regime_w = scored()
    curve = tmp_path_factory.mktemp("curves") / "loss.tsv"
    curve.write_text("step\tloss\n1\t2.5\n2\tnan\n3\t1.5\n")
    return {"summary": summary, "predictions": predictions, "curves": [("SFT: loss", curve)], "regime_w": regime_w,
            "rollouts": rollouts, "run": {"Base model": "tiny (hub, revision 0123456789ab)"},
            "weights": {"base": None, "sft": "abcdef0123456789", "ppo": None}, "metrics": {
                "metrics/x.json": {"a": {"b": 0.25, "c": NASTY}, "empty": {}},
                "dev": {"base": dev_figures(0.5), "sft": dev_figures(0.75)}, "dev_ppo": {"ppo": dev_figures(0.875)}}}


def dev_figures(accuracy: float) -> dict:
    """What `predict_dev` gives for a model that is right on `accuracy` of the questions and on half that when changed."""
    def interval(value: float) -> dict:
        return {"value": value, "low": value - 0.1, "high": value + 0.1}

    return {"accuracy": interval(accuracy), "counterfactual": {
        "n": 8, "original": interval(accuracy), "changed": interval(accuracy / 2), "gap": interval(accuracy / 2),
        "repeats_old_gold": 0.125}}


@pytest.fixture(scope="module")
def text(tmp_path_factory, report) -> str:
    """The page, written once: drawing takes seconds."""
    return write(tmp_path_factory.mktemp("report"), report)


def scored(answers: tuple[str, ...] = ("18", "18", "18", "5", "18", "5", "6", "18"), counterfactual: bool = True):
    """(scored rollouts, metrics) of two questions with gold 18: one answered so, one that no arm gets right."""
    def row(i: int, given: tuple[str, ...]) -> dict:
        outputs = [{"name": arm.name, "style": arm.style, "answer": answer, "num_tokens": 100 + place,
                    "counterfactual": {"answer": "20"} if counterfactual else None}
                   for place, (arm, answer) in enumerate(zip(ARMS, given, strict=True))]
        return {"id": f"train-{i}", "question": "?", "gold_answer": "18", "arm_outputs": outputs,
                "counterfactual": {"question": "??", "gold_answer": "20"} if counterfactual else None}
    rows, metrics = score_rows([row(0, answers), row(1, ("7",) * 8)], ScoreSettings(resamples=100))
    return list(rows), metrics.metrics()


def write(tmp_path, report, **changes) -> str:
    path = tmp_path / "report.html"
    write_report(path, **{**report, **changes})
    return path.read_text(encoding="utf-8")


def test_report_is_one_sound_page_that_fetches_nothing(text):
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert page.links and all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert "script" not in page.tags
    assert not re.search(r"url\((?!#)|@import", text)
    assert "Content-Security-Policy" in text


def test_report_escapes_what_models_and_data_hold(text):
    assert "<script" not in text
    assert "<b>" not in text
    assert text.count("&lt;script&gt;alert(1)") >= 3  # questions, an answer, a metric
    assert NASTY in "".join(Page(text).texts)


def test_report_shows_the_comparison(text):
    shown = " ".join("".join(Page(text).texts).split())
    for expected in ("on 10 test questions", "30.0 (10.8 to 60.3)", "SFT: loss",
                     "Base model tiny (hub, revision 0123456789ab)", "SFT adapter abcdef012345 50.0",
                     "No difference shown between SFT and Base: +20.0 points", "gap of -68.8 points", "a.b0.25",
                     "answer 2 of 10 questions rightly (20.0%) and all fail on 4 (40.0%); they differ on 4",
                     "Base wrong, SFT right, PPO right: 2 questions", "Base right, SFT right, PPO wrong: 1 question "):
        assert expected in shown


@pytest.mark.slow
def test_report_is_the_same_bytes_again_and_knows_no_date(tmp_path, report, text):
    assert write(tmp_path, report) == text
    assert not re.search(r"20[0-9]{2}-[0-9]{2}-[0-9]{2}", text)


def test_every_colour_is_the_page_s(text):
    """A fixed colour, or a text without one, would not be seen in one of the two schemes."""
    figures = re.findall(r"<svg .*?</svg>", text, re.DOTALL)
    assert len(figures) == 9
    for figure in figures:
        assert re.search(r'aria-label="[A-Z]', figure)
        assert not re.search(r"(?:fill|stroke): #", figure)
        assert all("fill: var(--" in each for each in re.findall(r"<text [^>]*>", figure))
    used = set(re.findall(r"var\(--(\w+)\)", text))
    declared = re.findall(r"--(\w+): ", text)
    assert used <= set(declared)
    colours = {name for name in declared if name != "mark"}
    assert all(declared.count(name) == 2 for name in colours - {"base", "sft", "ppo"})


def test_report_without_curves_or_counterfactuals_and_with_a_long_answer(tmp_path, report, predictions):
    rollouts, regime_w = scored(counterfactual=False)
    base = copy.deepcopy(predictions["base"])
    base[0]["full_text"] = "head" + "x" * 10_000 + "tail"
    text = write(tmp_path, report, curves=[], rollouts=rollouts, regime_w=regime_w,
                 predictions={**predictions, "base": base})
    assert "No training curve was given." in text
    assert "No question has a counterfactual" in text
    assert "S is not defined" in text
    assert "7,008 characters left out" in text
    assert "headx" in text and "xtail" in text and "x" * 2001 not in text


def test_report_needs_every_figure_and_writes_nothing_without(tmp_path, report):
    broken = copy.deepcopy(report["regime_w"])
    del broken["accuracy"]["any"]
    with pytest.raises(ValueError, match=r"metrics/regime_w.json lacks accuracy.any; rerun the stage score"):
        write(tmp_path, report, regime_w=broken)
    with pytest.raises(ValueError, match=r"missing.tsv \(training curve 'PPO: KL'\) is not here"):
        write(tmp_path, report, curves=[("PPO: KL", tmp_path / "missing.tsv")])
    with pytest.raises(ValueError, match="no arm's answer; rerun the stages rollouts and score"):
        write(tmp_path, report, rollouts=[])
    assert not (tmp_path / "report.html").exists()


def test_a_curve_is_read_as_written(tmp_path):
    path = tmp_path / "kl.tsv"
    path.write_text("step\tkl\n1\t0.5\n2\tinf\n10\t-0.25\n")
    assert read_curve("PPO: KL", path).points == [(1, 0.5), (10, -0.25)]
    path.write_text("step\tloss\n1\t0.5\n")
    with pytest.raises(ValueError, match="columns step and kl"):
        read_curve("PPO: KL", path)
    path.write_text("step\tkl\n1\n")
    with pytest.raises(ValueError, match="columns step and kl"):
        read_curve("PPO: KL", path)


def test_credit_by_hand():
    """One question, rewards as given: wrong arms of a rewarded question are reinforced by question credit alone."""
    def row(reward, arms):
        return {"reward": reward, "arm_outputs": [{"correct": c, "advantage": a} for c, a in arms]}
    rows = [row(1.0, [(True, 0.5), (False, -0.5)]), row(-1.0, [(False, 0.0), (False, 0.0)])]
    question, arm = compare_credit(rows)
    # advantages 1, 1, -1, -1 against outcomes 1, 0, 0, 0: covariance 1/4, deviations 1 and √3/4
    assert question.correlation == pytest.approx(1 / 3**0.5)
    assert question[1:] == pytest.approx((1 / 3, 0, 0))
    # advantages 1/2, -1/2, 0, 0: covariance 1/8, deviations √(1/8) and √3/4
    assert arm.correlation == pytest.approx((1 / 8) / ((1 / 8) ** 0.5 * 3**0.5 / 4))
    assert arm[1:] == (0, 0, 0.5)


def test_credit_where_nothing_varies():
    question, arm = compare_credit([{"reward": 1.2, "arm_outputs": [{"correct": True, "advantage": 0.0}] * 3}] * 3)
    assert question == arm == (None, 0.0, 0.0, 1.0)
