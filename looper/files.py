"""Files and folders that are written whole or not at all, and their hashes."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it over `path` when the block ends without an error.

    The block may make a file or a folder there. After an error nothing is left, and `path` is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.with_name(f".{path.name}.{ending}") for ending in ("partial", "old"))
    for leftover in (temporary, old):  # of a killed process
        _remove(leftover)
    try:
        yield temporary
        if path.is_dir():  # no rename puts a folder over one that holds something
            os.replace(path, old)
        os.replace(temporary, path)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        _remove(old)
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Keys keep their order, so that a diff reads as the code does; NaN and infinities are refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises ValueError if the file is missing or no JSON."""
    if not Path(path).exists():
        raise ValueError(f"{path} is not here; run the stage that writes it (dvc repro), or bring it back (dvc pull)")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); rerun the stage that writes it") from None


def sha256(path: Path) -> str:
    """The hex SHA-256 of a file's bytes; one process reads a file again only after it has changed."""
    status = Path(path).stat()
    return _sha256(Path(path).resolve(), status.st_size, status.st_mtime_ns)


@cache
def _sha256(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
