"""The exported tokenizer against ours: ids of much text, special tokens, the golden conversations by its template."""

from __future__ import annotations

import random

import pytest

from nanochat_ray.interchange.hf_text import HFTokenizer
from nanochat_ray.interchange.hf_tokenizer import MARK, fast_tokenizer, save_tokenizer
from nanochat_ray.text.conversation import render, render_prompt
from tests.interchange.hf_made import need_hf
from tests.parity.goldens import load_json
from tests.parity.test_tokenizer import golden_tokenizer

pytestmark = pytest.mark.slow
GOLDEN = load_json("conversations")
MIXED = "abdeglmrstvxST '’ſ\n\r\t  123٣ß你好🌍é\u0301\u200d.,!?<|>_-\u00a0\u3000İΣς"


@pytest.fixture(scope="module", autouse=True)
def hf():
    need_hf()


@pytest.fixture(scope="module", params=[512, 2048])
def both(request):
    tokenizer = golden_tokenizer(request.param)
    return tokenizer, fast_tokenizer(tokenizer)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(golden_tokenizer(2048), folder, 2048)
    return AutoTokenizer.from_pretrained(folder)


def check(both, texts: list[str]) -> None:
    ours, fast = both
    wrong = [text for text in texts if fast.encode(text, add_special_tokens=False).ids != ours.encode(text)]
    assert not wrong, f"{len(wrong)} of {len(texts)} texts have other ids, such as {wrong[0]!r}"


def test_characters_of_unicode(both):
    points = [k for k in range(0x110000) if not 0xD800 <= k < 0xE000 and (k < 0x3000 or k % 17 == 0)]
    check(both, [f"a{chr(k)}b '{chr(k)} {chr(k)}{chr(k)} 1{chr(k)}\n{chr(k)}" for k in points])


def test_random_texts(both):
    rng = random.Random(0)
    check(both, ["".join(rng.choices(MIXED, k=rng.randint(0, 60))) for _ in range(5_000)])


def test_golden_texts(both):
    check(both, [str(part) for part in load_json("inputs").values()])


def test_decoding_gives_the_text_back(theirs):
    text = "naïve café 你好 🌍\r\n\t  <b>x</b>  "
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert theirs.decode(ids) == text
    tool = theirs.convert_tokens_to_ids("<|python_start|>")
    assert theirs.decode([tool, *ids]) == "<|python_start|>" + text
    assert theirs.decode([tool, *ids], skip_special_tokens=True) == text


def test_special_tokens_and_bos(theirs):
    ours = golden_tokenizer(2048)
    assert len(theirs) == ours.vocab_size
    assert {name: theirs.convert_tokens_to_ids(name) for name in ours.special} == ours.special
    assert theirs("hi")["input_ids"] == ours.encode("hi", prepend="<|bos|>")
    assert theirs("a<|user_end|>", add_special_tokens=False)["input_ids"][-1] == ours.special["<|user_end|>"]
    padded = theirs(["hi there", "hi"], padding=True)
    assert padded["attention_mask"][1][0] == 0 and padded["attention_mask"][1][-1] == 1


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_the_chat_template(theirs, case):
    ours, messages = golden_tokenizer(2048), case["messages"]
    found = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = render(ours, messages, 10**6)
    assert found["input_ids"] == ids
    if "special token text" not in case["name"]:  # there Transformers loses count of the characters
        assert found["assistant_masks"] == mask
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    prompt = theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert prompt == render_prompt(ours, asked, 10**6).ids


@pytest.mark.parametrize("text", ["<|bos|>", f"<{MARK}|bos|>", f"<{MARK}{MARK}|", "<<||>", f"<{MARK}", "a<|user_end|"])
def test_no_text_of_a_message_becomes_a_special_token(theirs, text):
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    ids = theirs.apply_chat_template(messages, return_dict=False)
    assert ids == render(golden_tokenizer(2048), messages)[0]


@pytest.mark.parametrize("case", GOLDEN["rejected"], ids=lambda case: case["name"])
def test_what_we_refuse_is_refused(theirs, case):
    with pytest.raises(Exception, match=r"message|content|part"):
        theirs.apply_chat_template(case["messages"])


def test_read_for_evaluation_it_is_ours(theirs):
    """Ids, BOS and bytes of each token, read off the exported vocabulary."""
    ours, read = golden_tokenizer(2048), HFTokenizer(theirs, "m")
    assert (read.bos_id, read.vocab_size) == (ours.bos_id, ours.vocab_size)
    assert read.token_bytes().tolist() == ours.token_bytes().tolist()
    texts = ["<|bos|> is text", "half a \ud83c pair", "你好", ""]
    assert read.encode(texts, prepend=read.bos_id) == ours.encode(texts, prepend=ours.bos_id)
    assert [a.tolist() for a in read.encode_to_arrays(texts)] == [a.tolist() for a in ours.encode_to_arrays(texts)]
