"""Rollout files: JSON Lines, checked row by row, written whole or not at all. The schema is in regime_w/README.md."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, TypeVar

from regime_w.answers import canonical_answer

T = TypeVar("T")

_MISSING = object()
_KINDS = {str: "a string", list: "a list", dict: "an object", int: "an integer", bool: "true or false",
          NoneType: "null"}
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False)  # a parsed row holds no circle


Fields = dict[str, tuple[type, ...]]  # that a record must have, each of one of these types
_ROW: Fields = {"id": (str,), "gold_answer": (str,), "arm_outputs": (list,), "counterfactual": (dict, NoneType)}
_OUTPUT: Fields = {"name": (str,), "style": (str,), "answer": (str, NoneType), "num_tokens": (int,)}
_OUTPUT_ON_BOTH: Fields = {**_OUTPUT, "counterfactual": (dict,)}
_ANSWER: Fields = {"answer": (str, NoneType)}
_CHANGED: Fields = {"gold_answer": (str,)}
_ARM: Fields = {"arm": (str,)}
_SCORED: Fields = {"arm_outputs": (list,)}
_SCORED_OUTPUT: Fields = {"name": (str,), "correct": (bool,)}
_PROBLEM: Fields = {"question": (str,), "answer": (str,)}
MAX_TOKENS = 10**9


def map_rows(path: Path, function: Callable[[Any], T]) -> Iterator[T]:
    """`function` of each row of a JSON Lines file, one at a time; it raises ValueError if the row is broken.

    Raises that error with file and line number before it, as for a line that is not JSON; and if there is no row.
    """
    number = 0
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                result = function(_parse(line))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
            yield result
    if not number:
        raise ValueError(f"{path}: holds no row; give it one JSON object a line")


def encode(row: dict) -> bytes:
    """The row as a line of a file. Raises ValueError that names the field if JSON or UTF-8 cannot hold its value."""
    try:
        return _ENCODER.encode(row).encode() + b"\n"
    except ValueError:
        where, value = _unwritable(row)
        return _fail(_path(where), value, "finite, and valid Unicode if it is text")


def write_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Writes the lines whole or not at all: after an error nothing is left, and `path` is as it was.

    Raises ValueError if `path` is a folder or a device.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file; name another file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb", buffering=2**20) as file:
            file.writelines(lines)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_row(row: Any) -> None:
    """Raises ValueError that names the field if a rollouts row is broken, and says what must stand there."""
    _check(row, (), _ROW)
    _check_number(row, ())
    outputs, other = row["arm_outputs"], row["counterfactual"]
    if not outputs:
        _fail("arm_outputs", outputs, "a list of at least one arm's output")
    if other is not None:
        _check(other, ("counterfactual",), _CHANGED)
        _check_number(other, ("counterfactual",))
    _check_each(outputs, (), _OUTPUT if other is None else _OUTPUT_ON_BOTH)
    if other is not None:
        _check_each([output["counterfactual"] for output in outputs], ("counterfactual",), _ANSWER)
    for i, output in enumerate(outputs):
        if not 0 <= output["num_tokens"] <= MAX_TOKENS:
            _fail(f"arm_outputs[{i}].num_tokens", output["num_tokens"], f"from 0 to {MAX_TOKENS} (tokens)")
        if "arm" in output:
            _check(output, ("arm_outputs", i), _ARM)
    names = [output["name"] for output in outputs]
    if len(set(names)) < len(names):
        _fail("arm_outputs", [name for name in names if names.count(name) > 1], "outputs of arms with different names")


def check_scored(row: Any) -> dict:
    """The row. Raises ValueError that names the field if it lacks what `bandit.replay` reads of a scored row."""
    _check(row, (), _SCORED)
    if not row["arm_outputs"]:
        _fail("arm_outputs", [], "a list of at least one arm's output")
    _check_each(row["arm_outputs"], (), _SCORED_OUTPUT, "score the file first")
    return row


def check_problem(row: Any) -> None:
    """Raises ValueError that names the field if a row is no problem as GSM8K stores it."""
    _check(row, (), _PROBLEM)


def _parse(line: bytes) -> Any:
    if not line.strip():
        raise ValueError("the line is empty; remove it")
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a JSON object ({error}); mend or remove this line") from None


def _check_each(records: Sequence, where: tuple, fields: Fields, add: str = "add it") -> None:
    """`_check` of what stands at `where` in each output: all in one go, as nearly every row is right."""
    if not _hold(records, fields):
        wrong = next(i for i, record in enumerate(records) if not _hold([record], fields))
        _check(records[wrong], ("arm_outputs", wrong, *where), fields, add)


def _hold(records: Sequence, fields: Fields) -> bool:
    """Whether all are objects with these fields; by type, as True is an int to isinstance."""
    for record in records:
        if type(record) is not dict:
            return False
    for name, kinds in fields.items():  # plain loops, field by field: half the time of sets of types
        for record in records:
            if type(record.get(name, _MISSING)) not in kinds:
                return False
    return True


def _check(record: Any, where: tuple, fields: Fields, add: str = "add it") -> None:
    if type(record) is not dict:
        _fail(_path(where), record, "an object")
    for name, kinds in fields.items():
        if type(record.get(name, _MISSING)) in kinds:
            continue
        if name not in record:
            raise ValueError(f"field '{_path((*where, name))}' is missing; {add}")
        _fail(_path((*where, name)), record[name], " or ".join(_KINDS[kind] for kind in kinds))


def _check_number(record: dict, where: tuple) -> None:
    if canonical_answer(record["gold_answer"]) is None:
        _fail(_path((*where, "gold_answer")), record["gold_answer"], "a number, as a string")


def _unwritable(value: Any, where: tuple = ()) -> tuple[tuple, Any]:
    """(where it stands, the innermost value that cannot be written)."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        try:
            _ENCODER.encode(inner).encode()
        except ValueError:
            return _unwritable(inner, (*where, key))
    return where, value


def _path(where: tuple) -> str:
    """('arm_outputs', 3, 'answer') is arm_outputs[3].answer."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in where).lstrip(".")


def _fail(field: str, found: Any, must: str) -> NoReturn:
    what = f"field '{field}'" if field else "the row"
    raise ValueError(f"{what} must be {must}, found {json.dumps(found, default=str)[:80]}; mend it")
