"""A tokenizer.pkl is read as data: real ones exactly, and whatever is something else is refused and runs nothing."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat_ray.interchange import nanochat_pickle
from nanochat_ray.interchange.nanochat_pickle import read_encoding
from nanochat_ray.interchange.nanochat_tokenizer import differing_lengths, pickled, read_tokenizer
from nanochat_ray.text.tokenizer import SPLIT_PATTERN, Tokenizer
from tests.interchange.hostile_pickles import MARKER, calling, greedy, in_tokenizer, malformed
from tests.interchange.nanochat_made import encoding, write_tokenizer
from tests.parity.goldens import load_json

REPOSITORY = Path(__file__).parent.parent.parent
WATCHING = """
import io, json, sys
import pickletools, struct, encodings.raw_unicode_escape
from nanochat_ray.interchange.nanochat_pickle import read_encoding
sizes, *rest = sys.stdin.buffer.read().split(b"\\n", 1)
seen, watching = [], False
def hook(event, arguments):
    if watching and event not in ("object.__getattr__",):
        seen.append(event + " " + repr(arguments)[:80])
sys.addaudithook(hook)
data, out = io.BytesIO(rest[0]), []
for size in json.loads(sizes):
    pickled = data.read(size)
    watching = True
    try:
        read_encoding(pickled)
        outcome = "taken"
    except ValueError as error:
        outcome = str(error)
    except BaseException as error:
        outcome = "raised " + type(error).__name__
    watching = False
    out.append([outcome, list(seen)])
    seen.clear()
json.dump(out, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def hostile() -> dict[str, bytes]:
    return calling() | greedy() | malformed()


def test_hostile_pickles_run_nothing(hostile, tmp_path):
    """In a process of its own whose every import, call of the system, opened file and compilation is noted."""
    data = json.dumps([len(p) for p in hostile.values()]).encode() + b"\n" + b"".join(hostile.values())
    done = subprocess.run(
        [sys.executable, "-c", WATCHING, str(tmp_path / "out.json")], input=data, cwd=tmp_path, capture_output=True,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"}, check=False, timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode()
    outcomes = dict(zip(hostile, json.loads((tmp_path / "out.json").read_text()), strict=True))
    for name, (outcome, events) in outcomes.items():
        assert outcome != "taken" and not outcome.startswith("raised") and len(outcome) < 400, (name, outcome)
        assert not events, (name, events)
    assert not (tmp_path / MARKER).exists()
    assert len(outcomes) > 100


def test_the_corpus_is_hostile(tmp_path, monkeypatch):
    """Python's own machine would run them: else the test above says nothing."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(calling()["os.system, protocol 4"])
    assert (tmp_path / MARKER).exists()


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_real_tokenizers(protocol):
    made = encoding(512)
    state = read_encoding(pickle.dumps(made, protocol=protocol))
    assert (state.name, state.pattern) == ("rustbpe", SPLIT_PATTERN)
    assert state.ranks == made._mergeable_ranks and state.special == made._special_tokens


def test_the_pickler_in_python_is_read_too():
    stream = __import__("io").BytesIO()
    pickle._Pickler(stream, 4).dump(encoding(512))
    assert len(read_encoding(stream.getvalue()).ranks) == 503


@pytest.mark.parametrize("size", [512, 2048])
def test_golden_texts_encode_the_same(tmp_path, size):
    tokenizer = read_tokenizer(write_tokenizer(tmp_path, size), "0" * 64)
    for case in load_json(f"tokenizer_{size}")["encode"]:
        assert tokenizer.encode(case["text"]) == case["ids"]
    assert tokenizer.vocab_size == size
    assert tokenizer.token_bytes().tolist() == load_json(f"tokenizer_{size}")["token_bytes"]


def test_what_is_written_is_a_tokenizer_for_nanochat():
    tokenizer = Tokenizer.from_tokens([bytes([b]) for b in range(256)] + [b"ab", b"abc"])
    theirs = pickle.loads(pickled(tokenizer))  # as nanochat reads it
    assert theirs.encode_ordinary("abcab") == tokenizer.encode("abcab") == [257, 256]
    assert theirs.encode_single_token("<|bos|>") == tokenizer.bos_id and theirs.n_vocab == tokenizer.vocab_size
    assert theirs.name == "rustbpe" and theirs.special_tokens_set == set(tokenizer.special)


@pytest.mark.filterwarnings("ignore")
def test_every_cut_and_every_changed_byte_is_refused_or_a_tokenizer():
    whole = pickle.dumps(encoding(300), protocol=4)
    for length in (*range(0, len(whole), 11), len(whole) - 1):
        with pytest.raises(ValueError, match=r"tokenizer|Encoding"):
            read_encoding(whole[:length])
    rng, taken = random.Random(0), 0
    for _ in range(400):
        changed = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        try:
            state = read_encoding(bytes(changed))
            taken += 1
            assert all(type(k) is bytes and type(v) is int for k, v in state.ranks.items())
        except ValueError:
            pass
    assert 0 < taken < 400


def test_sizes_are_bounded(monkeypatch):
    monkeypatch.setattr(nanochat_pickle, "MAX_TOKENS", 100)
    with pytest.raises(ValueError, match="at most 100"):
        read_encoding(pickle.dumps(encoding(300)))
    monkeypatch.setattr(nanochat_pickle, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="at most 1,000"):
        read_encoding(b"x" * 1001)


def test_another_tokenizer_is_refused_by_what_differs(tmp_path):
    path = tmp_path / "tokenizer.pkl"

    def refused(data: bytes, words: str) -> None:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=words) as caught:
            read_tokenizer(path, "0" * 64)
        assert str(path) in str(caught.value)

    refused(pickle.dumps(encoding(300, pattern=r"\s+|\S+")), "split pattern")
    made = encoding(300)
    state = made.__getstate__()
    made._special_tokens = {**state["special_tokens"], "<|extra|>": 300}
    refused(pickle.dumps(made), "special tokens")
    made = encoding(300)
    made._mergeable_ranks = {token: 2 * rank for token, rank in state["mergeable_ranks"].items()}
    refused(pickle.dumps(made), "ids of its")
    made._mergeable_ranks = {token: 290 - rank for token, rank in state["mergeable_ranks"].items()}
    refused(pickle.dumps(made), "single bytes")
    refused(in_tokenizer(b"X\x01\x00\x00\x00x"), "split pattern")


def test_lengths_of_older_nanochats_are_noticed(tmp_path):
    import torch

    tokenizer = read_tokenizer(write_tokenizer(tmp_path, 512), "0" * 64)
    path = tmp_path / "tokenizer" / "token_bytes.pt"
    assert differing_lengths(path, tokenizer) == 0
    lengths = torch.load(path, weights_only=True)
    lengths[128:256] = 3  # the text of half a character is one replacement character
    torch.save(lengths, path)
    assert differing_lengths(path, tokenizer) == 128
    torch.save(lengths[:-1], path)
    with pytest.raises(ValueError, match="512 tokens"):
        differing_lengths(path, tokenizer)
