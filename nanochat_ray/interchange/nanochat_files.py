"""Where nanochat keeps its files, and finding them in a folder.

```
<base>/tokenizer/tokenizer.pkl  token_bytes.pt
<base>/base_checkpoints/<tag>/model_000500.pt  meta_000500.json   (chatsft_checkpoints, chatrl_checkpoints alike)
```
A folder with the files of one model is taken too, as models are passed around: then somebody has to say which of base,
sft and rl it is, unless its parent's name does.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_ray.interchange.nanochat_tokenizer import PICKLE_FILE, TOKEN_BYTES_FILE

FOLDER_OF_SOURCE = {"base": "base_checkpoints", "sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints"}
MID_FOLDER = "mid_checkpoints"  # of a stage that nanochat had in 2025, between base and SFT
TOKENIZER_FOLDER = "tokenizer"
MAX_META_BYTES = 16 << 20
MAX_META_DEPTH = 50
_MODEL_FILE = re.compile(r"model_(\d{1,18})\.pt")
_DEPTH_TAG = re.compile(r"d(\d+)")


@dataclass(frozen=True)
class Found:
    """One model's files."""

    source: str
    tag: str
    step: int
    model: Path
    meta: Path

    def read_meta(self) -> dict[str, Any]:
        """What the meta file says. FileNotFoundError without one, ValueError if it cannot be used."""
        if not self.meta.is_file():
            raise FileNotFoundError(f"no {self.meta}, which says how large the network of {self.model.name} is")
        if self.meta.stat().st_size > MAX_META_BYTES:
            raise ValueError(f"{self.meta}: {self.meta.stat().st_size:,} bytes are more than a meta file has")
        try:
            meta = json.loads(self.meta.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.meta} is not JSON: {error}") from None
        if _is_deeper(meta, MAX_META_DEPTH):
            raise ValueError(f"{self.meta} is nested deeper than {MAX_META_DEPTH} levels")
        if not isinstance(meta, dict) or not isinstance(meta.get("model_config"), dict):
            raise ValueError(f"{self.meta} has no model_config, so the network's size is unknown")
        return meta


def model_file(step: int) -> str:
    return f"model_{step:06d}.pt"


def meta_file(step: int) -> str:
    return f"meta_{step:06d}.json"


def find_models(folder: Path, sources: tuple[str, ...] | None, tag: str | None, step: int | None) -> list[Found]:
    """The models in a folder, in the order base, sft, rl; of all sources that are there if `sources` is None.

    FileNotFoundError if one that was named, or any at all, is not there. ValueError for a folder of one model whose
    source nobody says.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    if _steps(folder):
        return [_in_flat_folder(folder, sources, tag, step)]
    wanted = [source for source in FOLDER_OF_SOURCE if sources is None or source in sources]
    chosen = _largest_tag([folder / FOLDER_OF_SOURCE[source] for source in wanted]) if tag is None else tag
    found, missing = [], []
    for source in wanted:
        place = folder / FOLDER_OF_SOURCE[source] / (chosen or "<tag>")
        if place.is_dir() and (model := _pick(place, source, step)) is not None:
            found.append(model)
        else:
            missing.append(f"{source} ({place})")
    if not found or (sources is not None and missing):
        at = "" if step is None else f" of step {step}"
        raise FileNotFoundError(f"no model_*.pt{at} of {', '.join(missing)}")
    return found


def find_tokenizer(folder: Path, named: Path | None) -> Path:
    """The `tokenizer.pkl` of a folder: as named, else in it, in its `tokenizer`, or in its base folder's."""
    if named is not None:
        path = named / PICKLE_FILE if named.is_dir() else named
        if not path.is_file():
            raise FileNotFoundError(f"no {path}")
        return path
    places = [folder, folder / TOKENIZER_FOLDER, folder.parent.parent / TOKENIZER_FOLDER]
    for place in places:
        if (place / PICKLE_FILE).is_file():
            return place / PICKLE_FILE
    looked = ", ".join(str(place) for place in places)
    raise FileNotFoundError(f"no {PICKLE_FILE} in any of {looked}; say with --tokenizer where it is")


def token_bytes_beside(tokenizer: Path) -> Path | None:
    """The `token_bytes.pt` beside a `tokenizer.pkl`, if it is there."""
    path = tokenizer.with_name(TOKEN_BYTES_FILE)
    return path if path.is_file() else None


def _in_flat_folder(folder: Path, sources: tuple[str, ...] | None, tag: str | None, step: int | None) -> Found:
    by_parent = {name: source for source, name in FOLDER_OF_SOURCE.items()}
    source = by_parent.get(folder.resolve().parent.name)
    if sources is not None:
        if len(sources) != 1 or source not in (None, sources[0]):
            of = f", and its parent's name says {source}" if source else ""
            raise ValueError(f"{folder} holds the files of one model{of}; --sources {' '.join(sources)} cannot be it")
        source = sources[0]
    if source is None:
        raise ValueError(f"{folder} holds the files of one model; say with --sources base, sft or rl which it is")
    found = _pick(folder, source, step)
    if found is None:
        raise FileNotFoundError(f"no {model_file(step or 0)} in {folder}; there are steps {_steps(folder)}")
    return found if tag is None else Found(source, tag, found.step, found.model, found.meta)


def _pick(folder: Path, source: str, step: int | None) -> Found | None:
    """The model of a step, or of the largest there is."""
    steps = _steps(folder)
    chosen = step if step is not None else max(steps, default=-1)
    if chosen not in steps:
        return None
    model = folder / steps[chosen]
    meta = model.with_name(model.name.replace("model_", "meta_").replace(".pt", ".json"))
    return Found(source, folder.resolve().name, chosen, model, meta)


def _steps(folder: Path) -> dict[int, str]:
    """The steps that have a model file, and its name. Compared as numbers: names do not sort beyond six digits.

    ValueError for two files of one step.
    """
    found: dict[int, str] = {}
    for path in sorted(folder.iterdir()):
        if (match := _MODEL_FILE.fullmatch(path.name)) and path.is_file():
            before = found.setdefault(int(match[1]), path.name)
            if before != path.name:
                raise ValueError(f"{folder} has {before} and {path.name}, both of step {int(match[1])}; take one away")
    return found


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and dicts are nested deeper than so; what copies a value calls itself for each level."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(levels == 0 or _is_deeper(item, levels - 1) for item in items)


def _largest_tag(places: list[Path]) -> str | None:
    """The tag in these folders with the largest d<depth>, the latest among equals, else the latest of all."""

    def key(path: Path) -> tuple[int, float]:
        depth = _DEPTH_TAG.match(path.name)
        return (int(depth[1]) if depth else -1, path.stat().st_mtime)

    tags = [path for place in places if place.is_dir() for path in place.iterdir() if path.is_dir()]
    return max(tags, key=key).name if tags else None
