"""The CORE bundle on the disk (DCLM, arXiv:2406.11794): its tasks, their items in order, and their prompts."""

from __future__ import annotations

import csv
import fcntl
import functools
import hashlib
import json
import os
import random
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from nanochat_ray.corpus.download import DownloadError, fetch
from nanochat_ray.tasks.rows import TaskDataMissing

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
ITEM_SEED = 1337
SHOT_SEED = 1234  # plus the item's index
CORE_LABELS = (
    "hellaswag_zeroshot", "jeopardy", "bigbench_qa_wikidata", "arc_easy", "arc_challenge", "copa", "commonsense_qa",
    "piqa", "openbook_qa", "lambada_openai", "hellaswag", "winograd", "winogrande", "bigbench_dyck_languages",
    "agi_eval_lsat_ar", "bigbench_cs_algorithms", "bigbench_operators", "bigbench_repeat_copy_logic", "squad", "coqa",
    "boolq", "bigbench_language_identification",
)  # fmt: skip

TaskType = Literal["multiple_choice", "schema", "language_modeling"]
KEYS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}
Item = dict[str, Any]


@dataclass(frozen=True)
class CoreTask:
    """One task of the bundle."""

    label: str
    type: TaskType
    num_fewshot: int
    delimiter: str  # between question and answer
    path: Path  # JSONL
    baseline_frac: float  # accuracy of guessing


@dataclass(frozen=True)
class CoreBundle:
    tasks: list[CoreTask]
    skipped: dict[str, str]  # label of a task that is listed but cannot run, and why
    sha256: str  # of the list, the baselines and all data files that are there


def load_bundle(folder: Path) -> CoreBundle:
    """The tasks of a bundle folder: `core.yaml`, `eval_meta_data.csv`, `eval_data/`.

    A task whose file is not there is skipped by name. Raises TaskDataMissing if the folder is no bundle, ValueError for
    an entry of unknown type or without a baseline.
    """
    for name in ("core.yaml", "eval_meta_data.csv"):
        if not (folder / name).is_file():
            raise TaskDataMissing(f"{folder} is no CORE bundle: it has no {name}; name the folder with --eval-bundle")
    digest = hashlib.sha256()
    for name in ("core.yaml", "eval_meta_data.csv"):
        digest.update((folder / name).read_bytes())
    with open(folder / "eval_meta_data.csv", encoding="utf-8", newline="") as file:
        baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(file)}
    tasks, skipped = [], {}
    for entry in yaml.safe_load((folder / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]:
        label, kind, path = entry["label"], entry["icl_task_type"], folder / "eval_data" / entry["dataset_uri"]
        if kind not in KEYS:
            raise ValueError(f"{folder}/core.yaml: task {label} is of unknown type {kind!r}; known: {', '.join(KEYS)}")
        if label not in baselines:
            raise ValueError(f"{folder}/eval_meta_data.csv has no random baseline for task {label}")
        if not path.is_file():
            skipped[label] = f"{path} is missing"
            continue
        digest.update(path.read_bytes())
        delimiter = entry.get("continuation_delimiter", " ")
        tasks.append(CoreTask(label, kind, entry["num_fewshot"][0], delimiter, path, baselines[label]))
    return CoreBundle(tasks, skipped, digest.hexdigest())


def find_bundle(eval_bundle: Path | None, storage: Path) -> Path:
    """The bundle's folder: the one named, else `<storage>/eval_bundle`, fetched if need be. Raises TaskDataMissing."""
    folder = eval_bundle or storage / "eval_bundle"
    if (folder / "core.yaml").is_file():
        return folder
    if eval_bundle:
        raise TaskDataMissing(f"no CORE bundle in {eval_bundle}: it has no core.yaml")
    storage.mkdir(parents=True, exist_ok=True)
    with open(storage / ".eval_bundle.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            try:
                _fetch_bundle(folder)
            except DownloadError as error:
                raise TaskDataMissing(
                    f"no CORE bundle: {folder} is not there and was not fetched ({error}); name one with --eval-bundle"
                ) from error
    return folder


def _fetch_bundle(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".eval_bundle.") as temporary:
        archive = Path(temporary, "eval_bundle.zip")
        fetch(BUNDLE_URL, archive)
        with zipfile.ZipFile(archive) as contents:
            contents.extractall(temporary)  # one folder, eval_bundle
        os.replace(Path(temporary, "eval_bundle"), folder)


@functools.lru_cache(maxsize=4)
def load_items(task: CoreTask) -> tuple[Item, ...]:
    """All items of a task in their shuffled order; the first n of it are what a limit of n keeps. Not to be changed.

    ValueError with file and line number for a line without the keys of the task's type.
    """
    items = []
    for number, line in enumerate(task.path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            item = json.loads(line)
            if missing := [key for key in KEYS[task.type] if key not in item]:
                raise ValueError(f"{task.path}, line {number}: a {task.type} item needs {', '.join(missing)}")
            items.append(item)
    random.Random(ITEM_SEED).shuffle(items)
    return tuple(items)


def few_shots(n_items: int, index: int, k: int) -> list[int]:
    """Which other items are shown before item `index`, in order; all others if they are fewer than k."""
    k = min(k, n_items - 1)
    drawn = random.Random(SHOT_SEED + index).sample(range(n_items - 1), k)
    return [j + (j >= index) for j in drawn]  # as if drawn from the list without the item itself


def render_prompts(kind: TaskType, item: Item, shots: list[Item], delimiter: str) -> list[str]:
    """The texts to compare: one per choice or context; for language modelling the text without and with the answer."""
    if kind == "multiple_choice":
        shown = [f"{shot['query']}{delimiter}{shot['choices'][shot['gold']]}\n\n" for shot in shots]
        return ["".join(shown) + f"{item['query']}{delimiter}{choice}" for choice in item["choices"]]
    if kind == "schema":
        shown = [f"{s['context_options'][s['gold']]}{delimiter}{s['continuation']}\n\n" for s in shots]
        return ["".join(shown) + f"{option}{delimiter}{item['continuation']}" for option in item["context_options"]]
    shown = [f"{shot['context'].strip()}{delimiter}{shot['continuation']}\n\n" for shot in shots]
    question = "".join(shown) + f"{item['context'].strip()}{delimiter}"
    # A trailing space would be a token of its own instead of the start of the answer's first word.
    return [question.strip(), f"{question}{item['continuation']}"]
