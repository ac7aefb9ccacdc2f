"""`params.yaml` as a typed, frozen model. Every error at once, each with its path; nothing is loaded before it holds.

`python -m looper.params` checks the file.
"""

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from looper.ppo_settings import PPOSettings
from regime_w.settings import ScoreSettings

PARAMS = Path("params.yaml")
# In Python these settings have defaults. The file names them all: none is in force that it does not show.
DEFAULTS = {"score": asdict(ScoreSettings()), "ppo": asdict(PPOSettings())}

Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what every random generator takes
Share = Annotated[float, Field(ge=0, lt=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Revision = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$", description="a commit, not a branch")]


class Section(BaseModel):
    """Unknown keys are errors, values are of their type, and nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class HubBase(Section):
    source: Literal["hub"]
    repo: str
    revision: Revision
    licence: str


class WheelBase(Section):
    source: Literal["wheel"]
    requirement: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.]+$")
    file: str = Field(pattern=r"\.gguf$")
    sha256: Sha256
    licence: str


class GgufBase(Section):
    source: Literal["gguf"]
    path: str = Field(pattern=r"\.gguf$")
    sha256: Sha256
    licence: str


class FolderBase(Section):
    source: Literal["folder"]
    path: str
    digest: Sha256 | None  # of its files, as models/base/manifest.json says it; None takes the folder as it is
    licence: str


class Model(Section):
    """How every stage loads `models/base`."""

    device: Literal["cpu", "cuda"]
    dtype: Literal["bfloat16", "float32"]
    quantization: Literal["none", "nf4"]
    template: Literal["chatml", "qwen", "deepseek_r1"]

    @model_validator(mode="after")
    def _possible(self) -> "Model":
        if self.quantization == "nf4" and self.dtype != "bfloat16":
            raise ValueError("quantization nf4 computes in bfloat16: set dtype to bfloat16, or quantization to none")
        return self


class HubData(Section):
    source: Literal["hub"]
    repo: str
    config: str
    revision: Revision
    dev_share: Share
    seed: Seed


class PathData(Section):
    source: Literal["path"]
    path: str
    train_sha256: Sha256 | None
    test_sha256: Sha256 | None
    dev_share: Share
    seed: Seed


class SampleData(Section):
    source: Literal["sample"]
    train: Positive
    dev: Positive
    test: Positive
    seed: Seed


class Lora(Section):
    r: Positive
    alpha: Positive
    dropout: Share


class SelfTargets(Section):
    """How the base answers train questions when `sft.targets` is self."""

    samples: Positive
    temperature: float = Field(gt=0)
    max_new_tokens: Positive
    batch_size: Positive
    seed: Seed


def _rows_or_auto(value: object) -> object:
    if value != "auto" and not (type(value) is int and value > 0):
        raise ValueError(f"must be a number of rows, 1 or more, or auto, found {value!r}")
    return value


class Sft(Section):
    targets: Literal["gold", "self"]
    self: SelfTargets
    lora: Lora
    learning_rate: float = Field(gt=0)
    epochs: float = Field(gt=0)
    batch_size: Positive
    micro_batch: Annotated[int | str, BeforeValidator(_rows_or_auto)]
    warmup_share: Share
    max_tokens: Positive
    max_grad_norm: float = Field(gt=0)
    loss_on: Literal["completion", "full"]
    gradient_checkpointing: bool
    save_steps: Positive
    seed: Seed

    @model_validator(mode="after")
    def _possible(self) -> "Sft":
        if self.micro_batch != "auto" and self.batch_size % self.micro_batch:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of micro_batch {self.micro_batch}")
        return self


class DevEval(Section):
    questions: Positive


class Round(Section):
    """One round of rollouts, score and ppo.

    start: the adapter that answers and is trained. suffix: what the names of the round's files end in.
    """

    start: str
    suffix: str = Field(pattern=r"^(_[0-9a-z]+)?$")

    @property
    def adapter(self) -> str:
        """The adapter that the round makes."""
        return f"models/ppo_regime_w{self.suffix}"


class Rollouts(Section):
    """allocation: uniform (every arm answers every question once) or thompson (arms that were right more often do)."""

    questions: Positive
    allocation: Literal["uniform", "thompson"]
    max_new_tokens: Positive
    batch_size: Positive
    seed: Seed


class Eval(Section):
    max_new_tokens: Positive
    batch_size: Positive


class Params(Section):
    base: Annotated[HubBase | WheelBase | GgufBase | FolderBase, Field(discriminator="source")]
    model: Model
    prepare: Annotated[HubData | PathData | SampleData, Field(discriminator="source")]
    sft: Sft
    dev_eval: DevEval
    rounds: dict[str, Round] = Field(min_length=1)
    final: str
    rollouts: Rollouts
    score: ScoreSettings
    ppo: PPOSettings
    eval: Eval

    @model_validator(mode="after")
    def _one_round_after_another(self) -> "Params":
        problems, adapters = [], ["models/sft_lora", *(each.adapter for each in self.rounds.values())]
        if list(self.rounds) != [str(i) for i in range(1, len(self.rounds) + 1)]:
            problems.append(f'rounds must be "1", "2", … in order, found {", ".join(self.rounds)}')
        for name, before in zip(self.rounds, adapters, strict=False):
            if (start := self.rounds[name].start) != before:
                problems.append(f"rounds.{name}.start must be the adapter of the round before, {before}, found {start}")
        if len(set(adapters)) < len(adapters):
            problems.append("rounds: each needs a suffix of its own, or it would write over another's files")
        if self.final != adapters[-1]:
            problems.append(f"final must be the last round's adapter, {adapters[-1]}, found {self.final}")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def round_of(rounds: dict[str, Round], name: str) -> Round:
    """The round that a stage was called for. Raises ValueError if there is none of that name."""
    if name not in rounds:
        raise ValueError(f"there is no round {name!r}; the section rounds of {PARAMS} has {', '.join(rounds)}")
    return rounds[name]


def load_params(path: Path = PARAMS) -> Params:
    """Reads and checks the whole file.

    Raises ValueError whose text holds every error, one a line: `section.key: what is wrong, found …`; how settings fit
    together is checked once each of them is right.
    """
    if not path.exists():
        raise ValueError(f"{path} is not here; run from the repository's root, or bring it back: git checkout {path}")
    try:
        content = parse(path.read_bytes())
    except (yaml.YAMLError, UnicodeError) as error:
        raise ValueError(f"{path}: not YAML; mend it: {error}") from None
    return check(content, str(path))


class _Loader(yaml.SafeLoader):
    """YAML 1.1, and the floats that `dvc exp run -S` writes, as Python prints them: 1e-05. A written 2e-4 stays text.

    A key that stands twice is an error: YAML's own reader takes the last one and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} stands there {keys.count(key.value)} times; keep one", key.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]e[-+][0-9]{2,}$"), list("-+0123456789"))


def parse(text: str | bytes) -> object:
    """The content of a params file's text. Raises yaml.YAMLError or UnicodeError."""
    return yaml.load(text, _Loader)  # a safe loader: plain values alone


def check(content: object, where: str) -> Params:
    """The typed params of a parsed file; `where` names it in errors. Raises as `load_params` does."""
    unquoted = [f"  {path}: write the key as text: '{path.split('.')[-1]}'" for path in _other_keys(content)]
    if unquoted:  # JSON would turn them into text, and DVC, which reads the file too, would not
        raise ValueError(f"{where} has {len(unquoted)} error(s); nothing was run\n" + "\n".join(unquoted))
    lines = [f"  {path}: is missing; add it" for path in _left_out(content, DEFAULTS)]
    try:
        # As JSON, where strict pydantic still reads an object into a dataclass: regime_w's settings know no pydantic
        params = Params.model_validate_json(json.dumps(content, default=str), strict=True)
    except ValidationError as error:
        lines += [f"  {_path(each['loc'])}: {text}" for each in error.errors() for text in _text(each).splitlines()]
    if lines:
        raise ValueError(f"{where} has {len(lines)} error(s); nothing was run\n" + "\n".join(lines))
    return params


def _left_out(content: object, defaults: dict[str, object], above: str = "") -> list[str]:
    """The dotted paths of keys of `defaults` that a section, where it stands in `content`, leaves out."""
    if not isinstance(content, dict):
        return []
    return [path for key, value in defaults.items()
            for path in ([f"{above}{key}"] if above and key not in content else
                         _left_out(content.get(key), value, f"{above}{key}.") if isinstance(value, dict) else [])]


def _other_keys(content: object, above: str = "") -> list[str]:
    """The dotted paths of keys that are no text."""
    if not isinstance(content, dict):
        return []
    return [path for key, value in content.items()
            for path in [*([] if isinstance(key, str) else [f"{above}{key}"]), *_other_keys(value, f"{above}{key}.")]]


def _path(location: tuple[int | str, ...]) -> str:
    # pydantic puts the chosen source of a union behind its section: params.yaml has no such key
    keys = [str(key) for i, key in enumerate(location) if not (i == 1 and location[0] in ("base", "prepare"))]
    return ".".join(keys) or "the file"


def _text(error: dict) -> str:
    kind, found = error["type"], error["input"]
    text = {
        "extra_forbidden": "unknown key; remove it or mend its name",
        "unexpected_keyword_argument": "unknown key; remove it or mend its name",
        "missing": "is missing; add it",
        "union_tag_not_found": "source is missing; add it",
        "value_error": error["msg"].removeprefix("Value error, "),  # ours: it says what was found
    }.get(kind, f"{error['msg']}, found {found!r}")
    if kind == "union_tag_invalid":
        text = f"source must be one of {error['ctx']['expected_tags']}, found {found['source']!r}"
    if isinstance(found, str) and kind == "float_type" and _is_number(found):
        text += f" (YAML 1.1 reads {found} as text: write it with a dot, as in {float(found):.1e})"
    return text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    if sys.argv[1:]:
        print(f"usage: python -m looper.params; found {' '.join(sys.argv[1:])}", file=sys.stderr)
        sys.exit(2)
    try:
        load_params()
    except ValueError as problem:
        print(problem, file=sys.stderr)
        sys.exit(2)
    print(f"{PARAMS}: every setting is there and possible")
