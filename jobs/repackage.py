"""Write any data set as data shards: parquet, JSON lines (also .gz, .zst) or text files in, a folder for --data out.

The first --val-docs documents become the last shard, for validation. Every document is written exactly once.
"""

from __future__ import annotations

import time
from pathlib import Path

from _runtime import main

from nanochat_ray.config import RepackageSettings
from nanochat_ray.flags import Section, read_flags


def run(settings: RepackageSettings) -> None:
    from nanochat_ray.corpus.reader import scan_data
    from nanochat_ray.corpus.repackage import repackage

    if settings.data is None or settings.to is None:
        raise ValueError("say with --data what to read and with --to which folder to write")
    if "://" in settings.to:
        raise ValueError(f"--to {settings.to}: shards are written to a local or mounted folder, not to a URI")
    begun = time.monotonic()
    folder = Path(settings.to).expanduser().absolute()
    result = repackage(
        settings.data, folder, settings.text_column, settings.pattern, settings.chars_per_shard, settings.val_docs,
        settings.seed,
    )
    manifest = scan_data(str(folder))
    empty = f", {result.empty:,} of them empty" if result.empty else ""
    print(
        f"{folder}: {len(manifest.train)} training shards and {manifest.val.name} for validation, "
        f"{result.documents:,} documents{empty}, {result.characters:,} characters in {time.monotonic() - begun:.0f} s"
    )


def cli() -> None:
    run(read_flags(__doc__ or "", [Section("repackage", RepackageSettings())]).settings(RepackageSettings))


if __name__ == "__main__":
    main(cli)
