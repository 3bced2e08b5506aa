"""Evaluating a model of Transformers in the same units as our own; needs no Ray."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat_ray.corpus.reader import DataManifest, Split, validation_rows
from nanochat_ray.interchange.hf_core import evaluate_core_task
from nanochat_ray.interchange.hf_model import DEFAULT_SEQUENCE_LEN, HFSource, load
from nanochat_ray.messages import PackedRows
from nanochat_ray.metrics.bits_per_byte import evaluate_bpb
from nanochat_ray.model.precision import pick_dtype, prepare_device
from nanochat_ray.stages.evaluation import BpbUnit, CoreUnit, EvalSpec, Evaluator, Nats, Record, Unit, core_tasks
from nanochat_ray.stages.staging import micro_batches


@dataclass(frozen=True)
class HFSpec:
    """The model and the data to evaluate with; plain values, so it can cross to other processes."""

    source: HFSource
    device: str
    dtype: str | None = None
    bundle: Path | None = None
    manifest: DataManifest | None = None
    sequence_len: int = DEFAULT_SEQUENCE_LEN  # of rows for bits per byte
    device_batch_size: int = 32

    @property
    def name(self) -> str:
        return f"evaluate {self.source.name}"


class HFEvaluator:
    """A loaded model that evaluates units of CORE and of bits per byte."""

    def __init__(self, spec: HFSpec):
        self.spec = spec
        dtype, _ = pick_dtype(spec.device, spec.dtype)
        prepare_device(spec.device)
        self.model, self.tokenizer = load(spec.source, spec.device, dtype)

    def run(self, unit: Unit) -> list[Record]:
        if isinstance(unit, CoreUnit):
            assert self.spec.bundle is not None
            task = core_tasks(self.spec.bundle)[unit.label]
            return list(evaluate_core_task(self.model, self.tokenizer, task, unit.max_per_task, unit.indices))
        assert isinstance(unit, BpbUnit), f"{unit} is no unit for a model of others"
        model: Any = self.model
        part = PackedRows(self.split_rows(unit.split, unit.n_rows).tokens[unit.start : unit.stop])
        batches = micro_batches(part, self.spec.device_batch_size, self.spec.device)
        return [Nats(len(part), *evaluate_bpb(model, batches, self.token_bytes), str(self.model.compute_dtype))]

    @functools.cached_property
    def token_bytes(self) -> torch.Tensor:
        return torch.from_numpy(self.tokenizer.token_bytes()).to(self.spec.device)

    @functools.lru_cache(maxsize=2)  # noqa: B019  one evaluator per process, which lives as long as it
    def split_rows(self, split: Split, n_rows: int) -> PackedRows:
        assert self.spec.manifest is not None
        tokenizer: Any = self.tokenizer
        return validation_rows(self.spec.manifest, tokenizer, self.spec.sequence_len, n_rows, split)


def evaluator_of(spec: EvalSpec | HFSpec) -> Evaluator | HFEvaluator:
    """The loaded model that a spec names."""
    return HFEvaluator(spec) if isinstance(spec, HFSpec) else Evaluator(spec)


def run_units_here(spec: EvalSpec | HFSpec, units: Sequence[Unit]) -> list[list[Record]]:
    """Evaluate in this process, one unit after another."""
    evaluator = evaluator_of(spec)
    return [evaluator.run(unit) for unit in units]
