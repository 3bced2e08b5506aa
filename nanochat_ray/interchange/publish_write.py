"""Putting a package where it is published: a folder, an object store, or the hub.

In a folder or a store the order of writing makes it whole: what is going to be there (`publishing.json`), the files,
`published.json`, and last `lease.json`, without which nobody sees a run. So a publication that was broken off is not
there, and the same command finishes it. The hub takes everything in one commit.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from nanochat_ray.interchange.publish import Model, Package, published_with
from nanochat_ray.model.checkpoint import CorruptCheckpointError, open_checkpoint, save_checkpoint
from nanochat_ray.remote import Remote
from nanochat_ray.run_dir import LEASE_FILE, RunDir, differences, shown, write_atomic

logger = logging.getLogger(__name__)

PUBLISHED_FILE = "published.json"
PUBLISHING_FILE = "publishing.json"
WITH = "published_with"
HUB_SCHEME = "hf://"
PUBLISHED_HOST = "published"  # a lease of nobody: a job may take it, and then trains on in this place
LEASE = {"epoch": 0, "host": PUBLISHED_HOST, "pid": 0, "started": "0", "heartbeat": 0.0, "released": True}


def publish(package: Package, source: RunDir, uri: str, replace: bool = False, private: bool = True) -> str:
    """Publish to a folder, a URI of an object store, or `hf://owner/name`; returns what was done, in one line.

    `replace` is needed where another publication of this run is. ValueError for a place that cannot be taken, and for
    the hub without the extra `hf`; ConnectionError if a store or the hub does not answer or refuses.
    """
    if uri.startswith(HUB_SCHEME):
        return _to_hub(package, uri.removeprefix(HUB_SCHEME).strip("/"), replace, private)
    return _to_run_folder(package, source, RunDir.of(uri, package.tag), replace)


def _to_run_folder(package: Package, source: RunDir | None, target: RunDir, replace: bool) -> str:
    root, remote = target.root, Remote.of(target.root)
    if source is not None and root.resolve() == source.root.resolve():
        raise ValueError(f"{shown(root)} is the run itself; give another place")
    if remote is not None:
        remote.probe()
    manifest = package.manifest()
    _refuse_others_run(root)
    before = _read(root / PUBLISHED_FILE)
    if before is not None and _same(before, manifest):
        if _read(root / LEASE_FILE) is not None and not _missing(package, root):
            return f"{shown(root)}: published before, nothing to do"
    elif before is not None and not replace:
        changed = differences({**before, WITH: None}, {**manifest, WITH: None})
        raise ValueError(
            f"another publication of {package.tag} is in {shown(root)}:\n  " + "\n  ".join(changed[:5])
            + "\nGive --replace, or another place."
        )
    if before is not None and not _same(before, manifest):
        _clear(root)
    begun = _read(root / PUBLISHING_FILE)
    if begun is not None and begun != manifest:  # broken off, of something else
        _clear(root)
    elif begun is None and before is None and _anything(root):
        raise ValueError(f"{shown(root)} is not empty and nothing published is in it; give another place")
    _delete(root / LEASE_FILE)
    _write(root / PUBLISHING_FILE, _json(manifest))
    for model in package.models:
        _write_model(model, target)
    for path, data in sorted(package.files.items()):
        _write(root / path, data)
    _write(root / PUBLISHED_FILE, _json({**manifest, WITH: published_with()}))
    _write(root / LEASE_FILE, _json(LEASE))
    _delete(root / PUBLISHING_FILE)
    return f"{shown(root)}: published {len(manifest['files'])} files, {_size(manifest)}"


def _to_hub(package: Package, repo: str, replace: bool, private: bool) -> str:
    """Everything in one commit, so the hub has it whole or not; it leaves out files that it has already."""
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise ValueError(f"{HUB_SCHEME}{repo}: owner and name are needed, {HUB_SCHEME}owner/name")
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise ValueError("publishing to the hub needs huggingface_hub: pip install -e '.[hf]'") from None
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))  # a mirror
    manifest = package.manifest()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        there = f"{package.tag}/{PUBLISHED_FILE}"
        if api.file_exists(repo, there):
            with tempfile.TemporaryDirectory() as folder:
                before = json.loads(Path(api.hf_hub_download(repo, there, local_dir=folder)).read_text())
            if _same(before, manifest):
                return f"{HUB_SCHEME}{repo}/{package.tag}: published before, nothing to do"
            if not replace:
                raise ValueError(f"another publication of {package.tag} is in {HUB_SCHEME}{repo}; give --replace")
        with tempfile.TemporaryDirectory() as folder:
            staged = RunDir(Path(folder) / package.tag)
            _to_run_folder(package, None, staged, replace=False)
            shutil.copyfile(staged.root / "README.md", Path(folder) / "README.md")
            api.upload_folder(
                repo_id=repo, folder_path=folder, commit_message=f"Publish {package.tag}",
                delete_patterns=f"{package.tag}/*", ignore_patterns=[".*"],
            )
    except ValueError:
        raise
    except Exception as error:  # the library's own kinds, and those of the HTTP library that its version uses
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConnectionError(f"the hub did not take {HUB_SCHEME}{repo}: {why}") from error
    return f"{HUB_SCHEME}{repo}/{package.tag}: published {len(manifest['files'])} files, {_size(manifest)}"


def _write_model(model: Model, target: RunDir) -> None:
    """The checkpoint at its place, unless it is there. Its weights file is the same byte for byte."""
    root, step = target.checkpoints(model.stage), model.checkpoint.step
    if not _is_there(model, target.root):
        save_checkpoint(root, step, model.checkpoint.model_tensors(), None, model.meta)
    written = open_checkpoint(root, step).model_hash
    if written != model.checkpoint.model_hash:
        raise OSError(f"weights of {shown(root)}, step {step}: {written} written, {model.checkpoint.model_hash} wanted")


def _is_there(model: Model, root: Path) -> bool:
    try:
        found = open_checkpoint(RunDir(root).checkpoints(model.stage), model.checkpoint.step)
    except (FileNotFoundError, CorruptCheckpointError):
        return False
    return found.model_hash == model.checkpoint.model_hash and found.meta == json.loads(model.meta_bytes)


def _missing(package: Package, root: Path) -> list[str]:
    """What of the package is not there, or is something else."""
    missing = [path for path, data in package.files.items() if _bytes(root / path) != data]
    return missing + [model.folder for model in package.models if not _is_there(model, root)]


def _refuse_others_run(root: Path) -> None:
    lease = _read(root / LEASE_FILE)
    if lease is not None and lease.get("host") != PUBLISHED_HOST:
        raise ValueError(f"{shown(root)} is a run that jobs write to; give another place to publish")


def _same(before: dict[str, Any], manifest: dict[str, Any]) -> bool:
    """Whether a published manifest is this one, whatever code wrote it."""
    return {key: value for key, value in before.items() if key != WITH} == json.loads(json.dumps(manifest))


def _size(manifest: dict[str, Any]) -> str:
    return f"{sum(entry['bytes'] for entry in manifest['files'].values()) / 1e6:,.1f} MB"


# --- files here or in the store that is mirrored here ---


def _bytes(path: Path) -> bytes | None:
    if (remote := Remote.of(path)) is not None:
        return remote.read(path)
    return path.read_bytes() if path.is_file() else None


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object, None if it is not there. ValueError that names the file if it is something else."""
    data = _bytes(path)
    if data is None:
        return None
    try:
        value = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{shown(path)} is damaged ({error}); delete it") from None
    if not isinstance(value, dict):
        raise ValueError(f"{shown(path)} is no JSON object; delete it")
    return value


def _write(path: Path, data: bytes) -> None:
    write_atomic(path, data)
    if (remote := Remote.of(path)) is not None:
        remote.patient().push(path)


def _delete(path: Path) -> None:
    if (remote := Remote.of(path)) is not None:
        remote.patient().delete(path)
    path.unlink(missing_ok=True)


def _anything(root: Path) -> bool:
    if (remote := Remote.of(root)) is not None:
        return bool(remote.listing(root))
    return root.is_dir() and any(root.iterdir())


def _clear(root: Path) -> None:
    """Take away an earlier publication, first what shows it."""
    for name in (LEASE_FILE, PUBLISHED_FILE, PUBLISHING_FILE):
        _delete(root / name)
    if (remote := Remote.of(root)) is not None:
        remote.patient().delete(root)
    if root.is_dir():
        shutil.rmtree(root)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()
