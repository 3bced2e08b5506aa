"""ZeRO stages 1 to 3 by DeepSpeed, with DeepSpeed's own Muon; its state by parameter name, so that it needs no pickle.

DeepSpeed's Muon (MuonWithAuxAdam) is another algorithm than ours: Newton-Schulz with fixed coefficients instead of
Polar Express, no row equalisation, no variance reduction, weight decay everywhere instead of where step and weight
agree. Both give an update of about the Frobenius norm sqrt(min(m, n)) and multiply it by sqrt(max(1, m / n)), so
learning rates carry over; decay in DeepSpeed lacks that shape factor. DeepSpeed is imported when a `Zero` is built.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import increment_version

from nanochat_ray.messages import World
from nanochat_ray.model.checkpoint import load_weights
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.optim import Rates, parameter_groups
from nanochat_ray.model.optim_shards import ParamGroup, all_gather
from nanochat_ray.stages.strategy import DEEPSPEED_OPTIMIZER, Objective, Strategy, summed_loss

MUON_SLOTS = ("momentum_buffer",)
ADAM_SLOTS = ("exp_avg", "exp_avg_sq")


class Zero(Strategy):
    """A DeepSpeed engine around the network. All parameters are kept in fp32, the tables too: ZeRO wants one format.

    DeepSpeed's interface for single parameters does not reach all of its Muon's state. So this reads attributes of its
    optimizers that the pinned version has: in stages 1 and 2 `round_robin_bit16_groups`, `round_robin_bit16_offsets`
    and `params_in_partition`; in stage 3 `fp16_groups`, `fp32_partitioned_groups_flat` and (written) `muon_beta`.
    """

    optimizer_name = DEEPSPEED_OPTIMIZER

    def __init__(self, name: str, model: GPT, world: World, rates: Rates, compiled: bool) -> None:
        super().__init__(model, world)
        self.scheduled = False
        self.name, self.stage = name, int(name.removeprefix("zero"))
        self.warnings = (
            "the recipe was tuned for nanochat's Muon; DeepSpeed's is another algorithm, so expect another loss",
        )
        self.notes = ("train/grad_norm is DeepSpeed's: of AdamW's gradients and Muon's finished updates",)
        for table in model.tables:
            table.float()
        params: dict[str, Any] = dict(model.named_parameters())  # DeepSpeed hangs its own things on them
        self.params = params
        self.shapes = {key: param.shape for key, param in params.items()}
        self.groups = parameter_groups(model, rates)
        prepare_process(world)
        import deepspeed
        from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

        self.deepspeed = deepspeed
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=MuonWithAuxAdam([deepspeed_group(group) for group in self.groups]),
            config=engine_config(self.stage, world.world_size), dist_init_required=False,
        )
        self.zero = self.engine.optimizer  # DeepSpeed's wrapper; `zero.optimizer` is MuonWithAuxAdam over flat shards
        # A tensor, because DeepSpeed compiles Muon anew for each new number.
        self.momentum = torch.zeros((), device=world.device)
        for theirs in self.zero.param_groups:
            if theirs["use_muon"]:
                theirs["momentum"] = self.momentum
        self.zero.muon_beta = self.momentum  # what stage 3 reads instead
        names = {id(param): key for key, param in params.items()}
        self.state: FlatState | CutState = (
            CutState(self.zero, world, names, params) if self.stage == 3 else FlatState(self.zero, world, names)
        )
        if compiled and self.stage == 3:  # a traced network does not gather the head's weight
            self.notes += ("zero3 trains without torch.compile",)
        elif compiled:
            self.engine.compile(compile_kwargs={"dynamic": False})

    # --- a step

    def micro_steps(self, n_own: int) -> int:
        """The most of all ranks: ZeRO 2 and 3 communicate in every pass, and none steps without one."""
        most = torch.tensor(n_own, device=self.world.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return max(1, int(most))

    def backward(
        self, inputs: Tensor, targets: Tensor, weight: float, last: bool, objective: Objective | None = None
    ) -> Tensor:
        assert self.scheduled, "set_schedule comes before accumulate"
        self.engine.set_gradient_accumulation_boundary(last)
        loss = summed_loss(self.engine, inputs, targets, objective)
        self.engine.backward(loss * weight)
        return loss.detach()

    def set_schedule(self, lr_multiplier: float, momentum: float, weight_decay: float) -> None:
        self.scheduled = True
        for group, theirs in zip(self.groups, self.zero.param_groups, strict=True):
            theirs["lr"] = group.initial_lr * lr_multiplier
            if group.kind == "muon":
                theirs["weight_decay"] = weight_decay
        self.momentum.fill_(momentum)

    def scale_initial_lr(self, frac: float) -> None:
        for group in self.groups:
            group.initial_lr *= frac

    def update(self) -> float:
        self.engine.step()
        self.scheduled = False
        if self.stage < 3:
            increment_version(list(self.model.parameters()))  # written through flat buffers, behind the counters
        norm = self.engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    # --- state

    @contextmanager
    def full_weights(self) -> Iterator[GPT]:
        """Stage 3: a copy of the network, without DeepSpeed's hooks, so that ranks need not evaluate in step."""
        if self.stage < 3:
            yield self.model
            return
        with torch.device("meta"):
            copy = GPT(self.model.config, self.model.compute_dtype)
        copy.to_empty(device=self.model.device)
        with self._gathered(), torch.no_grad():
            for own, source in zip(copy.parameters(), self.model.parameters(), strict=True):
                own.copy_(source)
            for buffer, source_buffer in zip(copy.buffers(), self.model.buffers(), strict=True):
                buffer.copy_(source_buffer)
        yield copy

    def model_tensors(self) -> dict[str, Tensor]:
        with self._gathered():
            return super().model_tensors()

    @torch.no_grad()
    def optimizer_tensors(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for index, group in enumerate(self.groups):
            for key, tensor in self.state.get(index, group, self.shapes):
                if self.world.rank == 0:
                    state[key] = tensor.to("cpu", copy=True)
        return state

    @torch.no_grad()
    def load(self, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor] | None) -> None:
        if optimizer is not None:
            self._check_state(optimizer)
        with self._gathered(write=True):
            load_weights(self.model, dict(model))
        for name, param in self.params.items():
            value = model[name].to(self.world.device, torch.float32)
            if self.stage == 3:
                part = own_part(value, param.ds_tensor.numel(), self.world)
                self.deepspeed.utils.safe_set_local_fp32_param(param, part)
            else:
                self.deepspeed.utils.safe_set_full_fp32_param(param, value)
        if optimizer is not None:
            for index, group in enumerate(self.groups):
                self.state.set(index, group, optimizer)

    def extra_state(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self.engine.destroy()

    def _gathered(self, write: bool = False):
        """Stage 3: inside, parameters are whole on every rank; with `write` rank 0's changes go to all."""
        params = list(self.model.parameters())
        return self.deepspeed.zero.GatheredParameters(
            params, modifier_rank=0 if write else None, enabled=self.stage == 3
        )

    def _check_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises ValueError unless these are the tensors that `optimizer_tensors` gives."""
        expected = {key: shape for group in self.groups for key, shape in state_shapes(group, self.shapes).items()}
        missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        if missing or unknown:
            raise ValueError(
                f"optimizer state does not fit {self.optimizer_name}: {len(missing)} missing {missing[:3]}, "
                f"{len(unknown)} unknown {unknown[:3]} of {len(expected)} tensors; was it saved by another --parallel?"
            )
        for key, shape in expected.items():
            if tensors[key].shape != shape:
                raise ValueError(f"optimizer state {key} has shape {tuple(tensors[key].shape)}, not {tuple(shape)}")


class FlatState:
    """The optimizer's state in stages 1 and 2.

    DeepSpeed lays each parameter group out in one flat tensor and gives every rank an equal part. AdamW's moments are
    parts like the weights'; Muon's momentum is whole for each matrix that a rank's part touches.
    """

    def __init__(self, zero: Any, world: World, names: Mapping[int, str]) -> None:
        self.zero, self.world, self.names = zero, world, names

    def get(self, index: int, group: ParamGroup, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
        """Name and full tensor of a group's state, on every rank. A collective."""
        flat = self.zero.optimizer.param_groups[index]["params"][0]
        state = self.zero.optimizer.state.get(flat, {})
        if group.kind == "adamw":
            for slot in ADAM_SLOTS:
                part = state.get(slot, torch.zeros_like(flat))
                whole = part.new_empty(self.world.world_size * len(part))
                all_gather(whole, part)
                for name, offset in self._layout(index):
                    yield f"{name}.{slot}", whole[offset : offset + shapes[name].numel()].view(shapes[name])
            for name in group.names:
                yield f"{name}.step", torch.tensor(state.get("step", 0))
            return
        own = self._touched(index)
        sizes = [shapes[name].numel() for name in own]
        momentum = state.get("momentum_buffer", flat.new_zeros(sum(sizes)))
        momenta = dict(zip(own, momentum.split(sizes), strict=True))
        for name, offset in self._layout(index):
            whole = momenta[name].clone() if name in momenta else flat.new_empty(shapes[name].numel())
            dist.broadcast(whole, src=offset // len(flat))
            yield f"{name}.momentum_buffer", whole.view(shapes[name])

    def set(self, index: int, group: ParamGroup, tensors: Mapping[str, Tensor]) -> None:
        """Take this rank's part of a group's state."""
        flat = self.zero.optimizer.param_groups[index]["params"][0]
        if group.kind == "adamw":
            state: dict[str, Any] = {"step": int(tensors[f"{group.names[0]}.step"])}
            for slot in ADAM_SLOTS:
                whole = flat.new_zeros(self.world.world_size * len(flat))
                for name, offset in self._layout(index):
                    value = tensors[f"{name}.{slot}"].flatten()
                    whole[offset : offset + len(value)] = value
                state[slot] = whole.view(self.world.world_size, -1)[self.world.rank].clone()
        else:
            momenta = [tensors[f"{name}.momentum_buffer"].flatten() for name in self._touched(index)]
            state = {"momentum_buffer": torch.cat(momenta).to(flat.device, flat.dtype)} if momenta else {}
        self.zero.optimizer.state[flat] = state

    def _layout(self, index: int) -> list[tuple[str, int]]:
        """Name and first element of each parameter in its group's flat tensor."""
        params = self.zero.round_robin_bit16_groups[index]
        offsets = self.zero.round_robin_bit16_offsets[index]
        return [(self.names[id(param)], offset) for param, offset in zip(params, offsets, strict=True)]

    def _touched(self, index: int) -> list[str]:
        """The matrices of which this rank's part holds something."""
        return [self.names[id(param)] for param in self.zero.params_in_partition[index]]


class CutState:
    """The optimizer's state in stage 3: each parameter is cut evenly over the ranks, and so is its state."""

    def __init__(self, zero: Any, world: World, names: Mapping[int, str], params: Mapping[str, Any]) -> None:
        self.zero, self.world, self.params = zero, world, params
        self.flat_of = {
            names[id(param)]: flat
            for group, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)
            for param in group
        }

    def get(self, index: int, group: ParamGroup, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
        """Name and full tensor of a group's state, on every rank. A collective."""
        from deepspeed.utils import safe_get_full_optimizer_state

        for name in group.names:
            state = self.zero.optimizer.state.get(self.flat_of[name], {})
            for slot in slots(group):
                there = slot in state
                full = safe_get_full_optimizer_state(self.params[name], slot) if there else torch.zeros(shapes[name])
                yield f"{name}.{slot}", full
            if group.kind == "adamw":
                yield f"{name}.step", torch.tensor(state.get("step", 0))

    def set(self, index: int, group: ParamGroup, tensors: Mapping[str, Tensor]) -> None:
        """Take this rank's part of a group's state."""
        from deepspeed.utils import safe_set_local_optimizer_state

        for name in group.names:
            flat, param = self.flat_of[name], self.params[name]
            if not self.zero.optimizer.state.get(flat):
                self.zero.optimizer.state[flat] = {slot: torch.zeros_like(flat) for slot in slots(group)}
            for slot in slots(group):
                part = own_part(tensors[f"{name}.{slot}"].to(flat), param.ds_tensor.numel(), self.world)
                safe_set_local_optimizer_state(param, part, slot)
            if group.kind == "adamw":
                self.zero.optimizer.state[flat]["step"] = int(tensors[f"{name}.step"])


def slots(group: ParamGroup) -> tuple[str, ...]:
    return MUON_SLOTS if group.kind == "muon" else ADAM_SLOTS


def state_shapes(group: ParamGroup, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """Shapes of a group's state by "<parameter>.<slot>"."""
    found = {f"{name}.{slot}": shapes[name] for name in group.names for slot in slots(group)}
    if group.kind == "adamw":
        found |= {f"{name}.step": torch.Size([]) for name in group.names}
    return found


def own_part(value: Tensor, n: int, world: World) -> Tensor:
    """This rank's n elements of a tensor that is cut evenly, with zeros behind its end."""
    padded = value.new_zeros(n * world.world_size)
    padded[: value.numel()] = value.flatten()
    return padded[world.rank * n : (world.rank + 1) * n]


def deepspeed_group(group: ParamGroup) -> dict[str, Any]:
    """One of our parameter groups as MuonWithAuxAdam wants it; also marks its parameters, which ZeRO looks at."""
    muon = group.kind == "muon"
    for param in group.params:
        param.use_muon = muon  # type: ignore[attr-defined]
    theirs = {"params": group.params, "lr": group.lr, "weight_decay": group.weight_decay, "use_muon": muon}
    return theirs | ({"momentum": group.momentum} if muon else {"betas": group.betas, "eps": group.eps})


def engine_config(stage: int, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration. Its batch sizes only have to fit together: `Zero` accumulates by hand."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world_size,
        "gradient_clipping": 0.0,
        # Its Muon refuses a reduce-scatter in stage 3, and needs whole matrices anyway.
        "zero_optimization": {"stage": stage, "reduce_scatter": stage < 3},
        "zero_allow_untested_optimizer": True,
    }


def prepare_process(world: World) -> None:
    """What DeepSpeed expects of a process.

    A process group of one rank, if there is none, stays: DeepSpeed remembers the first that it sees.
    """
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    if world.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if shutil.which("ninja") is None:  # installed beside this Python, which need not be on the path
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not dist.is_initialized():
        assert world.world_size == 1, "torch.distributed is not running"
        backend = "nccl" if world.device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
