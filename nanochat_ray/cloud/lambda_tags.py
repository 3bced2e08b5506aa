"""Ray's tags on a Lambda instance: those of the launch on the instance, later changes in a file of the provider's.

The API takes tags at launch only (POST /instances/{id} changes the name alone), keys of a narrow alphabet and short
values. A tag that does not fit travels as numbered pieces of text, so nothing is lost.
"""

from __future__ import annotations

import base64
import json
import logging
import re
import threading
from collections.abc import Collection, Iterable, Mapping
from hashlib import sha256
from pathlib import Path

from nanochat_ray.run_dir import locked, read_json, write_json

logger = logging.getLogger(__name__)
KEY_PATTERN = re.compile(r"[a-z][a-z0-9\-:]+")
KEY_LENGTH, VALUE_LENGTH = 55, 128
OURS = "nr:"  # keys of this project begin so; a tag of Ray's that does is encoded like one that does not fit
PIECE = re.compile(r"nr:tag-(\d+):(\d+)")


def encode(tags: Mapping[str, str]) -> list[dict[str, str]]:
    """Ray's tags as the API takes them. `decode` gives them back."""
    entries, long = [], []
    for key, value in tags.items():
        fits = KEY_PATTERN.fullmatch(key) and len(key) <= KEY_LENGTH and len(value) <= VALUE_LENGTH and value.isascii()
        if fits and value.isprintable() and not key.startswith(OURS):
            entries.append({"key": key, "value": value})
        else:
            long.append((key, value))
    for n, pair in enumerate(long):
        text = base64.urlsafe_b64encode(json.dumps(pair).encode()).decode()
        for k in range(0, len(text), VALUE_LENGTH):
            entries.append({"key": f"{OURS}tag-{n}:{k // VALUE_LENGTH}", "value": text[k : k + VALUE_LENGTH]})
    return entries


def decode(tags: Mapping[str, str]) -> dict[str, str]:
    """Ray's tags of an instance. Tags that somebody else put there come along; what is not whole is left out."""
    found = {key: value for key, value in tags.items() if not key.startswith(OURS)}
    pieces: dict[int, dict[int, str]] = {}
    for key, value in tags.items():
        if match := PIECE.fullmatch(key):
            pieces.setdefault(int(match[1]), {})[int(match[2])] = value
    for parts in pieces.values():
        try:
            name, value = json.loads(base64.urlsafe_b64decode("".join(parts[k] for k in range(len(parts)))))
            found[name] = value
        except (KeyError, ValueError, TypeError):
            logger.warning("a tag in %d pieces cannot be read", len(parts))
    return found


class LaterTags:
    """The tags that Ray set after the launch, by instance: a file for each cluster, which outlives the process."""

    def __init__(self, folder: Path, cluster_name: str) -> None:
        self._path = folder / f"tags-{sha256(cluster_name.encode()).hexdigest()[:16]}.json"
        self._lock = threading.Lock()
        self._known: dict[str, dict[str, str]] = {}
        self._complained = False
        with self._lock:
            self._known = self._read()

    def of(self, instance_id: str) -> dict[str, str]:
        with self._lock:
            return dict(self._known.get(instance_id, {}))

    def set(self, instance_id: str, tags: Mapping[str, str], others: Collection[str]) -> None:
        """Change tags of one instance. Those of instances that are neither it nor among `others` are forgotten."""
        with self._lock:
            self._known.setdefault(instance_id, {}).update(tags)
            self._write(instance_id, {*others, instance_id})

    def _write(self, instance_id: str, keep: Collection[str]) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with locked(self._path.with_suffix(".lock"), wait_s=30.0):
                merged = {**self._known, **self._read(), instance_id: self._known[instance_id]}
                self._known = {name: merged[name] for name in self._in_order(merged, keep)}
                write_json(self._path, self._known)
        except (OSError, TimeoutError) as trouble:  # this process still knows them: the worst is a setup done twice
            if not self._complained:
                logger.warning("tags of instances cannot be kept in %s: %s", self._path, trouble)
            self._complained = True

    @staticmethod
    def _in_order(names: Iterable[str], keep: Collection[str]) -> list[str]:
        return sorted(name for name in names if name in keep)

    def _read(self) -> dict[str, dict[str, str]]:
        try:
            content = read_json(self._path)
            return {str(name): {str(k): str(v) for k, v in tags.items()} for name, tags in content.items()}
        except (OSError, ValueError, AttributeError):
            return {}
