"""The Llama decoder, written small for fast training on a CPU; parameter names are those of a Hugging Face checkpoint.

Apart from train.py so that evaluation and export can be checked against it. Only rows with a label reach the vocabulary
projection, and attention is masked to one document, which is why this is not transformers' own module.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Shape:
    vocabulary: int = 2048
    width: int = 192
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    head_width: int = 32
    hidden: int = 512
    context: int = 1024
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-5


class RMSNorm(nn.Module):
    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), self.weight, self.epsilon)


def rope_tables(shape: Shape) -> tuple[Tensor, Tensor]:
    """Cosines and sines [context, head_width], halves repeated (Llama's rotate-half layout)."""
    frequency = shape.rope_theta ** (-torch.arange(0, shape.head_width, 2, dtype=torch.float32) / shape.head_width)
    angle = torch.outer(torch.arange(shape.context, dtype=torch.float32), frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = nn.Linear(shape.width, shape.heads * shape.head_width, bias=False)
        self.k_proj = nn.Linear(shape.width, shape.kv_heads * shape.head_width, bias=False)
        self.v_proj = nn.Linear(shape.width, shape.kv_heads * shape.head_width, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_width, shape.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        rows, length, _ = x.shape
        group = self.shape.heads // self.shape.kv_heads

        def split(projected: Tensor) -> Tensor:
            return projected.view(rows, length, -1, self.shape.head_width).transpose(1, 2)

        q = rotate(split(self.q_proj(x)), cos, sin).to(x.dtype)
        k = rotate(split(self.k_proj(x)), cos, sin).to(x.dtype).repeat_interleave(group, dim=1)
        v = split(self.v_proj(x)).repeat_interleave(group, dim=1)
        out = functional.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=mask)
        projected: Tensor = self.o_proj(out.transpose(1, 2).reshape(rows, length, -1))
        return projected


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.width, shape.hidden, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down_proj = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.width, shape.norm_epsilon)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.width, shape.norm_epsilon)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    """`model.*` of the checkpoint; the output projection is the embedding (tied)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.width, shape.norm_epsilon)
        cos, sin = rope_tables(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.data.mul_((2 * self.shape.layers) ** -0.5)

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Hidden states [B, T, width] after the last norm; mask [B, 1, T, T] is True where attention may look."""
        length = input_ids.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        hidden: Tensor = self.norm(x)
        return hidden


def document_mask(document: Tensor) -> Tensor:
    """Causal and within one document: [B, T] document numbers to a boolean mask [B, 1, T, T]."""
    length = document.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return ((document[:, :, None] == document[:, None, :]) & causal)[:, None]
