"""GSM8K, or problems in its format: three sources, every row checked, three splits that share no question."""

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

from looper.files import sha256
from looper.jsonl import check_row, read_jsonl
from looper.params import HubData, PathData, SampleData
from looper.sample_problems import generate
from regime_w.counterfactual import make_counterfactual

ROW = {"question": str, "answer": str}
ANNOTATION = re.compile(r"<<[^<>]*>>")
GOLD = re.compile(r"####\s*(-?\d[\d,]*)\s*$", re.ASCII)


def prepare(settings: HubData | PathData | SampleData) -> tuple[dict[str, list[dict]], list[dict], dict[str, Any]]:
    """(splits, counterfactuals, metrics) from the source that `settings` names.

    splits: "train", "dev" and "test", each a list of rows (id, question, solution, gold_answer, annotated).
    counterfactuals: one row for each train and dev question that has a certain one.
    metrics: the counts, and what was dropped and why.
    Raises ValueError if a question stands in two splits, or a split is empty.
    """
    dropped: Counter[str] = Counter()
    if settings.source == "sample":
        parts = {split: _rows(generate(split, getattr(settings, split), settings.seed), split, dropped)
                 for split in ("train", "dev", "test")}
    else:
        official, test = _read_hub(settings) if settings.source == "hub" else _read_path(settings)
        train, dev = divide(_rows(official, "train", dropped), settings.dev_share, settings.seed)
        parts = {"train": train, "dev": dev, "test": _rows(test, "test", dropped)}
    refuse_overlap(parts)
    counterfactuals = [row for split in ("train", "dev") for row in _counterfactuals(parts[split], split, settings.seed)]
    return parts, counterfactuals, _metrics(parts, counterfactuals, dropped)


def divide(rows: list[dict], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """(train, dev) by a seeded shuffle; dev gets `share` of the rows, rounded to the nearest."""
    shuffled = random.Random(seed).sample(rows, len(rows))
    cut = len(rows) - round(share * len(rows))
    return shuffled[:cut], shuffled[cut:]


def refuse_overlap(parts: dict[str, list[dict]]) -> None:
    """Raises ValueError if a question, white space and case aside, stands in two splits."""
    seen: dict[str, tuple[str, str]] = {}
    for split, rows in parts.items():
        if not rows:
            raise ValueError(f"prepare: the {split} split is empty; give the source more rows, or mend prepare.dev_share")
        for row in rows:
            first, where = seen.setdefault(_key(row["question"]), (split, row["id"]))
            if first != split:
                raise ValueError(f"prepare: {where} ({first}) and {row['id']} ({split}) are the same question "
                                 f"({row['question'][:60]!r}…); remove one of them; nothing written")


def _rows(raw: list[dict], split: str, dropped: Counter[str]) -> list[dict]:
    rows, seen = [], set()
    for number, each in enumerate(raw):
        question, answer = each["question"].strip(), each["answer"].strip()
        gold = GOLD.search(answer)
        reason = ("empty question" if not question else "no integer after ####" if not gold
                  else "no solution" if not answer[:gold.start()].strip()
                  else "duplicate question" if _key(question) in seen else None)
        if reason:
            dropped[reason] += 1
            continue
        seen.add(_key(question))
        solution = ANNOTATION.sub("", answer[:gold.start()]).strip()
        rows.append({"id": f"{split}-{number:05d}", "question": question, "solution": solution,
                     "gold_answer": str(int(gold[1].replace(",", ""))), "annotated": answer})
    return rows


def _counterfactuals(rows: list[dict], split: str, seed: int) -> list[dict]:
    made = ((row["id"], make_counterfactual(row["question"], row["annotated"], seed)) for row in rows)
    return [{"id": name, "split": split, "question": each.question, "gold_answer": each.gold_answer,
             "changed_from": each.changed_from, "changed_to": each.changed_to} for name, each in made if each]


def _metrics(parts: dict[str, list[dict]], counterfactuals: list[dict], dropped: Counter[str]) -> dict[str, Any]:
    counts = Counter(row["split"] for row in counterfactuals)
    return {"rows": {split: len(rows) for split, rows in parts.items()},
            "dropped": {"total": dropped.total(), **dict(sorted(dropped.items()))},
            "counterfactual_share": {split: round(counts[split] / len(parts[split]), 6) for split in ("train", "dev")}}


def _key(question: str) -> str:
    return " ".join(question.lower().split())


def _read_path(settings: PathData) -> tuple[list[dict], list[dict]]:
    folder = Path(settings.path)
    for name, expected in (("train", settings.train_sha256), ("test", settings.test_sha256)):
        file = folder / f"{name}.jsonl"
        if not file.exists():
            raise ValueError(f"prepare.path: {file} is not here; put GSM8K's train.jsonl and test.jsonl into {folder}/, "
                             "or set prepare.source to hub or sample")
        if expected and (found := sha256(file)) != expected:
            raise ValueError(f"{file}: sha256 {found}, prepare.{name}_sha256 says {expected}; nothing written; "
                             "fetch the file again, or set the hash of the file you mean")
    return read_jsonl(folder / "train.jsonl", ROW), read_jsonl(folder / "test.jsonl", ROW)


def _read_hub(settings: HubData) -> tuple[list[dict], list[dict]]:
    from datasets import load_dataset

    loaded = load_dataset(settings.repo, settings.config, revision=settings.revision)
    parts = loaded["train"].to_list(), loaded["test"].to_list()
    for split, rows in zip(("train", "test"), parts, strict=True):
        for number, row in enumerate(rows):
            check_row(row, ROW, f"{settings.repo} {settings.revision}, {split} row {number}")
    return parts
