"""Chat evaluation: letters, completions, shards, and the arithmetic of the scores."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch

from nanochat_ray.engine.engine import Engine
from nanochat_ray.messages import Rollout, SamplingParams
from nanochat_ray.metrics.chat_eval import (
    ProgramRun,
    chat_core,
    evaluate_categorical,
    evaluate_generative,
    graded,
    problem_seed,
    program_outcomes,
    summarise,
    wilson_interval,
)
from nanochat_ray.sandbox import ProgramResult, SandboxFailed
from nanochat_ray.tasks.gsm8k import FinalAnswerTask
from nanochat_ray.tasks.humaneval import HumanEval
from nanochat_ray.tasks.multiple_choice import LetterTask, letter_conversation
from nanochat_ray.tasks.rows import TaskSources
from nanochat_ray.text.conversation import render_for_completion
from tests.engine.tiny import CONTEXT, byte_tokenizer, tiny_model


class Letters(LetterTask):
    name = "letters"

    def __init__(self, letters: str = "ABCD", n: int = 11, long: int = 0) -> None:
        super().__init__()
        self.letters, self.n, self.long = letters.split() if " " in letters else list(letters), n, long

    def num_examples(self) -> int:
        return self.n

    def get_example(self, index: int) -> dict:
        letters = self.letters[: 3 + index % 2]
        question = f"number {index * 'x'}" + "y" * self.long
        conversation = letter_conversation(question, letters, letters, letters[index % 3])
        return conversation | {"subject": "even" if index % 2 == 0 else "odd"}


class Sums(FinalAnswerTask):
    name = "sums"
    eval_type: ClassVar = "generative"

    def num_examples(self) -> int:
        return 6

    def get_example(self, index: int) -> dict:
        parts = [{"type": "text", "text": f"#### {index}"}]
        messages = [{"role": "user", "content": f"0+{index}"}, {"role": "assistant", "content": parts}]
        return {"messages": messages, "family": "small" if index < 2 else "large"}


@pytest.fixture(scope="module")
def model():
    return tiny_model().eval()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def test_letters_are_compared_behind_the_prompt(model, tokenizer):
    task = Letters()
    for record in evaluate_categorical(model, tokenizer, task, range(len(task)), batch_size=4):
        conversation = task[record.index]
        prompt = render_for_completion(tokenizer, conversation, CONTEXT)
        with torch.inference_mode():
            logits = model(torch.tensor([prompt]))[0, -1]
        wanted = [logits[ord(letter)].item() for letter in conversation["letters"]]
        assert record.letter_logits == pytest.approx(wanted, abs=1e-9)
        best = conversation["letters"][wanted.index(max(wanted))]
        assert record.answers[0].text == best
        assert record.correct == (best == conversation["messages"][1]["content"])
        assert record.chance_frac == 1 / len(conversation["letters"])


def test_letter_shards_add_up(model, tokenizer):
    task = Letters()
    whole = evaluate_categorical(model, tokenizer, task, range(11))
    parts = [r for k in (1, 0) for r in evaluate_categorical(model, tokenizer, task, range(k, 11, 2), batch_size=3)]
    assert summarise(parts) == summarise(whole)
    result = summarise(whole)
    assert result.groups.keys() == {"even", "odd"}
    assert result.chance_frac == pytest.approx((6 / 3 + 5 / 4) / 11)
    assert [r.prompt_sha256 for r in whole] == [r.prompt_sha256 for r in sorted(parts, key=lambda r: r.index)]


def test_a_letter_is_one_token(model, tokenizer):
    with pytest.raises(ValueError, match="the letter 'é' is 2 tokens"):
        evaluate_categorical(model, tokenizer, Letters("é A B C"), [0])


def test_long_questions_are_cut_and_counted(model, tokenizer):
    task = Letters(long=CONTEXT)
    records = evaluate_categorical(model, tokenizer, task, [0, 1])
    assert all(record.prompt_tokens_cut > 0 for record in records)


@dataclass
class Replies:
    """Completes with given texts and remembers what it was asked."""

    texts: dict[str, list[str]]  # by question
    context: int = CONTEXT
    asked: list[list[int]] = field(default_factory=list)  # of each call the prompts' seeds

    def rollouts(self, prompts, params):
        self.asked.append([own.seed for own in params])
        tokenizer = byte_tokenizer()
        found = []
        for prompt in prompts:
            (question,) = [q for q in self.texts if q in tokenizer.decode(prompt)]
            replies = [tokenizer.encode(text) for text in self.texts[question]]
            found.append([Rollout(prompt, ids, [1] * len(ids), "stop", tokenizer.bos_id) for ids in replies])
        return found


TEXTS = {f"0+{k}": [f"#### {k}", "#### 7"] if k % 2 else ["no", f"#### {k}."] for k in range(6)}


def test_any_answer_and_every_answer(tokenizer):
    records = evaluate_generative(Replies(TEXTS), tokenizer, Sums(), range(6), SamplingParams(0.0, num_samples=2))
    assert [record.correct for record in records] == [False, True] * 3
    assert [[answer.extracted for answer in record.answers] for record in records][:2] == [[None, "0."], ["1", "7"]]
    result = summarise(records)
    assert (result.accuracy, result.pass_at_1, result.numeric_accuracy) == (0.5, 0.25, 1.0)
    assert result.groups == {"large": 0.5, "small": 0.5}
    assert result.interval == wilson_interval(3, 6)
    assert records[0].answers[0].n_tokens == 2 and records[0].answers[0].finish_reason == "stop"


def test_prompts_go_together_and_each_has_its_own_seed(tokenizer):
    source = Replies(TEXTS)
    evaluate_generative(source, tokenizer, Sums(), [4, 2], SamplingParams(0.7, seed=3))
    assert source.asked == [[problem_seed(3, 4), problem_seed(3, 2)]]
    assert len({problem_seed(seed, index) for seed in range(20) for index in range(50)}) == 1000


def test_completion_shards_add_up(model, tokenizer):
    engine = Engine(model, tokenizer, max_rows=4)
    for params in (SamplingParams(0.0, max_tokens=9), SamplingParams(1.0, top_k=20, max_tokens=9, num_samples=3)):
        whole = evaluate_generative(engine, tokenizer, Sums(), range(6), params)
        parts = [r for k in (1, 0) for r in evaluate_generative(engine, tokenizer, Sums(), range(k, 6, 2), params)]
        assert sorted(parts, key=lambda record: record.index) == whole
        assert all(len(record.answers) == params.num_samples for record in whole)
    assert evaluate_generative(engine, tokenizer, Sums(), [], params) == []


def test_an_answer_has_room(model, tokenizer):
    class Long(Sums):
        def get_example(self, index: int) -> dict:
            conversation = super().get_example(index)
            conversation["messages"][0]["content"] = "z" * 3 * CONTEXT
            return conversation

    engine = Engine(model, tokenizer)
    (record,) = evaluate_generative(engine, tokenizer, Long(), [0], SamplingParams(0.0, max_tokens=10**6))
    assert record.prompt_tokens_cut > 2 * CONTEXT
    assert record.answers[0].finish_reason == "stop" or record.answers[0].n_tokens >= CONTEXT // 2


@pytest.fixture
def programs(tmp_path):
    """Three problems of HumanEval's kind: number k is to give back k."""
    rows = [
        {"prompt": f"def f{k}():\n", "canonical_solution": f"    return {k}\n", "entry_point": f"f{k}",
         "test": f"def check(f):\n    assert f() == {k}\n"} for k in range(3)
    ]  # fmt: skip
    (tmp_path / "human_eval").mkdir()
    (tmp_path / "human_eval/HumanEval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return HumanEval(TaskSources(tmp_path))


def test_programs_are_graded_elsewhere(tokenizer, programs):
    texts = {f"def f{k}():": [f"```\ndef f{k}(): return 1\n```", f"def f{k}(): return 2"] for k in range(3)}
    records = evaluate_generative(Replies(texts), tokenizer, programs, range(3), SamplingParams(0.0, num_samples=2))
    assert not any(answer.correct for record in records for answer in record.answers)
    asked = []

    def run(codes):
        asked.extend(codes)
        results = [ProgramResult("== 1" in code and "return 1" in code, "", "", "x", isolation="i") for code in codes]
        return [*results[:-1], SandboxFailed("no processes left")]

    found, left_out = graded(records, run)
    assert len(asked) == 6 and all("assert f() ==" in code and "check(f" in code for code in asked)
    (failed,) = {record.index for record in records} - {record.index for record in found}
    assert left_out == {failed: "no processes left"}
    for record in found:
        answer = int(programs[record.index]["entry_point"][1:])
        assert record.correct == (answer == 1) and record.answers[0].correct == record.correct
        assert record.answers[0].extracted.startswith("def") and record.answers[0].program is None
        assert record.answers[1].run == ProgramRun("failed", "x", "i")
    assert sum(sum(outcomes.values()) for outcomes in program_outcomes(found).values()) == 4
    assert summarise(found).n_problems == 2


def test_nothing_is_run_for_records_without_programs(tokenizer):
    records = evaluate_generative(Replies(TEXTS), tokenizer, Sums(), range(6), SamplingParams(0.0, num_samples=2))
    assert graded(records, None) == (records, {}) and program_outcomes(records) == {}


def test_summaries_want_each_problem_once(model, tokenizer):
    records = evaluate_categorical(model, tokenizer, Letters(), [0, 1])
    for wrong in ([], [*records, records[0]]):
        with pytest.raises(ValueError, match="each of another problem"):
            summarise(wrong)


def test_wilson_interval():
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    for n in (1, 7, 1000):
        for n_correct in range(0, n + 1, max(1, n // 7)):
            low, high = wilson_interval(n_correct, n)
            assert 0 <= low <= n_correct / n + 1e-12 and n_correct / n - 1e-12 <= high <= 1


def test_chat_core():
    six = {"ARC-Easy": 0.4, "ARC-Challenge": 0.25, "MMLU": 0.1, "GSM8K": 0.5, "HumanEval": 0.2, "SpellingBee": 1.0}
    scores = chat_core(six | {"held-out questions": 1.0})
    assert scores == pytest.approx(
        {"ChatCORE": (0.2 + 0 - 0.2 + 0.5 + 0.2 + 1) / 6, "ChatCORE5": 0.7 / 5, "ChatCORE_cat": 0.0}
    )
    assert chat_core({"GSM8K": 0.5, "MMLU": 0.25}) == {"ChatCORE over 2 of 6 tasks": 0.25}
    assert chat_core({"held-out questions": 1.0}) == {}
    del six["SpellingBee"]
    assert chat_core(six).keys() == {"ChatCORE5", "ChatCORE_cat", "ChatCORE over 5 of 6 tasks"}
