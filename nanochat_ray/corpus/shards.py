"""Sets of data shards: the published ones by name, what lies at any other source, and their checksums.

A folder of fetched shards has a `checksums.json` with each one's size and SHA-256, by which a later call knows what is
whole, and which makes the folder a source that others can verify.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nanochat_ray.corpus.download import (
    DownloadError,
    Fetched,
    Retry,
    fetch_bytes,
    why_unreachable,
)
from nanochat_ray.corpus.source import SHA256, file_system, is_http, join_address
from nanochat_ray.run_dir import write_json

logger = logging.getLogger(__name__)

CHARS_PER_SHARD = 2.5e8
CHARS_PER_TOKEN = 4.8  # of the default 32,768-token tokenizer on this text
CROPPED_FRAC = 0.35  # of the tokens read, lost to best-fit packing at T = 2048
CAPPED_FRAC = 0.2  # of the characters, beyond the tokenizer's cap on a document; an upper bound
HUB = "https://huggingface.co"
CHECKSUMS_FILE = "checksums.json"


@dataclass(frozen=True)
class PublishedSet:
    """A data set published on the hub as numbered parquet shards; the last one is for validation."""

    folder: str  # below the storage
    repo: str
    n_shards: int

    def name(self, index: int) -> str:
        return f"shard_{index:05d}.parquet"

    @property
    def names(self) -> list[str]:
        return [self.name(i) for i in range(self.n_shards)]

    @property
    def val_shard(self) -> str:
        return self.name(self.n_shards - 1)

    @property
    def base_url(self) -> str:
        return f"{os.environ.get('HF_ENDPOINT', HUB).rstrip('/')}/datasets/{self.repo}/resolve/main"


PUBLISHED = {
    "climbmix": PublishedSet("base_data_climbmix", "karpathy/climbmix-400b-shuffle", 6543),
    "fineweb-edu": PublishedSet("base_data_fineweb_edu", "karpathy/fineweb-edu-100b-shuffle", 1823),
}


def shards_needed(training_tokens: int) -> int:
    """Shards that hold at least this many tokens after packing."""
    return math.ceil(training_tokens * CHARS_PER_TOKEN / ((1 - CROPPED_FRAC) * CHARS_PER_SHARD))


def tokenizer_shards(max_chars: int) -> int:
    """Shards that hold at least this many characters after the tokenizer's cap on a document."""
    return math.ceil(max_chars / ((1 - CAPPED_FRAC) * CHARS_PER_SHARD))


def choose(names: Sequence[str], n_train: int | None, val_shard: str | None, source: str) -> list[str]:
    """The first `n_train` training shards (None: all) and the validation shard, which is the last unless named."""
    names = sorted(names)
    if not names:
        raise FileNotFoundError(f"{source} has no *.parquet shards")
    val_shard = val_shard or names[-1]
    if val_shard not in names:
        near = difflib.get_close_matches(val_shard, names, n=1, cutoff=0.0)[0]
        raise FileNotFoundError(f"validation shard {val_shard!r} is not in {source}; the nearest name is {near!r}")
    return [*[name for name in names if name != val_shard][:n_train], val_shard]


def list_source(source: str, retry: Retry | None = None) -> tuple[list[str], dict[str, Fetched]]:
    """The shards at a source (a web address, a URI or a folder) and their checksums, as far as it has them.

    A web server lists nothing, so there the checksum file names the shards. Raises DownloadError, FileNotFoundError.
    """
    if reason := why_unreachable(source):
        raise DownloadError(f"{source}: {reason}")
    if is_http(source):
        checksums = _source_checksums(source, (CHECKSUMS_FILE, "SHA256SUMS"), retry)
        return sorted(checksums), checksums
    from pyarrow import fs

    system, path = file_system(source)
    try:
        found = system.get_file_info(fs.FileSelector(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"{source}: there is no such folder") from None
    names = {info.base_name for info in found if info.is_file}
    there = [name for name in (CHECKSUMS_FILE, "SHA256SUMS") if name in names]
    checksums = _source_checksums(source, there, retry)
    return sorted(name for name in names if name.endswith(".parquet")), checksums


def _source_checksums(source: str, files: Iterable[str], retry: Retry | None) -> dict[str, Fetched]:
    for name in files:
        try:
            content = fetch_bytes(join_address(source, name), hub_token(source), retry).decode()
        except DownloadError as error:
            logger.debug("no checksums: %s", error)
            continue
        return parse_checksums(content, join_address(source, name))
    return {}


def parse_checksums(content: str, where: str) -> dict[str, Fetched]:
    """Shards by name in a checksum file: our own, a JSON object of name to SHA-256, or lines as sha256sum prints them.

    A size that is not told is -1. ValueError for anything else.
    """
    try:
        if content.lstrip().startswith("{"):
            data = json.loads(content)
            entries = data["files"] if isinstance(data.get("files"), dict) else data
            found = {
                name: Fetched(-1, value)
                if isinstance(value, str)
                else Fetched(value["size_bytes"], value["sha256"], value.get("revision"))
                for name, value in entries.items()
            }
        else:
            lines = [line.split(maxsplit=1) for line in content.splitlines() if line.strip()]
            found = {name.removeprefix("*").strip().removeprefix("./"): Fetched(-1, sha) for sha, name in lines}
        if wrong := [name for name, file in found.items() if not SHA256.fullmatch(file.sha256)]:
            raise ValueError(f"no SHA-256 for {wrong[0]}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where} is no list of SHA-256 checksums: {error!r}") from error
    return {name: file for name, file in found.items() if name.endswith(".parquet")}


def read_checksums(folder: Path) -> dict[str, Fetched]:
    """What is recorded of a folder's shards; nothing if it has no record."""
    path = folder / CHECKSUMS_FILE
    return parse_checksums(path.read_text(), str(path)) if path.exists() else {}


def write_checksums(folder: Path, files: Mapping[str, Fetched], **more: object) -> None:
    entries = {name: asdict(file) for name, file in sorted(files.items())}
    write_json(folder / CHECKSUMS_FILE, {**more, "files": entries})


def hub_token(source: str) -> str | None:
    """The hub's token, for the hub only."""
    return os.environ.get("HF_TOKEN") if source.startswith(os.environ.get("HF_ENDPOINT", HUB)) else None
