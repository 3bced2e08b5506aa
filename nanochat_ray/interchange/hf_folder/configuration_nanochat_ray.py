"""A nanochat-ray network's configuration for Transformers. Copied into an exported folder."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig


class NanochatRayConfig(PretrainedConfig):
    """All constants of the network, so that weights never load with other maths.

    `vocab_size` counts tokens; the tables have rows up to the next multiple of `vocab_pad_multiple`, of which the
    surplus is never predicted. `sequence_len` is the context of training, from which the windows derive;
    `rope_table_factor` times that is the furthest position.
    """

    model_type = "nanochat_ray"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
    }

    def __init__(
        self,
        sequence_len: int = 2048,
        vocab_size: int = 32768,
        n_layer: int = 12,
        n_head: int = 6,
        n_kv_head: int = 6,
        n_embd: int = 768,
        window_pattern: str = "SSSL",
        rope_base: float = 100_000.0,
        rope_table_factor: int = 10,
        qk_scale: float = 1.2,
        logit_softcap: float = 15.0,
        norm_eps: float = 2.0**-23,
        smear_channels: int = 24,
        value_gate_channels: int = 12,
        value_gate_scale: float = 3.0,
        vocab_pad_multiple: int = 64,
        arch_version: int = 1,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **more: Any,
    ) -> None:
        self.sequence_len = sequence_len
        self.vocab_size = vocab_size
        self.n_layer = n_layer
        self.n_head = n_head
        self.n_kv_head = n_kv_head
        self.n_embd = n_embd
        self.window_pattern = window_pattern
        self.rope_base = rope_base
        self.rope_table_factor = rope_table_factor
        self.qk_scale = qk_scale
        self.logit_softcap = logit_softcap
        self.norm_eps = norm_eps
        self.smear_channels = smear_channels
        self.value_gate_channels = value_gate_channels
        self.value_gate_scale = value_gate_scale
        self.vocab_pad_multiple = vocab_pad_multiple
        self.arch_version = arch_version
        self.use_cache = use_cache
        if arch_version != 1:
            raise ValueError(f"arch_version {arch_version}: this file knows version 1; take the folder's own one")
        if tie_word_embeddings:
            raise ValueError("tie_word_embeddings: the network's input and output tables are not the same")
        super().__init__(tie_word_embeddings=False, **more)

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_pad_multiple) * self.vocab_pad_multiple

    @property
    def max_position_embeddings(self) -> int:
        return self.rope_table_factor * self.sequence_len

    @property
    def windows(self) -> list[int]:
        """Left window of each layer: earlier positions that a query sees besides its own. The last layer's is L."""
        short = -(-self.sequence_len // 512) * 128  # a quarter of the context, rounded up to a multiple of 128
        letters = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.n_layer - 1)] + ["L"]
        return [self.sequence_len if letter in "Ll" else short for letter in letters]

    def has_value_embed(self, layer: int) -> bool:
        """Every second layer has value embeddings, the last one always."""
        return layer % 2 == (self.n_layer - 1) % 2
