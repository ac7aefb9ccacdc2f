"""JSON Lines: what is written is read back, and a broken row is named by file, line and field."""

import re

import pytest

from looper.jsonl import iterate_jsonl, read_first, read_jsonl, write_jsonl

FIELDS = {"id": str, "answer": (str, type(None)), "count": int}


def test_rows_are_read_back_as_written(tmp_path):
    rows = [{"id": "a", "text": "line\nbreak, \u2028 and \x85, größer"}, {"id": "b", "nested": {"x": [1, 2.5, None]}}]
    assert write_jsonl(tmp_path / "rows.jsonl", rows) == 2
    assert read_jsonl(tmp_path / "rows.jsonl") == rows
    assert (tmp_path / "rows.jsonl").read_bytes().count(b"\n") == 2
    assert "größer" in (tmp_path / "rows.jsonl").read_text(encoding="utf-8")


def test_nothing_is_written_after_an_error_in_a_row(tmp_path):
    def rows():
        yield {"id": "a"}
        raise RuntimeError

    target = tmp_path / "rows.jsonl"
    write_jsonl(target, [{"id": "before"}])
    with pytest.raises(RuntimeError):
        write_jsonl(target, rows())
    with pytest.raises(ValueError):
        write_jsonl(target, [{"reward": float("inf")}])
    assert read_jsonl(target) == [{"id": "before"}] and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(("line", "message"), [
    (b'{"id": "b", "answer": "1"}', "field 'count' is missing; add it"),
    (b'{"id": "b", "answer": 1, "count": 1}', "field 'answer' is int, must be str or NoneType; mend it"),
    (b'{"id": "b", "answer": null, "count": "1"}', "field 'count' is str, must be int; mend it"),
    (b'[1, 2]', "a list where an object must stand"),
    (b'{"id": "b", ', "not a JSON object (Expecting property name"),
    (b'', "not a JSON object (Expecting value"),
    (b'{"id": "\xff"}', "not a JSON object ('utf-8' codec can't decode byte 0xff"),
])
def test_a_broken_row_is_named_by_file_line_and_field(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    whole = b'{"id": "a", "answer": null, "count": 1}\n'
    path.write_bytes(whole + line + b"\n" + whole)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}:2: {message}')}"):
        read_jsonl(path, FIELDS)


def test_rows_come_one_at_a_time(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"id": "a"}\nbroken\n')
    rows = iterate_jsonl(tmp_path / "rows.jsonl", {"id": str})
    assert next(rows) == {"id": "a"}
    with pytest.raises(ValueError, match=":2:"):
        next(rows)


def test_a_missing_file_says_how_to_get_it(tmp_path):
    with pytest.raises(ValueError, match=r"train\.jsonl is not here; run the stage that writes it \(dvc repro\)"):
        read_jsonl(tmp_path / "train.jsonl")


def test_the_first_rows_or_an_error_that_names_the_setting(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"id": str(i)} for i in range(3)])
    assert [row["id"] for row in read_first(path, 2, "dev_eval.questions", {"id": str})] == ["0", "1"]
    with pytest.raises(ValueError, match=r"rows.jsonl holds 3 rows, dev_eval.questions asks for 4; lower it"):
        read_first(path, 4, "dev_eval.questions", {"id": str})
