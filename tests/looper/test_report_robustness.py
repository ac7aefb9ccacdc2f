"""Robustness in the report: each model's figures, and what is missing."""

import pytest

from looper.report import MODELS
from looper.report_robustness import robustness_block

FIGURES = {"n": 40, "original": {"value": 0.5, "low": 0.35, "high": 0.65}, "changed": {"value": 0.25, "low": 0.14, "high": 0.4},
           "gap": {"value": 0.25, "low": 0.05, "high": 0.45}, "repeats_old_gold": 0.075}
DEV = {name: {"accuracy": {"value": 0.3}, "counterfactual": FIGURES} for name in MODELS}


def test_every_model_stands_in_the_table_with_its_figures():
    block = robustness_block(DEV | {"ppo": {"accuracy": {"value": 0.9}, "counterfactual": FIGURES | {"repeats_old_gold": 0.0}}},
                             MODELS)
    assert "40 dev questions" in block.sentence
    for label, accuracy, repeats in (("Base", "30.0", "7.5"), ("SFT", "30.0", "7.5"), ("PPO", "90.0", "0.0")):
        cells = (accuracy, "50.0", "25.0", "+25.0 (+5.0 to +45.0)", repeats)
        assert f'<tr><th scope="row">{label}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>" in block.body
    assert block.body.count("one number changed") >= 3 and "25.0 (14.0 to 40.0)" in block.body


def test_no_counterfactual_is_said():
    block = robustness_block({name: {"accuracy": {"value": 0.3}, "counterfactual": {"n": 0}} for name in MODELS}, MODELS)
    assert block.sentence == "None of the dev questions asked has a counterfactual." and block.body == ""


@pytest.mark.parametrize(("missing", "error"), [
    ("sft", "metrics/dev.json lacks sft.counterfactual; rerun the stage dev_eval"),
    ("ppo", "metrics/dev_ppo.json lacks ppo.counterfactual; rerun the stage dev_ppo"),
])
def test_what_is_missing_is_named(missing, error):
    with pytest.raises(ValueError, match=error):
        robustness_block(DEV | {missing: {"accuracy": {"value": 0.3}}}, MODELS)
