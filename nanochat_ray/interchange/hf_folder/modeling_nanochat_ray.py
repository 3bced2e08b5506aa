"""The nanochat-ray network for Transformers. Copied into an exported folder; imports only torch and transformers.

A decoder-only transformer with normalised embeddings, smear, value embeddings, residual scalars, windows, backout and
soft-capped logits. Parameters have the names of nanochat-ray's own checkpoints. To generate, padding stands on the
left.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_nanochat_ray import NanochatRayConfig

Rotary = tuple[Tensor, Tensor]  # cosine and sine, each (B, T, 1, D/2) fp32


def wide(x: Tensor) -> Tensor:
    """x in the dtype of the arithmetic: fp64 stays, everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, eps: float) -> Tensor:
    w = wide(x)
    return (w * torch.rsqrt(w.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def mix(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a x + b y."""
    return (wide(x) * wide(a) + wide(y) * wide(b)).to(x.dtype)


def rotate_and_norm(x: Tensor, rotary: Rotary, scale: float, eps: float) -> Tensor:
    """Rotary position on x (B, T, heads, D), then norm per head, then times `scale`."""
    cos, sin = rotary
    x1, x2 = wide(x).chunk(2, dim=-1)
    return (rms_norm(torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1), eps) * scale).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys, and in every second layer a value embedding."""

    def __init__(self, config: NanochatRayConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        kv_channels = config.n_kv_head * config.head_dim
        self.c_q = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_k = nn.Linear(config.n_embd, kv_channels, bias=False)
        self.c_v = nn.Linear(config.n_embd, kv_channels, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        if config.has_value_embed(layer):
            self.ve_gate = nn.Linear(config.value_gate_channels, config.n_kv_head, bias=False)

    def forward(
        self, x: Tensor, value_embed: Tensor | None, rotary: Rotary, visible: Tensor, cache: DynamicCache | None
    ) -> Tensor:
        """x (B, T, C), visible (B, 1, T, S) bool -> (B, T, C)."""
        c = self.config
        B, T, _ = x.shape
        q = rotate_and_norm(self.c_q(x).view(B, T, c.n_head, c.head_dim), rotary, c.qk_scale, c.norm_eps)
        k = rotate_and_norm(self.c_k(x).view(B, T, c.n_kv_head, c.head_dim), rotary, c.qk_scale, c.norm_eps)
        v = self.c_v(x).view(B, T, c.n_kv_head, c.head_dim)
        if value_embed is not None:
            gate = c.value_gate_scale * torch.sigmoid(self.ve_gate(x[..., : c.value_gate_channels]))  # (B, T, K)
            v = v + gate[..., None] * value_embed.view_as(v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, D)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)  # (B, K, S, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=c.n_head != c.n_kv_head)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """Two matrices with a squared ReLU between them."""

    def __init__(self, config: NanochatRayConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """One layer: attention and MLP, each behind a norm and added to the stream."""

    def __init__(self, config: NanochatRayConfig, layer: int) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        x = x + self.attn(rms_norm(x, self.eps), *more)
        return x + self.mlp(rms_norm(x, self.eps))


class Transformer(nn.Module):
    """The token table and the layers; a module of its own only because the parameters' names have it."""

    def __init__(self, config: NanochatRayConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))


class NanochatRayForCausalLM(PreTrainedModel, GenerationMixin):
    """The network with its head. Logits are fp32, without the surplus rows of the vocabulary."""

    config_class = NanochatRayConfig
    base_model_prefix = "model"  # there is no headless model; no parameter's name begins so
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    _supports_sdpa = True
    # Scalars that mix streams: in bf16 they would lose what training moved them by.
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = [
        "resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda",
    ]  # fmt: skip

    def __init__(self, config: NanochatRayConfig) -> None:
        super().__init__(config)
        if config._attn_implementation != "sdpa":
            raise ValueError(f"attn_implementation {config._attn_implementation!r}: this network has 'sdpa' only")
        kv_channels = config.n_kv_head * config.head_dim
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.zeros(config.n_layer))
        self.smear_gate = nn.Linear(config.smear_channels, 1, bias=False)
        self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.backout_lambda = nn.Parameter(torch.zeros(1))
        self.value_embeds = nn.ModuleDict(
            {
                str(i): nn.Embedding(config.padded_vocab_size, kv_channels)
                for i in range(config.n_layer)
                if config.has_value_embed(i)
            }
        )
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in Transformers, but a tensor without a place, or a place without a tensor, is a ValueError naming it."""
        kwargs["ignore_mismatched_sizes"] = True  # otherwise Transformers raises first, without the name
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        wrong = [
            f"{kind} {sorted(map(str, info[key]))[:5]}"
            for kind, key in (("missing", "missing_keys"), ("unexpected", "unexpected_keys"),
                              ("of another shape", "mismatched_keys"))
            if info[key]
        ]  # fmt: skip
        if wrong:
            raise ValueError(f"the weights do not fit the network: {'; '.join(wrong)}")
        return (model, info) if output_loading_info else model

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices and tables, which is what is saved as the model's; the first parameters are fp32 scalars."""
        return self.transformer.wte.weight.dtype

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte

    def set_input_embeddings(self, value: Any) -> None:
        self.transformer.wte = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.lm_head = new_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("the vocabulary cannot be resized: value embeddings and head have a row for every token too")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits (B, T, V) fp32 of input_ids (B, T), and with labels (B, T) the loss of predicting each from those
        before it, -100 left out.

        attention_mask (B, S) is 1 for tokens and 0 for padding, over what the cache holds and the new tokens.
        logits_to_keep: only the last so many positions, or those indices; 0 for all. Raises ValueError for padding
        with tokens before and behind it, and for a position beyond the rotary table.
        """
        if output_attentions or output_hidden_states:
            raise ValueError("output_attentions and output_hidden_states: this network gives logits only")
        c = self.config
        use_cache = (c.use_cache and not self.training) if use_cache is None else use_cache
        cache = (past_key_values if past_key_values is not None else DynamicCache()) if use_cache else past_key_values
        n_past = cache.get_seq_length() if cache is not None else 0
        T = input_ids.size(1)
        if attention_mask is not None:
            attention_mask = checked_mask(attention_mask, n_past + T)
            positions = (attention_mask.cumsum(-1) - 1)[:, n_past:].clamp(min=0)  # (B, T)
        else:
            positions = torch.arange(n_past, n_past + T, device=input_ids.device)[None]  # (1, T)
        rotary = self.rotary(positions, n_past + T)
        visible = {left: seen(T, n_past, left, attention_mask, input_ids.device) for left in set(c.windows)}

        x = x0 = middle = self.smear(input_ids, positions, cache)
        for i, block in enumerate(self.transformer.h):
            x = mix(x, x0, self.resid_lambdas[i], self.x0_lambdas[i])
            value_embed = self.value_embeds[str(i)](input_ids).to(x.dtype) if c.has_value_embed(i) else None
            x = block(x, value_embed, rotary, visible[c.windows[i]], cache)
            if i == c.n_layer // 2:
                middle = x
        x = rms_norm(mix(x, middle, torch.ones_like(self.backout_lambda), -self.backout_lambda), c.norm_eps)
        if isinstance(logits_to_keep, int):
            logits_to_keep = torch.arange(max(0, T - logits_to_keep) if logits_to_keep else 0, T, device=x.device)
        logits = self.logits(x[:, logits_to_keep])
        loss = None
        if labels is not None:
            if logits.size(1) != T:
                raise ValueError("labels need the logits of all positions: leave logits_to_keep out")
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device))
        if return_dict is False:
            return tuple(value for value in (loss, logits, cache) if value is not None)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def smear(self, input_ids: Tensor, positions: Tensor, cache: DynamicCache | None) -> Tensor:
        """Each token's embedding plus a gated share of the embedding of the token before it: (B, T, C).

        The cache has the earlier ids in a layer of its own behind the others, so whatever reorders, repeats or cuts a
        cache treats them as it does keys.
        """
        ids = self.with_earlier(input_ids, cache) if cache is not None else input_ids  # (B, past + T)
        T = input_ids.size(1)
        before = F.pad(ids, (1, 0))[:, -T - 1 : -1]  # (B, T)
        e, e_before = (rms_norm(self.transformer.wte(part), self.config.norm_eps) for part in (input_ids, before))
        gate = self.smear_lambda.to(e.dtype) * torch.sigmoid(self.smear_gate(e[..., : self.config.smear_channels]))
        return e + gate * (e_before * (positions > 0)[..., None])

    def with_earlier(self, input_ids: Tensor, cache: DynamicCache) -> Tensor:
        """Put the ids into the cache; all ids that it holds then."""
        n_layer = self.config.n_layer
        while len(cache.layers) <= n_layer:
            cache.layers.append(DynamicLayer())
        odd = next((layer for layer in cache.layers if not isinstance(layer, DynamicLayer)), None)
        if odd is not None:
            raise ValueError(f"a cache with a {type(odd).__name__}: this network needs a DynamicCache, the default")
        column = input_ids[:, None, :, None]  # (B, 1, T, 1)
        return cache.update(column, column[..., :0], n_layer)[0][:, 0, :, 0]

    def rotary(self, positions: Tensor, n_keys: int) -> Rotary:
        """Cosine and sine at positions (B, T), all below `n_keys`: each (B, T, 1, D/2) fp32."""
        c = self.config
        if n_keys > c.max_position_embeddings and (last := int(positions.max())) >= c.max_position_embeddings:
            raise ValueError(f"position {last} is beyond the {c.max_position_embeddings} of the rotary table")
        half = c.head_dim // 2
        frequencies = c.rope_base ** (-torch.arange(half, dtype=torch.float32, device=positions.device) / half)
        angles = positions[..., None].float() * frequencies  # (B, T, D/2)
        dtype = self.transformer.wte.weight.dtype
        return wide(angles.cos().to(dtype)).unsqueeze(2), wide(angles.sin().to(dtype)).unsqueeze(2)

    def logits(self, x: Tensor) -> Tensor:
        """Soft-capped logits (..., V) in fp32 of the normalised stream (..., C)."""
        cap = self.config.logit_softcap
        return cap * torch.tanh(wide(self.lm_head(x)[..., : self.config.vocab_size]) / cap)


def checked_mask(attention_mask: Tensor, n_keys: int) -> Tensor:
    """The mask (B, S) as int64; ValueError for another shape, and for padding that has tokens before and behind it."""
    if attention_mask.dim() != 2 or attention_mask.size(1) != n_keys:
        raise ValueError(f"attention_mask {tuple(attention_mask.shape)}: (rows, {n_keys}) is wanted, 0 for padding")
    mask = (attention_mask != 0).long()
    stretch = n_keys - mask.flip(-1).argmax(-1) - mask.argmax(-1)  # from the first token to the last
    if bool(((stretch != mask.sum(-1)) & mask.any(-1)).any()):
        raise ValueError(
            "padding between tokens: to generate from rows of different length, pad them on the left "
            "(tokenizer.padding_side = 'left')"
        )
    return mask


def seen(T: int, n_past: int, left: int, attention_mask: Tensor | None, device: torch.device) -> Tensor:
    """Which of the n_past + T keys each of T queries sees: itself, and what its window reaches but padding.

    (B or 1, 1, T, n_past + T) bool. Padding sees itself only, so that nothing is undefined.
    """
    queries = torch.arange(n_past, n_past + T, device=device)[:, None]
    distance = queries - torch.arange(n_past + T, device=device)  # (T, S)
    visible = ((distance >= 0) & (distance <= left))[None, None]
    if attention_mask is None:
        return visible
    return visible & (attention_mask[:, None, None, :] != 0) | (distance == 0)
