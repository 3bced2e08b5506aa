"""How a chat model does on tasks: the letter it would answer, or the completions that it writes. And ChatCORE.

A record per problem, so that problems can be scored anywhere and merged; a record does not depend on which others are
scored with it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Protocol, TypeAlias

from nanochat_ray.messages import FinishReason, Rollout, SamplingParams
from nanochat_ray.metrics.scoring import Continuations, batches, tail_logits
from nanochat_ray.model.gpt import GPT
from nanochat_ray.sandbox import ProgramResult, SandboxFailed
from nanochat_ray.tasks.gsm8k import FinalAnswerTask
from nanochat_ray.tasks.humaneval import HumanEval
from nanochat_ray.tasks.task import Conversation, Task
from nanochat_ray.text.conversation import Prompt, render_prompt
from nanochat_ray.text.tokenizer import Tokenizer

CATEGORICAL = ("ARC-Easy", "ARC-Challenge", "MMLU")
CHAT_CORE_TASKS = (*CATEGORICAL, "GSM8K", "HumanEval", "SpellingBee")
LETTER_BASELINE = 0.25  # of every categorical task, also where a question has not four choices
WILSON_Z = 1.959964  # two-sided 95 %
MAX_TOKENS = 64 * 512

RunPrograms: TypeAlias = Callable[[Sequence[str]], Sequence[ProgramResult | SandboxFailed]]
"""Runs programs that a model wrote, somewhere; a failure of the machine stands where the result would."""


class RolloutSource(Protocol):
    """What completes prompts; the engine, or many of them."""

    @property
    def context(self) -> int:
        """Positions a sequence may fill, prompt included."""
        ...

    def rollouts(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[list[Rollout]]:
        """`num_samples` completions of each prompt, in order, with parameters of its own."""
        ...


@dataclass(frozen=True)
class ProgramRun:
    """How the program of an answer ended."""

    outcome: str  # passed, failed, timeout, memory, output or crashed
    error: str | None
    isolation: str


@dataclass(frozen=True)
class Answer:
    """One completion of a problem's prompt."""

    text: str
    extracted: str | None  # the part that is graded
    correct: bool
    numeric_correct: bool | None = None  # where answers are numbers: whether they are equal as numbers
    n_tokens: int = 1
    finish_reason: FinishReason | None = None  # None: a letter that was not sampled
    program: str | None = None  # has to run before it is known whether the answer is correct
    run: ProgramRun | None = None  # that it did


@dataclass(frozen=True)
class ChatRecord:
    """How one problem went."""

    task: str
    index: int
    correct: bool  # any of the answers is
    answers: tuple[Answer, ...]
    prompt_sha256: str
    prompt_tokens_cut: int = 0
    chance_frac: float = 0.0  # of being right by guessing
    group: str | None = None  # the subject or family of the problem
    letter_logits: tuple[float, ...] = ()


@dataclass(frozen=True)
class ChatResult:
    """How one task went."""

    task: str
    n_problems: int
    accuracy: float  # share of problems with any correct answer
    interval: tuple[float, float]  # Wilson's 95 % interval of it
    pass_at_1: float  # share of correct answers
    chance_frac: float
    numeric_accuracy: float | None = None
    groups: dict[str, float] = field(default_factory=dict)  # accuracy by subject or family


def evaluate_categorical(
    model: GPT, tokenizer: Tokenizer, task: Task, indices: Sequence[int], batch_size: int = 8
) -> list[ChatRecord]:
    """The letter that the model finds likeliest to begin its answer, for each problem. Nothing is sampled.

    ValueError for a letter that is not a single token of the tokenizer.
    """
    conversations = [task[index] for index in indices]
    prompts = [_prompt(tokenizer, conversation, model.config.sequence_len) for conversation in conversations]
    asked = [Continuations(prompt.ids[:-1], [prompt.ids[-1:]]) for prompt in prompts]
    records: dict[int, ChatRecord] = {}
    for batch in batches(asked, batch_size, MAX_TOKENS):
        logits = tail_logits(model, [asked[k] for k in batch])[:, 0]  # (B, V)
        for k, row in zip(batch, logits, strict=True):
            letters = conversations[k]["letters"]
            values = row[[_letter_id(tokenizer, letter) for letter in letters]].tolist()
            letter = letters[values.index(max(values))]  # the first among equals
            correct = task.evaluate(conversations[k], letter)
            records[k] = ChatRecord(
                task=task.name,
                index=indices[k],
                correct=correct,
                answers=(Answer(letter, letter, correct),),
                prompt_sha256=_ids_sha256(prompts[k].ids),
                prompt_tokens_cut=prompts[k].dropped_tokens,
                chance_frac=1 / len(letters),
                group=_group_of(conversations[k]),
                letter_logits=tuple(values),
            )
    return [records[k] for k in range(len(indices))]


def evaluate_generative(
    engine: RolloutSource, tokenizer: Tokenizer, task: Task, indices: Sequence[int], params: SamplingParams
) -> list[ChatRecord]:
    """Let the model complete each problem's prompt and grade what it writes.

    When sampling, each problem has a seed of its own, made of `params.seed` and its index. What is graded by running it
    comes back as programs, for `graded`: this process may hold a GPU.
    """
    conversations = [task[index] for index in indices]
    room = engine.context - min(params.max_tokens, engine.context // 2)  # an answer gets at least half of the context
    prompts = [_prompt(tokenizer, conversation, room) for conversation in conversations]
    seeded = [dataclasses.replace(params, seed=problem_seed(params.seed, index)) for index in indices]
    completed = engine.rollouts([prompt.ids for prompt in prompts], seeded)
    records = []
    for index, conversation, prompt, rollouts in zip(indices, conversations, prompts, completed, strict=True):
        answers = tuple(_grade(tokenizer, task, conversation, rollout) for rollout in rollouts)
        records.append(
            ChatRecord(
                task=task.name,
                index=index,
                correct=any(answer.correct for answer in answers),
                answers=answers,
                prompt_sha256=_ids_sha256(prompt.ids),
                prompt_tokens_cut=prompt.dropped_tokens,
                group=_group_of(conversation),
            )
        )
    return records


def problem_seed(seed: int, index: int) -> int:
    """A seed for one problem that no other problem has."""
    return int.from_bytes(hashlib.sha256(f"{seed} {index}".encode()).digest()[:7], "big")


def _prompt(tokenizer: Tokenizer, conversation: Conversation, max_tokens: int) -> Prompt:
    return render_prompt(tokenizer, conversation["messages"][:-1], max_tokens)


def _letter_id(tokenizer: Tokenizer, letter: str) -> int:
    ids = tokenizer.encode(letter)
    if len(ids) != 1:
        raise ValueError(f"the letter {letter!r} is {len(ids)} tokens; only a single token can be compared")
    return ids[0]


def _grade(tokenizer: Tokenizer, task: Task, conversation: Conversation, rollout: Rollout) -> Answer:
    text = tokenizer.decode(rollout.token_ids)
    program = task.program(conversation, text) if isinstance(task, HumanEval) else None
    return Answer(
        text=text,
        extracted=task.extract(text),
        correct=program is None and bool(task.evaluate(conversation, text)),
        numeric_correct=task.evaluate_numeric(conversation, text) if isinstance(task, FinalAnswerTask) else None,
        n_tokens=len(rollout.token_ids),
        finish_reason=rollout.finish_reason,
        program=program,
    )


def graded(records: Sequence[ChatRecord], run_programs: RunPrograms) -> tuple[list[ChatRecord], dict[int, str]]:
    """The records with their programs run, and the problems that the machine failed at: index and reason.

    Those are left out of the records. Nothing is run for records without programs.
    """
    programs = [answer.program for record in records for answer in record.answers if answer.program is not None]
    results = iter(run_programs(programs) if programs else ())
    found, left_out = [], {}
    for record in records:
        answers = []
        for answer in record.answers:
            result = next(results) if answer.program is not None else None
            if isinstance(result, SandboxFailed):
                left_out[record.index] = str(result)
            elif result is not None:
                run = ProgramRun(result.outcome, result.error, result.isolation)
                answer = dataclasses.replace(answer, correct=result.success, program=None, run=run)
            answers.append(answer)
        if record.index not in left_out:
            correct = any(answer.correct for answer in answers)
            found.append(dataclasses.replace(record, correct=correct, answers=tuple(answers)))
    return found, left_out


def program_outcomes(records: Sequence[ChatRecord]) -> dict[str, Counter[str]]:
    """How many programs ended in which way, by isolation."""
    found: dict[str, Counter[str]] = {}
    for run in (answer.run for record in records for answer in record.answers):
        if run is not None:
            found.setdefault(run.isolation, Counter())[run.outcome] += 1
    return found


def _group_of(conversation: Conversation) -> str | None:
    return conversation.get("subject") or conversation.get("family")


def _ids_sha256(ids: Sequence[int]) -> str:
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()


def summarise(records: Sequence[ChatRecord]) -> ChatResult:
    """The result of one task from the records of all its shards. ValueError if there is none, or a problem twice."""
    if not records or len({record.index for record in records}) != len(records):
        raise ValueError(f"{len(records)} records, each of another problem, are needed to sum up a task")
    groups = defaultdict(list)
    for record in sorted(records, key=lambda record: record.index):
        if record.group is not None:
            groups[record.group].append(record.correct)
    numeric = [any(a.numeric_correct for a in r.answers) for r in records if r.answers[0].numeric_correct is not None]
    n_correct = sum(record.correct for record in records)
    return ChatResult(
        task=records[0].task,
        n_problems=len(records),
        accuracy=n_correct / len(records),
        interval=wilson_interval(n_correct, len(records)),
        pass_at_1=fmean(fmean(answer.correct for answer in record.answers) for record in records),
        chance_frac=fmean(record.chance_frac for record in records),
        numeric_accuracy=fmean(numeric) if numeric else None,
        groups={group: fmean(correct) for group, correct in sorted(groups.items())},
    )


def wilson_interval(n_correct: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927); unlike the normal one it stays within 0 and 1."""
    p, z2 = n_correct / n, WILSON_Z**2
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = WILSON_Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def chat_core(accuracies: Mapping[str, float]) -> dict[str, float]:
    """Mean accuracies above guessing, each under a name that says what it covers; tasks beyond the six do not count.

    "ChatCORE" if all six tasks are there, else "ChatCORE over k of 6 tasks"; "ChatCORE5" if all but SpellingBee are
    (later versions of nanochat have no more); "ChatCORE_cat" of the three categorical ones.
    """
    centred = {
        task: (accuracies[task] - baseline) / (1 - baseline)
        for task in CHAT_CORE_TASKS
        if task in accuracies
        for baseline in (LETTER_BASELINE if task in CATEGORICAL else 0.0,)
    }
    names = {"ChatCORE": CHAT_CORE_TASKS, "ChatCORE5": CHAT_CORE_TASKS[:-1], "ChatCORE_cat": CATEGORICAL}
    covered = {name: tasks for name, tasks in names.items() if set(tasks) <= set(centred)}
    scores = {name: fmean(centred[task] for task in tasks) for name, tasks in covered.items()}
    if centred and "ChatCORE" not in scores:
        scores[f"ChatCORE over {len(centred)} of {len(CHAT_CORE_TASKS)} tasks"] = fmean(centred.values())
    return scores
