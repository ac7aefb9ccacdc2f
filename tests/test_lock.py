"""dvc.lock was made by the committed code and params: every hash it records for a file in git is that file's."""

import hashlib
import subprocess
from pathlib import Path

import pytest
import yaml
from ruamel.yaml import YAML

from looper.pipeline import lookup, resolved_stages

ROOT = Path(__file__).resolve().parents[1]
LOCK = YAML(typ="safe").load(ROOT / "dvc.lock")["stages"]  # YAML 1.2, as DVC writes it: 5e-06 is a number there
PARAMS = YAML(typ="safe").load(ROOT / "params.yaml")
STAGES = resolved_stages(yaml.safe_load((ROOT / "dvc.yaml").read_text()), PARAMS)
TRACKED = set(subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n"))


def test_the_lock_has_every_stage_and_no_other():
    assert set(LOCK) == set(STAGES)


@pytest.mark.parametrize("name", sorted(STAGES))
def test_the_lock_is_of_this_stage(name):
    assert LOCK[name]["cmd"] == STAGES[name]["cmd"]
    assert {dep["path"] for dep in LOCK[name].get("deps", [])} == set(STAGES[name]["deps"])


@pytest.mark.parametrize("name", sorted(STAGES))
def test_files_in_git_are_those_that_made_the_lock(name):
    checked = 0
    for kind in ("deps", "outs"):
        for entry in LOCK[name].get(kind, []):
            if entry["path"] in TRACKED:
                found = hashlib.md5((ROOT / entry["path"]).read_bytes()).hexdigest()
                assert found == entry["md5"], f"{entry['path']} is not the one that made dvc.lock; run make repro, commit"
                checked += 1
    assert checked > 3  # at the least, the stage's own module and what it imports


@pytest.mark.parametrize("name", sorted(STAGES))
def test_params_are_those_that_made_the_lock(name):
    expected = {key: lookup(PARAMS, key) for key in STAGES[name].get("params", [])}
    assert LOCK[name].get("params", {}) == ({"params.yaml": expected} if expected else {})
