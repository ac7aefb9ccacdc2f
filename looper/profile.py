"""Writes a profile into params.yaml, comments kept.

    python -m looper.profile NAME          write profiles/NAME.yaml's values into params.yaml
    python -m looper.profile NAME --diff   show what that would change, and change nothing
"""

import argparse
import difflib
import io
import re
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from looper.files import write_text
from looper.params import PARAMS, check, parse

PROFILES = Path("profiles")
NULL = "tag:yaml.org,2002:null"
# Their keys depend on `source`, or are the rounds, so a profile replaces them whole; in every other section it sets the
# keys it names.
WHOLE = ("base", "prepare", "rounds")


def overlay(name: str) -> dict[str, Any]:
    """The values of profile `name`, those of the profile that it extends below its own."""
    path = PROFILES / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(each.stem for each in PROFILES.glob("*.yaml")))
        raise ValueError(f"no profile {name!r}; there are: {known}")
    values = _yaml().load(path)
    if not (name := values.pop("extends", None)):
        return values
    below = overlay(name)
    for section in WHOLE:
        if section in values:
            below.pop(section)
    return _merge(below, values)


def apply(name: str, params: str) -> str:
    """The text of params.yaml with profile `name` written into it. Raises ValueError if the result is not valid."""
    editor = _yaml()
    try:
        document = editor.load(params)
    except YAMLError as error:
        raise ValueError(f"{PARAMS}: not YAML; mend it, or bring it back: git checkout {PARAMS}: {error}") from None
    for section, values in overlay(name).items():
        if not isinstance(document, dict) or not isinstance(document.get(section), type(values)):
            raise ValueError(f"{PARAMS} has no section {section}; bring the file back: git checkout {PARAMS}")
        if not isinstance(values, dict):
            document[section] = values
        elif section in WHOLE:
            _replace(document[section], values)
        else:
            _merge(document[section], values)
    stream = io.StringIO()
    editor.dump(document, stream)
    text = re.sub(r"(?<=\S) +(?=# )", " ", stream.getvalue())  # comments keep no column of an earlier value
    check(parse(text), f"params.yaml with profile {name}")
    return text


def _yaml() -> YAML:
    """Reads and writes numbers as they stand (5.0e-5; as a plain float it would be written 5e-05, text in YAML 1.1)."""
    editor = YAML()
    editor.width = 120
    editor.representer.add_representer(type(None), lambda representer, _: representer.represent_scalar(NULL, "null"))
    return editor


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
        if not PARAMS.exists():
            raise ValueError(f"{PARAMS} is not here; run from the repository's root, or bring it back: "
                             f"git checkout {PARAMS}")
        before = PARAMS.read_text(encoding="utf-8")
        after = apply(arguments.name, before)
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    if not arguments.diff:
        write_text(PARAMS, after)
    sys.stdout.writelines(difflib.unified_diff(before.splitlines(True), after.splitlines(True), "params.yaml",
                                               f"params.yaml with {arguments.name}"))
    if not arguments.diff:
        print(f"{PARAMS}: written" if after != before else f"{PARAMS} has these values already")


if __name__ == "__main__":
    main()
