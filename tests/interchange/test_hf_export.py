"""What an export is made of, as far as it shows without Transformers: template, card, tensors, bytes of tokens."""

from __future__ import annotations

import json
import re
from functools import cache

import jinja2
import pytest
import torch

from nanochat_ray.interchange import hf_export
from nanochat_ray.interchange.hf_card import model_card
from nanochat_ray.interchange.hf_export import converted, model_json, placed, token_ids
from nanochat_ray.interchange.hf_extra import needed
from nanochat_ray.interchange.hf_text import token_bytes_of
from nanochat_ray.interchange.hf_tokenizer import CHAT_TEMPLATE, MARK, byte_names, merges_of
from nanochat_ray.model.checkpoint import open_checkpoint, save_checkpoint
from nanochat_ray.text.conversation import render, render_prompt
from nanochat_ray.text.tokenizer import SPECIAL_TOKENS
from tests.parity.goldens import config_of, load_json, model_from_golden
from tests.parity.test_tokenizer import golden_tokenizer

GOLDEN = load_json("conversations")
CASES = pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])


class Refused(Exception):
    pass


def refuse(message: str) -> None:
    raise Refused(message)


@cache
def template() -> jinja2.Template:
    """The template without the tags that only Transformers knows."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    return environment.from_string(re.sub(r"\{%-? (end)?generation -?%\}", "", CHAT_TEMPLATE))


def rendered(messages: list, add_generation_prompt: bool = False) -> str:
    return template().render(messages=messages, add_generation_prompt=add_generation_prompt)


def ids_of(text: str) -> list[int]:
    """As the exported tokenizer reads it: names of special tokens are those, what is between them is ordinary text."""
    tokenizer = golden_tokenizer(2048)
    found = []
    for piece in re.split("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")", text):
        if piece in SPECIAL_TOKENS:
            found.append(tokenizer.encode_special(piece))
        else:
            found += tokenizer.encode(piece.replace(f"<{MARK}", "<"))
    return found


@CASES
def test_the_template_renders_as_we_do(case):
    tokenizer, messages = golden_tokenizer(2048), case["messages"]
    assert ids_of(rendered(messages)) == render(tokenizer, messages, 10**6)[0]
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    assert ids_of(rendered(asked, True)) == render_prompt(tokenizer, asked, 10**6).ids


@pytest.mark.parametrize("text", ["<|bos|>", f"<{MARK}|bos|>", f"<{MARK}{MARK}|", "<<||>", f"<{MARK}", "a<|user_end|"])
def test_no_text_becomes_a_special_token(text):
    messages = [{"role": "user", "content": text}]
    assert ids_of(rendered(messages)) == render(golden_tokenizer(2048), messages)[0]


@pytest.mark.parametrize("case", GOLDEN["rejected"], ids=lambda case: case["name"])
def test_the_template_refuses_what_we_refuse(case):
    with pytest.raises(Refused):
        rendered(case["messages"])


def test_the_template_refuses_what_it_would_encode_otherwise():
    parts = [{"type": "text", "text": text} for text in ("a", "", "b")]
    with pytest.raises(Refused, match="join"):
        rendered([{"role": "user", "content": "x"}, {"role": "assistant", "content": parts}])
    with pytest.raises(Refused, match="no question"):
        rendered([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], True)


def test_a_tensor_without_a_place_and_a_place_without_a_tensor_are_named():
    model = model_from_golden("a")
    good = model.state_dict()
    assert placed(good, model.config).keys() == good.keys()
    for change, what in (
        ({"transformer.h.0.new": torch.zeros(1)}, "transformer.h.0.new has no place"),
        ({"smear_lambda": None}, "smear_lambda is missing"),
        ({"lm_head.weight": torch.zeros(2, 3)}, r"lm_head.weight is \(2, 3\)"),
    ):
        tensors = {name: tensor for name, tensor in {**good, **change}.items() if tensor is not None}
        with pytest.raises(ValueError, match=what):
            placed(tensors, model.config)


def test_scalars_stay_fp32_when_weights_do_not():
    found = converted(model_from_golden("a").state_dict(), "bfloat16")
    assert {tensor.dtype for name, tensor in found.items() if "lambda" in name} == {torch.float32}
    assert {tensor.dtype for name, tensor in found.items() if "lambda" not in name} == {torch.bfloat16}


def test_every_constant_is_in_the_configuration():
    config, tokenizer = config_of("b"), golden_tokenizer(512)
    found = model_json(config, token_ids(tokenizer, "rl"), None)
    assert config.model_dump(mode="json").items() <= found.items()
    assert found["eos_token_id"] == [tokenizer.encode_special("<|assistant_end|>"), tokenizer.bos_id]
    assert token_ids(tokenizer, "base")["eos_token_id"] == [tokenizer.bos_id]


def test_the_card_has_the_reports_numbers_and_nothing_of_the_machine(tmp_path):
    model = model_from_golden("a")
    config = model.config.model_dump(mode="json")
    meta = {"model_config": config, "settings": {"data": "s3://key:hidden@bucket"}}
    save_checkpoint(tmp_path / "c", 7, {k: v.clone() for k, v in model.state_dict().items()}, None, meta)
    report = tmp_path / "report.md"
    report.write_text(
        "# nanochat-ray: d1\n\nMade from `/home/hidden`.\n\n## Summary\n\n| CORE | 0.25 |\n\n## Left out\n\n- hidden"
        "\n\n## Training\n\n| steps | 7 |\n\n## Machine\n\nhidden\n\n## pretrain\n\nhidden\n"
    )
    checkpoint = open_checkpoint(tmp_path / "c", 7)
    card = model_card("d1", "sft", checkpoint, "feed", report)
    assert "| CORE | 0.25 |" in card and "| steps | 7 |" in card and checkpoint.model_hash in card
    assert "hidden" not in card and str(tmp_path) not in card
    assert "## Summary" not in model_card("d1", "base", checkpoint, "feed", tmp_path / "nothing.md")


def test_nothing_is_left_when_the_disk_is_full_and_nothing_is_written_over(tmp_path, monkeypatch):
    model, tokenizer = model_from_golden("a"), golden_tokenizer(512)
    meta = {"model_config": model.config.model_dump(mode="json")}
    save_checkpoint(tmp_path / "c", 7, {k: v.clone() for k, v in model.state_dict().items()}, None, meta)
    checkpoint = open_checkpoint(tmp_path / "c", 7)
    monkeypatch.setattr(hf_export, "needed", lambda *packages: None)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_export, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        hf_export.export(checkpoint, tokenizer, tmp_path / "new" / "out", "sft", "card")
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(ValueError, match="there already"):
        hf_export.export(checkpoint, tokenizer, tmp_path / "c", "sft", "card")
    with pytest.raises(ValueError, match="2048 tokens, the model 512"):
        hf_export.export(checkpoint, golden_tokenizer(2048), tmp_path / "out", "sft", "card")


def test_a_missing_extra_is_one_line():
    with pytest.raises(ValueError, match=r"^no_such_package not installed here: pip install 'nanochat-ray\[hf\]'$"):
        needed("json", "no_such_package")


def test_merges_are_all_pairs_in_the_order_of_their_token():
    tokens = [bytes([b]) for b in range(256)] + [b"ab", b"bc", b"abc"]
    a, b, c = b"abc"
    assert merges_of(tokens) == [(a, b), (b, c), (a, 257), (256, c)]


def test_bytes_of_tokens_are_read_off_the_vocabulary():
    names = byte_names()
    half = "".join(names[byte] for byte in "你".encode()[:2])  # no text at all
    content = {
        "model": {"vocab": {half: 0, names[32] + "a": 1}}, "decoder": {"type": "ByteLevel"},
        "added_tokens": [{"id": 2, "content": "<s>", "special": True}, {"id": 3, "content": "é", "special": False}],
    }  # fmt: skip
    assert token_bytes_of(content, "m") == {0: "你".encode()[:2], 1: b" a", 2: b"", 3: "é".encode()}
    pieces = {"model": {"vocab": [["▁the", -1.0], ["<0xE4>", -2.0], ["é", -3.0]]},
              "decoder": {"type": "Sequence", "decoders": [{"type": "Replace"}, {"type": "ByteFallback"}]}}  # fmt: skip
    assert token_bytes_of(pieces, "m") == {0: b" the", 1: b"\xe4", 2: "é".encode()}
    with pytest.raises(ValueError, match=r"m: the bytes .*WordPiece"):
        token_bytes_of({"model": {"vocab": {}}, "decoder": {"type": "WordPiece"}}, "m")
    assert len(set(names)) == 256 and json.dumps(names)
