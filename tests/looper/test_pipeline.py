"""dvc.yaml resolved as DVC does: foreach over a section or a table, templates in strings, keys and lists."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from looper.pipeline import lookup, resolved_stages

PARAMS = {"rounds": {"1": {"start": "models/sft", "suffix": ""}, "2": {"start": "models/ppo", "suffix": "_2"}},
          "final": "models/ppo_2", "sft": {"lora": {"r": 8}}}
DVC = """
stages:
  sft:
    cmd: python -m stages.sft
    params: [sft]
  ppo:
    foreach: ${rounds}
    do:
      cmd: python -m stages.ppo ${key}
      deps: ["${item.start}", "data/${key}${item.suffix}.jsonl"]
      params: ["rounds.${key}"]
      metrics:
        - "metrics/ppo${item.suffix}.json": {cache: false}
  eval:
    foreach:
      base: {model: models/base}
      ppo: {model: "${final}"}
    do:
      cmd: eval ${key}
      deps: ["${item.model}"]
"""


def test_every_kind_of_template_by_hand():
    assert resolved_stages(yaml.safe_load(DVC), PARAMS) == {
        "sft": {"cmd": "python -m stages.sft", "params": ["sft"]},
        "ppo@1": {"cmd": "python -m stages.ppo 1", "deps": ["models/sft", "data/1.jsonl"], "params": ["rounds.1"],
                  "metrics": [{"metrics/ppo.json": {"cache": False}}]},
        "ppo@2": {"cmd": "python -m stages.ppo 2", "deps": ["models/ppo", "data/2_2.jsonl"], "params": ["rounds.2"],
                  "metrics": [{"metrics/ppo_2.json": {"cache": False}}]},
        "eval@base": {"cmd": "eval base", "deps": ["models/base"]},
        "eval@ppo": {"cmd": "eval ppo", "deps": ["models/ppo_2"]},
    }


def test_lookup_follows_a_dotted_path():
    assert lookup(PARAMS, "sft.lora.r") == 8 and lookup(PARAMS, "final") == "models/ppo_2"
    with pytest.raises(KeyError):
        lookup(PARAMS, "sft.lora.alpha")


@pytest.mark.parametrize("profile", ["sample", "rounds_3"])
def test_dvc_resolves_our_pipeline_to_the_same_stages(profile, tmp_path):
    """Against DVC itself: the same names and commands."""
    from looper.profile import apply

    root = Path(__file__).resolve().parents[2]
    params = apply(profile, (root / "params.yaml").read_text())
    (tmp_path / "params.yaml").write_text(params)
    (tmp_path / "dvc.yaml").write_text((root / "dvc.yaml").read_text())
    code = ("import json\nfrom dvc.repo import Repo\nRepo.init('.', no_scm=True)\nfor stage in Repo('.').index.stages:\n"
            "    deps = sorted(dep.def_path for dep in stage.deps if not hasattr(dep, 'params'))\n"
            "    print(json.dumps([stage.addressing, stage.cmd, deps]))")
    listed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    ours = resolved_stages(yaml.safe_load((root / "dvc.yaml").read_text()), yaml.safe_load(params))
    found = sorted(json.loads(line) for line in listed.splitlines() if line.startswith("["))
    assert found == sorted([name, entry["cmd"], sorted(entry["deps"])] for name, entry in ours.items())
