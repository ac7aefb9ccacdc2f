"""Writes a profile into params.yaml, comments kept.

    python -m looper.profile NAME          write profiles/NAME.yaml's values into params.yaml
    python -m looper.profile NAME --diff   show what that would change, and change nothing
"""

import argparse
import difflib
import io
import sys
from pathlib import Path
from typing import Any

import yaml
from ruamel.yaml import YAML

from looper.files import write_text
from looper.params import PARAMS, check

PROFILES = Path("profiles")
# Their keys depend on `source`, so a profile replaces them whole; in every other section it sets the keys it names.
WHOLE = ("base", "prepare")


def overlay(name: str) -> dict[str, Any]:
    """The values of profile `name`, those of the profile that it extends below its own."""
    path = PROFILES / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(each.stem for each in PROFILES.glob("*.yaml")))
        raise ValueError(f"no profile {name!r}; there are: {known}")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    below = values.pop("extends", None)
    return _merge(overlay(below), values) if below else values


def apply(name: str, params: str) -> str:
    """The text of params.yaml with profile `name` written into it. Raises ValueError if the result is not valid."""
    writer = YAML()
    writer.width = 120
    writer.indent(mapping=2, sequence=4, offset=2)
    document = writer.load(params)
    for section, values in overlay(name).items():
        if section in WHOLE:
            _replace(document[section], values)
        else:
            _merge(document[section], values)
    stream = io.StringIO()
    writer.dump(document, stream)
    check(yaml.safe_load(stream.getvalue()), f"params.yaml with profile {name}")
    return stream.getvalue()


def _merge(target: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = value
    return target


def _replace(target: dict[str, Any], values: dict[str, Any]) -> None:
    # In place: the comment that leads the next section hangs on this one's last key, so that key goes last.
    after = target.ca.items.pop(next(reversed(target)), None)
    target.clear()
    target.update(values)
    if after:
        target.ca.items[next(reversed(target))] = after


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m looper.profile", description=__doc__.splitlines()[0])
    parser.add_argument("name", help="a file of profiles/, without .yaml")
    parser.add_argument("--diff", action="store_true", help="show the change and write nothing")
    arguments = parser.parse_args()
    try:
        before = PARAMS.read_text(encoding="utf-8")
        after = apply(arguments.name, before)
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    if not arguments.diff:
        write_text(PARAMS, after)
    sys.stdout.writelines(difflib.unified_diff(before.splitlines(True), after.splitlines(True), "params.yaml",
                                               f"params.yaml with {arguments.name}"))


if __name__ == "__main__":
    main()
