"""The server's numbers as Ray's metrics, from where Prometheus and Ray's dashboard read them."""

from __future__ import annotations

import time
import warnings
from typing import Any

from ray.serve.metrics import Counter, Gauge, Histogram

from nanochat_ray.serve.loop import EngineLoop

PREFIX = "nanochat_serve_"  # Ray exports it as ray_nanochat_serve_...
TAGS = ("model",)
FIRST_TOKEN_BOUNDS_S = [0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5.0, 10.0, 30.0, 60.0]
BETWEEN_TOKENS_BOUNDS_S = [0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 2.5]
GAUGES = {
    "queue": ("waiting", "streams that wait for a row"),
    "running": ("running", "streams that are decoded"),
}
COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "tokens of prompts"),
    "cached_tokens": ("cached_tokens", "tokens of prompts that were found in the prefix cache"),
    "sampled_tokens": ("sampled_tokens", "tokens that were sampled"),
    "preemptions": ("preemptions", "streams that gave their memory to older ones and were computed again"),
    "finished": ("finished", "requests that came to their end"),
    "cancellations": ("cancelled", "requests whose reader left"),
    "rejected": ("rejected", "requests refused because the queue was full"),
}


class ServeMetrics:
    """Exports an EngineLoop's numbers; call `export` about once a second. A failure warns once and switches it off."""

    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop
        self._before: dict[str, dict[str, Any]] = {}
        self._at_s = time.monotonic()
        self._off = False
        self._gauges = {name: Gauge(PREFIX + name, text, tag_keys=TAGS) for name, (_, text) in GAUGES.items()}
        self._counters = {name: Counter(PREFIX + name, text, tag_keys=TAGS) for name, (_, text) in COUNTERS.items()}
        self._kv = Gauge(PREFIX + "kv_used_frac", "share of the key-value blocks in use", tag_keys=TAGS)
        self._hits = Gauge(PREFIX + "cache_hit_frac", "share of the latest prompts found in the cache", tag_keys=TAGS)
        self._speed = Gauge(PREFIX + "tokens_per_s", "tokens sampled per second of late", tag_keys=TAGS)
        self._first = Histogram(
            PREFIX + "ttft_s", "seconds from a request to its first token", FIRST_TOKEN_BOUNDS_S, tag_keys=TAGS
        )
        self._between = Histogram(
            PREFIX + "inter_token_s", "seconds between two tokens of a request, mean over one chunk",
            BETWEEN_TOKENS_BOUNDS_S, tag_keys=TAGS,
        )  # fmt: skip

    def export(self) -> None:
        """Set gauges, add what has happened since the last call to counters and distributions."""
        if self._off:
            return
        try:
            self._export()
        except Exception as error:  # a metrics back-end of any kind may not end a server
            self._off = True
            warnings.warn(f"Ray's metrics are off: {error}", RuntimeWarning, stacklevel=2)

    def _export(self) -> None:
        now = time.monotonic()
        for model, stats in self._loop.stats()["models"].items():
            tags, before = {"model": model}, self._before.get(model, {})
            for name, (key, _) in GAUGES.items():
                self._gauges[name].set(stats[key], tags)
            new = {key: stats[key] - before.get(key, 0) for key, _ in COUNTERS.values()}
            for name, (key, _) in COUNTERS.items():
                if new[key] > 0:
                    self._counters[name].inc(new[key], tags)
            self._kv.set(stats["blocks_used"] / max(stats["blocks_total"], 1), tags)
            self._speed.set(new["sampled_tokens"] / max(now - self._at_s, 1e-3), tags)
            if new["prompt_tokens"]:
                self._hits.set(new["cached_tokens"] / new["prompt_tokens"], tags)
            self._before[model] = stats
        self._at_s = now
        times = self._loop.take_times()
        for model, seconds in times.first_token_s:
            self._first.observe(seconds, {"model": model})
        for model, seconds in times.between_tokens_s:
            self._between.observe(seconds, {"model": model})
