"""Decoding steps on a GPU as CUDA graphs: all kernels of a step are launched at once, and none waits for Python.

Source: https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat_ray.engine.kv_cache import Step
from nanochat_ray.model.gpt import GPT

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]  # it reads these, in place
    logits: Tensor  # (1, R, V), it writes these


class DecodeGraphs:
    """One network's graphs, by the shape of the step, each recorded when its shape first occurs."""

    def __init__(self, model: GPT) -> None:
        self._model = model
        self._graphs: dict[tuple[torch.Size, ...], _Graph] = {}
        self._broken = False

    def __call__(self, step: Step) -> Tensor:
        """Logits (R, V) of a padded step of one token per row; the rows' copies are left out."""
        inputs = step.tensors()
        shapes = tuple(tensor.shape for tensor in inputs)
        n = len(step.parts)
        if shapes not in self._graphs and not self._broken:
            try:
                self._graphs[shapes] = self._record(step)
            except RuntimeError as error:
                self._broken = True
                logger.warning("decoding without CUDA graphs, which is slower for small batches: %s", error)
        if self._broken:
            return self._model(step.idx, cache=step)[0, :n]
        found = self._graphs[shapes]
        for kept, new in zip(found.inputs, inputs, strict=True):
            kept.copy_(new, non_blocking=True)
        found.graph.replay()
        return found.logits[0, :n]

    def _record(self, step: Step) -> _Graph:
        """Steps write the same values when they are run again, so trying and recording them does no harm."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._model(step.idx, cache=step)  # kernels that choose or cast something at their first call do it here
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        pool = next((found.graph.pool() for found in self._graphs.values()), None)
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # others may load weights
            logits = self._model(step.idx, cache=step)
        return _Graph(graph, step.tensors(), logits)
