"""Whether a run fits: the memory of one rank in parts, and the largest device batch size."""

from __future__ import annotations

from dataclasses import dataclass

from nanochat_ray.config import ModelConfig
from nanochat_ray.plan.activations import Compute, StepBytes, step_bytes
from nanochat_ray.plan.state import Shapes, StateBytes, state_bytes

GIB = 2**30
USABLE_FRAC = 0.92  # of a device's memory: the rest is lost between torch's blocks
RESERVE_GPU_BYTES = int(1.5 * GIB)  # the CUDA context, the libraries' workspaces, NCCL's buffers
RESERVE_CPU_BYTES = int(0.75 * GIB)  # Python, torch, Ray and scratch memory of one worker; bench/plan.py measures it


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the two times when they can be greatest: in a micro-step, and in the optimizer's step."""

    parallel: str
    rows: int  # the device batch size
    state: StateBytes
    step: StepBytes
    reserve: int
    micro_steps: int

    @property
    def in_step(self) -> int:
        """In the forward and backward pass.

        With one micro-step the gradients come as the activations go, so only one of the two is there in full.
        """
        s, held = self.step, self.state.weights + self.state.optimizer + self.state.buffers + self.reserve
        passes = s.activations + s.weight_casts + max(s.logits, s.backward)
        if self.micro_steps > 1 or self.parallel != "sharded":
            return held + self.state.gradients + passes
        return held + max(passes, self.state.gradients + s.backward)

    @property
    def in_update(self) -> int:
        return sum((self.state.weights, self.state.gradients, self.state.optimizer, self.state.update, self.reserve))

    @property
    def peak(self) -> int:
        return max(self.in_step, self.in_update)

    def fits(self, memory_bytes: int) -> bool:
        return self.peak <= USABLE_FRAC * memory_bytes


class MemoryPlan:
    """Memory of a network's training by strategy and device batch size."""

    def __init__(
        self, config: ModelConfig, compute: Compute, shapes: Shapes, ranks: int, rows_per_step: int
    ) -> None:
        self.config, self.compute, self.shapes, self.ranks = config, compute, shapes, ranks
        self.rows_per_rank = -(-rows_per_step // ranks)
        self._states: dict[str, StateBytes] = {}

    def state(self, parallel: str) -> StateBytes:
        if parallel not in self._states:
            self._states[parallel] = state_bytes(self.shapes, parallel, self.ranks)
        return self._states[parallel]

    def at(self, parallel: str, rows: int) -> Memory:
        """A rank's memory with micro-steps of `rows` rows, or as many as there are."""
        rows = min(rows, self.rows_per_rank)
        return Memory(
            parallel, rows, self.state(parallel), step_bytes(self.config, rows, self.compute),
            RESERVE_CPU_BYTES if self.compute.on_cpu else RESERVE_GPU_BYTES, -(-self.rows_per_rank // rows),
        )

    def largest_rows(self, parallel: str, memory_bytes: int) -> int:
        """The largest power of two that fits, or a rank's share of a step if all of that does; 0 if nothing fits."""
        if self.at(parallel, self.rows_per_rank).fits(memory_bytes):
            return self.rows_per_rank
        rows = 1 << (self.rows_per_rank.bit_length() - 1)
        while rows and not self.at(parallel, rows).fits(memory_bytes):
            rows //= 2
        return rows
