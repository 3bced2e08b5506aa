"""How many tokens packing wastes, and how fast one process reads, tokenizes and packs next to tiktoken alone.

python bench/packing.py DATA [--vocab-size 4096 --sequence-len 512 2048 --threads 1 --repeats 5]

DATA is a folder or URI of parquet shards. Prints a table and one JSON line. Rates are tokens read per second, the
median of `--repeats` runs in which all parts take turns; `whole_share` is the whole way against tiktoken's
`encode_ordinary` on the same texts and threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from nanochat_ray.corpus.reader import DataManifest, iter_documents, pack_item, read_row_group, scan_data
from nanochat_ray.messages import PackCounts
from nanochat_ray.text.packing import pack_documents
from nanochat_ray.text.tokenizer import Tokenizer, training_texts

TOKENIZER_CHARS = 20_000_000


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(
    manifest: DataManifest, tokenizer: Tokenizer, sequence_len: int, threads: int, repeats: int
) -> dict[str, float]:
    """Waste and rates over all training items at one row length."""
    items = [manifest.item(k) for k in range(manifest.n_items)]
    texts = [read_row_group(manifest, item) for item in items]
    documents = [tokenizer.encode_to_arrays(group) for group in texts]
    counts = PackCounts()

    def tiktoken_alone() -> None:
        encode = tokenizer.encode  # of one string: encode_ordinary and nothing else
        if threads == 1:
            for group in texts:
                for text in group:
                    encode(text)
        else:
            with ThreadPoolExecutor(threads) as pool:
                for group in texts:
                    list(pool.map(encode, group))

    def whole() -> None:
        nonlocal counts
        counts = PackCounts()
        for item in items:
            counts += pack_item(manifest, item, tokenizer, sequence_len, num_threads=threads).counts

    parts: dict[str, Callable[[], object]] = {
        "tiktoken": tiktoken_alone,
        "read": lambda: [read_row_group(manifest, item) for item in items],
        "tokenize": lambda: [tokenizer.encode_to_arrays(group, num_threads=threads) for group in texts],
        "pack": lambda: [pack_documents(group, sequence_len + 1) for group in documents],
        "whole": whole,
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(repeats):
        for name, run in parts.items():
            times[name].append(seconds(run))
    record: dict[str, float] = {
        "T": sequence_len,
        "rows": counts.tokens_used // (sequence_len + 1),
        "waste_percent": round(100 * counts.waste_frac, 2),
        "floor_percent": round(100 * counts.floor_frac, 2),
        "above_floor": round(100 * (counts.waste_frac - counts.floor_frac), 2),
        "empty": counts.empty,
        "overlong": counts.overlong,
    }
    for name, runs in times.items():
        record[f"{name}_mtok_per_s"] = round(counts.tokens_read / statistics.median(runs) / 1e6, 3)
    shares = [alone / way for alone, way in zip(times["tiktoken"], times["whole"], strict=True)]
    record["whole_share"] = round(statistics.median(shares), 3)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--sequence-len", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    manifest = scan_data(args.data)
    feed = training_texts(iter_documents(manifest, "train"), TOKENIZER_CHARS, 10_000)
    tokenizer = Tokenizer.train(feed, args.vocab_size)
    records = [measure(manifest, tokenizer, T, args.threads, args.repeats) for T in args.sequence_len]
    for name in records[0]:
        print(f"{name:<22}", *(f"{record[name]:>12g}" for record in records))
    print(json.dumps({"bench": "packing", "vocab": tokenizer.vocab_size, "threads": args.threads, "results": records}))


if __name__ == "__main__":
    main()
