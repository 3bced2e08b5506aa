"""Byte-level BPE: trained by rustbpe, encoded by tiktoken, stored as JSON.

Token ids are the 256 bytes in order, then the merges in the order in which they were learned, then the special tokens.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import rustbpe
import tiktoken
from numpy.typing import DTypeLike

from nanochat_ray.run_dir import have_records

SPECIAL_TOKENS: tuple[str, ...] = (
    "<|bos|>",  # also stands between documents; there is no end-of-text token
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
# GPT-4's pattern, but numbers come in pieces of at most two digits (a small vocabulary has no room for 1,000 of them).
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
FILE_NAME = "tokenizer.json"
_FORMAT = "nanochat-ray-tokenizer"
_VERSION = 1
_BOS_NAMES = ("<|bos|>", "<|endoftext|>")


class Tokenizer:
    """Text to token ids and back. Made by `train`, `load` or `from_tiktoken`.

    Encoding never yields a special id: the text `<|bos|>` is seven ordinary characters. Control tokens come only from
    `encode_special`, `prepend` and `append`, so no text of a user can forge one.
    """

    def __init__(
        self,
        encoding: tiktoken.Encoding,
        ordinary: Sequence[bytes],
        special: Mapping[str, int],
        training: Mapping[str, Any] | None = None,
    ) -> None:
        self._encoding = encoding
        self._ordinary = list(ordinary)  # bytes of each ordinary token, by id
        self.special: dict[str, int] = dict(special)
        self.training: dict[str, Any] = dict(training or {})
        self.vocab_size: int = encoding.n_vocab
        self.bos_id: int = next(self.special[name] for name in _BOS_NAMES if name in self.special)

    # ---- making, saving, loading

    @classmethod
    def from_tokens(cls, ordinary: Sequence[bytes], training: Mapping[str, Any] | None = None) -> Tokenizer:
        """The tokenizer with these ordinary tokens (bytes in id order, which is merge order), special tokens behind."""
        special = {name: len(ordinary) + k for k, name in enumerate(SPECIAL_TOKENS)}
        ranks = {token: rank for rank, token in enumerate(ordinary)}
        if len(ranks) != len(ordinary) or list(ordinary[:256]) != [bytes([b]) for b in range(256)]:
            raise ValueError(f"{len(ordinary)} tokens: the first 256 must be the single bytes, and no token come twice")
        encoding = tiktoken.Encoding(
            "nanochat-ray", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )
        return cls(encoding, ordinary, special, training)

    @classmethod
    def train(
        cls, texts: Iterator[str], vocab_size: int, training: Mapping[str, Any] | None = None
    ) -> Tokenizer:
        """Learn merges from `texts`, greedily by pair count; a tie goes to the smaller pair of ids.

        `vocab_size` counts the special tokens. Too little text gives a smaller vocabulary: read `vocab_size` of the
        result. `training` is kept in the file for the record (corpus hash, caps).
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size {vocab_size} is below {MIN_VOCAB_SIZE}: 256 bytes and {len(SPECIAL_TOKENS)} special tokens"
            )
        trainer = rustbpe.Tokenizer()
        clean = (_without_lone_surrogates(text) for text in texts)
        trainer.train_from_iterator(clean, vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        ranks = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
        record = {"trainer": "rustbpe " + importlib.metadata.version("rustbpe"), **(training or {})}
        return cls.from_tokens([bytes(token) for token, _ in ranks], record)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read `tokenizer.json`, or the folder that holds it, from a run's store too. ValueError if it is damaged."""
        file = Path(path)
        file = file if file.is_file() else have_records(file) / FILE_NAME
        if not file.exists():
            raise FileNotFoundError(f"no tokenizer at {file}; train one with jobs/tok_train.py")
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            if (data["format"], data["version"]) != (_FORMAT, _VERSION):
                raise ValueError(f"format {data['format']!r} version {data['version']!r}")
            known = (data["pattern"], data["special"]) == (SPLIT_PATTERN, list(SPECIAL_TOKENS))
            tokenizer = cls.from_tokens([bytes.fromhex(token) for token in data["ordinary"]], data["training"])
        except (KeyError, TypeError, ValueError) as error:  # JSON's and UTF-8's errors are ValueErrors
            raise ValueError(f"{file} is not a tokenizer file of version {_VERSION} ({error}); train again") from error
        if not known:
            raise ValueError(f"{file} has another split pattern or other special tokens than this code; train it again")
        if data["sha256"] != tokenizer.hash:
            raise ValueError(f"{file} is damaged: tokens with hash {tokenizer.hash}, the file says {data['sha256']}")
        return tokenizer

    @classmethod
    def from_tiktoken(cls, name: str, timeout_s: float = 30.0) -> Tokenizer:
        """A published vocabulary (`gpt2`, `cl100k_base`) to compare with. tiktoken downloads it once and caches it.

        Raises ConnectionError when that fails or takes longer than `timeout_s`, ValueError for a name it does not know.
        """
        found: list[tiktoken.Encoding | Exception] = []

        def fetch() -> None:
            try:
                found.append(tiktoken.get_encoding(name))
            except Exception as error:  # handed over to the waiting thread, which raises
                found.append(error)

        thread = threading.Thread(target=fetch, daemon=True)  # tiktoken's download itself has no deadline
        thread.start()
        thread.join(timeout_s)
        encoding = found[0] if found else TimeoutError(f"no answer within {timeout_s:g} s")
        if isinstance(encoding, ValueError):
            raise encoding
        if isinstance(encoding, Exception):
            reason = type(encoding).__name__
            raise ConnectionError(f"tokenizer {name!r} could not be downloaded ({reason})") from encoding
        special = {token: encoding.encode_single_token(token) for token in encoding.special_tokens_set}
        ordinary = [b""] * min(special.values())  # cl100k_base leaves ids out
        for token in encoding.token_byte_values():
            ordinary[encoding.encode_single_token(token)] = token
        return cls(encoding, ordinary, special)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json` into `folder`, which is made if needed. A reader never sees half of it."""
        assert tuple(self.special) == SPECIAL_TOKENS, "a baseline is not saved"
        data = {
            "format": _FORMAT,
            "version": _VERSION,
            "pattern": SPLIT_PATTERN,
            "ordinary": [token.hex() for token in self._ordinary],
            "special": list(self.special),
            "vocab_size": self.vocab_size,
            "training": self.training,
            "sha256": self.hash,
        }
        file = Path(folder) / FILE_NAME
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        with open(temporary, "w", encoding="utf-8") as stream:
            json.dump(data, stream, indent=0)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of all that decides the ids: pattern, ordinary and special tokens."""
        content = [SPLIT_PATTERN, [token.hex() for token in self._ordinary], list(self.special)]
        return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()

    # ---- text to ids

    @overload
    def encode(
        self, text: str, prepend: int | str | None = None, append: int | str | None = None, num_threads: int = 8
    ) -> list[int]: ...
    @overload
    def encode(
        self, text: list[str], prepend: int | str | None = None, append: int | str | None = None, num_threads: int = 8
    ) -> list[list[int]]: ...
    def encode(
        self,
        text: str | list[str],
        prepend: int | str | None = None,
        append: int | str | None = None,
        num_threads: int = 8,
    ) -> list[int] | list[list[int]]:
        """Ids of one text, or a list of ids for a list of texts (in threads). Each half of a lone surrogate is U+FFFD.

        `prepend` and `append` put an id or a special token's name before and after each text.
        """
        before = [] if prepend is None else [self._id(prepend)]
        after = [] if append is None else [self._id(append)]
        if isinstance(text, str):
            return before + self._encoding.encode_ordinary(text) + after
        if not isinstance(text, list) or not all(isinstance(item, str) for item in text):
            raise ValueError(f"encode takes a string or a list of strings, not {type(text).__name__}")
        return [before + ids + after for ids in self._encoding.encode_ordinary_batch(text, num_threads=num_threads)]

    __call__ = encode

    def encode_to_arrays(
        self, texts: Sequence[str], dtype: DTypeLike | None = None, num_threads: int = 1
    ) -> list[np.ndarray]:
        """One array per text, BOS in front: the packer's fast path, without any Python list of ids.

        `dtype` must hold the vocabulary; default: `token_dtype(vocab_size)`.
        """
        dtype = token_dtype(self.vocab_size) if dtype is None else np.dtype(dtype)

        def document(text: str) -> np.ndarray:
            try:
                ids = self._encoding.encode_to_numpy(text, disallowed_special=())
            except UnicodeEncodeError:
                ids = self._encoding.encode_to_numpy(_without_lone_surrogates(text), disallowed_special=())
            out = np.empty(len(ids) + 1, dtype=dtype)
            out[0] = self.bos_id
            out[1:] = ids
            return out

        if num_threads == 1:
            return [document(text) for text in texts]
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(document, texts))

    def encode_special(self, name: str) -> int:
        """The id of a special token; KeyError for any other name."""
        return self.special[name]

    def _id(self, token: int | str) -> int:
        return self.special[token] if isinstance(token, str) else token

    # ---- ids to text

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids`: special ids give their names, bytes that are no UTF-8 give U+FFFD.

        KeyError for an id beyond the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Bytes of `ids`. KeyError for an id beyond the vocabulary."""
        return self._encoding.decode_bytes(ids.tolist() if isinstance(ids, np.ndarray) else ids)

    def token_bytes(self) -> np.ndarray:
        """Length in bytes of every token, 0 for the special ones: the denominator of bits per byte. (V,) int32."""
        lengths = np.zeros(self.vocab_size, dtype=np.int32)  # (V,)
        lengths[: len(self._ordinary)] = [len(token) for token in self._ordinary]
        return lengths


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def training_texts(documents: Iterator[str], max_chars: int, doc_cap: int) -> Iterator[str]:
    """What the tokenizer learns from: documents cut to `doc_cap` characters, until more than `max_chars` are given.

    The document that takes the total above `max_chars` is the last one given.
    """
    total = 0
    for document in documents:
        text = document[:doc_cap]
        total += len(text)
        yield text
        if total > max_chars:
            return


def _without_lone_surrogates(text: str) -> str:
    """The text with each lone surrogate as U+FFFD; pairs become the character they stand for."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        pass
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
