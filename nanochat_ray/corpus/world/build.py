"""The embedded world as files: parquet shards of documents, JSON lines of conversations and held-out questions.

Everything is a pure function of the seed: the same bytes every time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_ray.corpus.world.conversations import build_conversations
from nanochat_ray.corpus.world.documents import build_documents
from nanochat_ray.corpus.world.facts import draw_facts
from nanochat_ray.corpus.world.questions import Question, heldout_questions

VERSION = 1
VAL_FRAC = 0.02  # of the documents and of the conversations
TRAIN_SHARDS = 4
ROW_GROUP_DOCS = 256
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class World:
    """Everything there is to read, to train on and to ask."""

    documents: list[str]
    val_documents: list[str]
    conversations: list[dict[str, Any]]
    val_conversations: list[dict[str, Any]]
    heldout: list[Question]


def build_world(seed: int = 42) -> World:
    """The world of a seed, in memory."""
    documents, conversations = build_documents(seed), build_conversations(seed)
    n_docs, n_convs = int(len(documents) * VAL_FRAC), int(len(conversations) * VAL_FRAC)
    return World(documents[n_docs:], documents[:n_docs], conversations[n_convs:], conversations[:n_convs],
                 heldout_questions(seed))


def write_world(folder: Path, seed: int = 42) -> None:
    """Write the world of a seed into `folder`, unless it is there already.

    shard_00000.parquet and so on (column text; the last shard is for validation), sft_train.jsonl, sft_val.jsonl,
    heldout.jsonl, and manifest.json with version, seed, counts and SHA-256 of each file. The folder appears as a whole.
    FileExistsError if `folder` holds something else.
    """
    if folder.exists() and any(folder.iterdir()):
        manifest = _read_manifest(folder)
        if (manifest.get("version"), manifest.get("seed")) == (VERSION, seed):
            return
        raise FileExistsError(
            f"{folder} holds something other than the embedded world of version {VERSION}, seed {seed}; "
            "remove it or name another folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _write_files(temporary, build_world(seed), seed)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except OSError:
        if _read_manifest(folder).get("seed") != seed:  # else another process was faster, with the same bytes
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    return json.loads(path.read_text()) if path.is_file() else {}


def _write_files(folder: Path, world: World, seed: int) -> None:
    per_shard = -(-len(world.documents) // TRAIN_SHARDS)
    shards = [world.documents[i : i + per_shard] for i in range(0, len(world.documents), per_shard)]
    for i, documents in enumerate([*shards, world.val_documents]):
        table = pa.table({"text": pa.array(documents, pa.string())})
        pq.write_table(table, folder / f"shard_{i:05d}.parquet", row_group_size=ROW_GROUP_DOCS, compression="zstd")
    lines: dict[str, list[Any]] = {
        "sft_train.jsonl": world.conversations,
        "sft_val.jsonl": world.val_conversations,
        "heldout.jsonl": [asdict(question) for question in world.heldout],
    }
    for name, rows in lines.items():
        (folder / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
                                   encoding="utf-8")
    files = sorted(path for path in folder.iterdir())
    facts = draw_facts(seed)
    manifest = {
        "version": VERSION,
        "seed": seed,
        "counts": {
            "facts": len(facts.all), "unseen_facts": len(facts.unseen), "documents": len(world.documents),
            "val_documents": len(world.val_documents), "conversations": len(world.conversations),
            "val_conversations": len(world.val_conversations), "heldout": len(world.heldout),
        },
        "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
