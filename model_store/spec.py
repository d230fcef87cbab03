"""What a decoder-only transformer is to us: numbers and switches, no names of tensors and no file formats.

Apart from architectures.py so that decoder.py and reference.py, which must agree on the meaning of every field, depend
on nothing else. Each field changes the arithmetic; a new kind of model is a new field here and one branch in both.
"""

from __future__ import annotations

from dataclasses import dataclass

from model_store.rope import Rope


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A pre-norm decoder: RMSNorm, grouped-query attention with rotary positions, gated SiLU feed-forward."""

    architecture: str  # Hugging Face name
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    norm_epsilon: float
    rope: Rope
    windows: tuple[int, ...]  # [num_layers] a query sees keys with position > its own - window; 0 = all
    qkv_bias: bool
    output_bias: bool  # on the attention's output projection
    mlp_bias: bool
    qk_norm: bool  # RMSNorm over every q and k head before the rotation
    tied_embeddings: bool  # the output layer is the embedding table

    @property
    def max_model_len(self) -> int:
        """Context length in tokens."""
        return self.rope.max_positions

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        return self.q_size + 2 * self.kv_size
