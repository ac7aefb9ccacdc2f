"""What surrounds every stage: help, usage, the hub switched off, errors that help."""

import gc
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from looper import stage
from looper.params import load_params
from stages import eval as eval_stage

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "stages").glob("*.py") if path.stem != "__init__")
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "scipy", "matplotlib"}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in stage.PRIVATE | stage.TORCH | stage.OFFLINE:
        monkeypatch.setenv(name, "")  # restored afterwards: run() writes into os.environ
    threshold = gc.get_threshold()
    yield
    gc.set_threshold(*threshold)
    gc.unfreeze()


def test_help_of_every_stage_is_its_docstring_and_imports_nothing_heavy(tmp_path):
    code = (f"import contextlib, io, runpy, sys\nfor name in {NAMES}:\n"
            "    sys.argv, out = [name, '--help'], io.StringIO()\n"
            "    with contextlib.redirect_stdout(out):\n"
            "        module = runpy.run_module(f'stages.{name}', run_name='__main__')\n"
            "    assert out.getvalue().strip() == module['__doc__'].strip() \\\n"
            "        and f'Stage {name}: ' in out.getvalue(), name\n"
            f"print(sorted({HEAVY} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=20,
                          env={"PYTHONPATH": str(ROOT), "PATH": ""})
    assert done.stdout == "[]\n", done.stderr
    assert not list(tmp_path.iterdir())


def test_help_works_from_the_command_line(tmp_path):
    done = subprocess.run([sys.executable, "-m", "stages.eval", "-h"], cwd=tmp_path, capture_output=True, text=True,
                          env={"PYTHONPATH": str(ROOT), "PATH": ""})
    assert done.returncode == 0 and done.stdout.startswith("Stage eval: greedy answers") and done.stderr == ""


@pytest.mark.parametrize(("given", "arguments", "usage"), [
    (["extra"], (), "usage: python -m stages.sft; found extra"),
    ([], ("ROUND",), "usage: python -m stages.sft ROUND; found nothing"),
    (["base"], ("NAME", "ADAPTER"), "usage: python -m stages.sft NAME ADAPTER; found base"),
    (["1", "2"], ("ROUND",), "usage: python -m stages.sft ROUND; found 1 2"),
])
def test_wrong_arguments_get_the_usage(monkeypatch, capsys, given, arguments, usage):
    monkeypatch.setattr(sys, "argv", ["/x/stages/sft.py", *given])
    with pytest.raises(SystemExit) as end:
        stage.run(lambda *_: pytest.fail("the stage ran"), "doc", arguments=arguments)
    assert end.value.code == 2 and capsys.readouterr().err == usage + "\n"


def test_the_arguments_reach_main_and_the_time_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/x/stages/eval.py", "ppo", "models/ppo"])
    got = []
    stage.run(lambda *given: got.append(given), "doc", arguments=("NAME", "ADAPTER"))
    assert got == [("ppo", "models/ppo")] and capsys.readouterr().out == "eval ppo models/ppo: 0.0 s\n"


def test_our_error_is_its_text_and_exit_2(monkeypatch, capsys, tmp_path):
    from looper.jsonl import read_jsonl

    monkeypatch.setattr(sys, "argv", ["/x/stages/sft.py"])
    with pytest.raises(SystemExit) as end:
        stage.run(lambda: read_jsonl(tmp_path / "train.jsonl"), "doc")
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"sft: {tmp_path}/train.jsonl is not here; run the stage that writes it")


def test_our_error_is_ours_inside_a_context_manager_too(monkeypatch, capsys, tmp_path):
    from looper.files import replacing
    from looper.params import load_params

    def main():
        with replacing(tmp_path / "model"):
            load_params(tmp_path / "params.yaml")

    monkeypatch.setattr(sys, "argv", ["/x/stages/sft.py"])
    with pytest.raises(SystemExit) as end:
        stage.run(main, "doc")
    assert end.value.code == 2 and "params.yaml is not here" in capsys.readouterr().err


def test_an_interrupt_is_a_line_and_no_traceback(monkeypatch, capsys):
    def main():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["/x/stages/sft.py"])
    with pytest.raises(SystemExit) as end:
        stage.run(main, "doc")
    assert end.value.code == 130
    assert capsys.readouterr().err == "sft: interrupted; what it finished is kept: the same command goes on from there\n"


@pytest.mark.parametrize("by_dvc", [False, True])
def test_under_dvc_an_error_says_where_the_outputs_went(monkeypatch, capsys, by_dvc):
    monkeypatch.delenv("DVC_STAGE", raising=False)
    if by_dvc:
        monkeypatch.setenv("DVC_STAGE", "eval@sft")  # as DVC does for a stage's command
    monkeypatch.setattr(sys, "argv", ["/x/stages/eval.py", "sfd", "models/sft_lora"])
    with pytest.raises(SystemExit) as end:
        stage.run(eval_stage.main, "doc", arguments=("NAME", "ADAPTER"))
    first, *rest = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and "no model 'sfd'" in first
    assert [line.startswith("DVC has removed this stage's former outputs") for line in rest] == [True] * by_dvc


@pytest.mark.parametrize("main", [lambda: __import__("json").loads("{"), lambda: {}["key"]])
def test_a_librarys_error_keeps_its_traceback(monkeypatch, main):
    monkeypatch.setattr(sys, "argv", ["/x/stages/sft.py"])
    with pytest.raises((ValueError, KeyError)) as caught:
        stage.run(main, "doc")
    assert not isinstance(caught.value, SystemExit)


@pytest.fixture
def small_card(monkeypatch):
    """A card of 24 GiB with 1.5 free, of which this process holds 21.25."""
    import torch

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * 2**29, 24 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 85 * 2**28)
    return torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 24 GiB.")


@pytest.mark.parametrize(("name", "settings"), [
    ("sft", ["sft.micro_batch", "sft.gradient_checkpointing: true"]), ("targets", ["sft.self.batch_size"]),
    ("rollouts", ["rollouts.batch_size"]), ("ppo", ["ppo.gradient_checkpointing: true", "ppo.mini_batch_size"]),
    ("eval", ["eval.batch_size"]), ("dev_eval", ["eval.batch_size"]), ("dev_ppo", ["eval.batch_size"]),
])
def test_too_little_gpu_memory_says_what_is_there_and_which_setting_lowers_it(monkeypatch, capsys, small_card, name, settings):
    def main():
        raise small_card

    monkeypatch.setattr(sys, "argv", [f"/x/stages/{name}.py"])
    with pytest.raises(SystemExit) as end:
        stage.run(main, "doc")
    text = capsys.readouterr().err
    assert end.value.code == 2 and text.startswith(f"{name}: the GPU's memory is too small") and text.count("\n") == 1
    assert "it has 24.0 GiB; this stage holds 21.2 GiB and asked for 2.00 GiB, 1.5 GiB were left" in text
    for setting in settings:
        assert setting in text
        section = load_params(ROOT / "params.yaml").model_dump()
        for key in setting.partition(":")[0].split("."):
            section = section[key]


def test_every_stage_that_loads_the_model_has_a_setting_for_less_memory():
    texts = {name: (ROOT / "stages" / f"{name}.py").read_text(encoding="utf-8") for name in NAMES}
    loading = {name for name, text in texts.items() if "load_base(" in text or "load_for_generation(" in text
               or "load_trainable(" in text}
    assert loading == set(stage.LESS_MEMORY) & set(NAMES) and len(loading) >= 6


def test_every_stage_that_loads_the_model_starts_a_process_a_gpu_and_writes_in_one():
    texts = {name: (ROOT / "stages" / f"{name}.py").read_text(encoding="utf-8") for name in NAMES}
    for call in ("start_processes(params.model)", "first_process_only()"):
        assert {name for name, text in texts.items() if f" {call}\n" in text} == set(stage.LESS_MEMORY) & set(NAMES)
    for name in set(stage.LESS_MEMORY) & set(NAMES):
        body = texts[name].partition("with scratch(")[2]
        assert 0 < body.index("first_process_only()") < body.index("write"), f"{name} writes before it is alone"


@pytest.mark.parametrize("network", [False, True])
def test_only_stages_that_fetch_may_ask_the_hub(monkeypatch, network):
    monkeypatch.setattr(sys, "argv", ["/x/stages/sft.py"])
    seen = {}
    stage.run(lambda: seen.update(os.environ), "doc", network=network)
    always = stage.PRIVATE | stage.TORCH
    assert {name: seen[name] for name in always} == always
    expected = dict.fromkeys(stage.OFFLINE, "") if network else stage.OFFLINE
    assert {name: seen[name] for name in stage.OFFLINE} == expected
    assert stage.OFFLINE["HF_HUB_OFFLINE"] == stage.OFFLINE["HF_DATASETS_OFFLINE"] == "1"


@pytest.mark.parametrize(("name", "arguments", "error"), [
    ("rollouts", ["4"], "rollouts: there is no round '4'; the section rounds of params.yaml has 1\n"),
    ("score", ["0"], "score: there is no round '0'; the section rounds of params.yaml has 1\n"),
    ("ppo", ["one"], "ppo: there is no round 'one'; the section rounds of params.yaml has 1\n"),
    ("eval", ["dpo", "models/dpo"], "eval: there is no model 'dpo' to compare; it must be one of base, sft, ppo\n"),
])
def test_a_stage_that_is_called_for_what_is_not_there_says_so_at_once(name, arguments, error):
    code = f"import runpy, sys; sys.argv = {[name, *arguments]}; runpy.run_module('stages.{name}', run_name='__main__')"
    code += f"\nassert not {HEAVY} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (2, error)


@pytest.mark.parametrize(("environment", "end"), [({}, "at Python's end\n"), ({"DVC_STAGE": "score@1"}, ""),
                                                    ({"LOCAL_RANK": "0"}, "")])
def test_a_stage_for_which_others_wait_ends_at_once_with_all_that_it_said(environment, end):
    code = ("import atexit, sys; sys.argv = ['score']\nfrom looper.stage import run\n"
            "atexit.register(print, \"at Python's end\")\n"
            "def main():\n    print('said')\n    print('warned', end='', file=sys.stderr)\nrun(main, '')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={"PATH": "", **environment})
    assert (done.returncode, done.stderr) == (0, "warned")
    assert re.fullmatch(rf"said\nscore: 0\.\d s\n{end}", done.stdout)


def test_base_and_prepare_alone_have_the_network():
    texts = {name: (ROOT / "stages" / f"{name}.py").read_text(encoding="utf-8") for name in NAMES}
    assert [name for name, text in texts.items() if "network=True" in text] == ["base", "prepare"]


def test_the_switch_is_set_before_a_library_reads_it(tmp_path):
    """huggingface_hub reads it once, at import: nothing may import it before the stage's main."""
    code = ("import sys; sys.argv = ['sft']\nfrom looper.stage import run\nimport looper.params, stages.sft\n"
            "assert 'huggingface_hub' not in sys.modules\n"
            "def main():\n    import huggingface_hub.constants as hub\n"
            "    print(hub.HF_HUB_OFFLINE, hub.HF_HUB_DISABLE_TELEMETRY)\n"
            "run(main, '')")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={"PYTHONPATH": str(ROOT), "PATH": ""})
    assert done.stdout.startswith("True True\n"), done.stderr
