"""A ten times larger data set does not make the process that reads, tokenizes, packs and cuts it larger."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_ray.text.tokenizer import Tokenizer
from tests.conftest import sentences

SHARDS, TIMES = 6, 10
SLACK_BYTES = 8_000_000  # less than the rows of the larger set, and much less than its text
STATUS = Path("/proc/self/status")
# Peak memory of a fresh process over one epoch, or its first `n` steps. VmHWM begins anew with each program, while
# getrusage's maximum would be that of the tests' own process.
CHILD = """
import sys
from itertools import islice
from pathlib import Path
from nanochat_ray.corpus.reader import scan_data
from nanochat_ray.messages import Cursor
from nanochat_ray.stages.rows import CorpusRows, plain_row_blocks
from nanochat_ray.text.packing import step_batches

folder, tokenizer, packing, n = sys.argv[1:]
rows = CorpusRows(scan_data(folder), Path(tokenizer), 256, seed=1, epochs=1, packing=packing)
steps = 0
for batch in islice(step_batches(plain_row_blocks(rows, Cursor()), 64), int(n) or None):
    steps += 1
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(steps, 1024 * int(peak.split()[1]))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A data set, one with ten times as many shards of the same size, and a tokenizer."""
    root = tmp_path_factory.mktemp("memory")
    texts = [" ".join(sentences(60)[k % 60 :]) for k in range(400)]  # 0.6 MB
    for folder, n in (("small", SHARDS), ("large", SHARDS * TIMES)):
        (root / folder).mkdir()
        for k in range(n + 1):
            own = [f"{k} {text}" for text in texts]
            pq.write_table(pa.table({"text": own}), root / folder / f"{k:03d}.parquet", row_group_size=100)
    Tokenizer.train(iter(texts[:100]), 600).save(root / "tokenizer")
    return root / "small", root / "large", root / "tokenizer"


def run(folder: Path, tokenizer: Path, packing: str, n_steps: int = 0) -> tuple[int, int]:
    command = [sys.executable, "-c", CHILD, str(folder), str(tokenizer), packing, str(n_steps)]
    steps, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return int(steps), int(peak)


@pytest.mark.skipif(not STATUS.exists(), reason="needs /proc for the peak of a process' memory")
@pytest.mark.parametrize("packing", ["best-fit", "stream"])
def test_ten_times_the_data_takes_the_same_memory(folders: tuple[Path, Path, Path], packing: str) -> None:
    small, large, tokenizer = folders
    steps, peak = run(small, tokenizer, packing)
    assert run(large, tokenizer, packing, steps)[1] < peak + SLACK_BYTES
    all_steps, peak_of_all = run(large, tokenizer, packing)
    assert all_steps > 9 * steps
    assert peak_of_all < peak + SLACK_BYTES
