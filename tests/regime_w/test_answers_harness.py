"""strict_match, flexible_extract and harness_match against lm-evaluation-harness, with its task's own patterns."""

import importlib.util
import random
import sys
import types
from pathlib import Path

import pytest
import yaml

from regime_w.answers import flexible_extract, harness_match, strict_match

pytestmark = pytest.mark.slow

PIECES = ["#### ", "####", "18", "1,800", "-3", "$", "$18", ".", ",", "18.00", "...", "\n", " ", "<think>", "</think>",
    "\\boxed{18}", "x",
          "-", "#### -1,800.", "#### $18", "answer is ", "0", "٣", "½", "\u2212" "5", "#### 18.\n"]


@pytest.fixture(scope="module")
def task() -> dict:
    """The harness's gsm8k task, as its package ships it."""
    package = Path(importlib.util.find_spec("lm_eval").origin).parent
    return yaml.safe_load((package / "tasks" / "gsm8k" / "gsm8k.yaml").read_text())


@pytest.fixture(scope="module")
def texts() -> list[str]:
    random_ = random.Random(0)
    return ["", *PIECES, *("".join(random_.choices(PIECES, k=random_.randint(1, 12))) for _ in range(20_000))]


def harness_filter(task: dict, name: str, texts: list[str]) -> list[str]:
    from lm_eval.filters.extraction import RegexFilter

    steps = next(each["filter"] for each in task["filter_list"] if each["name"] == name)
    assert [step["function"] for step in steps] == ["regex", "take_first"]
    options = {key: value for key, value in steps[0].items() if key != "function"}
    return [found[0] for found in RegexFilter(**options).apply([[text] for text in texts], [{}] * len(texts))]


def test_strict_match_equals_the_harness(task: dict, texts: list[str]) -> None:
    expected = harness_filter(task, "strict-match", texts)
    assert [strict_match(text) for text in texts] == expected
    assert 0.1 < sum(each == "[invalid]" for each in expected) / len(expected) < 0.9


def test_flexible_extract_equals_the_harness(task: dict, texts: list[str]) -> None:
    expected = harness_filter(task, "flexible-extract", texts)
    assert [flexible_extract(text) for text in texts] == expected
    assert len(set(expected)) > 1000


def test_harness_match_equals_the_harness(task: dict, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # That module imports sacrebleu for metrics of translation; exact_match needs none of it
    monkeypatch.setitem(sys.modules, "sacrebleu", sys.modules.get("sacrebleu", types.ModuleType("sacrebleu")))
    from lm_eval.api.metrics import exact_match_hf_evaluate

    metric = task["metric_list"][0]
    options = {key: metric[key] for key in ("regexes_to_ignore", "ignore_case", "ignore_punctuation")}
    golds = ["18", "1,800", "-3", "It is 6 * 3 = <<6*3=18>>18.\n#### 18", "so\n#### 1,800", "[INVALID]"]
    matches = 0
    for i, text in enumerate(texts[:6000]):
        for extracted in (strict_match(text), flexible_extract(text)):
            gold = golds[i % len(golds)]
            expected = bool(exact_match_hf_evaluate(predictions=[extracted], references=[gold],
                **options)["exact_match"])
            assert harness_match(extracted, gold) is expected, (extracted, gold)
            matches += expected
    assert matches > 300
