"""Rollout files: JSON Lines, checked row by row, written whole or not at all. The schema is in regime_w/README.md."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from regime_w.answers import canonical_answer


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each line of a JSON Lines file, one at a time; the rows are not checked yet.

    Raises ValueError with file and line number for what is not JSON, and if there is no row.
    """
    number = 0
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not a JSON object ({error}); mend or remove this line") from None
            yield number, row
    if not number:
        raise ValueError(f"{path}: holds no row; give it one JSON object a line")


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Writes the rows whole or not at all: after an error nothing is left, and `path` is as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(_ENCODER.encode(row) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_row(row: Any) -> None:
    """Raises ValueError that names the field if a rollouts row is broken, and says what must stand there."""
    _require(isinstance(row, dict), "the row", row, "an object")
    _field(row, "", "id", str)
    _number(row, "", "gold_answer")
    outputs = _field(row, "", "arm_outputs", list)
    _require(bool(outputs), "field 'arm_outputs'", outputs, "a list of at least one arm's output")
    other = _field(row, "", "counterfactual", dict, optional=True)
    if other is not None:
        _number(other, "counterfactual.", "gold_answer")
    for i, output in enumerate(outputs):
        where = f"arm_outputs[{i}]."
        if not isinstance(output, dict):
            _require(False, f"field 'arm_outputs[{i}]'", output, "an object")
        _field(output, where, "name", str)
        _field(output, where, "style", str)
        _field(output, where, "answer", str, optional=True)
        _length(output, where)
        if other is not None:
            answered = _field(output, where, "counterfactual", dict)
            _field(answered, f"{where}counterfactual.", "answer", str, optional=True)
    names = [output["name"] for output in outputs]
    _require(len(set(names)) == len(names), "field 'arm_outputs'", names, "outputs of arms with different names")


def _field(record: dict, where: str, name: str, kind: type, optional: bool = False) -> Any:
    if name not in record:
        raise ValueError(f"field '{where}{name}' is missing; add it")
    value = record[name]
    if not (isinstance(value, kind) or optional and value is None):
        kinds = {str: "a string", list: "a list", dict: "an object", int: "an integer of 0 or more (tokens)"}
        _require(False, f"field '{where}{name}'", value, kinds[kind] + (" or null" if optional else ""))
    return value


def _number(record: dict, where: str, name: str) -> None:
    value = _field(record, where, name, str)
    _require(canonical_answer(value) is not None, f"field '{where}{name}'", value, "a number, as a string")


def _length(output: dict, where: str) -> None:
    value = _field(output, where, "num_tokens", int)
    if value < 0 or isinstance(value, bool):
        _require(False, f"field '{where}num_tokens'", value, "an integer of 0 or more (tokens)")


def _require(holds: bool, what: str, found: Any, must: str) -> None:
    if not holds:
        raise ValueError(f"{what} must be {must}, found {json.dumps(found, default=str)[:80]}; mend it")
