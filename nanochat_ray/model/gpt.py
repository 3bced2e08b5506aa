"""The network: a decoder-only transformer with value embeddings, smear, residual scalars, backout and windows.

Every weight matrix is stored (out, in) in fp32 and cast to the compute dtype where it is used; there is no autocast.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat_ray.config import ModelConfig
from nanochat_ray.model.attention import Cache, attend, rotary_tables, windows_of
from nanochat_ray.model.fp8 import Matrix, Recipe, fp8_linear
from nanochat_ray.model.ops import cross_entropy, mix, rms_norm, rotate_and_norm, softcap, squared_relu, wide

Rotary = tuple[Tensor, Tensor]  # cosine and sine


class Linear(Matrix):
    """y = x W^T without bias; the weight stays in fp32 and is cast to the dtype of x, or to fp8 (see `Matrix`)."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self._cast: tuple[tuple[int, int], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        recipe = self.recipe()
        return F.linear(x, self.cast_weight(x.dtype)) if recipe is None else fp8_linear(x, self.weight, recipe)

    def recipe(self) -> Recipe | None:
        found = super().recipe()
        if found is not None:
            self._cast = None  # a training pass, see `cast_weight`
        return found

    def cast_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight in another dtype. Inference keeps it, since decoding would spend half its time on casting.

        It is made anew when the weight's version counter has moved (writing through `.data` does not move it: write
        under `torch.no_grad()` instead). Fused optimizers do not move it either, so nothing is kept from a training
        pass on until its gradient is dropped.
        """
        weight = self.weight
        if weight.dtype == dtype:
            return weight
        training = torch.is_grad_enabled() or weight.grad is not None
        if training or torch.compiler.is_compiling() or weight.is_inference():
            self._cast = None
            return weight.to(dtype)
        state = weight.data_ptr(), weight._version
        if self._cast is None or self._cast[0] != state or self._cast[1].dtype != dtype:
            self._cast = state, weight.to(dtype)
        return self._cast[1]


class Table(nn.Module):
    """Vectors (rows, channels), looked up by id."""

    def __init__(self, n_rows: int, n_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_rows, n_channels))

    def forward(self, idx: Tensor) -> Tensor:
        return F.embedding(idx, self.weight)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, normalised queries and keys, a window, and in every second layer
    an embedding of the token added to its value."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.left = windows_of(config)[layer]
        kv_channels = config.n_kv_head * config.head_dim
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, kv_channels)
        self.c_v = Linear(config.n_embd, kv_channels)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        if has_value_embed(config, layer):
            self.ve_gate = Linear(config.value_gate_channels, config.n_kv_head)

    def forward(self, x: Tensor, value_embed: Tensor | None, rotary: Rotary, cache: Cache | None) -> Tensor:
        c = self.config
        B, T, _ = x.shape
        q = self.c_q(x).view(B, T, c.n_head, c.head_dim)
        k = self.c_k(x).view(B, T, c.n_kv_head, c.head_dim)
        v = self.c_v(x).view(B, T, c.n_kv_head, c.head_dim)
        if value_embed is not None:
            gate = c.value_gate_scale * torch.sigmoid(self.ve_gate(x[..., : c.value_gate_channels]))  # (B, T, K)
            v = torch.addcmul(v, gate[..., None], value_embed.view_as(v))
        q = rotate_and_norm(q, *rotary, c.qk_scale, c.norm_eps)
        k = rotate_and_norm(k, *rotary, c.qk_scale, c.norm_eps)
        if cache is None:
            y = attend(q, k, v, self.left)
        else:
            y = cache.attend(self.layer, q, k, v)
        return self.c_proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    """Two matrices with a squared ReLU between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(squared_relu(self.c_fc(x)))


class Block(nn.Module):
    """One layer: attention and MLP, each behind a norm and added to the stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, value_embed: Tensor | None, rotary: Rotary, cache: Cache | None) -> Tensor:
        x = x + self.attn(rms_norm(x, self.eps), value_embed, rotary, cache)
        return x + self.mlp(rms_norm(x, self.eps))


class Transformer(nn.Module):
    """The token table and the layers; a module of its own only because checkpoints have it in their names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.wte = Table(config.padded_vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))


def has_value_embed(config: ModelConfig, layer: int) -> bool:
    """Every second layer has value embeddings, the last one always."""
    return layer % 2 == (config.n_layer - 1) % 2


class GPT(nn.Module):
    """The network. The constructor leaves the weights unset; `build` gives an initialised one."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        kv_channels = config.n_kv_head * config.head_dim
        self.transformer = Transformer(config)
        self.lm_head = Linear(config.n_embd, config.padded_vocab_size)
        self.resid_lambdas = nn.Parameter(torch.empty(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.empty(config.n_layer))
        self.smear_gate = Linear(config.smear_channels, 1)
        self.smear_lambda = nn.Parameter(torch.empty(1))
        self.backout_lambda = nn.Parameter(torch.empty(1))
        self.value_embeds = nn.ModuleDict(
            {
                str(layer): Table(config.padded_vocab_size, kv_channels)
                for layer in range(config.n_layer)
                if has_value_embed(config, layer)
            }
        )
        shape = config.rope_table_factor * config.sequence_len, config.head_dim // 2
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(shape, dtype=compute_dtype), persistent=False)

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        *,
        device: str | torch.device = "cpu",
        compute_dtype: torch.dtype = torch.float32,
        seed: int = 42,
    ) -> GPT:
        """A network with fresh weights on a device; seeds torch's global generators."""
        with torch.device("meta"):
            model = cls(config, compute_dtype)
        model.to_empty(device=device)
        torch.manual_seed(seed)
        model.init_weights()
        return model

    @property
    def device(self) -> torch.device:
        return self.resid_lambdas.device

    @property
    def blocks(self) -> Iterable[Block]:
        return cast("Iterable[Block]", self.transformer.h)

    @property
    def tables(self) -> list[Table]:
        """The token table and the value embeddings by layer."""
        return [self.transformer.wte, *cast("Iterable[Table]", self.value_embeds.values())]

    def windows(self) -> list[int]:
        """Left window of each layer."""
        return windows_of(self.config)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set every tensor. Draws in fp32 from the global generator of the device, always in the same order."""
        L, bound = self.config.n_layer, math.sqrt(3 / self.config.n_embd)
        wte, *value_embeds = self.tables
        nn.init.normal_(wte.weight, std=0.8)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        for block in self.blocks:
            for projection in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                nn.init.uniform_(projection.weight, -bound, bound)
            nn.init.zeros_(block.attn.c_proj.weight)
            nn.init.uniform_(block.mlp.c_fc.weight, -0.4 * bound, 0.4 * bound)
            nn.init.zeros_(block.mlp.c_proj.weight)
        depth = torch.arange(L) / max(L - 1, 1)  # 0 at the first layer, 1 at the last
        self.resid_lambdas.copy_(1.15 - 0.10 * depth)
        self.x0_lambdas.copy_(0.20 - 0.15 * depth)
        self.smear_lambda.fill_(0.0)
        self.backout_lambda.fill_(0.2)
        nn.init.uniform_(self.smear_gate.weight, 0.0, 0.02)
        for table in value_embeds:
            nn.init.uniform_(table.weight, -bound, bound)
        for block in self.blocks:
            if hasattr(block.attn, "ve_gate"):
                nn.init.uniform_(block.attn.ve_gate.weight, 0.0, 0.02)
        cos, sin = rotary_tables(self.config, self.device)
        self.cos.copy_(cos)
        self.sin.copy_(sin)
        # An fp16 table would get fp16 gradients, which a loss scaler cannot unscale.
        for table in self.tables:
            table.to(torch.float32 if self.compute_dtype == torch.float16 else self.compute_dtype)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        cache: Cache | None = None,
        reduction: str = "mean",
        at: Tensor | None = None,
    ) -> Tensor:
        """Loss if there are targets, else logits.

        idx (B, T) int; targets (B, T) int64, -1 ignored. The loss is in nats: "mean" over the targets (0 if there is
        none), "sum", or "none" for (B, T) fp32 with 0 where ignored. Logits are (B, T, V) fp32 after the soft cap, or
        (n, V) at the n places `at` of the flattened idx. With a cache, idx continues its sequences. Raises ValueError
        when a row outgrows the rotary table.
        """
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction {reduction!r}; choose from mean, sum, none")
        c = self.config
        rotary = self.rotary(idx.size(1)) if cache is None else self.rotary_at(cache.positions)

        e = self.embed(idx)  # (B, T, C)
        x = x0 = self.smear(e, cache)
        middle = x
        for i, block in enumerate(self.blocks):
            x = mix(x, x0, self.resid_lambdas[i], self.x0_lambdas[i])
            value_embed = self.value_embeds[str(i)](idx).to(x.dtype) if has_value_embed(c, i) else None  # (B, T, K * D)
            x = block(x, value_embed, rotary, cache)
            if i == c.n_layer // 2:
                middle = x
        x = mix(x, middle, torch.ones_like(self.backout_lambda), -self.backout_lambda)  # backout
        x = rms_norm(x, c.norm_eps)
        if targets is None:
            return self.logits(x if at is None else x.flatten(0, 1)[at])
        return self.loss(x, targets, reduction)

    def embed(self, idx: Tensor) -> Tensor:
        """Normalised token embedding (B, T, C) in the compute dtype."""
        return rms_norm(self.transformer.wte(idx).to(self.compute_dtype), self.config.norm_eps)

    def smear(self, e: Tensor, cache: Cache | None) -> Tensor:
        """Each position's embedding plus a gated share of the previous position's; nothing comes before the first."""
        if cache is None:
            before = F.pad(e[:, :-1], (0, 0, 1, 0))
        else:
            before = self.embed(cache.previous) * (cache.positions > 0)[..., None]  # (B, T, C)
        gate = self.smear_lambda.to(e.dtype) * torch.sigmoid(self.smear_gate(e[..., : self.config.smear_channels]))
        return torch.addcmul(e, gate, before)

    def rotary(self, T: int) -> Rotary:
        """Tables (cos, cos) and (sin, -sin) of the first T positions, each (1, T, 1, D) in fp32."""
        if T > len(self.cos):
            raise ValueError(f"{T} positions are more than the {len(self.cos)} of the rotary table")
        return self._both_halves(self.cos[None, :T], self.sin[None, :T])

    def rotary_at(self, positions: Tensor) -> Rotary:
        """The same at given positions (B, T): (B, T, 1, D)."""
        return self._both_halves(self.cos[positions], self.sin[positions])

    @staticmethod
    def _both_halves(cos: Tensor, sin: Tensor) -> Rotary:
        cos, sin = wide(cos), wide(sin)  # (B, T, D/2)
        return torch.cat([cos, cos], dim=-1).unsqueeze(2), torch.cat([sin, -sin], dim=-1).unsqueeze(2)

    def logits(self, x: Tensor) -> Tensor:
        """Soft-capped logits (..., V) in fp32 of the normalised stream (..., C)."""
        return softcap(self.lm_head(x)[..., : self.config.vocab_size], self.config.logit_softcap)

    def loss(self, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """Cross-entropy of the normalised stream in nats, see `forward`."""
        c, recipe = self.config, self.lm_head.recipe()
        weight = self.lm_head.weight if recipe else self.lm_head.cast_weight(x.dtype)
        rows, ids, summed = x.flatten(0, 1), targets.flatten(), reduction != "none"
        loss = cross_entropy(rows, weight, ids, c.vocab_size, c.logit_softcap, summed, recipe)
        if reduction == "mean":
            return loss / (targets >= 0).sum().clamp(min=1)
        return loss if summed else loss.view(targets.shape)
