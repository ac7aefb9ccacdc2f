"""Profiles: each undoes the others, comments stay, and platinum holds the original design's values."""

import re
import shutil
import subprocess
import sys
from functools import cache
from itertools import product
from pathlib import Path

import pytest

from looper import profile
from looper.params import check, parse
from looper.profile import PROFILES, main, overlay

ROOT = Path(__file__).resolve().parents[2]
apply = cache(profile.apply)
with pytest.MonkeyPatch.context() as patch:  # the sample profile's params, whichever is in force here
    patch.chdir(ROOT)
    SAMPLE = apply("sample", Path("params.yaml").read_text(encoding="utf-8"))
OVERLAYS = {"rounds_1": ["1"], "rounds_3": ["1", "2", "3"]}  # they go on top of any of the others
NAMES = sorted(path.stem for path in (ROOT / "profiles").glob("*.yaml") if path.stem not in OVERLAYS)


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of its own to run in."""
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    (tmp_path / "params.yaml").write_text(SAMPLE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys):
    """(exit code, stdout, stderr) of `python -m looper.profile ARGUMENTS`."""
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["profile", *arguments])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


def test_there_are_four_profiles_and_sample_is_committed_byte_for_byte():
    assert NAMES == ["platinum", "platinum_arm", "reference", "sample"]
    shown = subprocess.run(["git", "show", "HEAD:params.yaml"], cwd=ROOT, capture_output=True, check=True)
    committed = shown.stdout.decode()
    assert apply("sample", committed) == committed


@pytest.mark.parametrize(("after", "before"), product(NAMES, NAMES))
def test_a_profile_undoes_another(after, before):
    assert apply(after, apply(before, SAMPLE)) == apply(after, SAMPLE)


def test_every_profile_sets_every_key_so_that_none_leaves_traces():
    def keys(values, above=""):
        for key, value in values.items():
            if isinstance(value, dict):
                yield from keys(value, f"{above}{key}.")
            elif above.split(".")[0] not in ("base", "prepare", "rounds"):  # those are replaced whole
                yield f"{above}{key}"

    found = {name: set(keys(overlay(name))) for name in NAMES}
    assert found["sample"] == found["reference"] == found["platinum"] == found["platinum_arm"]
    assert found["sample"] == set(keys(parse(SAMPLE)))


def test_platinum_undoes_changes_by_hand():
    by_hand = re.sub(r"\b(r|target|questions): [0-9.]+", r"\1: 7", SAMPLE)
    assert [parse(by_hand)[section] != parse(SAMPLE)[section] for section in ("sft", "ppo", "dev_eval")] == [True] * 3
    assert apply("platinum", by_hand) == apply("platinum", SAMPLE)


@pytest.mark.parametrize(("overlaid", "rounds"), OVERLAYS.items())
@pytest.mark.parametrize("name", NAMES)
def test_rounds_go_on_top_of_any_profile_and_change_nothing_else(name, overlaid, rounds):
    below, above = (parse(text) for text in (apply(name, SAMPLE), apply(overlaid, apply(name, SAMPLE))))
    last = above["rounds"][rounds[-1]]["suffix"]
    assert list(above["rounds"]) == rounds and above["final"] == f"models/ppo_regime_w{last}"
    assert {key for key in below if below[key] != above[key]} <= {"rounds", "final"}
    assert apply("sample", apply(overlaid, apply(name, SAMPLE))) == SAMPLE


# The original design's values
PLATINUM = {
    "base.repo": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "base.source": "hub",
    "model.quantization": "nf4", "model.dtype": "bfloat16", "model.template": "deepseek_r1", "model.device": "cuda",
    "prepare.source": "hub", "prepare.repo": "openai/gsm8k", "prepare.config": "main", "prepare.dev_share": 0.2,
    "sft.lora.r": 32, "sft.lora.alpha": 16, "sft.lora.dropout": 0.05, "sft.gradient_checkpointing": True,
    "sft.epochs": 1, "sft.batch_size": 8, "sft.learning_rate": 5e-5,
    "dev_eval.questions": 50, "rollouts.questions": 500,
    "ppo.learning_rate": 5e-6, "ppo.batch_size": 8, "ppo.mini_batch_size": 4, "ppo.kl.target": 0.1,
    "ppo.max_grad_norm": 1.0, "ppo.credit": "question",
}


@pytest.mark.parametrize(("name", "credit"), [("platinum", "question"), ("platinum_arm", "arm")])
def test_platinum_holds_the_designs_values(name, credit):
    """In the file itself, whatever stood in params.yaml before, and in what it makes of params.yaml."""
    params = parse(apply(name, SAMPLE))
    check(params, name)
    for path, expected in (PLATINUM | {"ppo.credit": credit}).items():
        for values in (params, overlay(name)):
            for key in path.split("."):
                values = values[key]
            assert values == expected and isinstance(values, type(expected)), path
    assert params["ppo"]["kl"]["horizon"] is not None, "KL control is adaptive"


@pytest.mark.parametrize("name", NAMES)
def test_every_comment_is_kept_and_floats_stay_readable(name):
    def comments(params):
        return re.findall(r"# .*", params)

    text = apply(name, SAMPLE)
    present = (ROOT / "params.yaml").read_text(encoding="utf-8")
    assert comments(text) == comments(present) and len(comments(text)) > 30
    rest = re.sub(r"\d\.\de|#.*|[0-9a-f]{40,}", "", text)
    assert not re.search(r"\d[eE]", rest), "a float that YAML 1.1 reads as text"
    assert "stop_multiple: null #" in text, "not an empty value"


def test_a_comment_stays_where_a_sections_last_key_goes(folder):
    """The comment above `model` hangs on the last key of `base` in the file."""
    (folder / "profiles/gold.yaml").write_text("base:\n  licence: MIT\n  source: folder\n  digest: null\n  path: weights\n")
    text = profile.apply("gold", SAMPLE)
    assert "base:\n  licence: MIT\n  source: folder\n  digest: null\n  path: weights\n\n# How every stage loads" in text


def test_it_writes_params_yaml_and_shows_the_change(folder, run):
    code, out, _ = run("platinum")
    assert code == 0 and (folder / "params.yaml").read_text(encoding="utf-8") == apply("platinum", SAMPLE)
    for line in ("\n-  template: chatml", "\n+  template: deepseek_r1", "\n+  learning_rate: 5.0e-5\n"):
        assert line in out
    assert out.endswith("params.yaml: written\n")
    assert run("sample")[0] == 0 and run("sample")[1] == "params.yaml has these values already\n"
    assert (folder / "params.yaml").read_text(encoding="utf-8") == SAMPLE


def test_diff_writes_nothing(folder, run):
    before = (folder / "params.yaml").stat().st_mtime_ns
    code, out, _ = run("platinum", "--diff")
    assert code == 0 and "+  quantization: nf4" in out and "written" not in out
    assert (folder / "params.yaml").read_text(encoding="utf-8") == SAMPLE
    assert (folder / "params.yaml").stat().st_mtime_ns == before


@pytest.mark.parametrize(("break_it", "message"), [
    (lambda folder: None, "no profile 'gold'; there are: platinum, platinum_arm, reference, rounds_1, rounds_3, sample"),
    (lambda folder: (folder / "profiles/gold.yaml").write_text("sft:\n  learning_rate: 2e-4\n"), "2.0e-04"),
    (lambda folder: (folder / "profiles/gold.yaml").write_text("sft:\n  rate: 1\n"), "sft.rate: unknown key"),
    (lambda folder: (folder / "profiles/gold.yaml").write_text("stf:\n  r: 1\n"), "params.yaml has no section stf"),
    (lambda folder: (folder / "params.yaml").unlink(), "params.yaml is not here; run from the repository's root"),
    (lambda folder: (shutil.copy(folder / "profiles/sample.yaml", folder / "profiles/gold.yaml"),
                     (folder / "params.yaml").write_text("a: {")), "params.yaml: not YAML; mend it"),
])
def test_mistakes_exit_2_and_write_nothing(folder, run, break_it, message):
    break_it(folder)
    before = (folder / "params.yaml").read_text() if (folder / "params.yaml").exists() else None
    code, out, err = run("gold")
    assert code == 2 and message in err and out == ""
    assert ((folder / "params.yaml").read_text() if (folder / "params.yaml").exists() else None) == before


def test_an_extended_profile_keeps_what_it_does_not_set():
    below, above = overlay("platinum"), overlay("platinum_arm")
    assert above["ppo"].pop("credit") == "arm" and below["ppo"].pop("credit") == "question"
    assert above == below and PROFILES == Path("profiles")
