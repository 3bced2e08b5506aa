"""The published pretraining sets by name, and fetching the shards that a run needs."""

from __future__ import annotations

import logging
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from nanochat_ray.corpus.download import DownloadError, fetch

logger = logging.getLogger(__name__)

CHARS_PER_SHARD = 2.5e8
CHARS_PER_TOKEN = 4.8  # of the default 32,768-token tokenizer on this text
CROPPED_FRAC = 0.35  # of the tokens read, lost to best-fit packing at T = 2048
CONCURRENT_DOWNLOADS = 4


@dataclass(frozen=True)
class PublishedSet:
    """A data set published as numbered parquet shards; the last one is for validation."""

    folder: str  # below the storage
    base_url: str
    n_shards: int

    def name(self, index: int) -> str:
        return f"shard_{index:05d}.parquet"

    @property
    def val_shard(self) -> str:
        return self.name(self.n_shards - 1)


PUBLISHED = {
    "climbmix": PublishedSet(
        "base_data_climbmix", "https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle/resolve/main", 6543
    ),
    "fineweb-edu": PublishedSet(
        "base_data_fineweb_edu", "https://huggingface.co/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main", 1823
    ),
}


def shards_needed(training_tokens: int) -> int:
    """Shards that hold at least this many tokens after packing."""
    return math.ceil(training_tokens * CHARS_PER_TOKEN / ((1 - CROPPED_FRAC) * CHARS_PER_SHARD))


def download_shards(name: str, n_train: int, storage: Path) -> Path:
    """Fetch the first `n_train` training shards and the validation shard; returns their folder.

    Shards that are there are kept. Raises DownloadError naming each shard that could not be had.
    """
    published = PUBLISHED[name]
    folder = storage / published.folder
    n_train = min(n_train, published.n_shards - 1)
    names = [*(published.name(i) for i in range(n_train)), published.val_shard]
    missing = [shard for shard in names if not (folder / shard).exists()]
    if missing:
        logger.info("%s: fetching %d of %d shards into %s", name, len(missing), len(names), folder)

    def get(shard: str) -> str | None:
        try:
            fetch(f"{published.base_url}/{shard}", folder / shard)
        except DownloadError as error:
            return str(error)
        logger.info("%s: %s", name, shard)
        return None

    with ThreadPoolExecutor(CONCURRENT_DOWNLOADS) as pool:
        failures = [failure for failure in pool.map(get, missing) if failure]
    if failures:
        raise DownloadError(
            f"{len(failures)} of {len(missing)} shards of {name} could not be fetched ({failures[0]}). "
            "The same command fetches the rest; --data takes a folder of your own parquet shards instead."
        )
    return folder
