"""Letter questions: the logits of the letters behind the prompt, and the letters picked."""

from __future__ import annotations

import base64
import json

import pytest

from nanochat_ray.metrics.chat_eval import evaluate_categorical, summarise
from nanochat_ray.tasks.multiple_choice import LetterTask, letter_conversation
from nanochat_ray.text.conversation import render_for_completion
from nanochat_ray.text.tokenizer import Tokenizer
from tests.parity.goldens import load_json, model_from_golden
from tests.real_data import needs_real_data, real_data

GOLDEN = load_json("chat_eval")
LETTERS = ("A", "B", "C", "D")


class Items(LetterTask):
    """Items of a CORE file as letter questions."""

    name = "Items"

    def __init__(self, items: list[dict]) -> None:
        super().__init__()
        self.items = items

    def num_examples(self) -> int:
        return len(self.items)

    def get_example(self, index: int) -> dict:
        item = self.items[index]
        return letter_conversation(item["query"], LETTERS, item["choices"], LETTERS[item["gold"]])


@pytest.fixture(scope="module")
def task():
    lines = (real_data() / GOLDEN["data"]).read_text(encoding="utf-8").splitlines()[: GOLDEN["first"]]
    return Items([json.loads(line) for line in lines])


@pytest.fixture(scope="module")
def tokenizer():
    name = GOLDEN["tokenizer"].removesuffix(".json")
    return Tokenizer.from_tokens([base64.b64decode(token) for token in load_json(name)["tokens_b64"]])


@needs_real_data
@pytest.mark.parametrize("batch_size", [1, 8])
def test_letters(task, tokenizer, batch_size):
    model = model_from_golden("d").eval()
    assert GOLDEN["weights"] == "weights_d.safetensors"
    assert [len(render_for_completion(tokenizer, conversation)) for conversation in task] == GOLDEN["prompt_lengths"]
    records = evaluate_categorical(model, tokenizer, task, range(len(task)), batch_size)
    for record, logits in zip(records, GOLDEN["letter_logits"], strict=True):
        assert record.letter_logits == pytest.approx(logits, abs=1e-4)
    assert [record.answers[0].text for record in records] == GOLDEN["picked"]
    assert summarise(records).accuracy == pytest.approx(GOLDEN["accuracy"])
    assert summarise(records[:5]).accuracy == pytest.approx(GOLDEN["accuracy_first5"])
