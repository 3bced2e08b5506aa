"""nanochat's tokenizer files, `tokenizer.pkl` and `token_bytes.pt`, to our tokenizer and back."""

from __future__ import annotations

import pickle
from pathlib import Path

import tiktoken
import torch

from nanochat_ray.interchange.nanochat_pickle import MAX_BYTES, EncodingState, read_encoding
from nanochat_ray.interchange.nanochat_tensors import read_tensor
from nanochat_ray.text.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

PICKLE_FILE = "tokenizer.pkl"
TOKEN_BYTES_FILE = "token_bytes.pt"
NANOCHAT_NAME = "rustbpe"  # what nanochat calls the encoding


def read_tokenizer(path: Path, source_sha256: str) -> Tokenizer:
    """Our tokenizer of a `tokenizer.pkl`; nothing in the file is run.

    ValueError, naming the file, if it is something else, or has another pattern or other special tokens than ours.
    """
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes; a tokenizer has at most {MAX_BYTES:,}")
    try:
        state = read_encoding(path.read_bytes())
        ordinary = _in_id_order(state)
        return Tokenizer.from_tokens(ordinary, {"imported": "nanochat", "source_sha256": source_sha256})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _in_id_order(state: EncodingState) -> list[bytes]:
    """The ordinary tokens by id. ValueError unless pattern, ids and special tokens are those of nanochat."""
    if state.pattern != SPLIT_PATTERN:
        raise ValueError(f"its split pattern is another one than ours: {state.pattern[:200]!r}")
    ordinary = sorted(state.ranks, key=state.ranks.__getitem__)
    if [state.ranks[token] for token in ordinary] != list(range(len(ordinary))):
        raise ValueError(f"the ids of its {len(ordinary):,} ordinary tokens are not 0, 1, 2, ...")
    wanted = {name: len(ordinary) + k for k, name in enumerate(SPECIAL_TOKENS)}
    if state.special != wanted:
        raise ValueError(f"its special tokens are {str(state.special)[:400]}; ours would be {wanted}")
    return ordinary


def differing_lengths(path: Path, tokenizer: Tokenizer) -> int:
    """How many tokens have another length in `token_bytes.pt` than their bytes have.

    Older nanochats measured the text of each token, in which a part of a character counts as three bytes. ValueError
    if the file is no such vector, or of another vocabulary.
    """
    stored = read_tensor(path)
    if tuple(stored.shape) != (tokenizer.vocab_size,) or stored.is_floating_point():
        raise ValueError(
            f"{path}: {stored.dtype} of shape {tuple(stored.shape)}; the tokenizer beside it has "
            f"{tokenizer.vocab_size} tokens, so a whole number for each of them is needed"
        )
    return int((stored.long() != torch.from_numpy(tokenizer.token_bytes()).long()).sum())


def pickled(tokenizer: Tokenizer) -> bytes:
    """The bytes of a `tokenizer.pkl` that nanochat reads."""
    n_ordinary = tokenizer.vocab_size - len(tokenizer.special)
    encoding = tiktoken.Encoding(
        NANOCHAT_NAME,
        pat_str=SPLIT_PATTERN,
        mergeable_ranks={tokenizer.decode_bytes([k]): k for k in range(n_ordinary)},
        special_tokens=tokenizer.special,
    )
    return pickle.dumps(encoding, protocol=4)


def token_bytes_tensor(tokenizer: Tokenizer) -> torch.Tensor:
    """The content of a `token_bytes.pt`: (V,) int32."""
    return torch.from_numpy(tokenizer.token_bytes())
