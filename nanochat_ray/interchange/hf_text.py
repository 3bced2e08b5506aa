"""The tokenizer of any model of Transformers, as far as evaluation needs one of ours: ids, BOS, bytes of each token.

Bytes are read off the vocabulary itself, not off decoded text: a token may be half a UTF-8 character.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from nanochat_ray.interchange.hf_tokenizer import byte_names
from nanochat_ray.text.tokenizer import token_dtype

BOS_NAMES = ("<|bos|>", "<|endoftext|>")  # nanochat's order; then what the tokenizer itself names
_ONE_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "▁"  # of SentencePiece's vocabularies
_TRIED = "Ten 12345 tests, isn't it?\n\n\tnaïve cafe\u0301  你好 🌍  x "


class HFTokenizer:
    """Text to ids, never to special ones, whatever the text says."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        """`tokenizer` is what AutoTokenizer gave. ValueError if it is no fast one or names no token to begin with."""
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise ValueError(f"{name}: a {type(tokenizer).__name__} shows no vocabulary; a fast tokenizer is needed")
        self.name = name
        self._fast = tokenizer.backend_tokenizer
        self._fast.no_truncation()
        self._fast.no_padding()
        self._fast.encode_special_tokens = True  # their names in a text are text
        vocabulary = self._fast.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        bos = next((vocabulary[name] for name in BOS_NAMES if name in vocabulary), tokenizer.bos_token_id)
        if bos is None:
            raise ValueError(f"{name}: no token begins a text: neither {' nor '.join(BOS_NAMES)} nor a BOS token")
        self.bos_id = int(bos)

    def encode(self, text: list[str], prepend: int | None = None, num_threads: int = 1) -> list[list[int]]:
        """Ids of each text, `prepend` in front. Half a surrogate pair is U+FFFD, as in ours."""
        before = [] if prepend is None else [prepend]
        found = self._fast.encode_batch([_whole(item) for item in text], add_special_tokens=False)
        return [before + list(item.ids) for item in found]

    def encode_to_arrays(self, texts: Sequence[str], dtype: DTypeLike | None = None) -> list[np.ndarray]:
        """One array for each text, BOS in front: what the packer takes."""
        kind = token_dtype(self.vocab_size) if dtype is None else np.dtype(dtype)
        return [np.array(ids, dtype=kind) for ids in self.encode(list(texts), prepend=self.bos_id)]

    def token_bytes(self) -> np.ndarray:
        """Length in bytes of every token, 0 for special ones and ids that no token has. (V,) int32.

        ValueError if the tokens of a text are not its bytes: normalised text, a space put in front, unknown characters.
        """
        tokens = token_bytes_of(json.loads(self._fast.to_str()), self.name)
        (ids,) = self.encode([_TRIED])
        joined = b"".join(tokens.get(k, b"") for k in ids)
        if joined != _TRIED.encode():
            raise ValueError(
                f"{self.name}: the tokens of a text are other bytes than the text ({joined[:20]!r}..., not "
                f"{_TRIED.encode()[:20]!r}...), so bits per byte would be wrong; leave them out with --eval core"
            )
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for k, token in tokens.items():
            lengths[k] = len(token)
        return lengths


def token_bytes_of(content: dict[str, Any], name: str) -> dict[int, bytes]:
    """The bytes of each token that stands for text, by id, from the content of a tokenizer.json.

    Two kinds of vocabulary are known: byte-level (GPT-2's characters for bytes) and SentencePiece's with bytes to fall
    back on. ValueError for another one.
    """
    decoder = content.get("decoder") or {}
    kinds = {part["type"] for part in decoder.get("decoders", [decoder]) if "type" in part}
    vocabulary = content["model"].get("vocab", {})
    if isinstance(vocabulary, list):  # a unigram model: tokens with their scores, by id
        vocabulary = {token: k for k, (token, _) in enumerate(vocabulary)}
    if "ByteLevel" in kinds:
        byte_of = {character: byte for byte, character in enumerate(byte_names())}

        def spell(token: str) -> bytes:
            return bytes(byte_of[c] for c in token) if all(c in byte_of for c in token) else token.encode()

    elif kinds & {"ByteFallback", "Metaspace"}:

        def spell(token: str) -> bytes:
            one = _ONE_BYTE.fullmatch(token)
            return bytes([int(one[1], 16)]) if one else token.replace(_SPACE, " ").encode()

    else:
        raise ValueError(
            f"{name}: the bytes of its tokens are not known (decoder {', '.join(sorted(kinds)) or 'none'}), so there "
            "are no bits per byte; leave them out with --eval core"
        )
    found = {int(k): spell(token) for token, k in vocabulary.items()}
    for added in content.get("added_tokens", []):
        found[int(added["id"])] = b"" if added["special"] else str(added["content"]).encode()
    return found


def _whole(text: str) -> str:
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
