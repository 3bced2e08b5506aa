"""Evaluation in units that can run anywhere: in a training loop, in this process, or on actors of a cluster.

A unit is a few items of one task; its records do not depend on where it ran or what else was asked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from nanochat_ray.corpus.reader import DataManifest, Split, validation_rows
from nanochat_ray.engine.engine import Engine
from nanochat_ray.messages import PackedRows, SamplingParams, World
from nanochat_ray.metrics.bits_per_byte import evaluate_bpb
from nanochat_ray.metrics.chat_eval import (
    ChatRecord,
    ChatResult,
    chat_core,
    evaluate_categorical,
    evaluate_generative,
    graded,
    summarise,
)
from nanochat_ray.metrics.core import core_metric, evaluate_task, merge
from nanochat_ray.metrics.core_bundle import CoreTask, load_bundle, load_items
from nanochat_ray.model.checkpoint import open_checkpoint
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.precision import pick_dtype, prepare_device
from nanochat_ray.sandbox import run_programs, usable
from nanochat_ray.stages.staging import micro_batches
from nanochat_ray.tasks.catalog import CHAT_TASKS
from nanochat_ray.tasks.humaneval import HumanEval
from nanochat_ray.tasks.rows import TaskDataMissing, TaskSources
from nanochat_ray.tasks.task import Task
from nanochat_ray.text.tokenizer import Tokenizer

# the subjects of nanochat's seven prompts
SAMPLE_PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
)
SAMPLE_TOKENS = 16
FREE_SAMPLES, FREE_SAMPLE_TOKENS = 8, 128
HELD_OUT = "held-out questions"  # of the embedded world, as a task's name
EVAL_SEED = 42


@dataclass(frozen=True)
class EvalSpec:
    """The model and the data to evaluate with; plain values, so it can cross to other processes."""

    checkpoints: Path
    step: int
    tokenizer_folder: Path
    device: str
    dtype: str | None = None
    sources: TaskSources = field(default_factory=TaskSources)
    bundle: Path | None = None
    manifest: DataManifest | None = None
    world_folder: Path | None = None
    device_batch_size: int = 32

    @property
    def name(self) -> str:
        """For people: `evaluate d12 pretrain step 2000`."""
        stage = self.checkpoints.parent
        return f"evaluate {stage.parent.name} {stage.name} step {self.step}"


@dataclass(frozen=True)
class CoreUnit:
    label: str
    indices: tuple[int, ...]
    max_per_task: int | None


@dataclass(frozen=True)
class ChatUnit:
    task: str
    indices: tuple[int, ...]
    params: SamplingParams
    batch_size: int = 8


@dataclass(frozen=True)
class BpbUnit:
    """Rows [start, stop) of the first `n_rows` of a split."""

    split: Split
    n_rows: int
    start: int
    stop: int


@dataclass(frozen=True)
class SampleUnit:
    """The fixed prompts, and text from nothing."""


@dataclass(frozen=True)
class Nats:
    """Loss and bytes of some rows, to be added up."""

    rows: int
    nats: float
    bytes: int
    dtype: str  # of the arithmetic


Unit: TypeAlias = CoreUnit | ChatUnit | BpbUnit | SampleUnit
Record: TypeAlias = Any  # CoreRecord, ChatRecord, Nats or a sample
RunUnits: TypeAlias = Callable[[EvalSpec, Sequence[Unit]], list[list[Record]]]


class Evaluator:
    """A loaded model that evaluates units."""

    def __init__(self, spec: EvalSpec):
        self.spec = spec
        self.tokenizer = Tokenizer.load(spec.tokenizer_folder)
        dtype, _ = pick_dtype(spec.device, spec.dtype)
        prepare_device(spec.device)
        checkpoint = open_checkpoint(spec.checkpoints, spec.step)
        self.model = checkpoint.build_model(spec.device, dtype, self.tokenizer.vocab_size)

    def run(self, unit: Unit) -> list[Record]:
        if isinstance(unit, CoreUnit):
            assert self.spec.bundle is not None
            core_task = core_tasks(self.spec.bundle)[unit.label]
            return evaluate_task(self.model, self.tokenizer, core_task, unit.max_per_task, unit.indices)
        if isinstance(unit, ChatUnit):
            task = chat_task(unit.task, self.spec.sources, self.spec.world_folder)
            return evaluate_chat(self.model, self.tokenizer, task, unit)
        if isinstance(unit, SampleUnit):
            return sample_completions(self.model, self.tokenizer) + free_samples(self.model, self.tokenizer)
        rows = self.split_rows(unit.split, unit.n_rows)
        part = PackedRows(rows.tokens[unit.start : unit.stop])
        token_bytes = torch.from_numpy(self.tokenizer.token_bytes()).to(self.spec.device)
        batches = micro_batches(part, self.spec.device_batch_size, self.spec.device)
        with torch.inference_mode():
            sums = evaluate_bpb(self.model, batches, token_bytes)
        return [Nats(len(part), *sums, str(self.model.compute_dtype))]

    @functools.lru_cache(maxsize=2)  # noqa: B019  one evaluator per process, which lives as long as it
    def split_rows(self, split: Split, n_rows: int) -> PackedRows:
        assert self.spec.manifest is not None
        return validation_rows(
            self.spec.manifest, self.tokenizer, self.model.config.sequence_len, n_rows, split
        )


def cut(indices: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """Index tuples of at most `size`, in order."""
    return [tuple(indices[start : start + size]) for start in range(0, len(indices), size)]


@functools.lru_cache(maxsize=2)
def core_tasks(bundle: Path) -> dict[str, CoreTask]:
    return {task.label: task for task in load_bundle(bundle).tasks}


@functools.lru_cache(maxsize=32)
def chat_task(name: str, sources: TaskSources, world_folder: Path | None = None) -> Task:
    """A chat task by name; TaskDataMissing if its data cannot be had."""
    if name == HELD_OUT:
        assert world_folder is not None
        from nanochat_ray.tasks.world import WorldQuestions

        return WorldQuestions(world_folder)
    return CHAT_TASKS[name](sources)


def evaluate_chat(model: GPT, tokenizer: Tokenizer, task: Task, unit: ChatUnit) -> list[ChatRecord]:
    if task.eval_type == "categorical":
        return evaluate_categorical(model, tokenizer, task, unit.indices, unit.batch_size)
    return evaluate_generative(Engine(model, tokenizer), tokenizer, task, unit.indices, unit.params)


def sample_completions(model: GPT, tokenizer: Tokenizer) -> list[dict[str, str]]:
    """Greedy continuations of the fixed prompts."""
    return continuations(model, tokenizer, SAMPLE_PROMPTS, SamplingParams(
        temperature=0.0, max_tokens=SAMPLE_TOKENS, use_tools=False
    ))


def free_samples(model: GPT, tokenizer: Tokenizer) -> list[dict[str, str]]:
    """Text sampled from nothing but the start of a document."""
    return continuations(model, tokenizer, ("",), SamplingParams(
        temperature=1.0, max_tokens=FREE_SAMPLE_TOKENS, num_samples=FREE_SAMPLES, seed=EVAL_SEED, use_tools=False
    ))


def continuations(
    model: GPT, tokenizer: Tokenizer, texts: Iterable[str], params: SamplingParams
) -> list[dict[str, str]]:
    texts = list(texts)
    # Its context may be shorter than a prompt when the model is a tiny one.
    engine = Engine(model, tokenizer, max_rows=len(texts) * params.num_samples)
    prompts = {text: tokenizer.encode(text, prepend=tokenizer.bos_id)[: engine.context] for text in texts}
    found = engine.rollouts(list(prompts.values()), params)
    return [
        {"prompt": text, "text": tokenizer.decode(rollout.token_ids)}
        for text, rollouts in zip(prompts, found, strict=True)
        for rollout in rollouts
    ]


# --- in a training loop: each rank evaluates its share, all ranks get the scores -------------------------------------


def gather(records: list[Any], world: World) -> list[Any]:
    """All ranks' records."""
    if world.world_size == 1:
        return records
    shares: list[list[Any]] = [[] for _ in range(world.world_size)]
    dist.all_gather_object(shares, records)
    return [record for share in shares for record in share]


def core_in_loop(
    model: GPT, tokenizer: Tokenizer, bundle: Path, max_per_task: int | None, world: World
) -> dict[str, Any]:
    results = []
    for task in core_tasks(bundle).values():
        n = len(load_items(task)[:max_per_task])
        mine = range(world.rank, n, world.world_size)
        records = gather(list(evaluate_task(model, tokenizer, task, max_per_task, mine)), world)
        results.append(merge(task, records))
    score = core_metric(results)
    centred = {f"core/{result.task}": result.centred for result in results}
    return {"core_metric": score.value, "core_metric_name": score.name, **centred}


@dataclass(frozen=True)
class ChatTasks:
    """What ChatCORE in the loop runs over: the tasks whose data is there."""

    sources: TaskSources
    max_categorical: int | None
    max_generative: int | None
    max_new_tokens: int = 512
    top_k: int = 50


def chatcore_in_loop(model: GPT, tokenizer: Tokenizer, tasks: ChatTasks, world: World) -> dict[str, Any]:
    """The scores of the tasks whose data is there. Programs are run on CPUs only: no process with a GPU starts them."""
    records: dict[str, list[ChatRecord]] = {}
    for name in CHAT_TASKS:
        try:
            task = chat_task(name, tasks.sources)
        except TaskDataMissing:
            continue
        if isinstance(task, HumanEval) and (world.device != "cpu" or not usable()):
            continue
        limit = tasks.max_categorical if task.eval_type == "categorical" else tasks.max_generative
        indices = range(world.rank, min(len(task), limit or len(task)), world.world_size)
        params = SamplingParams(
            temperature=0.0, top_k=tasks.top_k, max_tokens=tasks.max_new_tokens, seed=EVAL_SEED
        )
        mine = evaluate_chat(model, tokenizer, task, ChatUnit(name, tuple(indices), params))
        records[name] = gather(graded(mine, run_programs)[0], world)
    return chat_metrics({name: summarise(found) for name, found in records.items() if found})


def chat_metrics(results: dict[str, ChatResult]) -> dict[str, Any]:
    """The tracker's numbers of chat evaluation; `chatcore_metric_name` says what the mean covers."""
    metrics: dict[str, Any] = {f"chatcore/{name}": result.accuracy for name, result in results.items()}
    for name, value in chat_core({name: result.accuracy for name, result in results.items()}).items():
        if name == "ChatCORE_cat":
            metrics["chatcore_cat"] = value
        elif name != "ChatCORE5":
            metrics |= {"chatcore_metric": value, "chatcore_metric_name": name}
    return metrics
