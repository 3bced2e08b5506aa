"""A process of its own that sends a stage's records to Weights & Biases as they are written.

It reads what the stage, and a job that watches it, append to their files, so neither a slow nor a dead server can hold
training up. Its orders come as one line of JSON on standard input; when that is closed, by a stage that ended or was
killed, it sends what is left and ends within FINISH_TIMEOUT_S.

`<stage>/wandb.json` keeps the run's id and how far each series was sent. A restarted stage repeats steps; those that
were sent once are not sent again, so the run has one point for each step and its own counter only grows. The file is
written before the rows are sent: whatever kills this process leaves a gap rather than points that stand twice.
"""

from __future__ import annotations

import fcntl
import json
import netrc
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from nanochat_ray.remote import Every, Remote
from nanochat_ray.report.metrics_log import WATCH_FILE, LineReader, series_of
from nanochat_ray.run_dir import METRICS_FILE, read_json, write_json

STATE_FILE = "wandb.json"
LOG_FILE = "wandb.log"
LOCK_FILE = "wandb.lock"
POLL_S = 1.0
CONNECT_TIMEOUT_S = 3.0
INIT_TIMEOUT_S = 30.0
FINISH_TIMEOUT_S = 30.0
STORE_EVERY_S = 15.0
Mode = Literal["offline"] | None  # None: as wandb's own variables say


class Uploader:
    """The stage's side of the uploading process. Nothing here waits for it, except `finish`."""

    def __init__(self, folder: Path, run: str, project: str, config: Mapping[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        package = Path(__file__).parent.parent.parent
        paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.log_file = folder / LOG_FILE
        with open(self.log_file, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "nanochat_ray.report.uploader"],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
            )
        orders = {"folder": str(folder.absolute()), "run": run, "project": project, "config": config}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(orders).encode() + b"\n")
        self._process.stdin.flush()

    def problem(self) -> str | None:
        """Why the process has ended, None while it runs."""
        code = self._process.poll()
        return None if code is None else f"its process ended with code {code}, see {self.log_file}"

    def finish(self) -> str | None:
        """Let it send what is left, for FINISH_TIMEOUT_S; returns what went wrong."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(FINISH_TIMEOUT_S + 5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        return self.problem() if self._process.returncode else None


@dataclass
class Sent:
    """How far a stage's records were sent, over all its starts."""

    id: str = field(default_factory=lambda: secrets.token_hex(6))
    rows: int = 0  # wandb's own step counter
    bytes: dict[str, int] = field(default_factory=dict)  # read of each file
    steps: dict[str, int] = field(default_factory=dict)  # the last one of each series

    @staticmethod
    def load(path: Path) -> Sent:
        return Sent(**read_json(path)) if path.exists() else Sent()

    def take(self, file: str, record: Mapping[str, Any]) -> dict[str, Any] | None:
        """The record as a row to send; None if its step was sent before, or it has none."""
        step = record.get("step")
        series = f"{file}:{series_of(record)}"
        if not isinstance(step, int) or step <= self.steps.get(series, -1):
            return None
        self.steps[series] = step
        return {name: value for name, value in record.items() if name != "time" and value is not None}


class Sender:
    """Reads a stage's files and logs what is new to a wandb run."""

    def __init__(self, folder: Path, sent: Sent, run: Any):
        self.path, self.sent, self.run = folder / STATE_FILE, sent, run
        self.readers = {
            name: LineReader(folder / name, sent.bytes.get(name, 0)) for name in (METRICS_FILE, WATCH_FILE)
        }

    def send_news(self) -> bool:
        """Send a chunk of what was written since the last time; False if there was nothing."""
        rows = []
        before = dict(self.sent.bytes)
        for name, reader in self.readers.items():
            rows += [row for record in reader.read() if (row := self.sent.take(name, record)) is not None]
            self.sent.bytes[name] = reader.position
        if self.sent.bytes == before:
            return False
        first = max(self.sent.rows, self.run.step)
        self.sent.rows = first + len(rows)
        write_json(self.path, asdict(self.sent))
        for number, row in enumerate(rows, first):
            self.run.log(row, step=number, commit=True)
        return True


def main() -> None:
    """Follow the orders on standard input until it is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the stage, whose end is heard of anyway
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()
    orders = json.loads(sys.stdin.readline())
    folder = Path(orders["folder"])
    ended = threading.Event()
    threading.Thread(target=wait_for_end, args=(parent, ended), daemon=True).start()
    with only_one(folder / LOCK_FILE):
        sent = Sent.load(folder / STATE_FILE)
        write_json(folder / STATE_FILE, asdict(sent))
        store(folder)
        run = start_run(folder, orders["run"], orders["project"], orders["config"], sent.id)
        sender = Sender(folder, sent, run)
        with Every(STORE_EVERY_S, lambda: store(folder), "store-wandb"):
            while not ended.is_set():
                sender.send_news()
                ended.wait(POLL_S)
            while sender.send_news():
                continue
        run.finish()
        store(folder)


def store(folder: Path) -> None:
    """For a run in object storage: what was sent is known on other machines too."""
    if (remote := Remote.of(folder)) is not None:
        with suppress(OSError):
            remote.push(folder / STATE_FILE)


def wait_for_end(parent: int, ended: threading.Event) -> None:
    """Set `ended` when standard input is closed or the parent is gone; then leave this process FINISH_TIMEOUT_S."""
    reader = threading.Thread(target=sys.stdin.read, daemon=True)
    reader.start()
    while reader.is_alive() and os.getppid() == parent:
        reader.join(POLL_S)
    ended.set()
    time.sleep(FINISH_TIMEOUT_S)
    print(f"wandb did not finish in {FINISH_TIMEOUT_S:.0f} s; `wandb sync` uploads what is left", flush=True)
    os._exit(1)


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Wait until no other uploader works on this stage, such as that of a stage which was killed a second ago."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def start_run(folder: Path, name: str, project: str, config: dict[str, Any], run_id: str) -> Any:
    """The wandb run with this id, begun or continued; offline where no server can be had."""
    mode: Mode = None if os.environ.get("WANDB_MODE") or can_reach_wandb() else "offline"
    try:
        return init_run(folder, name, project, config, run_id, mode)
    except Exception as error:  # of many kinds: a refused key, a server that answers and then does not
        if mode == "offline":
            raise
        print(f"wandb goes on offline: {error}", flush=True)
        return init_run(folder, name, project, config, run_id, "offline")


def init_run(folder: Path, name: str, project: str, config: dict[str, Any], run_id: str, mode: Mode) -> Any:
    import wandb

    run = wandb.init(
        project=project, name=name, id=run_id, resume="allow", dir=folder, config=config, mode=mode,
        settings=wandb.Settings(console="off", init_timeout=INIT_TIMEOUT_S),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")  # evaluations of a watching job come later than their step
    return run


def can_reach_wandb() -> bool:
    """Whether there is a key, and a server that answers; asked first, because wandb itself waits for minutes."""
    url = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")
    host = url.hostname or ""
    try:
        if not os.environ.get("WANDB_API_KEY") and netrc.netrc().authenticators(host) is None:
            return False
        if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy")):
            return True  # the way out is the proxy's business
        with socket.create_connection((host, url.port or 443), timeout=CONNECT_TIMEOUT_S):
            return True
    except (OSError, netrc.NetrcParseError):
        return False


if __name__ == "__main__":
    main()
