"""What of a run is published, and writing it to a folder or an object store, whole or not at all.

```
<place>/<run>/  published.json  lease.json  README.md
  tokenizer/  pretrain/  sft/  rl/       config.json  _SUCCESS  (tokenizer.json)  (checkpoints/step_000500/...)
  report/report.md and its plots
```
Everything is on a list: named files, of configs named keys, of settings numbers and a few named texts. Optimizer state,
logs, rollouts, results and the rest of the configs have no way in. A published folder is a run's folder with less in
it, so its place can be given as `--storage`. The run is seen there once `lease.json` is, which comes last.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat_ray.corpus.reader import DataManifest
from nanochat_ray.model.checkpoint import META_FILE, MODEL_FILE, Checkpoint, known_bpb, resolve_checkpoint
from nanochat_ray.remote import PASSWORD
from nanochat_ray.report.environment import describe_environment
from nanochat_ray.report.markdown import REPORT_FILE, REPORT_STAGE
from nanochat_ray.report.records import plain, read_result
from nanochat_ray.run_dir import (
    CHECKPOINTS,
    CONFIG_FILE,
    DATA_FILE,
    DONE_FILE,
    RESULT_FILE,
    STAGE_OF_SOURCE,
    RunDir,
    read_json,
)
from nanochat_ray.text.tokenizer import FILE_NAME as TOKENIZER_FILE
from nanochat_ray.text.tokenizer import Tokenizer

CARD_FILE = "README.md"
PUBLISHED_FILE = "published.json"
FORMAT = "nanochat-ray-published"
CONFIG_KEYS = ("settings", "data", "tokenizer", "base_model", "optimizer", "imported", "known_from")
META_KEYS = ("source", "model_config", "settings", "total_batch_size", "num_iterations", "val_bpb", "data_hash",
             "world_size", "optimizer", "imported")  # fmt: skip
TEXT_KEYS = ("window_pattern", "packing", "fp8_recipe", "optimizer", "source", "format", "tag", "known_from")
_WORD = re.compile(r"[\w.+ -]{1,80}")
_HASH = re.compile(r"[0-9a-f]{64}")
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL|SIGNATURE", re.I)
_SECRET_SHAPE = re.compile(
    r"\bAKIA[0-9A-Z]{16}\b|\bhf_[A-Za-z0-9]{30,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bsk-[A-Za-z0-9_-]{20,}"
    r"|\bAIza[A-Za-z0-9_-]{35}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_KEY_PLACE = re.compile(
    r"(?:key|token|secret|password|wandb)\w*[\"'`]?\s*[=:]\s*[\"'`]?[0-9a-f]{40}\b|[?&](?:[\w-]*signature|sig)=", re.I
)
_OTHER_PATH = re.compile(r"(?<![\w:/.<>*|])/(?:[\w.@+-]+/){2,}([\w.@+-]*)")
_HOME = re.compile(r"(?<![\w:/.<>*|])/(?:home|Users|root)/[\w.@+-]+")
SHORTEST_SECRET = 12


@dataclass(frozen=True)
class Model:
    """One checkpoint to publish."""

    source: str
    checkpoint: Checkpoint
    meta: dict[str, Any]  # what its meta.json will say, but for the step

    @property
    def stage(self) -> str:
        return STAGE_OF_SOURCE[self.source]

    @property
    def meta_bytes(self) -> bytes:
        return json.dumps({"step": self.checkpoint.step, **self.meta}, indent=2, allow_nan=False).encode()

    @property
    def folder(self) -> str:
        """Below the run's folder."""
        return f"{self.stage}/{CHECKPOINTS}/{self.checkpoint.folder.name}"


@dataclass(frozen=True)
class Package:
    """All that is published of a run."""

    tag: str
    files: dict[str, bytes]  # small ones, by path below the run's folder
    models: tuple[Model, ...]
    lineage: dict[str, Any]
    notes: tuple[str, ...] = field(default=())  # what is not there

    def manifest(self) -> dict[str, Any]:
        """Size and SHA-256 of every file, and where it comes from; a function of the run alone."""
        sizes = {path: entry_of(data) for path, data in self.files.items()}
        for model in self.models:
            weights = (model.checkpoint.folder / MODEL_FILE).stat().st_size
            sizes[f"{model.folder}/{MODEL_FILE}"] = {"bytes": weights, "sha256": model.checkpoint.model_hash}
            sizes[f"{model.folder}/{META_FILE}"] = entry_of(model.meta_bytes)
        return {"format": FORMAT, "version": 1, "lineage": self.lineage, "files": sizes}


def entry_of(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def collect(run_dir: RunDir, sources: tuple[str, ...] | None = None, step: int | None = None) -> Package:
    """What is published of a run: of all finished sources if `sources` is None, of each its newest step.

    FileNotFoundError for what is not there or not finished; ValueError if a text holds what looks like a key.
    """
    tokenizer_folder = run_dir.require_stage("tokenizer", "tok_train.py")
    tokenizer = Tokenizer.load(tokenizer_folder)
    chosen = sources or tuple(source for source, stage in STAGE_OF_SOURCE.items() if run_dir.is_done(stage))
    if step is not None and len(chosen) != 1:
        raise ValueError(f"step {step} of which of {', '.join(chosen) or 'base, sft, rl'}? Name one source")
    files = {f"tokenizer/{TOKENIZER_FILE}": (tokenizer_folder / TOKENIZER_FILE).read_bytes()}
    _add_stage(files, run_dir, "tokenizer", finished=True)
    models = []
    for source in chosen or ("base",):
        stage = STAGE_OF_SOURCE[source]
        run_dir.require_stage(stage, f"{stage}.py")
        checkpoint = resolve_checkpoint(run_dir.checkpoints(stage), step)
        meta = {key: allowed(value, key) for key, value in checkpoint.meta.items() if key in META_KEYS}
        models.append(Model(source, checkpoint, meta))
        _add_stage(files, run_dir, stage, finished=True)
    if not any(model.source == "base" for model in models):  # RL takes settings from there
        _add_stage(files, run_dir, "pretrain", finished=False)
    notes = _add_report(files, run_dir)
    lineage = _lineage(run_dir, tokenizer, models)
    files[CARD_FILE] = _card(run_dir.root.name, models, lineage).encode()
    package = Package(run_dir.root.name, files, tuple(models), lineage, tuple(notes))
    metas = {f"{model.folder}/{META_FILE}": model.meta_bytes for model in models}
    for path, data in {**files, **metas, PUBLISHED_FILE: json_bytes(package.manifest())}.items():
        refuse_secrets(path, data)
    return package


def allowed(value: Any, key: str) -> Any:
    """The value without texts that could say anything: numbers, hashes, and single words under a few keys are left."""
    if isinstance(value, Mapping):
        kept = {name: allowed(item, str(name)) for name, item in value.items() if name != "meta"}
        return {name: item for name, item in kept.items() if item is not None or value[name] is None}
    if isinstance(value, str):
        return value if _HASH.fullmatch(value) or (key in TEXT_KEYS and _WORD.fullmatch(value)) else None
    return None if isinstance(value, list | tuple) else plain(value)


def refuse_secrets(path: str, data: bytes) -> None:
    """ValueError if a file holds a key of this process' environment, or what has the shape of a known kind of key."""
    text = data.decode("utf-8", errors="replace")
    names = [name for name, value in os.environ.items()
             if _SECRET_NAME.search(name) and len(value) >= SHORTEST_SECRET and value in text]
    if names:
        raise ValueError(f"{path} holds the value of {names[0]}; take it out, then publish again")
    if not path.endswith((".json", ".md")):
        return
    if shape := _SECRET_SHAPE.search(text) or _KEY_PLACE.search(text):
        raise ValueError(f"{path} holds what looks like a key ({shape[0][:6]}...); take it out, then publish again")
    if any(PASSWORD.search(word) for word in text.split()):
        raise ValueError(f"{path} holds what looks like a key (a URI with a password); take it out, then publish again")


def published_with() -> dict[str, Any]:
    """The code that publishes."""
    found = describe_environment()
    return {"commit": found.git_commit, "uncommitted_changes": found.git_dirty, "torch": found.torch}


def _add_stage(files: dict[str, bytes], run_dir: RunDir, stage: str, finished: bool) -> None:
    """A stage's config as far as it is on the list, and its mark of being done."""
    path = run_dir.stage(stage) / CONFIG_FILE
    if path.is_file():
        config = read_json(path)
        kept = {key: allowed(value, key) for key, value in config.items() if key in CONFIG_KEYS}
        files[f"{stage}/{CONFIG_FILE}"] = json_bytes({key: value for key, value in kept.items() if value is not None})
    if finished:
        done = read_json(run_dir.stage(stage) / DONE_FILE)
        files[f"{stage}/{DONE_FILE}"] = json_bytes({"finished_at": str(done.get("finished_at"))})


def _add_report(files: dict[str, bytes], run_dir: RunDir) -> list[str]:
    """The report and its plots, with the names of this machine's folders taken out."""
    folder = run_dir.stage(REPORT_STAGE)
    if not (folder / REPORT_FILE).is_file():
        return ["no report to publish; jobs/report.py writes one"]
    text = (folder / REPORT_FILE).read_text(encoding="utf-8")
    places = {str(run_dir.root): "<run>", str(run_dir.root.parent): "<storage>", str(Path.home()): "~"}
    if (run_dir.root / DATA_FILE).is_file():
        source = DataManifest.from_json(read_json(run_dir.root / DATA_FILE)).source
        places[source] = f"<data>/{_last_name(source)}"
    for place, name in sorted(places.items(), key=lambda item: -len(item[0])):
        text = text.replace(place, name) if len(place) > 1 else text
    text = _OTHER_PATH.sub(r"<...>/\1", text)  # as of another machine on which a part of the run was made
    text = _HOME.sub("<...>", text)
    files[f"{REPORT_STAGE}/{REPORT_FILE}"] = text.encode()
    for plot in sorted(folder.glob("*.png")):
        files[f"{REPORT_STAGE}/{plot.name}"] = plot.read_bytes()
    return []


def _lineage(run_dir: RunDir, tokenizer: Tokenizer, models: list[Model]) -> dict[str, Any]:
    found: dict[str, Any] = {"run": run_dir.root.name, "tokenizer_sha256": tokenizer.hash, "models": {}}
    data_file = run_dir.root / DATA_FILE
    if data_file.is_file():
        data = DataManifest.from_json(read_json(data_file))
        found["data"] = {
            "name": _last_name(data.source), "sha256": data.hash, "val": data.val.name,
            "train": [{"name": shard.name, "bytes": shard.bytes, "rows": shard.rows} for shard in data.train],
        }
    for model in models:
        folder = run_dir.stage(model.stage)
        config = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
        entry: dict[str, Any] = {
            "stage": model.stage, "step": model.checkpoint.step, "weights_sha256": model.checkpoint.model_hash,
            "val_bpb": plain(known_bpb(run_dir.checkpoints(model.stage), model.checkpoint.step)),
        }
        entry |= {key: allowed(config[key], key) for key in ("data", "base_model", "imported", "optimizer")
                  if config.get(key) is not None}
        if (folder / RESULT_FILE).is_file():
            record = read_result(folder)
            entry |= {"started_at": record.started_at, "seconds": record.seconds}
        found["models"][model.source] = entry
    return found


def _card(tag: str, models: list[Model], lineage: Mapping[str, Any]) -> str:
    """The README of the published run; its head is what the hub reads."""
    config = models[-1].checkpoint.model_config
    rows = [
        f"| {model.source} | {model.checkpoint.step} | {_bpb(lineage, model)} | `{model.checkpoint.model_hash[:16]}` |"
        for model in models
    ]
    data = lineage.get("data")
    trained = ""
    if data:
        trained = f"Trained on `{data['name']}` ({len(data['train'])} shards, SHA-256 `{data['sha256'][:16]}`)."
    return "\n".join([
        "---", "library_name: nanochat-ray", "pipeline_tag: text-generation", "---", "", f"# {tag}", "",
        f"A nanochat-ray model: {config.n_layer} layers, {config.n_embd} channels, {config.n_head} heads, "
        f"context {config.sequence_len}, {config.vocab_size:,} tokens. {trained}".rstrip(), "",
        "| model | step | val bpb | weights |", "| --- | ---: | ---: | --- |", *rows, "",
        f"The folder with `{tag}/` in it is a storage for nanochat-ray:", "",
        f"    python jobs/chat_cli.py --storage FOLDER --model-tag {tag} -i {models[-1].source}", "",
        "`published.json` has the size and SHA-256 of every file and where the weights come from; `report/report.md`, "
        "if it is there, what was measured.", "",
    ])


def _bpb(lineage: Mapping[str, Any], model: Model) -> str:
    value = lineage["models"][model.source]["val_bpb"]
    return "-" if value is None else f"{value:.4f}"


def _last_name(source: str) -> str:
    """Of a folder or a URI."""
    return Path(source.partition("?")[0]).name


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()
