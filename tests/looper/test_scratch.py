"""The scratch folder: the same inputs find it again, any other input does not; gone when the stage is done."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from looper.files import write_json
from looper.pipeline import resolved_stages
from looper.scratch import SCRATCH, inputs_hash, last_checkpoint, scratch

DVC = """
stages:
  sft:
    cmd: python -m stages.sft
    deps: [models/base, data/train.jsonl, looper/sft.py]
    params: [model, sft]
  eval:
    foreach:
      base: {model: models/base/manifest.json}
      ppo: {model: models/ppo}
    do:
      cmd: python -m stages.eval ${key}
      deps: [models/base, "${item.model}", "data/${key}.jsonl"]
      params: [model, eval]
"""
PARAMS = "model:\n  dtype: float32\nsft:\n  learning_rate: 1.0e-3\neval:\n  batch_size: 4\n"


@pytest.fixture(autouse=True)
def repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("dvc.yaml").write_text(DVC)
    Path("params.yaml").write_text(PARAMS)
    for path in ("data/train.jsonl", "data/base.jsonl", "data/ppo.jsonl", "looper/sft.py", "models/base/weights"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("before")
    write_json(Path("models/base/manifest.json"), {"files": {"model.safetensors": "1"}})
    write_json(Path("models/ppo/card.json"), {"files": {"adapter_model.safetensors": "1"}})


def edit(path, old, new):
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new))


def test_it_is_kept_after_an_error_found_again_and_removed_when_done():
    with pytest.raises(KeyboardInterrupt), scratch("sft") as folder:
        (folder / "chunk").write_text("done")
        raise KeyboardInterrupt
    with scratch("sft") as again:
        assert again == folder and (again / "chunk").read_text() == "done" and again.parent == SCRATCH
    assert not folder.exists()
    with scratch("sft") as folder:
        assert list(folder.iterdir()) == []


CHANGES = [
    ("params.yaml", "1.0e-3", "2.0e-3"), ("params.yaml", "float32", "bfloat16"),
    ("data/train.jsonl", "before", "after"), ("looper/sft.py", "before", "after"),
    ("models/base/manifest.json", '"1"', '"2"'),
]


def test_an_adapter_that_the_command_line_names_counts_too():
    for name in ("one", "two"):
        write_json(Path(f"models/{name}/card.json"), {"weights": name})
    with pytest.raises(RuntimeError), scratch("eval@ppo", Path("models/one")) as one:
        raise RuntimeError
    with scratch("eval@ppo", Path("models/two")) as two:
        assert two != one and not one.exists()


@pytest.mark.parametrize("change", CHANGES)
def test_any_input_that_changes_gives_another_folder_and_the_stale_one_goes(change):
    with pytest.raises(RuntimeError), scratch("sft") as stale:
        raise RuntimeError
    with pytest.raises(RuntimeError), scratch("eval@ppo") as others:
        raise RuntimeError
    edit(*change)
    with scratch("sft") as folder:
        assert folder != stale and not stale.exists()
    assert others.exists(), "another stage's scratch is not this one's to remove"


@pytest.mark.parametrize("change", [
    ("params.yaml", "batch_size: 4", "batch_size: 8"), ("params.yaml", "sft:", "# a comment\nsft:"),
    ("params.yaml", "1.0e-3", "0.001"), ("data/ppo.jsonl", "before", "after"), ("models/ppo/card.json", '"1"', '"2"'),
])
def test_what_is_no_input_changes_nothing(change):
    before = inputs_hash("sft")
    edit(*change)
    assert inputs_hash("sft") == before


@pytest.mark.parametrize(("change", "changed"), [
    (("models/ppo/card.json", '"1"', '"2"'), {"eval@ppo"}),
    (("models/base/manifest.json", '"1"', '"2"'), {"eval@base", "eval@ppo"}),
    (("data/ppo.jsonl", "before", "after"), {"eval@ppo"}),
    (("data/base.jsonl", "before", "after"), {"eval@base"}),
    (("params.yaml", "batch_size: 4", "batch_size: 8"), {"eval@base", "eval@ppo"}),
])
def test_a_foreach_stage_has_its_items_own_inputs(change, changed):
    stages = ("eval@base", "eval@ppo")
    before = {stage: inputs_hash(stage) for stage in stages}
    assert len(set(before.values())) == 2
    edit(*change)
    assert {stage for stage in stages if inputs_hash(stage) != before[stage]} == changed


def test_it_reads_the_repositorys_own_dvc_yaml(monkeypatch):
    """Every stage that keeps a scratch folder can name it, once its inputs are there."""
    root = Path(__file__).resolve().parents[2]
    Path("dvc.yaml").write_text((root / "dvc.yaml").read_text())
    Path("params.yaml").write_text((root / "params.yaml").read_text())
    monkeypatch.setattr("looper.scratch.sha256", lambda path: str(path))
    monkeypatch.setattr("looper.scratch._identity", lambda path: path)
    for folder in ("models/sft_lora", "models/ppo_regime_w"):
        write_json(Path(folder, "card.json"), {})
    using = {file.stem for file in (root / "stages").glob("*.py") if re.search(r"\bscratch\(", file.read_text())}
    stages = resolved_stages(yaml.safe_load(Path("dvc.yaml").read_text()), yaml.safe_load(Path("params.yaml").read_text()))
    names = [name for name in stages if name.partition("@")[0] in using]
    assert len(names) == 9 and len({inputs_hash(name) for name in names}) == len(names)


def test_a_missing_input_is_named():
    shutil.rmtree("models/ppo")
    with pytest.raises(ValueError, match="models/ppo is not here; .*dvc pull models/ppo"), scratch("eval@ppo"):
        pass
    Path("models/ppo").mkdir()
    with pytest.raises(ValueError, match="models/ppo holds neither card.json nor manifest.json"), scratch("eval@ppo"):
        pass


def test_the_last_checkpoint_is_the_last_that_is_whole(tmp_path, capsys):
    assert last_checkpoint(tmp_path) is None and capsys.readouterr().out == ""
    for step, state in ((9, "{}"), (20, '{"global_step": 20}'), (100, '{"global_st'), (110, None)):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoints" / "checkpoint-20")
    assert capsys.readouterr().out == f"going on from {tmp_path}/checkpoints/checkpoint-20\n"
