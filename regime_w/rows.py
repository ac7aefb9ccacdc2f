"""Rollout files: JSON Lines, checked row by row, written whole or not at all. The schema is in regime_w/README.md."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from regime_w.answers import canonical_answer


_MISSING = object()
_KINDS = {str: "a string", list: "a list", dict: "an object", int: "an integer"}
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False)  # a parsed row holds no circle


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
        with temporary.open("wb", buffering=2**20) as file:
            for row in rows:
                file.write(_ENCODER.encode(row).encode() + b"\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_row(row: Any) -> None:
    """Raises ValueError that names the field if a rollouts row is broken, and says what must stand there."""
    if not isinstance(row, dict):
        raise ValueError(f"the row must be an object, found {json.dumps(row)[:80]}; mend it")
    _field(row, (), "id", str)
    _number(row, (), "gold_answer")
    outputs = _field(row, (), "arm_outputs", list)
    if not outputs:
        _fail("arm_outputs", outputs, "a list of at least one arm's output")
    other = _field(row, (), "counterfactual", dict, optional=True)
    if other is not None:
        _number(other, ("counterfactual",), "gold_answer")
    for i, output in enumerate(outputs):
        if not isinstance(output, dict):
            _fail(f"arm_outputs[{i}]", output, "an object")
        where = ("arm_outputs", i)
        _field(output, where, "name", str)
        _field(output, where, "style", str)
        if "arm" in output:
            _field(output, where, "arm", str)
        _field(output, where, "answer", str, optional=True)
        if _field(output, where, "num_tokens", int) < 0:
            _fail(_path(where, "num_tokens"), output["num_tokens"], "0 or more (tokens)")
        if other is not None:
            answered = _field(output, where, "counterfactual", dict)
            _field(answered, (*where, "counterfactual"), "answer", str, optional=True)
    names = {output["name"] for output in outputs}
    if len(names) < len(outputs):
        _fail("arm_outputs", [output["name"] for output in outputs], "outputs of arms with different names")


def _field(record: dict, where: tuple, name: str, kind: type, optional: bool = False) -> Any:
    value = record.get(name, _MISSING)
    if type(value) is kind or optional and value is None:  # by type, as True is an int to isinstance
        return value
    if value is _MISSING:
        raise ValueError(f"field '{_path(where, name)}' is missing; add it")
    return _fail(_path(where, name), value, _KINDS[kind] + (" or null" if optional else ""))


def _number(record: dict, where: tuple, name: str) -> None:
    if canonical_answer(_field(record, where, name, str)) is None:
        _fail(_path(where, name), record[name], "a number, as a string")


def _path(where: tuple, name: str) -> str:
    """('arm_outputs', 3), 'answer' is arm_outputs[3].answer."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in (*where, name)).lstrip(".")


def _fail(field: str, found: Any, must: str) -> NoReturn:
    raise ValueError(f"field '{field}' must be {must}, found {json.dumps(found, default=str)[:80]}; mend it")
