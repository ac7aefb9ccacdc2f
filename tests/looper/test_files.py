"""Whole or not at all: after any error the target is as it was and nothing lies beside it."""

import hashlib
import os

import pytest

from looper.files import read_json, replacing, sha256, sha256_text, write_json, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_and_its_parents_are_made(tmp_path):
    write_text(tmp_path / "a" / "b.txt", "größer\n")
    assert (tmp_path / "a" / "b.txt").read_bytes() == "größer\n".encode()
    assert names(tmp_path / "a") == ["b.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_after_an_error_the_file_is_as_it_was(tmp_path, error):
    target = tmp_path / "a.txt"
    target.write_text("before")
    with pytest.raises(error), replacing(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "before" and names(tmp_path) == ["a.txt"]


def test_after_an_error_the_folder_is_as_it_was(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("before")
    with pytest.raises(RuntimeError), replacing(target) as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("half")
        raise RuntimeError
    assert names(tmp_path) == ["model"] and names(target) == ["old"]


def test_a_folder_replaces_a_folder_whole(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("before")
    with replacing(target) as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("after")
    assert names(tmp_path) == ["model"] and names(target) == ["new"]


def test_a_block_that_makes_nothing_loses_nothing(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("before")
    with pytest.raises(FileNotFoundError), replacing(target):
        pass
    assert names(tmp_path) == ["model"] and names(target) == ["old"]


def test_a_folder_is_never_half_replaced(tmp_path, monkeypatch):
    """Killed between the two renames, the old folder comes back."""
    target, replace = tmp_path / "model", os.replace
    target.mkdir()
    (target / "old").write_text("before")

    def killed(source, to):
        if str(source).endswith(".partial"):
            raise KeyboardInterrupt
        replace(source, to)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt), replacing(target) as temporary:
        temporary.mkdir()
    assert names(tmp_path) == ["model"] and names(target) == ["old"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(GeneratorExit):
        with replacing(target) as temporary:
            temporary.mkdir()
            (temporary / "shard-1").write_text("half")
            left = temporary
            raise GeneratorExit
    left.mkdir()  # as SIGKILL leaves it: no cleaning up
    (left / "shard-1").write_text("half")
    with replacing(target) as temporary:
        temporary.mkdir()
        (temporary / "shard-2").write_text("whole")
    assert names(tmp_path) == ["model"] and names(target) == ["shard-2"]


def test_json_keeps_the_order_of_keys_and_refuses_nan(tmp_path):
    target = tmp_path / "metrics.json"
    write_json(target, {"b": 1, "a": "é"})
    assert target.read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": "é"\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(target, {"b": float("nan")})
    assert read_json(target) == {"b": 1, "a": "é"} and names(tmp_path) == ["metrics.json"]


def test_broken_json_is_named(tmp_path):
    (tmp_path / "card.json").write_text('{"a": ')
    with pytest.raises(ValueError, match=r"card\.json: not JSON .*rerun the stage"):
        read_json(tmp_path / "card.json")


def test_hashes_are_sha256_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"\x00\xff" * 100_000)
    assert sha256(tmp_path / "a") == hashlib.sha256(b"\x00\xff" * 100_000).hexdigest()
    assert sha256_text("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
