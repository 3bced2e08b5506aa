"""Our network as a model of vLLM. Only vLLM imports this, where `vllm_plugin.register` has told it to.

The network is `GPT` itself, with the cache behind its attention replaced by vLLM's. So there is one text of the
architecture, its tensors have the checkpoint's names, and nothing has to be rearranged when weights come.

Smear wants the token before each token, which may lie in an earlier chunk, in a block found in the prefix cache or in
one computed again after preemption. All of these know a token's keys and values and nothing else of it, so what has to
be known later must be in there: one more attention layer has a window of two positions, zero queries and keys, and as
value the token's id in binary. Its output is the plain mean of the two ids' digits, from which the own ones are taken
away. Digits 0 and 1 and their means are exact in every dtype (values made of embeddings would lose their last bits in
the difference), and one key head is wide enough for them, so its pages are as large as the other layers'.

vLLM deals memory to groups of layers that keep the same positions, as many groups as the rarest kind of layer demands.
A kind of its own for the one layer with two positions would make every layer a group, each with tables to be filled in
every step. So that layer keeps what the last layer keeps, where vLLM's attention takes a window for each layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat_ray.config import ModelConfig
from nanochat_ray.interchange.vllm_plugin import NETWORK_KEY
from nanochat_ray.model.attention import rotary_tables
from nanochat_ray.model.checkpoint import load_weights
from nanochat_ray.model.flat_weights import FlatWeights, load_flat
from nanochat_ray.model.gpt import GPT, Linear, Table

if TYPE_CHECKING:
    from vllm.config import VllmConfig

HEAD_MULTIPLE = 32  # channels; vLLM's kernels for CPUs know all such head sizes up to 256
WINDOWS_BY_LAYER = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")  # vLLM's attention that allows for several in a group


class Body(GPT):
    """The network up to its last norm: vLLM asks for the logits of few positions, and later."""

    def logits(self, x: Tensor) -> Tensor:
        return x

    def head(self, x: Tensor) -> Tensor:
        """Soft-capped logits (n, V) in fp32 of what `forward` gave (n, C)."""
        return super().logits(x)


class PagedAttention(nn.Module):
    """One attention layer of vLLM, for heads of any size: they are filled up with zeros, which changes no score."""

    attention: Any

    def __init__(self, config: ModelConfig, window: int, vllm_config: VllmConfig, name: str) -> None:
        """`window` counts the own position too; 0 is no window."""
        from vllm.model_executor.layers.attention import Attention

        super().__init__()
        self.size = config.head_dim
        self.padded_size = -(-config.head_dim // HEAD_MULTIPLE) * HEAD_MULTIPLE
        self.attention = Attention(
            config.n_head,
            self.padded_size,
            config.head_dim**-0.5,
            num_kv_heads=config.n_kv_head,
            cache_config=vllm_config.cache_config,
            per_layer_sliding_window=window or None,
            prefix=name,
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (N, H, D), k and v (N, K, D), with D = `size` -> (N, H, D)."""
        padding = 0, self.padded_size - q.size(-1)
        if padding[1]:
            q, k, v = F.pad(q, padding), F.pad(k, padding), F.pad(v, padding)
        y = self.attention(q.flatten(1), k.flatten(1), v.flatten(1))
        return y.view(q.shape)[..., : self.size]


class PreviousToken(PagedAttention):
    """The id of the token before each token of the running sequences; see above."""

    def __init__(self, config: ModelConfig, vllm_config: VllmConfig, name: str) -> None:
        super().__init__(config, 2, vllm_config, name)
        self.config, self.n_digits = config, (config.padded_vocab_size - 1).bit_length()
        assert self.n_digits <= self.padded_size, "a head cannot hold an id"
        self.size = self.padded_size

    def find(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """ids (N,) -> (N,) int64; of no meaning at position 0, where there is none before."""
        places = torch.arange(self.n_digits, device=ids.device)
        digits = (ids[:, None] >> places & 1).to(dtype)  # (N, digits)
        nothing = torch.zeros(len(ids), self.config.n_head, self.padded_size, dtype=dtype, device=ids.device)
        values = nothing[:, : self.config.n_kv_head].clone()
        values[:, 0, : self.n_digits] = digits
        mean = self(nothing, nothing[:, : self.config.n_kv_head], values)[:, 0, : self.n_digits]
        before = (2 * mean - digits > 0.5).long() << places
        # Where vLLM only measures memory, attention leaves its output unset.
        return before.sum(dim=-1).clamp(max=self.config.padded_vocab_size - 1)


class Pages:
    """A forward pass' view of vLLM's cache: the `Cache` of model/attention.py for N tokens of several sequences."""

    def __init__(self, positions: Tensor, previous: Tensor, layers: nn.ModuleList) -> None:
        self.positions, self.previous, self.layers = positions[None], previous[None], layers

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.layers[layer](q[0], k[0], v[0])[None]


class NanochatRayForCausalLM(nn.Module):
    """What vLLM makes, fills with weights and runs."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        if (size := vllm_config.parallel_config.world_size) != 1:
            raise ValueError(f"world size {size}: this network runs whole on one device; start more engines instead")
        if vllm_config.quant_config is not None:
            raise ValueError(f"quantization {vllm_config.model_config.quantization}: not supported for this network")
        config = ModelConfig.model_validate(getattr(vllm_config.model_config.hf_config, NETWORK_KEY))
        dtype, length = vllm_config.model_config.dtype, vllm_config.model_config.max_model_len
        self.config = config
        self.gpt = Body(config, dtype)
        _set_dtypes(self.gpt, dtype)
        cos, sin = rotary_tables(config, self.gpt.device)
        self.gpt.cos.copy_(cos)
        self.gpt.sin.copy_(sin)
        # Ours counts the positions before the own one, vLLM's the own one too. A window that holds everything is none.
        windows = [0 if left + 1 >= length else left + 1 for left in self.gpt.windows()]
        layers = [PagedAttention(config, window, vllm_config, f"layers.{k}.attn") for k, window in enumerate(windows)]
        self.attention = nn.ModuleList(layers)
        self.smear = PreviousToken(config, vllm_config, f"layers.{config.n_layer}.smear")
        if self.smear.attention.attn_backend.get_name() in WINDOWS_BY_LAYER:
            self.smear.attention.get_kv_cache_spec = layers[-1].attention.get_kv_cache_spec

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.gpt.embed(input_ids)

    def forward(
        self, input_ids: Tensor, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Any = None
    ) -> Tensor:
        """The stream behind the last norm (N, C) of tokens `input_ids` (N,) at `positions` (N,)."""
        if inputs_embeds is not None:
            raise ValueError("prompts are token ids: smear and value embeddings look tokens up by their ids")
        previous = self.smear.find(input_ids, self.gpt.compute_dtype)
        return self.gpt(input_ids[None], cache=Pages(positions, previous, self.attention))[0]

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return self.gpt.head(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Take a checkpoint's tensors by name; ValueError if a name or a shape does not fit."""
        load_weights(self.gpt, dict(weights))
        return {f"gpt.{name}" for name in self.gpt.state_dict()}


class WeightReceiver:
    """Methods that vLLM adds to its worker (`worker_extension_cls`), for `collective_rpc`."""

    def receive_weights(self, weights: FlatWeights) -> int:
        """Copy weights into the network in place. Returns their version; ValueError, and nothing is done, if they do
        not fit."""
        gpt = self.model_runner.get_model().gpt  # type: ignore[attr-defined]
        own = {name: tuple(tensor.shape) for name, tensor in gpt.state_dict().items()}
        if other := [place for place in weights.places if own.get(place.name) != place.shape]:
            name, shape = other[0].name, other[0].shape
            raise ValueError(f"weights do not fit the network: {name} has {shape}, wanted is {own.get(name)}")
        load_flat(gpt, weights)
        return weights.version


def _set_dtypes(gpt: GPT, dtype: torch.dtype) -> None:
    """What a forward pass makes of the weights: matrices in the compute dtype, tables as `GPT.init_weights` has them,
    scalars in fp32."""
    for module in gpt.modules():
        if isinstance(module, Linear):
            module.to(dtype)
        elif isinstance(module, Table):
            module.to(torch.float32 if dtype == torch.float16 else dtype)
    for name in ("resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda"):
        setattr(gpt, name, nn.Parameter(getattr(gpt, name).float()))
