"""A small CORE bundle of made-up tasks."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

WORDS = "sun moon river stone bread salt lamp door wind seed".split()


def entry(label: str, kind: str, shots: int = 2, **extra: Any) -> dict[str, Any]:
    uri = f"made/{label}.jsonl"
    return {"label": label, "dataset_uri": uri, "num_fewshot": [shots], "icl_task_type": kind, **extra}


def items_of(kind: str, n: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)

    def text(most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    if kind == "multiple_choice":
        return [{"query": text(12), "choices": [text(4) for _ in range(4)], "gold": rng.randrange(4)} for _ in range(n)]
    if kind == "schema":
        return [
            {"context_options": [text(9), text(9)], "continuation": text(5), "gold": rng.randrange(2)} for _ in range(n)
        ]
    return [{"context": f" {text(12)} ", "continuation": text(3)} for _ in range(n)]


def write_bundle(folder: Path, tasks: dict[str, tuple[dict[str, Any], list[dict[str, Any]] | None, float]]) -> Path:
    """Tasks by label: their entry in the list, their items (None: no file), their random baseline in percent."""
    (folder / "eval_data" / "made").mkdir(parents=True)
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": [task[0] for task in tasks.values()]}))
    lines = [f"{label},{baseline}" for label, (_, _, baseline) in tasks.items()]
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\n" + "\n".join(lines) + "\n")
    for label, (_, items, _) in tasks.items():
        if items is not None:
            text = "".join(json.dumps(item) + "\n" for item in items)
            (folder / "eval_data" / "made" / f"{label}.jsonl").write_text(text)
    return folder


def three_kinds(folder: Path, n: int = 9) -> Path:
    kinds = {"mc": "multiple_choice", "schema": "schema", "lm": "language_modeling"}
    return write_bundle(folder, {label: (entry(label, kind), items_of(kind, n), 20.0) for label, kind in kinds.items()})
