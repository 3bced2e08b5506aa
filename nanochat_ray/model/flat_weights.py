"""All weights of a network in one flat buffer: what is sent from a learner to those that sample with its policy."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanochat_ray.model.gpt import GPT, Linear

ALIGN_BYTES = 64


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the buffer."""

    name: str
    dtype: str  # torch's name of it
    shape: tuple[int, ...]
    start: int  # in bytes, like `n_bytes`
    n_bytes: int


@dataclass(frozen=True)
class FlatWeights:
    """One version of the weights."""

    version: int
    buffer: np.ndarray  # (n,) uint8
    places: tuple[Place, ...]


def _sent(model: GPT) -> dict[str, Tensor]:
    """The weights by name; matrices in the compute dtype, since that is what a forward pass makes of them."""
    matrices = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear)}
    return {
        name: tensor.detach().to(model.compute_dtype) if name in matrices else tensor.detach()
        for name, tensor in model.state_dict().items()
    }


@torch.no_grad()
def flatten(model: GPT, version: int) -> FlatWeights:
    """Copy a network's weights into a new buffer on the CPU."""
    tensors = _sent(model)
    places, end = [], 0
    for name, tensor in tensors.items():
        places.append(Place(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), end, tensor.nbytes))
        end += -(-tensor.nbytes // ALIGN_BYTES) * ALIGN_BYTES
    buffer = torch.zeros(end, dtype=torch.uint8)
    for place, tensor in zip(places, tensors.values(), strict=True):
        _view(buffer, place).copy_(tensor, non_blocking=True)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return FlatWeights(version, buffer.numpy(), tuple(places))


@torch.no_grad()
def load_flat(model: GPT, weights: FlatWeights) -> None:
    """Copy the weights into a network of the same shape, in place. ValueError if a name or a shape does not fit."""
    own = model.state_dict()
    if differing := own.keys() ^ {place.name for place in weights.places}:
        raise ValueError(f"weights do not fit the model: {', '.join(sorted(differing)[:5])} on one side only")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the buffer may be read-only, and is only read
        buffer = torch.from_numpy(weights.buffer)
    for place in weights.places:
        tensor = own[place.name]
        if tuple(tensor.shape) != place.shape:
            raise ValueError(f"weight {place.name}: {place.shape} sent, {tuple(tensor.shape)} wanted")
        tensor.copy_(_view(buffer, place))


def _view(buffer: Tensor, place: Place) -> Tensor:
    part = buffer[place.start : place.start + place.n_bytes]
    return part.view(getattr(torch, place.dtype)).view(place.shape)
