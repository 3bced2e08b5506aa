"""What the whole suite shares: quiet threads, the jobs folder on the path, a tiny data set, one Ray cluster."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NANOCHAT_RAY_OFFLINE", "1")
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"
os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.pop("RAY_ADDRESS", None)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background jobs, and all they start, ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

JOBS = Path(__file__).parent.parent / "jobs"
sys.path.insert(0, str(JOBS))

WORDS = (
    "the river runs past a small town where seven bakers count bread and ask each other why the moon is so round "
    "while an old ferry waits for nobody in particular and the children learn to spell lantern harbour and window"
).split()


def sentences(n: int, length: int = 12) -> list[str]:
    """Different small documents, the same ones every time."""
    lengths = [3 + (k * 5) % length for k in range(n)]
    return [" ".join(WORDS[(k * 7 + j * (1 + k % 5)) % len(WORDS)] for j in range(lengths[k])) for k in range(n)]


def write_shards(folder: Path, shards: int = 3, documents: int = 96, row_group: int = 32) -> Path:
    """Parquet shards with a text column; the last one is for validation."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = sentences(shards * documents)
    for k in range(shards):
        table = pa.table({"text": texts[k * documents : (k + 1) * documents]})
        pq.write_table(table, folder / f"shard_{k:05d}.parquet", row_group_size=row_group)
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def ray_cluster():
    """One small cluster for the session, with more logical CPUs than this machine may have."""
    import ray

    ray.init(
        address="local", num_cpus=4, include_dashboard=False, object_store_memory=200_000_000, log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Callable[[str], str]]:
    """A local S3 with the empty bucket `bucket`; gives path within it -> URI, also good in a child process."""
    from moto.server import ThreadedMotoServer
    from pyarrow import fs

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line for every request
    keys = {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in keys.items():
            patch.setenv(name, value)
        query = f"endpoint_override={host}:{port}&scheme=http"
        fs.FileSystem.from_uri(f"s3://bucket?{query}&allow_bucket_creation=true")[0].create_dir("bucket")
        yield lambda path: f"s3://bucket/{path}?{query}"
    server.stop()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The sandbox's tests come first: they count this process' descriptors and children, which a cluster changes."""
    items.sort(key=lambda item: "tests/sandbox/" not in item.nodeid)
