"""What Ray Data costs the stream of rows, how long a trainer waits for them, and what memory they take.

    python bench/pipeline.py DATA [--packers 1 --pairs 3 --items 40 --row-group 1024] [--steps 60] [--memory]

DATA is a folder of parquet shards; they are written anew with the published shards' row groups, which are the items.

1. Rate: Ray Data with a consumer that takes all it gets, next to as many plain processes that pack the same items and
   drop them, in turns on the same cluster. Tokens read per second, from when every packer is warm.
2. Wait: a consumer that takes a step every so many milliseconds, as a trainer of the cpu preset and one of a million
   tokens per second would; what it waits for data, as a share of its time after ten steps.
3. `--memory` instead: the peak of every process of the cluster over one epoch of DATA and of ten times as many
   shards. Private memory, that is resident without what is shared (the object store, code).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

import psutil
import pyarrow.parquet as pq

from nanochat_ray.corpus.reader import iter_documents, scan_data
from nanochat_ray.messages import Cursor, PackedBatch
from nanochat_ray.stages.rows import CorpusRows, visits_from
from nanochat_ray.text.tokenizer import Tokenizer, training_texts

VOCAB_SIZE = 4096
TOKENIZER_CHARS = 20_000_000
WARM_STEPS = 10
PACED = {"cpu preset": (256, 16, 200), "1 M tokens/s": (2048, 256, 524)}  # T, rows per step, ms per step
TIMES = 10
SAMPLE_EVERY_S = 0.2


def plain_packer(rows: CorpusRows, items: list[int], barrier, results) -> None:
    rows.pack(items[0])  # loads the tokenizer
    barrier.wait()
    start, cpu_start = time.monotonic(), time.process_time()
    tokens = sum(rows.pack(item).counts.tokens_read for item in items)
    results.put((tokens, start, time.monotonic(), time.process_time() - cpu_start))


def plain_rate(rows: CorpusRows, n_items: int, packers: int) -> tuple[float, float]:
    """Tokens read by `packers` processes that share the stream's first items, per second and per CPU second."""
    items = [visit.item for visit in islice(visits_from(rows, Cursor()), n_items)]
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(packers + 1), spawn.Queue()
    arguments = [(rows, items[k::packers], barrier, results) for k in range(packers)]
    workers = [spawn.Process(target=plain_packer, args=each) for each in arguments]
    for worker in workers:
        worker.start()
    barrier.wait()
    done = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    tokens, starts, ends, cpu = zip(*done, strict=True)
    return sum(tokens) / (max(ends) - min(starts)), sum(tokens) / sum(cpu)


def dealt(rows: CorpusRows, rows_per_step: int, packers: int) -> tuple[object, Iterator[PackedBatch]]:
    import ray

    from nanochat_ray.data.dealer import batches_from, start_dealer

    dealer = start_dealer(rows, rows_per_step, 1, packers, "bench")
    ray.get(dealer.open.remote("bench", Cursor(), 0, 1))
    return dealer, batches_from(dealer, "bench", 0, 0)


def packers_cpu_s() -> float:
    """CPU seconds of Ray Data's packing processes so far."""
    mine = psutil.Process().children(recursive=True)
    times = [process.cpu_times() for process in mine if "MapWorker" in " ".join(process.cmdline())]
    return sum(each.user + each.system for each in times)


def ray_rate(rows: CorpusRows, n_items: int, packers: int) -> tuple[float, float]:
    """The same through Ray Data and the dealer, from when as many items are through as may be ready at the start."""
    import ray

    from nanochat_ray.data.dealer import ITEMS_AHEAD

    warm = (ITEMS_AHEAD + 2) * packers
    dealer, batches = dealt(rows, 64, packers)
    tokens, start, cpu_start = 0, 0.0, 0.0
    for batch in batches:
        at = batch.cursor.epoch * rows.n_items + batch.cursor.item
        if start:
            tokens += batch.counts.tokens_read
        elif at >= warm:
            start, cpu_start = time.monotonic(), packers_cpu_s()
        if at >= warm + n_items:
            break
    rates = tokens / (time.monotonic() - start), tokens / (packers_cpu_s() - cpu_start)
    ray.kill(dealer)
    return rates


def paced(rows: CorpusRows, rows_per_step: int, step_ms: float, n_steps: int, packers: int) -> dict[str, float]:
    """What a consumer waits that works `step_ms` between two steps."""
    import ray

    dealer, batches = dealt(rows, rows_per_step, packers)
    waits: list[float] = []
    began = time.monotonic()
    for _ in range(WARM_STEPS + n_steps):
        asked = time.monotonic()
        next(batches)
        waits.append(1000 * (time.monotonic() - asked))
        time.sleep(step_ms / 1000)
    ray.kill(dealer)
    warm = waits[WARM_STEPS:]
    return {
        "step_ms": step_ms, "first_wait_ms": waits[0], "wait_ms_median": statistics.median(warm),
        "wait_ms_max": max(warm), "wait_percent": 100 * sum(warm) / (sum(warm) + step_ms * n_steps),
        "seconds": time.monotonic() - began,
    }  # fmt: skip


class MemorySampler:
    """The greatest private memory of each kind of process below this one, and of all together."""

    def __enter__(self) -> MemorySampler:
        self.peaks: dict[str, int] = defaultdict(int)  # bytes
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(SAMPLE_EVERY_S):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    memory, kind = process.memory_info(), self._kind(process, me)
                except psutil.Error:
                    continue
                private = memory.rss - memory.shared
                total += private
                self.peaks[kind] = max(self.peaks[kind], private)
            self.peaks["all together"] = max(self.peaks["all together"], total)

    @staticmethod
    def _kind(process: psutil.Process, me: psutil.Process) -> str:
        if process.pid == me.pid:
            return "consumer"
        words = process.cmdline() or ["?"]
        if words[0].startswith("ray::"):
            name = " ".join(words)
            return "dealer" if "RowDealer" in name else "packer" if "MapWorker" in name else "other workers"
        program = Path(words[0]).name
        return "Ray's Python services" if program.startswith("python") else program


def memory_over(folder: Path, tokenizer: Path, packers: int) -> tuple[dict[str, int], int]:
    """Peaks in MB over one epoch of a folder on a cluster of its own, and the number of steps."""
    rows = CorpusRows(scan_data(str(folder)), tokenizer, 2048, seed=42, epochs=1)
    start_cluster(packers)
    import ray

    with MemorySampler() as memory:
        dealer, batches = dealt(rows, 16, packers)
        n_steps = sum(1 for _ in batches)
    ray.kill(dealer)
    ray.shutdown()
    return {kind: round(peak / 1e6) for kind, peak in memory.peaks.items()}, n_steps


def compare_memory(data: Path, tokenizer: Path, packers: int, scratch: Path) -> dict[str, object]:
    manifest = scan_data(str(data))
    large = scratch / "large"
    large.mkdir()
    for shard in manifest.train:
        for k in range(TIMES):
            (large / f"{shard.name}.{k}.parquet").symlink_to(shard.path)
    (large / "~val.parquet").symlink_to(manifest.val.path)
    found = []
    for folder in (data, large):  # each from a process of its own, so that nothing of the first is left in the second
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found.append(pool.submit(memory_over, folder, tokenizer, packers).result())
    print(f"{'peak private MB':<24} {found[0][1]:>6} steps {found[1][1]:>6} steps")
    for kind in sorted(set(found[0][0]) | set(found[1][0])):
        print(f"{kind:<24} {found[0][0].get(kind, 0):>12} {found[1][0].get(kind, 0):>12}")
    return {"steps": [steps for _, steps in found], "peak_mb": [peaks for peaks, _ in found]}


def regrouped(data: Path, folder: Path, row_group: int) -> Path:
    """The same shards with row groups of this many documents."""
    folder.mkdir()
    manifest = scan_data(str(data))
    for shard in (*manifest.train, manifest.val):
        pq.write_table(pq.read_table(shard.path), folder / shard.name, row_group, compression="zstd")
    return folder


def start_cluster(packers: int) -> None:
    import ray

    ray.init(
        address="local", num_cpus=packers + 1, include_dashboard=False, object_store_memory=500_000_000,
        log_to_driver=False, logging_level="ERROR",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--packers", type=int, default=max(1, (os.cpu_count() or 1) // 2))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--items", type=int, default=40)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--row-group", type=int, default=1024, help="documents per item")
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    os.environ |= {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    record: dict[str, object] = {
        "bench": "pipeline", "packers": args.packers, "cpus": os.cpu_count(), "row_group": args.row_group
    }
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        manifest = scan_data(str(regrouped(args.data, scratch / "data", args.row_group)))
        feed = training_texts(iter_documents(manifest, "train"), TOKENIZER_CHARS, 10_000)
        Tokenizer.train(feed, VOCAB_SIZE).save(scratch / "tokenizer")
        if args.memory:
            record["memory"] = compare_memory(scratch / "data", scratch / "tokenizer", args.packers, scratch)
        else:
            record |= measure_time(args, CorpusRows(manifest, scratch / "tokenizer", 2048, seed=42))
    print(json.dumps(record))


def measure_time(args: argparse.Namespace, rows: CorpusRows) -> dict[str, object]:
    import dataclasses

    import ray

    start_cluster(args.packers)
    print(f"{'pair':>4} {'plain Mtok/s':>13} {'ray Mtok/s':>11} {'ratio':>6} {'ratio per CPU s of packers':>27}")
    ratios, cpu_ratios = [], []
    for pair in range(args.pairs):
        arms = {"plain": plain_rate, "ray": ray_rate}
        order = ("plain", "ray") if pair % 2 == 0 else ("ray", "plain")
        rate = {arm: arms[arm](rows, args.items, args.packers) for arm in order}
        (plain, plain_cpu), (on_ray, on_ray_cpu) = rate["plain"], rate["ray"]
        ratios.append(on_ray / plain)
        cpu_ratios.append(on_ray_cpu / plain_cpu)
        print(f"{pair:>4} {plain / 1e6:>13.3f} {on_ray / 1e6:>11.3f} {ratios[-1]:>6.3f} {cpu_ratios[-1]:>27.3f}")
    waits = {}
    print(f"{'consumer':<14} {'step ms':>8} {'first ms':>9} {'median ms':>10} {'max ms':>8} {'wait %':>7}")
    for name, (sequence_len, rows_per_step, step_ms) in PACED.items():
        source = dataclasses.replace(rows, sequence_len=sequence_len)
        found = waits[name] = paced(source, rows_per_step, step_ms, args.steps, args.packers)
        print(
            f"{name:<14} {step_ms:>8} {found['first_wait_ms']:>9.0f} {found['wait_ms_median']:>10.2f} "
            f"{found['wait_ms_max']:>8.1f} {found['wait_percent']:>7.2f}"
        )
    ray.shutdown()
    return {
        "ratio_median": statistics.median(ratios), "ratios": ratios,
        "cpu_ratio_median": statistics.median(cpu_ratios), "cpu_ratios": cpu_ratios, "waits": waits,
    }


if __name__ == "__main__":
    main()
