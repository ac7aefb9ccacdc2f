"""JSON Lines: one object a line, UTF-8. A broken row is named by file, line and field."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from looper.files import replacing


def read_jsonl(path: Path, fields: Mapping[str, type | tuple[type, ...]] | None = None) -> list[dict[str, Any]]:
    """All rows of `path`. `fields` names what every row must have, and of which type.

    Raises ValueError with file, line number and field for a row that is no object, or lacks or mistypes a field.
    """
    return list(iterate_jsonl(path, fields))


def iterate_jsonl(path: Path, fields: Mapping[str, type | tuple[type, ...]] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of `path`, one at a time; checked as `read_jsonl` does."""
    if not Path(path).exists():
        raise ValueError(f"{path} is not here; run the stage that writes it (dvc repro), or bring it back (dvc pull {path})")
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise ValueError(f"{path}:{number}: not a JSON object ({error}); mend or remove this line") from None
            check_row(row, fields or {}, f"{path}:{number}")
            yield row


def read_first(path: Path, count: int, setting: str, fields: Mapping[str, type | tuple[type, ...]]) -> list[dict[str, Any]]:
    """The first `count` rows of `path`, which `setting` asks for. Raises ValueError if there are fewer."""
    rows = read_jsonl(path, fields)
    if len(rows) < count:
        raise ValueError(f"{path} holds {len(rows)} rows, {setting} asks for {count}; lower it, or prepare more rows")
    return rows[:count]


def check_row(row: Any, fields: Mapping[str, type | tuple[type, ...]], where: str) -> None:
    """Raises ValueError, which names `where`, for a row that is no object, or lacks or mistypes one of `fields`."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a {type(row).__name__} where an object must stand; mend this row")
    for field, kind in fields.items():
        if field not in row:
            raise ValueError(f"{where}: field '{field}' is missing; add it")
        if not isinstance(row[field], kind):
            found = type(row[field]).__name__
            raise ValueError(f"{where}: field '{field}' is {found}, must be {_name(kind)}; mend it")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes the rows whole or not at all; returns how many there were."""
    count = 0
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def _name(kind: type | tuple[type, ...]) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(each.__name__ for each in kinds)
