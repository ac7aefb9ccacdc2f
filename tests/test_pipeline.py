"""The real `dvc repro` on a tiny model, in a clone: what reruns after which change, experiments, and the remote."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
ALL = ["base", "prepare", "targets", "sft", "dev_eval", "rollouts@1", "score@1", "ppo@1", "dev_ppo", "eval@base", "eval@sft", "eval@ppo",
       "report"]


def environment(folder: Path) -> dict[str, str]:
    """For commands run in `folder`: this interpreter's programs come first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(folder), "DVC_NO_ANALYTICS": "1", "OMP_NUM_THREADS": "1"}


def run(folder: Path, *command: str) -> str:
    """What `command` prints, run in `folder`."""
    done = subprocess.run(command, cwd=folder, env=environment(folder), text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}"
    return done.stdout


def rerun(folder: Path, *command: str) -> set[str]:
    """The stages that `command` (dvc repro, unless another is given) runs."""
    return set(re.findall(r"^Running stage '([^']+)'", run(folder, *(command or ("dvc", "repro"))), re.MULTILINE))


def commit(folder: Path) -> None:
    run(folder, "git", "add", "-A")
    run(folder, "git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "--quiet", "-m", "state")


def change(folder: Path, section: str, key: str, value: object) -> None:
    params = yaml.safe_load((folder / "params.yaml").read_text())
    assert params[section][key] != value
    params[section][key] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A clone of the files in git with a tiny base model and few, short questions, its pipeline run once."""
    from tiny import save_tiny

    folder = tmp_path_factory.mktemp("clone") / "project"
    for name in run(ROOT, "git", "ls-files").split("\n"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["base"] = {"source": "folder", "path": str(save_tiny(folder.with_name("tiny"))), "digest": None,
                      "licence": "none"}
    params["model"] |= {"device": "cpu", "dtype": "float32", "quantization": "none", "template": "chatml"}
    params["prepare"] = {"source": "sample", "train": 24, "dev": 8, "test": 10, "seed": 0}
    params["sft"] |= {"epochs": 1, "batch_size": 8, "micro_batch": 8, "max_tokens": 512, "save_steps": 2}
    params["dev_eval"]["questions"] = 4
    params["rollouts"] |= {"questions": 4, "max_new_tokens": 12, "batch_size": 32}
    params["ppo"] |= {"credit": "question", "batch_size": 2, "mini_batch_size": 2, "ppo_epochs": 1}
    params["eval"] = {"max_new_tokens": 12, "batch_size": 16}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    run(folder, "git", "init", "--quiet")
    commit(folder)
    assert rerun(folder) == set(ALL)
    commit(folder)
    for name, adapter in (("base", None), ("sft", "sft_lora"), ("ppo", "ppo_regime_w")):
        weights = adapter and hashlib.sha256((folder / f"models/{adapter}/adapter_model.safetensors").read_bytes()).hexdigest()
        assert json.loads((folder / f"metrics/eval_{name}.json").read_text())["adapter_sha256"] == weights
    return folder


def test_nothing_reruns_when_nothing_changed(project):
    assert rerun(project) == set()


def test_a_comment_in_params_reruns_nothing(project):
    with (project / "params.yaml").open("a") as file:
        file.write("# a comment\n")
    assert rerun(project) == set()


def test_a_comment_in_a_file_reruns_the_stages_that_import_it_and_nothing_behind_them(project):
    with (project / "regime_w" / "scoring.py").open("a") as file:
        file.write("# a comment\n")
    assert rerun(project) == {"score@1"}


def test_a_reward_weight_leaves_sft_and_the_other_models_alone(project):
    change(project, "score", "coherence_weight", 0.6)
    assert rerun(project) == {"score@1", "ppo@1", "dev_ppo", "eval@ppo", "report"}


def test_a_ppo_setting_reruns_ppo_and_what_reads_it(project):
    before = (project / "params.yaml").read_text()
    change(project, "ppo", "learning_rate", 1.0e-3)
    assert rerun(project) == {"ppo@1", "dev_ppo", "eval@ppo", "report"}
    (project / "params.yaml").write_text(before)
    assert rerun(project) == set(), "what has run once with these inputs comes out of the run cache"


def test_an_sft_setting_reruns_all_but_base_data_and_the_base_evaluation(project):
    change(project, "sft", "learning_rate", 2.5e-3)
    assert rerun(project) == set(ALL) - {"base", "prepare", "targets", "eval@base"}
    commit(project)


def test_an_experiment_is_run_compared_and_listed(project):
    before = (project / "params.yaml").read_text()
    assert rerun(project, "dvc", "exp", "run", "-S", "ppo.learning_rate=1.0e-5") == {"ppo@1", "dev_ppo", "eval@ppo", "report"}
    assert re.search(r"learning_rate: 1.*e-0?5", (project / "params.yaml").read_text())
    difference = run(project, "dvc", "metrics", "diff", "--all")
    assert re.search(r"metrics/summary.json\s+accuracy.ppo", difference)
    assert re.search(r"metrics/ppo.json\s+policy_loss", difference)
    assert "ppo.learning_rate" in run(project, "dvc", "exp", "show", "--csv", "--only-changed")
    (project / "params.yaml").write_text(before)
    run(project, "git", "checkout", "--quiet", ".")
    run(project, "dvc", "checkout", "--quiet")


def test_a_second_round_starts_from_the_first_and_does_not_repeat_it(project):
    before = (project / "params.yaml").read_text()
    second = ("-S", "+rounds.2.start=models/ppo_regime_w", "-S", "+rounds.2.suffix=_2", "-S", "final=models/ppo_regime_w_2")
    expected = {"rollouts@2", "score@2", "ppo@2", "dev_ppo", "eval@ppo", "report"}
    assert rerun(project, "dvc", "exp", "run", *second) == expected
    cards = [json.loads((project / f"models/ppo_regime_w{suffix}/card.json").read_text()) for suffix in ("", "_2")]
    assert cards[1]["start_sha256"] == cards[0]["files"]["adapter_model.safetensors"]
    asked = [{json.loads(line)["id"] for line in (project / f"data/rollouts{suffix}.jsonl").read_text().splitlines()}
             for suffix in ("", "_2")]
    assert len(asked[0]) == len(asked[1]) == 4 and not asked[0] & asked[1]
    (project / "params.yaml").write_text(before)
    run(project, "git", "checkout", "--quiet", ".")
    run(project, "dvc", "checkout", "--quiet")


def test_a_killed_stage_goes_on_where_it_was_and_makes_the_same_adapter(project):
    before = (project / "params.yaml").read_text()
    change(project, "sft", "epochs", 16)
    with subprocess.Popen(["dvc", "repro", "sft"], cwd=project, env=environment(project), start_new_session=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as killed:
        deadline = time.monotonic() + 120
        while not (kept := sorted(project.glob(".scratch/sft-*/checkpoints/checkpoint-*/trainer_state.json"))):
            assert killed.poll() is None and time.monotonic() < deadline, "the stage ended before its first checkpoint"
            time.sleep(0.02)
        os.killpg(killed.pid, signal.SIGKILL)
    assert not (project / "models" / "sft_lora").exists()
    # What goes on counts on from the checkpoint: with its history marked, the mark shows in what the stage logs
    state = json.loads(kept[-1].read_text())
    state["log_history"][0]["loss"] = 77.0
    kept[-1].write_text(json.dumps(state))
    assert rerun(project, "dvc", "repro", "sft") == {"sft"}
    assert "77.0" in (project / "metrics/live/sft/plots/metrics/loss.tsv").read_text().split("\n")[1]
    assert not list(project.glob(".scratch/sft-*"))
    adapter = project / "models/sft_lora/adapter_model.safetensors"
    went_on = adapter.read_bytes()
    assert rerun(project, "dvc", "repro", "--force", "--single-item", "--no-run-cache", "sft") == {"sft"}
    assert adapter.read_bytes() == went_on
    (project / "params.yaml").write_text(before)
    run(project, "git", "checkout", "--quiet", ".")
    run(project, "dvc", "checkout", "--quiet")


def test_a_clone_pulls_everything_and_reruns_nothing(project):
    run(project, "dvc", "remote", "add", "--default", "folder", str(project.with_name("remote")))
    commit(project)
    run(project, "dvc", "push")
    second = project.with_name("second")
    run(project, "git", "clone", "--quiet", str(project), str(second))
    run(second, "dvc", "pull")
    assert rerun(second) == set()


def test_the_base_and_one_adapter_are_enough_to_evaluate(project):
    third = project.with_name("third")
    run(project, "git", "clone", "--quiet", str(project), str(third))
    run(third, "dvc", "pull", "models/ppo_regime_w", "models/base")
    assert not (third / "models" / "sft_lora").exists()
    expected = (third / "metrics" / "eval_ppo.json").read_text()
    run(third, "python", "-m", "stages.prepare")
    (third / "metrics" / "eval_ppo.json").unlink()
    run(third, "python", "-m", "stages.eval", "ppo", "models/ppo_regime_w")
    assert (third / "metrics" / "eval_ppo.json").read_text() == expected
