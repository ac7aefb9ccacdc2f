"""params.yaml: every error at once with its path, before anything is loaded."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from looper.params import check, load_params, parse, round_of
from looper.profile import apply

ROOT = Path(__file__).resolve().parents[2]
with pytest.MonkeyPatch.context() as patch:  # the sample profile's params, whichever is in force here
    patch.chdir(ROOT)
    SAMPLE = apply("sample", Path("params.yaml").read_text(encoding="utf-8"))
REMOVED = object()


def changed(**changes):
    """The committed params with `sft__lora__r=1` set, or removed."""
    content = parse(SAMPLE)
    for path, value in changes.items():
        *sections, key = path.split("__")
        section = content
        for name in sections:
            section = section[name]
        if value is REMOVED:
            del section[key]
        else:
            section[key] = value
    return content


def errors(**changes):
    with pytest.raises(ValueError) as caught:
        check(changed(**changes), "params.yaml")
    return str(caught.value).splitlines()


def test_the_sample_profile_is_right_and_frozen():
    params = check(parse(SAMPLE), "params.yaml")
    assert params.model.template == "chatml" and params.ppo.kl.target == 0.1 and params.score.weight_end == 0.4
    with pytest.raises(ValueError, match="frozen"):
        params.sft.seed = 1


def test_a_micro_batch_may_be_left_to_the_card():
    assert check(changed(sft__micro_batch="auto"), "params.yaml").sft.micro_batch == "auto"


def test_every_setting_stands_in_params_yaml():
    """No setting is in force that the file does not show: a default of a dataclass would be one."""
    def paths(values, above=""):
        for key, value in values.items():
            yield f"{above}{key}"
            if isinstance(value, dict):
                yield from paths(value, f"{above}{key}.")

    in_force = load_params(ROOT / "params.yaml").model_dump()
    content = parse((ROOT / "params.yaml").read_bytes())
    assert set(paths(content)) == set(paths(in_force))
    assert {"ppo.kl.horizon", "score.resamples", "sft.lora.r"} < set(paths(in_force))


def test_all_errors_come_at_once_each_with_its_path():
    found = errors(sft__learning_rate="2e-4", sft__typo=1, ppo__kl__target="high", score__weight_end="0.4",
                   base__sha256="x", prepare__source="csv", eval__batch_size=0, rollouts=REMOVED,
                   model__quantization="int8")
    assert found[0] == "params.yaml has 9 error(s); nothing was run"
    paths = [line.strip().split(":")[0] for line in found[1:]]
    assert paths == ["base.sha256", "model.quantization", "prepare", "sft.learning_rate", "sft.typo", "rollouts",
                     "score.weight_end", "ppo.kl.target", "eval.batch_size"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"sft__learning_rate": "2e-4"}, "  sft.learning_rate: Input should be a valid number, found '2e-4' (YAML 1.1 "
                                     "reads 2e-4 as text: write it with a dot, as in 2.0e-04)"),
    ({"sft__typo": 1}, "  sft.typo: unknown key; remove it or mend its name"),
    ({"score__typo": 1}, "  score.typo: unknown key; remove it or mend its name"),
    ({"ppo__kl__typo": 1}, "  ppo.kl.typo: unknown key; remove it or mend its name"),
    ({"typo": 1}, "  typo: unknown key; remove it or mend its name"),
    ({"sft__lora__r": REMOVED}, "  sft.lora.r: is missing; add it"),
    ({"score__cf": REMOVED}, "  score.cf: is missing; add it"),
    ({"ppo__kl__target": REMOVED}, "  ppo.kl.target: is missing; add it"),
    ({"ppo__kl": REMOVED}, "  ppo.kl: is missing; add it"),
    ({"ppo": REMOVED}, "  ppo: is missing; add it"),
    ({"base__source": REMOVED}, "  base: source is missing; add it"),
    ({"prepare__source": "csv"}, "  prepare: source must be one of 'hub', 'path', 'sample', found 'csv'"),
    ({"prepare__train": "480"}, "  prepare.train: Input should be a valid integer, found '480'"),
    ({"sft__seed": True}, "  sft.seed: Input should be a valid integer, found True"),
    ({"sft__seed": -1}, "  sft.seed: Input should be greater than or equal to 0, found -1"),
    ({"score__seed": "3"}, "  score.seed: Input should be a valid integer, found '3'"),
    ({"sft__batch_size": 8.0}, "  sft.batch_size: Input should be a valid integer, found 8.0"),
    ({"sft__learning_rate": float("inf")}, "  sft.learning_rate: Input should be a finite number, found inf"),
    ({"score__weight_end": float("inf")}, "  score.weight_end: Input should be a finite number, found inf"),
    ({"ppo__learning_rate": float("nan")}, "  ppo.learning_rate: Input should be a finite number, found nan"),
    # impossible combinations
    ({"sft__micro_batch": 0}, "  sft.micro_batch: must be a number of rows, 1 or more, or auto, found 0"),
    ({"sft__micro_batch": "all"}, "  sft.micro_batch: must be a number of rows, 1 or more, or auto, found 'all'"),
    ({"sft__batch_size": 8, "sft__micro_batch": 3}, "  sft: batch_size 8 must be a multiple of micro_batch 3"),
    ({"model__quantization": "nf4", "model__dtype": "float32"},
     "  model: quantization nf4 computes in bfloat16: set dtype to bfloat16, or quantization to none"),
    ({"score__weight_end": -1}, "  score: weight_end must be 0 or more, found -1.0"),
    ({"rollouts__allocation": "ucb1"}, "  rollouts.allocation: Input should be 'uniform' or 'thompson', found 'ucb1'"),
    ({"ppo__batch_size": 8, "ppo__mini_batch_size": 3}, "  ppo: batch_size 8 must be a multiple of mini_batch_size 3"),
])
def test_what_each_mistake_gets(changes, message):
    (first, *rest) = errors(**changes)
    assert first == "params.yaml has 1 error(s); nothing was run" and len(rest) == 1
    assert rest[0] == message


def test_all_that_is_wrong_in_a_section_is_said_at_once():
    assert errors(score__weight_end=-1.0, score__seed=-1, ppo__gamma=1.5, ppo__mini_batch_size=0) == [
        "params.yaml has 4 error(s); nothing was run",
        "  score: weight_end must be 0 or more, found -1.0",
        "  score: seed must be 0 or more, found -1",
        "  ppo: mini_batch_size must be positive, found 0",
        "  ppo: gamma must lie in [0, 1], found 1.5",
    ]
    assert errors(ppo__kl__target=0.0, ppo__kl__stop_multiple=1.0)[1:] == [
        "  ppo.kl: kl.target must be positive (nats a sequence), found 0.0",
        "  ppo.kl: kl.stop_multiple must be above 1 (or null: never stop), found 1.0",
    ]


@pytest.mark.parametrize(("text", "message"), [
    ("", "the file: Input should be an object, found None"),
    ("- 1", r"the file: Input should be an object, found \[1\]"),
    ("sft: {", "not YAML; mend it: "),
    ("sft: \xff", "not YAML; mend it: "),
    ("sft:\n  seed: 0\n  seed: 1\n", "the key seed stands there 2 times; keep one\n +in .*line 2, column 3"),
])
def test_a_file_that_holds_no_settings(tmp_path, text, message):
    (tmp_path / "params.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        load_params(tmp_path / "params.yaml")


def test_a_missing_file_says_how_to_get_it(tmp_path):
    with pytest.raises(ValueError, match="is not here; run from the repository's root, or bring it back: git checkout"):
        load_params(tmp_path / "params.yaml")


def test_what_dvc_exp_run_writes_is_a_number(tmp_path):
    """`dvc exp run -S ppo.learning_rate=1.0e-5` writes 1e-05, text to a plain YAML 1.1 reader."""
    from dvc.utils.hydra import apply_overrides

    (tmp_path / "params.yaml").write_text(SAMPLE, encoding="utf-8")
    given = ["ppo.learning_rate=1.0e-5", "sft.learning_rate=3.0e-4", "sft.seed=7"]
    apply_overrides(str(tmp_path / "params.yaml"), given)
    plain = yaml.safe_load((tmp_path / "params.yaml").read_text(encoding="utf-8"))
    assert plain["ppo"]["learning_rate"] == "1e-05", "DVC has mended this"
    params = load_params(tmp_path / "params.yaml")
    assert (params.ppo.learning_rate, params.sft.learning_rate, params.sft.seed) == (1e-5, 3e-4, 7)
    expected = check(parse(SAMPLE), "params.yaml").model_dump()
    expected["ppo"]["learning_rate"], expected["sft"]["learning_rate"], expected["sft"]["seed"] = 1e-5, 3e-4, 7
    assert params.model_dump() == expected


@pytest.mark.parametrize(("text", "value"), [
    ("1e-05", 1e-5), ("-2e+10", -2e10), ("5.0e-5", 5e-5), ("2.5e-05", 2.5e-5),
    ("2e-4", "2e-4"), ("1e5", "1e5"), ("0x1e-05", "0x1e-05"), ("1e-05x", "1e-05x"), ("480", 480),
])
def test_which_texts_are_numbers(text, value):
    found = parse(f"a: {text}")["a"]
    assert found == value and type(found) is type(value)


def test_bad_params_answer_at_once_and_load_nothing(tmp_path):
    (tmp_path / "params.yaml").write_text(re.sub("epochs: [0-9.]+", "epochs: none", SAMPLE, count=1))
    code = ("import sys, runpy\n"
            "try: runpy.run_module('stages.sft', run_name='__main__', alter_sys=True)\n"
            "except SystemExit as end: print(end.code)\n"
            "print(sorted({'torch', 'transformers', 'trl', 'datasets', 'numpy', 'scipy'} & set(sys.modules)))\n")
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={"PYTHONPATH": str(ROOT), "PATH": ""})
    seconds = time.perf_counter() - started
    assert done.stdout.splitlines() == ["2", "[]"], done.stderr
    assert "sft.epochs: Input should be a valid number, found 'none'" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*/")) and seconds < 3  # 0.5 s alone; the rest is for a busy machine


def test_the_module_checks_the_file(tmp_path):
    for text, code in ((SAMPLE, 0), ("sft: 1", 2)):
        (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
        done = subprocess.run([sys.executable, "-m", "looper.params"], cwd=tmp_path, capture_output=True, text=True,
                              env={"PYTHONPATH": str(ROOT), "PATH": ""})
        assert done.returncode == code and bool(done.stderr) == bool(code)
        assert done.stdout == ("" if code else "params.yaml: every setting is there and possible\n")


ROUND = {"start": "models/sft_lora", "suffix": ""}
SECOND = {"start": "models/ppo_regime_w", "suffix": "_2"}


def test_rounds_follow_one_another():
    params = check(changed(rounds={"1": ROUND, "2": SECOND}, final="models/ppo_regime_w_2"), "params.yaml")
    assert [each.adapter for each in params.rounds.values()] == ["models/ppo_regime_w", "models/ppo_regime_w_2"]
    assert round_of(params.rounds, "2").start == "models/ppo_regime_w"
    with pytest.raises(ValueError, match="no round '3'; the section rounds of params.yaml has 1, 2"):
        round_of(params.rounds, "3")


@pytest.mark.parametrize(("rounds", "final", "error"), [
    ({"1": ROUND, "2": SECOND}, "models/ppo_regime_w",
     "final must be the last round's adapter, models/ppo_regime_w_2, found models/ppo_regime_w"),
    ({"1": ROUND, "3": SECOND}, "models/ppo_regime_w_2", 'rounds must be "1", "2", … in order, found 1, 3'),
    ({"1": SECOND}, "models/ppo_regime_w_2",
     "rounds.1.start must be the adapter of the round before, models/sft_lora, found models/ppo_regime_w"),
    ({"1": ROUND, "2": SECOND | {"start": "models/sft_lora"}}, "models/ppo_regime_w_2",
     "rounds.2.start must be the adapter of the round before, models/ppo_regime_w, found models/sft_lora"),
    ({"1": ROUND, "2": SECOND | {"suffix": ""}}, "models/ppo_regime_w",
     "rounds: each needs a suffix of its own, or it would write over another's files"),
])
def test_rounds_that_do_not_follow_one_another_are_an_error(rounds, final, error):
    assert errors(rounds=rounds, final=final)[1:] == [f"  the file: {error}"]


def test_a_round_whose_name_is_a_number_is_an_error_at_once():
    assert errors(rounds={1: ROUND})[1:] == ["  rounds.1: write the key as text: '1'"]


def test_a_suffix_cannot_leave_the_folder():
    assert "rounds.1.suffix" in errors(rounds={"1": ROUND | {"suffix": "/../x"}}, final="models/ppo_regime_w")[1]
