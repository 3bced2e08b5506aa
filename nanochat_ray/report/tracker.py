"""Where a stage's numbers go while it runs: always metrics.jsonl, and Weights & Biases if the person named a run."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanochat_ray.report.metrics_log import MetricsLog
from nanochat_ray.report.records import plain
from nanochat_ray.report.uploader import Uploader
from nanochat_ray.run_dir import METRICS_FILE

NO_WANDB = "dummy"
CHECK_INTERVAL_S = 5.0


class Tracker:
    """Records (step, metrics) of one stage; for rank 0 only.

    A stage is one wandb run over all its starts. Another process uploads what the file says (uploader.py); without
    network or key it writes offline files below the folder (`wandb sync` uploads them). WANDB_MODE and the other
    variables of wandb are obeyed. A failure here warns once and never stops training.
    """

    def __init__(
        self,
        folder: Path,
        run: str = NO_WANDB,
        config: Mapping[str, Any] | None = None,
        project: str | None = None,
    ):
        self._log: MetricsLog | None = None
        self._uploader: Uploader | None = None
        self._warned: set[str] = set()
        self._checked_s = time.monotonic()
        try:
            self._log = MetricsLog(folder / METRICS_FILE)
            if self._log.goes_on:  # the report counts the starts of a stage by these
                self._log.append({"event": "start", "time": round(time.time(), 3)})
        except OSError as error:
            self._warn_once("file", f"no {METRICS_FILE}: {error}")
        if run != NO_WANDB:
            try:
                self._uploader = Uploader(folder, run, project or project_of(folder), plain(config or {}))
            except OSError as error:
                self._warn_once("wandb", f"wandb is off: {error}")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record numbers (or plain JSON values) of one step, by their tracker names (`train/loss`, `val/bpb`, ...)."""
        if self._log is not None:
            try:
                self._log.append({"step": step, "time": round(time.time(), 3), **metrics})
            except OSError as error:
                self._warn_once("file", f"{METRICS_FILE} has gaps, it could not be written: {error}")
        if self._uploader is not None and time.monotonic() - self._checked_s > CHECK_INTERVAL_S:
            self._checked_s = time.monotonic()
            if problem := self._uploader.problem():
                self._warn_once("wandb", f"wandb is off: {problem}")

    def finish(self) -> None:
        """Close the file and, within a bounded time, the wandb run; nothing may be logged afterwards."""
        if self._log is not None:
            self._log.close()
            self._log = None
        if self._uploader is not None:
            if problem := self._uploader.finish():
                self._warn_once("wandb", f"wandb did not finish: {problem}")
            self._uploader = None

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(message, RuntimeWarning, stacklevel=3)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.finish()


def project_of(folder: Path) -> str:
    """nanochat's project names: pretraining in `nanochat`, the other stages in `nanochat-<stage>`."""
    return "nanochat" if folder.name == "pretrain" else f"nanochat-{folder.name}"
