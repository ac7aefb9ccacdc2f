"""dvc.yaml against the code: a stage's deps are the files it imports, its params the sections it reads."""

import ast
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("stages", "looper", "regime_w")
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
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


def sections_read(file: Path) -> set[str]:
    """The `X` of every `params.X` in a stage's module."""
    nodes = ast.walk(ast.parse(file.read_text()))
    return {node.attr for node in nodes
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "params"}


# Files that a module reads beside its own text.
DATA_FILES = {"looper/sample_problems.py": "looper/sample_problems.yaml", "looper/report.py": "looper/report.html.j2"}


@pytest.mark.parametrize("stage", STAGES)
def test_deps_are_the_import_closure(stage):
    needed = {str(file.relative_to(ROOT)) for file in closure(ROOT / "stages" / f"{stage}.py") if has_code(file)}
    needed |= {data for module, data in DATA_FILES.items() if module in needed}
    listed = {dep for dep in definition(stage)["deps"] if dep.startswith(PACKAGES)}
    assert listed == needed, f"add {sorted(needed - listed)}, remove {sorted(listed - needed)}"


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_the_sections_read(stage):
    assert set(definition(stage).get("params", [])) == sections_read(ROOT / "stages" / f"{stage}.py")


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
    entry = definition(stage)
    outs = [out if isinstance(out, str) else next(iter(out))
            for kind in ("outs", "metrics", "plots") for out in entry.get(kind, [])]
    items = PIPELINE[stage].get("foreach", {"": {}})
    known = {text.replace("${key}", key).replace("${item.model}", item.get("model", ""))
             for text in [*entry["deps"], *outs] for key, item in items.items()}
    for node in ast.walk(ast.parse((ROOT / "stages" / f"{stage}.py").read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Path" and isinstance(node.args[0], ast.Constant):
            path = node.args[0].value
            assert any(f"{path}/".startswith(f"{each}/") or f"{each}/".startswith(f"{path}/") for each in known), path


def test_every_stage_module_is_in_the_pipeline():
    modules = {file.stem for file in (ROOT / "stages").glob("*.py")} - {"__init__"}
    assert modules == set(STAGES)
