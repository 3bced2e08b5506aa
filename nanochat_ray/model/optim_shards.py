"""The parts of the optimizer: what one rank owns of a tensor or of a Muon group, and the communication around it.

Every part goes through `reduce` (start averaging gradients over ranks), `receive` (wait for this rank's share of them),
`update` (step what this rank owns, start gathering parameters) and `finish` (wait). With one rank there is nothing to
communicate, and the code is the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from nanochat_ray.model.muon import apply_update, muon_direction, second_moment_shape

ADAM_EPS = 1e-10
INITIAL_MOMENTUM = 0.95  # of Muon, until a schedule sets another

# Newer versions of torch renamed these two.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class ParamGroup:
    """Parameters that share a rule and its hyper-parameters; a schedule sets lr, momentum and Muon's weight decay."""

    kind: Literal["adamw", "muon"]
    names: list[str]
    params: list[nn.Parameter]
    lr: float
    weight_decay: float
    betas: tuple[float, float] = (0.0, 0.0)  # AdamW
    eps: float = ADAM_EPS  # AdamW
    momentum: float = INITIAL_MOMENTUM  # Muon
    beta2: float = 0.9  # Muon
    ns_steps: int = 5  # Muon
    initial_lr: float = field(init=False)  # what schedules multiply

    def __post_init__(self) -> None:
        if self.kind not in ("adamw", "muon"):
            raise ValueError(f"parameter group of kind {self.kind!r}; there are adamw and muon")
        self.initial_lr = self.lr


@dataclass
class Pending:
    """A collective under way. It holds its tensors: they must live until it is over."""

    result: Tensor
    source: Tensor | None = None
    work: dist.Work | None = None
    divisor: int = 1

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()  # gloo has no futures for reduce-scatter
        return self.result.div_(self.divisor) if self.divisor != 1 else self.result


@dataclass(frozen=True)
class Ranks:
    """This rank among `world_size`, and the collectives over them. No process group is needed for one rank."""

    rank: int = 0
    world_size: int = 1

    def share(self, n: int) -> tuple[int, int, int]:
        """How n rows fall to ranks: rows per slice (the last slices may be short or empty), own first row, own end."""
        rows = -(-n // self.world_size)
        return rows, min(self.rank * rows, n), min((self.rank + 1) * rows, n)

    def mean(self, x: Tensor) -> Pending:
        """Average over ranks, in place."""
        if self.world_size == 1:
            return Pending(x)
        op, divisor = self._averaging()
        return Pending(x, work=dist.all_reduce(x, op=op, async_op=True), divisor=divisor)

    def mean_slice(self, x: Tensor) -> Pending:
        """This rank's slice (s, ...) of the average of x (W * s, ...)."""
        if self.world_size == 1:
            return Pending(x)
        op, divisor = self._averaging()
        out = x.new_empty(x.size(0) // self.world_size, *x.shape[1:])
        return Pending(out, x, reduce_scatter(out, x, op=op, async_op=True), divisor)

    def gather(self, part: Tensor, out: Tensor) -> Pending:
        """The slices (s, ...) of all ranks, in order, in out (W * s, ...)."""
        return Pending(out, part, all_gather(out, part, async_op=True))

    def full(self, part: Tensor, n: int) -> Tensor:
        """All n rows of something cut up by `share`, of which this rank has `part`."""
        if self.world_size == 1:
            return part
        part = padded(part, self.share(n)[0])
        out = part.new_empty(self.world_size * len(part), *part.shape[1:])
        return self.gather(part, out).wait()[:n]

    def sum(self, x: Tensor) -> Pending:
        """Sum over ranks, in place."""
        return Pending(x, work=dist.all_reduce(x, async_op=True)) if self.world_size > 1 else Pending(x)

    def _averaging(self) -> tuple[dist.ReduceOp.RedOpType, int]:
        """The reduction, and what is left to divide by: gloo cannot average."""
        if dist.get_backend() == "nccl":
            return dist.ReduceOp.AVG, 1
        return dist.ReduceOp.SUM, self.world_size


def padded(x: Tensor, n: int) -> Tensor:
    """A contiguous copy of x with zero rows added up to n."""
    out = x.new_zeros(n, *x.shape[1:])
    out[: len(x)] = x
    return out


def gradient(param: nn.Parameter) -> Tensor:
    return torch.zeros_like(param) if param.grad is None else param.grad


class OptimShard(ABC):
    """What this rank keeps and updates of one AdamW tensor or one Muon group."""

    def __init__(self, group: ParamGroup, ranks: Ranks) -> None:
        self.group, self.ranks = group, ranks
        self.pending: Pending | None = None
        self.grad: Tensor | None = None  # this rank's share of the averaged gradient, from receive to update

    def wait(self) -> Tensor:
        """The result of the collective under way."""
        assert self.pending is not None
        pending, self.pending = self.pending, None
        return pending.wait()

    def receive(self, loss_scale: float = 1.0) -> Tensor:
        """Wait for the gradient that this rank steps with, divided by `loss_scale`; returns its sum of squares ()."""
        self.grad = self.wait()
        if loss_scale != 1:
            self.grad.div_(loss_scale)
        return torch.linalg.vector_norm(self.grad, dtype=torch.float32).square()

    def take_gradient(self) -> Tensor:
        """What `receive` got, which then belongs to the caller."""
        assert self.grad is not None
        grad, self.grad = self.grad, None
        return grad

    @abstractmethod
    def reduce(self) -> None: ...

    @abstractmethod
    def update(self) -> None: ...

    @abstractmethod
    def finish(self) -> None: ...

    @abstractmethod
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the full state by "<parameter>.<slot>"."""

    @abstractmethod
    def full_state(self) -> Iterator[tuple[str, Tensor]]:
        """Name and full tensor on the device, on every rank."""

    @abstractmethod
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take this rank's part of the full state."""


class AdamWShard(OptimShard):
    """Rows of a table, or a small tensor as a whole on every rank."""

    def __init__(self, group: ParamGroup, name: str, param: nn.Parameter, ranks: Ranks, cut: bool) -> None:
        super().__init__(group, ranks if cut else Ranks())
        self.name, self.param, self.cut, self.all_ranks = name, param, cut, ranks
        self.slice_rows, self.first, self.end = self.ranks.share(len(param))
        self.exp_avg = torch.zeros_like(param[self.first : self.end])
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        self.steps = torch.zeros((), device=param.device)

    def reduce(self) -> None:
        grad = gradient(self.param)
        if not self.cut:
            self.pending = self.all_ranks.mean(grad)
            return
        n_rows = self.slice_rows * self.ranks.world_size
        self.pending = self.ranks.mean_slice(grad if n_rows == len(grad) else padded(grad, n_rows))

    def receive(self, loss_scale: float = 1.0) -> Tensor:
        squares = super().receive(loss_scale)
        counts = self.cut or self.all_ranks.rank == 0  # what every rank has counts once
        return squares if counts else torch.zeros_like(squares)

    def update(self) -> None:
        grad, own = self.take_gradient()[: self.end - self.first], self.param[self.first : self.end]
        self.steps += 1
        if len(own):
            # One pass over memory, arithmetic in fp32 whatever the tensors' format (arXiv:1711.05101).
            torch._fused_adamw_(
                [own],
                [grad],
                [self.exp_avg],
                [self.exp_avg_sq],
                [],
                [self.steps],
                lr=self.group.lr,
                beta1=self.group.betas[0],
                beta2=self.group.betas[1],
                weight_decay=self.group.weight_decay,
                eps=self.group.eps,
                amsgrad=False,
                maximize=False,
            )
            increment_version(self.param)  # the fused step does not, and casts of the weight are kept by version
        if self.ranks.world_size > 1:
            n_rows = self.slice_rows * self.ranks.world_size
            out = self.param.data if n_rows == len(self.param) else own.new_empty(n_rows, *own.shape[1:])
            self.pending = self.ranks.gather(padded(own, self.slice_rows), out)

    def finish(self) -> None:
        if self.ranks.world_size > 1:
            gathered = self.wait()
            if len(gathered) != len(self.param):
                self.param.copy_(gathered[: len(self.param)])

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        shape = tuple(self.param.shape)
        return {f"{self.name}.exp_avg": shape, f"{self.name}.exp_avg_sq": shape, f"{self.name}.step": ()}

    def full_state(self) -> Iterator[tuple[str, Tensor]]:
        yield f"{self.name}.exp_avg", self.ranks.full(self.exp_avg, len(self.param))
        yield f"{self.name}.exp_avg_sq", self.ranks.full(self.exp_avg_sq, len(self.param))
        yield f"{self.name}.step", self.steps.long()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        own = slice(self.first, self.end)
        self.exp_avg.copy_(tensors[f"{self.name}.exp_avg"][own])
        self.exp_avg_sq.copy_(tensors[f"{self.name}.exp_avg_sq"][own])
        self.steps.copy_(tensors[f"{self.name}.step"])


class MuonShard(OptimShard):
    """Some of the matrices of a Muon group, which are whole and all of one shape."""

    def __init__(
        self, group: ParamGroup, ranks: Ranks, muon_eq: bool, muon_plus: bool, dtype: torch.dtype
    ) -> None:
        super().__init__(group, ranks)
        self.muon_eq, self.muon_plus, self.dtype = muon_eq, muon_plus, dtype
        like = group.params[0]
        m, n = like.shape
        self.slice_rows, self.first, self.end = ranks.share(len(group.params))
        self.own = group.params[self.first : self.end]
        self.momentum_buffer = like.new_zeros(len(self.own), m, n)
        self.second_moment = like.new_zeros(len(self.own), *second_moment_shape(m, n))

    def reduce(self) -> None:
        grads = [gradient(param) for param in self.group.params]
        n_padding = self.slice_rows * self.ranks.world_size - len(grads)
        stack = torch.stack(grads + [torch.zeros_like(grads[0])] * n_padding)  # (W * s, m, n)
        self.pending = self.ranks.mean_slice(stack)

    def update(self) -> None:
        grads = self.take_gradient()
        if self.own:
            direction = muon_direction(
                grads[: len(self.own)],
                self.momentum_buffer,
                self.second_moment,
                momentum=self.group.momentum,
                beta2=self.group.beta2,
                ns_steps=self.group.ns_steps,
                muon_eq=self.muon_eq,
                muon_plus=self.muon_plus,
                dtype=self.dtype,
            )
            apply_update(self.own, direction, self.group.lr, self.group.weight_decay)
        if self.ranks.world_size > 1:
            for slot, param in zip(grads, self.own, strict=False):
                slot.copy_(param)
            out = grads.new_empty(self.ranks.world_size * len(grads), *grads.shape[1:])
            self.pending = self.ranks.gather(grads, out)

    def finish(self) -> None:
        if self.ranks.world_size > 1:
            for param, new in zip(self.group.params, self.wait(), strict=False):  # the padding stays behind
                param.copy_(new)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, param in zip(self.group.names, self.group.params, strict=True):
            m, n = param.shape
            shapes[f"{name}.momentum_buffer"] = (m, n)
            shapes[f"{name}.second_momentum_buffer"] = second_moment_shape(m, n)
        return shapes

    def full_state(self) -> Iterator[tuple[str, Tensor]]:
        for slot, part in (
            ("momentum_buffer", self.momentum_buffer), ("second_momentum_buffer", self.second_moment)
        ):
            full = self.ranks.full(part, len(self.group.params))  # (k, ...)
            yield from zip((f"{name}.{slot}" for name in self.group.names), full, strict=True)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for i, name in enumerate(self.group.names[self.first : self.end]):
            self.momentum_buffer[i].copy_(tensors[f"{name}.momentum_buffer"])
            self.second_moment[i].copy_(tensors[f"{name}.second_momentum_buffer"])
