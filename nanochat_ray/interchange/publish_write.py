"""Putting a package where it is published: a folder, an object store, or the hub.

In a folder or a store the order of writing makes it whole: what is going to be there (`publishing.json`), the files,
`published.json`, and last `lease.json`, without which nobody sees a run. So a publication that was broken off is not
there, and the same command finishes it. The hub takes everything in one commit.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nanochat_ray.interchange.hf_model import first_line
from nanochat_ray.interchange.publish import (
    CARD_FILE,
    FORMAT,
    PUBLISHED_FILE,
    Model,
    Package,
    json_bytes,
    published_with,
)
from nanochat_ray.model.checkpoint import (
    META_FILE,
    MODEL_FILE,
    CorruptCheckpointError,
    open_checkpoint,
    save_checkpoint,
)
from nanochat_ray.remote import Remote
from nanochat_ray.run_dir import LEASE_FILE, MANIFEST_FILE, RunDir, differences, shown, write_atomic

logger = logging.getLogger(__name__)

PUBLISHING_FILE = "publishing.json"
WITH = "published_with"
HUB_SCHEME = "hf://"
_HALF_WRITTEN = re.compile(r"(?:.*/)?\.[^/]+\.[0-9a-f]{32}\.tmp(?:/[^/]+)?")  # left by a writer that was killed
_MARK = re.compile(r"[0-9a-f]{32}-")  # before the name of a checkpoint's file in a store
PUBLISHED_HOST = "published"  # a lease of nobody: a job may take it, and then trains on in this place
LEASE = {"epoch": 0, "host": PUBLISHED_HOST, "pid": 0, "started": "0", "heartbeat": 0.0, "released": True}


def publish(package: Package, source: RunDir, uri: str, replace: bool = False, private: bool = True) -> str:
    """Publish to a folder, a URI of an object store, or `hf://owner/name`; returns what was done, in one line.

    `replace` is needed where another publication of this run is. ValueError for a place that cannot be taken (one with
    files that are no part of a publication too), for the hub without the extra `hf`, and with `private` for a
    repository that everybody sees; ConnectionError if a store or the hub does not answer or refuses.
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
    before, begun = _read_ours(root / PUBLISHED_FILE), _read_ours(root / PUBLISHING_FILE)
    there = _files(root)
    if before is None and begun is None and there:
        raise ValueError(f"{shown(root)} is not empty and nothing published is in it; give another place")
    odd = _strangers(there, [found for found in (before, begun, manifest) if found is not None])
    if odd:
        raise ValueError(f"{shown(root)} holds what is not published: {', '.join(odd[:5])}; take it away first")
    if before is not None and _same(before, manifest):
        if _read(root / LEASE_FILE) is not None and not _missing(package, root):
            return f"{shown(root)}: published before, nothing to do"
    elif before is not None and not replace:
        changed = differences({**before, WITH: None}, {**manifest, WITH: None})
        raise ValueError(
            f"another publication of {package.tag} is in {shown(root)}:\n  " + "\n  ".join(changed[:5])
            + "\nGive --replace, or another place."
        )
    if any(found is not None and not _same(found, manifest) for found in (before, begun)):
        _clear(root)  # nothing else is there, as was looked at above
    _delete(root / LEASE_FILE)
    _write(root / PUBLISHING_FILE, json_bytes(manifest))
    for model in package.models:
        _write_model(model, target)
    for path, data in sorted(package.files.items()):
        _write(root / path, data)
    _write(root / PUBLISHED_FILE, json_bytes({**manifest, WITH: published_with()}))
    _write(root / LEASE_FILE, json_bytes(LEASE))
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
    with _asking(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise ValueError(f"{HUB_SCHEME}{repo} is there for everybody to see; give --public, or make it private")
        if _is_on_hub(api, repo, package.tag, manifest, replace):
            return f"{HUB_SCHEME}{repo}/{package.tag}: published before, nothing to do"
    with tempfile.TemporaryDirectory() as folder:
        staged = RunDir(Path(folder) / package.tag)
        _to_run_folder(package, None, staged, replace=False)
        shutil.copyfile(staged.root / CARD_FILE, Path(folder) / CARD_FILE)
        with _asking(repo):
            api.upload_folder(
                repo_id=repo, folder_path=folder, commit_message=f"Publish {package.tag}",
                delete_patterns=f"{package.tag}/*", ignore_patterns=[".*"],
            )
    return f"{HUB_SCHEME}{repo}/{package.tag}: published {len(manifest['files'])} files, {_size(manifest)}"


@contextlib.contextmanager
def _asking(repo: str) -> Iterator[None]:
    """What the hub's library raises, as ConnectionError of one line."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # the library's own kinds, and those of the HTTP library that its version uses
        raise ConnectionError(f"the hub did not take {HUB_SCHEME}{repo}: {first_line(error)}") from error


def _is_on_hub(api: Any, repo: str, tag: str, manifest: dict[str, Any], replace: bool) -> bool:
    """Whether this publication is there, whole. ValueError for another one, or other files, without `replace`."""
    sizes = {
        entry.path.removeprefix(f"{tag}/"): entry.size for entry in api.list_repo_tree(repo, recursive=True)
        if entry.path.startswith(f"{tag}/") and hasattr(entry, "size")
    }
    same = False
    if PUBLISHED_FILE in sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = api.hf_hub_download(repo, f"{tag}/{PUBLISHED_FILE}", local_dir=folder)
            before = json.loads(Path(path).read_text())
        same = isinstance(before, dict) and _same(before, manifest)
        if not same and not replace:
            raise ValueError(f"another publication of {tag} is in {HUB_SCHEME}{repo}; give --replace")
    odd = _strangers(sizes, [manifest])
    if odd and not replace:
        raise ValueError(f"{HUB_SCHEME}{repo}/{tag} holds what is not published: {', '.join(odd[:5])}; take it away "
                         "there, or give --replace")
    whole = all(sizes.get(path) == entry["bytes"] for path, entry in manifest["files"].items())
    return same and not odd and whole and LEASE_FILE in sizes


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


def _strangers(paths: Iterable[str], manifests: list[dict[str, Any]]) -> list[str]:
    """Of the files of a place those that none of these publications has."""
    known = {PUBLISHED_FILE, PUBLISHING_FILE, LEASE_FILE}
    for path in (path for manifest in manifests for path in manifest["files"]):
        known.add(path)
        folder, _, name = path.rpartition("/")
        if name == MODEL_FILE:
            known |= {f"{folder}/{MANIFEST_FILE}", f"{folder}/*{MODEL_FILE}", f"{folder}/*{META_FILE}"}
    return sorted(
        path for path in paths
        if path not in known and _MARK.sub("*", path) not in known and not _HALF_WRITTEN.fullmatch(path)
    )


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


def _read_ours(path: Path) -> dict[str, Any] | None:
    """The manifest of a publication, None if there is none. ValueError for a file that is something else."""
    found = _read(path)
    if found is not None and (found.get("format") != FORMAT or not isinstance(found.get("files"), dict)):
        raise ValueError(f"{shown(path)} is of nothing that was published; give another place")
    return found


def _write(path: Path, data: bytes) -> None:
    write_atomic(path, data)
    if (remote := Remote.of(path)) is not None:
        remote.patient().push(path)


def _delete(path: Path) -> None:
    if (remote := Remote.of(path)) is not None:
        remote.patient().delete(path)
    path.unlink(missing_ok=True)


def _files(root: Path) -> list[str]:
    """All files of a place, by path below it; empty folders count for nothing."""
    if (remote := Remote.of(root)) is None:
        return [str(path.relative_to(root)) for path in root.rglob("*") if path.is_symlink() or not path.is_dir()]
    found, folders = [], [root]
    while folders:
        folder = folders.pop()
        for name, entry in remote.listing(folder).items():
            if entry.size_bytes is None:
                folders.append(folder / name)
            else:
                found.append(str((folder / name).relative_to(root)))
    return found


def _clear(root: Path) -> None:
    """Take away an earlier publication: first what shows it, last what says that it is one."""
    _delete(root / LEASE_FILE)
    remote, last = Remote.of(root), (PUBLISHED_FILE, PUBLISHING_FILE)
    if remote is not None:
        for name in remote.listing(root).keys() - set(last):
            remote.patient().delete(root / name)
    for path in list(root.iterdir()) if root.is_dir() else []:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in last:
            path.unlink()
    for name in last:
        _delete(root / name)
