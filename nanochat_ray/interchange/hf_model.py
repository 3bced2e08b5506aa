"""Any causal language model of Transformers, loaded to be evaluated: from a local folder or the hub."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_ray.interchange.hf_export import MODEL_TYPE
from nanochat_ray.interchange.hf_extra import needed
from nanochat_ray.interchange.hf_text import HFTokenizer
from nanochat_ray.model.checkpoint import file_hash

DEFAULT_SEQUENCE_LEN = 1024  # nanochat's, for models of others
MAX_LOGITS = 2**27  # alive at a time: 512 MiB of fp32
HASHED = (".safetensors", ".json", ".py", ".jinja", ".model", ".txt")


@dataclass(frozen=True)
class HFSource:
    """Where a model is, pinned: plain values that cross to other processes."""

    path: str  # local folder, or hub id
    revision: str | None  # commit on the hub
    sha256: str | None  # of a local folder's files
    trust_remote_code: bool = False

    @property
    def name(self) -> str:
        return Path(self.path).name if self.revision is None else self.path

    def slug(self, asked: Mapping[str, Any]) -> str:
        """The name as a folder's, with a mark of what is asked: models of one name, and other settings, lie apart."""
        mark = hashlib.sha256(json.dumps([self.identity(), asked], sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.name.replace('/', '-').lstrip('.') or 'model'}-{mark}"

    def identity(self) -> dict[str, Any]:
        """What decides a result; where a local folder lies does not."""
        return {"name": self.name, "revision": self.revision, "sha256": self.sha256}


def find_source(path: str, trust_remote_code: bool = False) -> HFSource:
    """Look for a model: a folder with config.json, else a hub id, whose present commit is pinned.

    FileNotFoundError if it is neither, or the hub cannot be reached and the model is not in its cache.
    """
    needed("transformers", "huggingface_hub")
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} holds no model of Transformers: it has no config.json")
        return HFSource(str(folder.absolute()), None, folder_hash(folder), trust_remote_code)
    from huggingface_hub import hf_hub_download

    try:
        config = Path(hf_hub_download(path, "config.json"))
    except Exception as error:  # the library's errors have many roots
        raise FileNotFoundError(
            f"no model {path!r}: not a local folder, and not had from the hub ({type(error).__name__}: "
            f"{first_line(error)})"
        ) from error
    return HFSource(path, config.parent.name, None, trust_remote_code)


def folder_hash(folder: Path) -> str:
    """SHA-256 over names and contents of the files that make a model."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix in HASHED)
    return hashlib.sha256(json.dumps([[file.name, file_hash(file)] for file in files]).encode()).hexdigest()


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@dataclass(frozen=True)
class Lengths:
    """Token counts that a model's configuration gives."""

    sequence_len: int  # of rows for bits per byte
    max_len: int | None  # positions that there are; None: no limit is known


def lengths_of(config: Any) -> Lengths:
    """Rows have the context of training in our own models, else what nanochat takes, if there are so many positions."""
    limit = getattr(config, "max_position_embeddings", None)
    max_len = int(limit) if isinstance(limit, int) and limit > 0 else None
    if getattr(config, "model_type", None) == MODEL_TYPE:
        return Lengths(int(config.sequence_len), max_len)
    return Lengths(min(max_len or DEFAULT_SEQUENCE_LEN, DEFAULT_SEQUENCE_LEN), max_len)


def read_lengths(source: HFSource) -> Lengths:
    """The same before the weights are loaded. ValueError in one line for a configuration that cannot be had."""
    needed("transformers")
    from transformers import AutoConfig

    with one_line_errors(source):
        return lengths_of(
            AutoConfig.from_pretrained(
                source.path, revision=source.revision, trust_remote_code=source.trust_remote_code
            )
        )


class HFModel:
    """A loaded network: logits, and losses in the form that the metrics take."""

    def __init__(self, network: Any, device: str) -> None:
        self.network, self.device = network.to(device).eval(), torch.device(device)
        self.compute_dtype = network.dtype
        self.lengths = lengths_of(network.config)
        head = network.get_output_embeddings()
        self.vocab_size = int(network.config.vocab_size if head is None else head.weight.size(0))  # of its logits

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """Logits (B, T, V) of ids (B, T); rows may be filled up on the right with any id."""
        return self.network(input_ids=ids.long().to(self.device), use_cache=False).logits

    @torch.inference_mode()
    def __call__(self, idx: Tensor, targets: Tensor, reduction: str = "none") -> Tensor:
        """Loss in nats (B, T) fp32 at each target, 0 where it is -1."""
        assert reduction == "none"
        T, losses = idx.size(1), []
        for rows in range(0, idx.size(0), size := max(1, MAX_LOGITS // (T * self.vocab_size))):
            wanted = targets[rows : rows + size]
            logits = self.logits(idx[rows : rows + size]).flatten(0, 1).float()
            losses.append(F.cross_entropy(logits, wanted.flatten(), ignore_index=-1, reduction="none").view_as(wanted))
        return torch.cat(losses)


def load(source: HFSource, device: str, dtype: torch.dtype) -> tuple[HFModel, HFTokenizer]:
    """The model and its tokenizer. Weights are read from safetensors only.

    ValueError in one line for what Transformers cannot load, and naming tensors without a place, or missing ones.
    """
    needed("transformers")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    how = {"revision": source.revision, "trust_remote_code": source.trust_remote_code}
    with one_line_errors(source):
        network, info = AutoModelForCausalLM.from_pretrained(
            source.path, dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True,
            **how,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(source.path, **how)
    kinds = {"missing": "missing_keys", "of another shape": "mismatched_keys", "without a place": "unexpected_keys"}
    wrong = [f"{kind}: {', '.join(sorted(map(str, info[key]))[:5])}" for kind, key in kinds.items() if info[key]]
    if wrong:
        raise ValueError(f"{source.path}: its weights do not fit its network; {'; '.join(wrong)}")
    return HFModel(network, device), HFTokenizer(tokenizer, source.name)


@contextlib.contextmanager
def one_line_errors(source: HFSource) -> Iterator[None]:
    """What Transformers raises, as a ValueError of one line that names the model."""
    try:
        yield
    except Exception as error:  # of many kinds, of other libraries too: a cut file is a SafetensorError
        hint = "; its code runs with --trust-remote-code" if "trust_remote_code" in str(error) else ""
        raise ValueError(f"{source.path} cannot be loaded: {first_line(error)}{hint}") from error
