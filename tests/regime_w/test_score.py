import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regime_w.answer_set import AnswerSet
from regime_w.reward import total
from regime_w.sample_rows import random_rows, worked_rows
from regime_w.score import score_file, score_row, score_rows
from regime_w.settings import ScoreSettings


def row(answers: list, lengths: list, gold: str = "18", changed: list | None = None, styles: str = "wm") -> dict:
    """A row with arms of alternating styles; `changed` are the answers to a counterfactual with gold 21."""
    half = {"w": "wolfram", "m": "maudlin"}
    outputs = [{"name": f"arm-{i}", "style": half[styles[i % len(styles)]], "answer": answer, "num_tokens": length,
                "counterfactual": changed and {"answer": changed[i]}} for i,
                (answer, length) in enumerate(zip(answers, lengths))]
    return {"id": "q", "question": "?", "gold_answer": gold, "extra": 1, "arm_outputs": outputs,
            "counterfactual": {"gold_answer": "21"} if changed else None}


def test_a_row_by_hand() -> None:
    scored = score_row(row(["18", "18.0", "7", None], [100, 300, 500, 700], changed=["21", "18", "21.00", None]))
    s_end, s_path, s_cf = 1 / 6, 1600**2 / (4 * 840000), 0.5
    s_wm = 0.4 * s_end + 0.3 * s_path + 0.3 * s_cf
    assert (scored["s_end"], scored["s_cf"]) == (s_end, s_cf)
    assert scored["s_path"] == pytest.approx(s_path, abs=1e-12)
    assert scored["s_wm"] == pytest.approx(s_wm, abs=1e-12)
    assert scored["reward"] == pytest.approx(1 + 0.7 * s_wm, abs=1e-12)
    arms = scored["arm_outputs"]
    assert [arm["correct"] for arm in arms] == [True, True, False, False]
    # Without arm 0: answers 18, 7, none: no pair; lengths 300, 500, 700; one of three right on the counterfactual
    without = 0.3 * 1500**2 / (3 * 830000) + 0.3 / 3
    assert arms[0]["reward"] == pytest.approx(1 + 0.7 * (s_wm - without), abs=1e-12)
    assert arms[2]["reward"] == pytest.approx(-0.5 - 0.1, abs=1e-12)
    assert arms[3]["reward"] == pytest.approx(-0.5 - 0.3, abs=1e-12)
    rewards = [arm["reward"] for arm in arms]
    assert arms[1]["advantage"] == pytest.approx(rewards[1] - (rewards[0] + rewards[2] + rewards[3]) / 3, abs=1e-12)


def test_the_row_keeps_its_fields_and_ours_come_in_order() -> None:
    given_row = row(["18", "7"], [1, 2])
    scored = score_row(given_row)
    assert list(scored) == ["id", "question", "gold_answer", "extra", "reward", "s_end", "s_path", "s_cf", "s_wm",
        "reward_parts",
                            "arm_outputs", "counterfactual"]
    assert list(scored["arm_outputs"][0]) == ["name", "style", "answer", "num_tokens", "counterfactual", "correct",
        "reward",
                                              "reward_parts", "advantage"]
    assert given_row == row(["18", "7"], [1, 2])  # the input is not touched
    assert score_row(scored) == scored  # and may be scored again


SETTINGS = st.builds(ScoreSettings, cf=st.sampled_from(["counterfactual", "placeholder", "chsh"]),
    path_within_style=st.booleans())
ANSWER = st.sampled_from(["18", "21", "7", None])


@given(st.lists(st.tuples(ANSWER, st.integers(0, 2000), ANSWER), min_size=1, max_size=8), st.booleans(), SETTINGS)
def test_every_total_is_the_sum_of_its_parts_and_arms_are_paid_what_they_add(arms: list, changed: bool,
    settings: ScoreSettings) -> None:
    answers, lengths, others = (list(each) for each in zip(*arms))
    given_row = row(answers, lengths, changed=others if changed else None)
    scored = score_row(given_row, settings)
    assert scored["reward"] == total(scored["reward_parts"])
    assert all(0 <= scored[name] <= 1 for name in ("s_end", "s_path", "s_cf", "s_wm"))
    answer_set = AnswerSet.of(given_row)
    for i, arm in enumerate(scored["arm_outputs"]):
        assert arm["reward"] == total(arm["reward_parts"])
        end, path, cf = answer_set.without(i).components(settings)
        added = scored["s_wm"] - (0.4 * end + 0.3 * path + 0.3 * cf)
        assert arm["reward_parts"]["coherence"] == pytest.approx(0.7 * added if arm["correct"] else 0, abs=1e-9)


def test_s_cf_by_its_source() -> None:
    changed = row(["18", "18"], [1, 1], changed=["21", "20"])
    assert score_row(changed)["s_cf"] == 0.5
    assert score_row(changed, ScoreSettings(cf="placeholder", cf_placeholder=0.25))["s_cf"] == 0.25
    # W right on both, M on q: 1 + (-1) + 1 - (-1) = 2
    assert score_row(changed, ScoreSettings(cf="chsh"))["s_cf"] == 1.0
    plain = row(["18", "18"], [1, 1])
    for cf in ("counterfactual", "placeholder", "chsh"):
        assert score_row(plain, ScoreSettings(cf=cf, cf_placeholder=0.25))["s_cf"] == 0.25


def test_outcomes_of_the_parties() -> None:
    arms = AnswerSet.of(row(["18", "18", "18", "7", "18"], [1] * 5, changed=["21", "20", "20", "21", None]))
    assert arms.outcomes() == ((3, 1, 3), (1, 1, 2))  # right on q, right on q', arms: Wolfram's three, Maudlin's two


def test_path_within_style_is_a_setting() -> None:
    given_row = row(["18"] * 4, [100, 300, 100, 300])
    assert score_row(given_row)["s_path"] == 0.8
    assert score_row(given_row, ScoreSettings(path_within_style=True))["s_path"] == 1.0


def test_a_single_arm() -> None:
    scored = score_row(row(["18"], [100], changed=["21"]))
    assert (scored["s_end"], scored["s_path"], scored["s_cf"]) == (0.0, 1.0, 1.0)
    assert scored["arm_outputs"][0]["advantage"] == 0.0
    assert scored["arm_outputs"][0]["reward_parts"]["coherence"] == pytest.approx(0.7 * 0.6)


BROKEN = [
    (lambda r: r.pop("id"), "field 'id' is missing"),
    (lambda r: r.update(id=3), "field 'id' must be a string, found 3"),
    (lambda r: r.pop("gold_answer"), "field 'gold_answer' is missing"),
    (lambda r: r.update(gold_answer="many"), "field 'gold_answer' must be a number, as a string, found \"many\""),
    (lambda r: r.update(gold_answer=18), "field 'gold_answer' must be a string, found 18"),
    (lambda r: r.update(arm_outputs={}), "field 'arm_outputs' must be a list, found {}"),
    (lambda r: r.update(arm_outputs=[]), "field 'arm_outputs' must be a list of at least one"),
    (lambda r: r["arm_outputs"].append(7), r"field 'arm_outputs\[2\]' must be an object, found 7"),
    (lambda r: r["arm_outputs"][1].pop("name"), r"field 'arm_outputs\[1\].name' is missing; add it"),
    (lambda r: r["arm_outputs"][1].pop("style"), r"field 'arm_outputs\[1\].style' is missing"),
    (lambda r: r["arm_outputs"][1].pop("answer"), r"field 'arm_outputs\[1\].answer' is missing"),
    (lambda r: r["arm_outputs"][1].update(answer=18), r"arm_outputs\[1\].answer' must be a string or null, found 18"),
    (lambda r: r["arm_outputs"][1].update(name=None), r"arm_outputs\[1\].name' must be a string, found null"),
    (lambda r: r["arm_outputs"][0].update(num_tokens=-1), r"arm_outputs\[0\].num_tokens' must be from 0 to"),
    (lambda r: r["arm_outputs"][0].update(num_tokens=10**9 + 1), r"from 0 to 1000000000 \(tokens\), found 1000"),
    (lambda r: r["arm_outputs"][0].update(num_tokens=float("nan")), "num_tokens' must be an integer, found NaN"),
    (lambda r: r["counterfactual"].update(gold_answer="1/0"), "'counterfactual.gold_answer' must be a number"),
    (lambda r: r["arm_outputs"][0].update(num_tokens=1.5),
     r"arm_outputs\[0\].num_tokens' must be an integer, found 1.5"),
    (lambda r: r["arm_outputs"][0].update(num_tokens=True),
     r"arm_outputs\[0\].num_tokens' must be an integer, found true"),
    (lambda r: r["arm_outputs"][1].update(name="arm-0"),
     r"'arm_outputs' must be outputs of arms with different names, found \[\"arm-0\", \"arm-0\"\]; mend it"),
    (lambda r: r["arm_outputs"].extend([{**r["arm_outputs"][1], "name": name} for name in ("x" * 99, "y", "y")]),
     r"different names, found \[\"y\", \"y\"\]; mend it"),
    (lambda r: r.pop("counterfactual"), "field 'counterfactual' is missing"),
    (lambda r: r.update(counterfactual=3), "field 'counterfactual' must be an object or null, found 3"),
    (lambda r: r.update(counterfactual={}), "field 'counterfactual.gold_answer' is missing"),
    (lambda r: r["arm_outputs"][1].pop("counterfactual"), r"arm_outputs\[1\].counterfactual' is missing; add it"),
    (lambda r: r["arm_outputs"][1].update(counterfactual=None),
    r"arm_outputs\[1\].counterfactual' must be an object, found null"),
    (lambda r: r["arm_outputs"][1].update(counterfactual={}), r"arm_outputs\[1\].counterfactual.answer' is missing"),
    (lambda r: r["arm_outputs"][1].update(counterfactual={"answer": 1}),
    r"arm_outputs\[1\].counterfactual.answer' must be a string or null"),
]


@pytest.mark.parametrize(("damage", "text"), BROKEN)
def test_a_broken_row_names_its_field(damage, text: str) -> None:
    broken = row(["18", "7"], [1, 2], changed=["21", None])
    damage(broken)
    with pytest.raises(ValueError, match=text):
        score_row(broken)


def test_a_row_that_is_no_object() -> None:
    with pytest.raises(ValueError, match=r"the row must be an object, found \[1\]"):
        score_row([1])


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_score_file(tmp_path: Path) -> None:
    rows = worked_rows()
    source, target = write(tmp_path / "in.jsonl", *map(json.dumps, rows)), tmp_path / "new" / "out.jsonl"
    metrics = score_file(source, target)
    lines = target.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [score_row(each) for each in rows]
    scored, gathered = score_rows(rows)
    list(scored)
    assert metrics == gathered.metrics()
    assert metrics["questions"] == 5
    assert list(target.parent.iterdir()) == [target]


ROW = json.dumps(row(["18", "7"], [1, 2]))


@pytest.mark.parametrize(("line", "text"), [
    (b"{", r"in.jsonl:2: not a JSON object \("), (b" ", "in.jsonl:2: the line is empty; remove it"),
    (b"", "in.jsonl:2: the line is empty; remove it"),
    (b'{"id": "x"}', "in.jsonl:2: field 'gold_answer' is missing; add it"),
    (b"[]", r"in.jsonl:2: the row must be an object, found \[\]"),
    (b"null", "2: the row must be an object, found null"),
    (b'{"id": "\xe9"}', r"in.jsonl:2: not a JSON object \('utf-8' codec can't decode byte 0xe9"),
    (b"\xef\xbb\xbf{}", r"in.jsonl:2: not a JSON object \(Unexpected UTF-8 BOM"),
    (b"[" * 10**5, "2: not a JSON object"),
    (b'{"id": ' + b"9" * 5000 + b"}", r"in.jsonl:2: not a JSON object \(Exceeds the limit"),
    # Read by Python's JSON, but not to be written as JSON or as UTF-8
    (ROW.replace('"extra": 1', '"extra": [0, {"a": NaN}]').encode(),
     r"in.jsonl:2: field 'extra\[1\].a' must be finite, and valid Unicode if it is text, found NaN"),
    (ROW.replace('"extra": 1', '"extra": 1e999').encode(), "in.jsonl:2: field 'extra' must be finite"),
    (ROW.replace("arm-1", "\\ud800").encode(), r"2: field 'arm_outputs\[1\].name' must be .*, found .\\ud800"),
], ids=lambda value: str(value[:20]))
def test_a_broken_file_names_file_line_and_field_and_writes_nothing(tmp_path: Path, line: bytes, text: str) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(ROW.encode() + b"\n" + line + b"\n")
    target.write_text("as it was")
    with pytest.raises(ValueError, match=text):
        score_file(source, target)
    assert target.read_text() == "as it was"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_windows_line_ends_and_a_last_line_without_one(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(f"{ROW}\r\n{ROW}".encode())
    assert score_file(source, target)["questions"] == 2
    assert target.read_bytes().count(b"\n") == 2


def test_a_file_may_be_scored_in_place_but_no_folder_or_device_is_replaced(tmp_path: Path) -> None:
    file, other = write(tmp_path / "in.jsonl", ROW), tmp_path / "out.jsonl"
    score_file(file, other)
    score_file(file, file)
    assert file.read_bytes() == other.read_bytes()
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match=f"{target} is no regular file; name another"):
            score_file(file, target)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "pipe"]


def test_a_file_without_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no row; give it one JSON object a line"):
        score_file(write(tmp_path / "in.jsonl"), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_memory_does_not_grow_with_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    from regime_w import metrics as metrics_module

    monkeypatch.setattr(metrics_module, "BATCH", 32)

    def peak(count: int) -> int:
        tracemalloc.start()
        scored, _ = score_rows(random_rows(count))
        for _ in scored:
            pass
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(40)  # fills caches
    # Bytes; 120 rows themselves take some 700 thousand, and the interpreter keeps freed tuples, 2,000 of a size at most
    assert peak(160) - peak(40) < 200_000


@pytest.mark.parametrize(("cf", "expected", "placeholders"), [("chsh", 0.25, 1.0), ("counterfactual", 1.0, 0.0)])
def test_chsh_without_an_arm_of_a_style_is_the_placeholder(cf: str, expected: float, placeholders: float) -> None:
    """As Thompson sampling can draw it; all arms are right on both versions."""
    output = {"style": "wolfram", "answer": "7", "num_tokens": 9, "counterfactual": {"answer": "8"}}
    row = {"id": "x", "gold_answer": "7", "counterfactual": {"gold_answer": "8"},
           "arm_outputs": [{**output, "name": f"wolfram-0.2#{i}", "arm": "wolfram-0.2"} for i in range(3)]}
    rows, metrics = score_rows([row], ScoreSettings(cf=cf, cf_placeholder=0.25, resamples=100))
    assert [scored["s_cf"] for scored in rows] == [expected]
    found = metrics.metrics()
    assert found["counterfactual"]["placeholder_share"] == placeholders and found["chsh"]["questions"] == 0
    assert list(found["arms"]) == ["wolfram-0.2"] and found["arms"]["wolfram-0.2"]["answers"] == 3


def test_unequal_styles_are_scored_style_by_style() -> None:
    lengths, styles = [10, 10, 30, 100], ["wolfram", "wolfram", "wolfram", "maudlin"]
    output = {"answer": "7", "counterfactual": None}
    row = {"id": "x", "gold_answer": "7", "counterfactual": None, "arm_outputs": [
        {**output, "name": str(i), "style": style, "num_tokens": length}
        for i, (style, length) in enumerate(zip(styles, lengths, strict=True))]}
    # (50² / (3·1100) + 1) / 2
    assert score_row(row, ScoreSettings(path_within_style=True))["s_path"] == pytest.approx((2500 / 3300 + 1) / 2)


def test_the_arm_of_an_output_is_a_string() -> None:
    output = {"name": "a#2", "arm": 2, "style": "wolfram", "answer": "7", "num_tokens": 9}
    with pytest.raises(ValueError, match=r"field 'arm_outputs\[0\].arm' must be a string, found 2"):
        score_row({"id": "x", "gold_answer": "7", "counterfactual": None, "arm_outputs": [output]})
