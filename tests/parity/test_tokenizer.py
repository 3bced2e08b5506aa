"""Tokenizers against tokenizer_512.json, tokenizer_2048.json and tokenizer_feed.json; everything exact."""

from __future__ import annotations

import base64
from functools import cache
from itertools import pairwise
from typing import Any

import pyarrow.parquet as pq
import pytest
import regex

from nanochat_ray.text.tokenizer import SPLIT_PATTERN, Tokenizer, training_texts
from tests.parity.goldens import load_json
from tests.real_data import needs_real_data, real_data

SIZES = [512, 2048]


@cache
def golden(size: int) -> Any:
    return load_json(f"tokenizer_{size}")


@cache
def golden_tokenizer(size: int) -> Tokenizer:
    return Tokenizer.from_tokens([base64.b64decode(token) for token in golden(size)["tokens_b64"]])


def documents(name: str) -> list[str]:
    return pq.read_table(real_data() / name, columns=["text"])["text"].to_pylist()


@needs_real_data
@pytest.mark.parametrize("size", SIZES)
def test_training_learns_the_same_merges(size: int) -> None:
    train = golden(size)["train"]
    texts = (text[: train["doc_cap"]] for text in documents(train["file"])[: train["n_docs"]])
    tokenizer = Tokenizer.train(texts, size)
    assert tokenizer.hash == golden_tokenizer(size).hash
    assert tokenizer.vocab_size == golden(size)["n_tokens"]


@pytest.mark.parametrize("size", SIZES)
def test_ids_and_lengths(size: int) -> None:
    g, tokenizer = golden(size), golden_tokenizer(size)
    assert tokenizer.special == g["special"]
    assert tokenizer.bos_id == g["special"]["<|bos|>"]
    assert tokenizer.vocab_size == g["vocab_size"] == g["n_tokens"]
    assert tokenizer.token_bytes().tolist() == g["token_bytes"]
    for k, (left, right) in enumerate(g["merges"]):
        assert tokenizer.decode_bytes([left, right]) == tokenizer.decode_bytes([256 + k])


@pytest.mark.parametrize("size", SIZES)
def test_encoding(size: int) -> None:
    """Pieces of the pattern, ids of the tokenizer, and ids of merging by hand in the golden order."""
    tokenizer = golden_tokenizer(size)
    rank = {tuple(pair): 256 + k for k, pair in enumerate(golden(size)["merges"])}
    for case in golden(size)["encode"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]
        assert tokenizer.encode_to_arrays([case["text"]])[0].tolist() == [tokenizer.bos_id, *case["ids"]]
        assert regex.findall(SPLIT_PATTERN, case["decoded"]) == case["pieces"]
        merged = [token for piece in case["pieces"] for token in merge(list(piece.encode()), rank)]
        assert merged == case["ids"]


def merge(ids: list[int], rank: dict[tuple[int, ...], int]) -> list[int]:
    while len(ids) > 1:
        best = min(pairwise(ids), key=lambda pair: rank.get(pair, 1 << 30))
        if best not in rank:
            break
        out: list[int] = []
        for token in ids:
            if out and (out[-1], token) == best:
                out[-1] = rank[best]
            else:
                out.append(token)
        ids = out
    return ids


@pytest.mark.parametrize("size", SIZES)
def test_prepend_and_append(size: int) -> None:
    for case in golden(size)["encode_wrapped"]:
        assert golden_tokenizer(size).encode(case["text"], case["prepend"], case["append"]) == case["ids"]


@pytest.mark.parametrize("size", SIZES)
def test_decoding(size: int) -> None:
    tokenizer, g = golden_tokenizer(size), golden(size)
    for case in g["decode"]:
        assert tokenizer.decode(case["ids"]) == case["text"]
    for case in g["decode_out_of_range"]:
        with pytest.raises(KeyError):
            tokenizer.decode(case["ids"])
    assert g["unknown_special"]["error"] == "KeyError"
    with pytest.raises(KeyError):
        tokenizer.encode_special("<|no_such_token|>")


@needs_real_data
def test_training_feed() -> None:
    feed = load_json("tokenizer_feed")
    texts = documents(feed["file"])
    for case in feed["cases"]:
        given = list(training_texts(iter(texts), case["max_chars"], case["doc_cap"]))
        lengths = [len(text) for text in given]
        assert (len(given), sum(lengths), lengths[-1]) == (case["n_docs"], case["n_chars"], case["last_doc_len"])


def test_tiny_corpora() -> None:
    feed = load_json("tokenizer_feed")
    for case in feed["tiny_corpora"]:
        tokenizer = Tokenizer.train(iter(case["texts"]), case["asked_vocab"])
        learned = [base64.b64decode(token) for token in case["learned_b64"]]
        assert tokenizer.vocab_size == case["n_tokens"]
        assert tokenizer.bos_id == case["bos"]
        assert [tokenizer.decode_bytes([256 + k]) for k in range(case["bos"] - 256)] == learned
    assert feed["vocab_below_265"]
    with pytest.raises(ValueError, match="264"):
        Tokenizer.train(iter(["a"]), 264)
