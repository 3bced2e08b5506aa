"""Laws of the tokenizer: what is encoded comes back, no text can forge a control token, files are whole or refused."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.text.tokenizer import SPECIAL_TOKENS, Tokenizer, token_dtype, training_texts
from nanochat_ray.text.tokenizer_eval import evaluate

CORPUS = ["the cat sat on the mat, the dog ran to the cat; 123 or 4567?", "naïve café 你好 🌍", "def f(x):\n    x()"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(iter(CORPUS * 3), 300)


# surrogates are no text, but json.loads makes them
anything = st.text(st.characters(codec=None, exclude_categories=())) | st.lists(
    st.sampled_from([*SPECIAL_TOKENS, "the", " ", "\n", "\ud83d", "\udf0d", "<|", "|>"])
).map("".join)


@given(text=anything)
def test_text_comes_back_and_never_holds_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert max(ids, default=0) < tokenizer.vocab_size - len(SPECIAL_TOKENS)
    assert tokenizer.decode(ids) == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert tokenizer.encode_to_arrays([text])[0].tolist() == [tokenizer.bos_id, *ids]


def test_a_list_is_encoded_as_its_texts_are(tokenizer: Tokenizer) -> None:
    texts = ["", "<|bos|>", "half a pair \ud83d", *CORPUS]
    expected = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode(texts) == tokenizer(texts) == expected
    wrapped = tokenizer.encode(texts, prepend=0, append="<|user_end|>")
    assert wrapped == [[0, *ids, tokenizer.encode_special("<|user_end|>")] for ids in expected]
    for threads in (1, 4):
        arrays = tokenizer.encode_to_arrays(texts, np.uint32, num_threads=threads)
        assert [array.tolist() for array in arrays] == [[tokenizer.bos_id, *ids] for ids in expected]
        assert {array.dtype for array in arrays} == {np.dtype(np.uint32)}


def test_only_texts_are_encoded(tokenizer: Tokenizer) -> None:
    for bad in (None, 3, b"bytes", ["a", 1]):
        with pytest.raises(ValueError, match="string"):
            tokenizer.encode(bad)  # type: ignore[arg-type]
    with pytest.raises(KeyError):
        tokenizer.encode("a", prepend="<|nothing|>")


def test_token_bytes_are_true_lengths(tokenizer: Tokenizer) -> None:
    """Also of tokens that are no valid UTF-8 on their own, whose text would be three bytes of replacement."""
    lengths = tokenizer.token_bytes()
    assert lengths.dtype == np.int32 and lengths.shape == (tokenizer.vocab_size,)
    assert (lengths[:256] == 1).all()
    assert (lengths[-len(SPECIAL_TOKENS) :] == 0).all()
    text = CORPUS[1]
    assert lengths[tokenizer.encode(text)].sum() == len(text.encode())


def test_saved_and_loaded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "new" / "folder")
    file = tmp_path / "new" / "folder" / "tokenizer.json"
    for path in (file, file.parent, str(file)):
        loaded = Tokenizer.load(path)
        assert loaded.hash == tokenizer.hash
        assert loaded.encode(CORPUS[0]) == tokenizer.encode(CORPUS[0])
        assert loaded.training == tokenizer.training and "rustbpe" in loaded.training["trainer"]
    assert [path.name for path in file.parent.iterdir()] == ["tokenizer.json"]
    assert json.loads(file.read_text())["special"] == list(SPECIAL_TOKENS)


def test_the_hash_is_of_the_tokens_alone(tokenizer: Tokenizer) -> None:
    same = Tokenizer.train(iter(CORPUS * 3), 300, {"corpus": "elsewhere"})
    other = Tokenizer.train(iter(CORPUS * 3), 299)
    assert same.hash == tokenizer.hash != other.hash


def test_damaged_files_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="tok_train"):
        Tokenizer.load(tmp_path / "nothing.json")
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    whole = file.read_text()
    data = json.loads(whole)
    swapped = {**data, "ordinary": [*data["ordinary"][:-2], data["ordinary"][-1], data["ordinary"][-2]]}
    for damaged in (
        whole[:1000],
        "",
        "[]",
        json.dumps({**data, "version": 2}),
        json.dumps({**data, "ordinary": data["ordinary"][:-1]}),
        json.dumps({**data, "ordinary": data["ordinary"][1:]}),
        json.dumps({**data, "pattern": r"\w+"}),
        json.dumps({**data, "special": data["special"][::-1]}),
        json.dumps(swapped),
    ):
        file.write_text(damaged)
        with pytest.raises(ValueError, match="tokenizer"):
            Tokenizer.load(tmp_path)


def test_it_travels_between_processes(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.hash == tokenizer.hash and copy.encode(CORPUS[2]) == tokenizer.encode(CORPUS[2])


def test_the_feed_ends_with_the_document_that_goes_beyond() -> None:
    documents = iter(["a" * 7, "b" * 20, "c", "d"])
    assert list(training_texts(documents, max_chars=17, doc_cap=10)) == ["a" * 7, "b" * 10, "c"]
    assert next(documents) == "d"  # no further than needed


def test_token_dtype() -> None:
    assert token_dtype(65536) == np.uint16
    assert token_dtype(65537) == np.uint32


def test_baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A published vocabulary with a gap in its ids; one that cannot be had is named; a slow one is given up."""
    published = tiktoken.Encoding(
        "toy",
        pat_str=r"\S+|\s+",
        mergeable_ranks={bytes([k]): k for k in range(256)},
        special_tokens={"<|endoftext|>": 257, "<|fim|>": 260},
    )

    def get_encoding(name: str) -> tiktoken.Encoding:
        if name == "slow":
            time.sleep(5)
        if name == "unreachable":
            raise OSError("no route")
        return published

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    baseline = Tokenizer.from_tiktoken("toy")
    assert baseline.bos_id == 257 and baseline.vocab_size == 261
    assert baseline.token_bytes().sum() == 256
    for name in ("unreachable", "slow"):
        with pytest.raises(ConnectionError, match=name):
            Tokenizer.from_tiktoken(name, timeout_s=0.2)


def test_evaluation(tokenizer: Tokenizer) -> None:
    baseline = Tokenizer.train(iter([""]), 265)  # bytes alone
    records = evaluate(tokenizer, {"bytes": baseline}, {"train": CORPUS[0], "val": ""})
    assert [record["text"] for record in records] == ["news", "korean", "code", "math", "science", "train", "val"]
    for record in records:
        assert record["bytes tokens"] == record["bytes"]
        assert record.keys() == records[0].keys()
    train = records[-2]
    tokens, size = len(tokenizer.encode(CORPUS[0])), len(CORPUS[0])
    assert (train["tokens"], train["bytes"], train["ratio"]) == (tokens, size, round(size / tokens, 3))
    assert train["bytes diff_percent"] == pytest.approx(100 * (1 - tokens / size), abs=0.06)
