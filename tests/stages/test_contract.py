"""dvc.yaml against the code: a stage's deps are the files it imports, its params the sections it reads."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from looper.pipeline import resolved_stages

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("stages", "looper", "regime_w")
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
RESOLVED = resolved_stages({"stages": PIPELINE}, yaml.safe_load((ROOT / "params.yaml").read_text()))
STAGES = sorted(PIPELINE)


def definition(stage: str) -> dict:
    entry = PIPELINE[stage]
    return entry.get("do", entry)


def module_file(dotted: str) -> Path | None:
    path = ROOT.joinpath(*dotted.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.exists():
            return candidate
    return None


def imported_files(file: Path) -> set[Path]:
    """The files of ours that `file` imports anywhere in it, at module level or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import; write it whole"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {module_file(name) for name in names if name.split(".")[0] in PACKAGES} - {None}
    return found


def closure(file: Path) -> set[Path]:
    seen, waiting = set(), {file}
    while waiting:
        current = waiting.pop()
        seen.add(current)
        waiting |= imported_files(current) - seen
    return seen


def has_code(file: Path) -> bool:
    body = ast.parse(file.read_text()).body
    return not all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)


def keys_read(file: Path) -> set[str]:
    """The dotted path of every `params.X` and `params.X.Y` in a stage's module, the longest at each place."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)]
    inner = {id(node.value) for node in nodes}
    paths = {ast.unparse(node) for node in nodes if id(node) not in inner}
    # A call on a section, as in params.sft.model_dump(), reads the section
    return {path.removeprefix("params.").removesuffix(".model_dump") for path in paths if path.startswith("params.")}


# Files that a module reads beside its own text.
DATA_FILES = {"looper/sample_problems.py": "looper/sample_problems.yaml", "looper/report.py": "looper/report.html.j2"}


@pytest.mark.parametrize("stage", STAGES)
def test_deps_are_the_import_closure(stage):
    needed = {str(file.relative_to(ROOT)) for file in closure(ROOT / "stages" / f"{stage}.py") if has_code(file)}
    needed |= {data for module, data in DATA_FILES.items() if module in needed}
    listed = {dep for dep in definition(stage)["deps"] if dep.startswith(PACKAGES)}
    assert listed == needed, f"add {sorted(needed - listed)}, remove {sorted(listed - needed)}"


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_the_keys_read(stage):
    """A round's own entry of `rounds` is named in dvc.yaml, so that a further round leaves the finished ones alone."""
    listed = {key.removesuffix(".${key}") for key in definition(stage).get("params", [])}
    read = keys_read(ROOT / "stages" / f"{stage}.py")
    assert {key for key in listed if not any(key == other or other.startswith(f"{key}.") for other in read)} == set()
    assert {key for key in read if not any(key == other or key.startswith(f"{other}.") for other in listed)} == set()


@pytest.mark.parametrize("stage", STAGES)
def test_params_reach_the_library_as_sections(stage):
    """A stage hands sections on, never the whole params: else a key could be read that dvc.yaml does not name."""
    for node in ast.walk(ast.parse((ROOT / "stages" / f"{stage}.py").read_text())):
        if isinstance(node, ast.Call):
            arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
            assert not any(isinstance(each, ast.Name) and each.id == "params" for each in arguments)


@pytest.mark.parametrize("stage", STAGES)
def test_every_data_file_the_stage_names_is_in_dvc_yaml(stage):
    """Every path literal in the stage's module is one of its deps or outs, lies in one, or is a folder of some."""
    known = [str(path) for name, entry in RESOLVED.items() if name.partition("@")[0] == stage for path in paths_of(entry)]
    for node in ast.walk(ast.parse((ROOT / "stages" / f"{stage}.py").read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Path" and node.args:
            pattern = path_pattern(node.args[0])
            assert pattern is None or any(re.fullmatch(f"{pattern}(/.*)?", each) or re.match(f"{each}(/|$)", pattern)
                                          for each in known), pattern


def test_the_report_depends_on_all_it_reads():
    from looper.report import MODELS
    from stages.report import CURVES, METRICS

    read = {f"metrics/{name}.json" for name in METRICS.values()} | {str(path) for path in CURVES.values()}
    read |= {f"metrics/eval_{model}.json" for model in MODELS} | {f"data/predictions/{model}.jsonl" for model in MODELS}
    read.add("data/regime_w_rollouts.jsonl")
    assert {dep for dep in RESOLVED["report"]["deps"] if not dep.startswith(PACKAGES)} == read


def paths_of(entry: dict) -> list[str]:
    """The deps and outs of a stage."""
    outs = [out if isinstance(out, str) else next(iter(out))
            for kind in ("outs", "metrics", "plots") for out in entry.get(kind, [])]
    return [*entry["deps"], *outs] if "deps" in entry else outs


def path_pattern(node: ast.expr) -> str | None:
    """A regular expression of the paths that a literal or an f-string can be; None for a value from elsewhere."""
    if isinstance(node, ast.Constant):
        return re.escape(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(re.escape(part.value) if isinstance(part, ast.Constant) else "[0-9a-z_]*" for part in node.values)
    return None


def test_every_stage_module_is_in_the_pipeline():
    modules = {file.stem for file in (ROOT / "stages").glob("*.py")} - {"__init__"}
    assert modules == set(STAGES)
