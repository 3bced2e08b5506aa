"""Where a stage's numbers go while it runs: always metrics.jsonl, and Weights & Biases if the person named a run."""

from __future__ import annotations

import netrc
import os
import secrets
import socket
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from nanochat_ray.report.metrics_log import MetricsLog
from nanochat_ray.report.records import plain
from nanochat_ray.run_dir import METRICS_FILE, write_atomic

NO_WANDB = "dummy"
WANDB_ID_FILE = "wandb_id"
CONNECT_TIMEOUT_S = 3.0
INIT_TIMEOUT_S = 30.0


class Tracker:
    """Records (step, metrics) of one stage; for rank 0 only.

    A stage is one wandb run, whose id lies in the stage's folder, so that a restart continues it. Without network or
    key wandb writes offline files below the folder (`wandb sync` uploads them); WANDB_MODE and the other variables of
    wandb are obeyed. A failure here warns once and never stops training.
    """

    def __init__(
        self,
        folder: Path,
        run: str = NO_WANDB,
        config: Mapping[str, Any] | None = None,
        project: str | None = None,
    ):
        self._folder = folder
        self._log: MetricsLog | None = None
        self._wandb: Any = None
        self._warned: set[str] = set()
        try:
            self._log = MetricsLog(folder / METRICS_FILE)
        except OSError as error:
            self._warn_once("file", f"no {METRICS_FILE}: {error}")
        if run != NO_WANDB:
            try:
                self._wandb = _start_wandb(folder, run, project or _project(folder), plain(config or {}))
            except Exception as error:  # wandb raises many kinds, and none of them may end a training run
                self._warn_once("wandb", f"wandb is off: {error}")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record numbers (or plain JSON values) of one step, by their tracker names (`train/loss`, `val/bpb`, ...)."""
        record = {"step": step, "time": round(time.time(), 3), **plain(metrics)}
        if self._log is not None:
            try:
                self._log.append(record)
            except OSError as error:
                self._warn_once("file", f"{METRICS_FILE} has gaps, it could not be written: {error}")
        if self._wandb is not None:
            try:
                self._wandb.log({"step": step, **plain(metrics)})
            except Exception as error:
                self._warn_once("wandb", f"wandb is off from step {step} on: {error}")
                self._wandb = None

    def finish(self) -> None:
        """Close the files and the wandb run; nothing may be logged afterwards."""
        if self._log is not None:
            self._log.close()
            self._log = None
        if self._wandb is not None:
            try:
                self._wandb.finish()
            except Exception as error:
                self._warn_once("finish", f"wandb did not finish: {error}")
            self._wandb = None

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(message, RuntimeWarning, stacklevel=3)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.finish()


def _project(folder: Path) -> str:
    """nanochat's project names: pretraining in `nanochat`, the other stages in `nanochat-<stage>`."""
    return "nanochat" if folder.name == "pretrain" else f"nanochat-{folder.name}"


def _start_wandb(folder: Path, run: str, project: str, config: dict[str, Any]) -> Any:
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    id_file = folder / WANDB_ID_FILE
    run_id = id_file.read_text().strip() if id_file.exists() else ""
    if not run_id:
        run_id = secrets.token_hex(6)
        write_atomic(id_file, run_id + "\n")
    mode: Literal["offline"] | None = None if os.environ.get("WANDB_MODE") or _can_reach_wandb() else "offline"
    handle = wandb.init(
        project=project,
        name=run,
        id=run_id,
        resume="allow",
        dir=folder,
        config=config,
        mode=mode,
        settings=wandb.Settings(console="off", init_timeout=INIT_TIMEOUT_S),
    )
    handle.define_metric("step")
    handle.define_metric("*", step_metric="step")  # after a restart the steps go back; wandb's own counter may not
    return handle


def _can_reach_wandb() -> bool:
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
