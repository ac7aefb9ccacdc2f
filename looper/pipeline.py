"""dvc.yaml as DVC resolves it: every stage by its name, those of a `foreach` one by one, its templates filled in."""

import re
from collections.abc import Mapping
from typing import Any

TEMPLATE = re.compile(r"\$\{([^}]+)\}")


def resolved_stages(pipeline: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Stage name ("sft", "eval@ppo") → its entry, from the content of dvc.yaml and of params.yaml.

    Raises KeyError for a template that names nothing.
    """
    found = {}
    for name, entry in pipeline["stages"].items():
        if "foreach" in entry:
            for key, item in _filled(entry["foreach"], params).items():
                found[f"{name}@{key}"] = _filled(entry["do"], {**params, "key": key, "item": item})
        else:
            found[name] = _filled(entry, params)
    return found


def lookup(content: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path such as sft.learning_rate."""
    for key in path.split("."):
        content = content[key]
    return content


def _filled(value: Any, names: Mapping[str, Any]) -> Any:
    if isinstance(value, Mapping):
        return {_filled(key, names): _filled(each, names) for key, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, names) for each in value]
    if not isinstance(value, str):
        return value
    whole = TEMPLATE.fullmatch(value)  # the value itself, which may be a section
    return lookup(names, whole[1]) if whole else TEMPLATE.sub(lambda found: str(lookup(names, found[1])), value)
