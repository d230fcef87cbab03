"""The decoder in plain NumPy, straight from the checkpoint: what an artifact is compared with.

Shares nothing with the graph but the spec: no packing, no kernels, no KV cache. One layer's weights are read at a time
for all prompts together, so memory holds a layer and time is one pass over the file. Sums that decide little digits
(norms, softmax) are taken in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from model_store.checkpoint import Checkpoint
from model_store.spec import DecoderSpec

Floats = NDArray[np.float32]
TokenIds = NDArray[np.int64]
# Sees activations [T, channels] of all prompts by name, layer after layer: what each linear layer multiplies (by the
# names that decoder.py gives the layers: layers.3.qkv, .output, .gate_up, .down, and lm_head) and what goes into the
# KV cache (layers.3.k after the rotation, layers.3.v).
Observer = Callable[[str, Floats], None]


def _see_nothing(_: str, __: Floats) -> None:
    """Nobody watches."""


def reference_logits(
    checkpoint: Checkpoint, prompts: Sequence[TokenIds], observe: Observer = _see_nothing
) -> list[Floats]:
    """Logits [T, vocab_size] of every prompt of T token ids, in float32."""
    spec = checkpoint.spec
    offsets = np.cumsum([0, *(len(prompt) for prompt in prompts)])
    spans = [slice(start, stop) for start, stop in pairwise(offsets)]
    table = spec.rope.table()[: max((len(prompt) for prompt in prompts), default=0)]
    positions = np.concatenate([np.arange(len(prompt)) for prompt in prompts])

    x = _embed(checkpoint, np.concatenate(prompts))
    for layer in range(spec.num_layers):
        weights, at = _Layer(checkpoint, layer), f"layers.{layer}"
        normed = _rms_norm(x, weights["attention_norm"], spec.norm_epsilon)
        observe(f"{at}.qkv", normed)
        q, k, v = (weights.linear(name, normed) for name in ("q", "k", "v"))
        q, k = _heads(q, spec, weights, "q_norm"), _heads(k, spec, weights, "k_norm")
        q, k = _rotate(q, table[positions]), _rotate(k, table[positions])
        observe(f"{at}.k", k.reshape(len(k), -1))
        observe(f"{at}.v", v)
        v = v.reshape(len(v), -1, spec.head_dim)
        attended = np.concatenate([_attend(q[span], k[span], v[span], spec.windows[layer]) for span in spans])
        observe(f"{at}.output", attended)
        x = x + weights.linear("output", attended)
        normed = _rms_norm(x, weights["mlp_norm"], spec.norm_epsilon)
        observe(f"{at}.gate_up", normed)
        gated = _silu(weights.linear("gate", normed)) * weights.linear("up", normed)
        observe(f"{at}.down", gated)
        x = x + weights.linear("down", gated)
    x = _rms_norm(x, checkpoint.tensors["final_norm"].read(), spec.norm_epsilon)
    observe("lm_head", x)
    logits = _output_layer(checkpoint, x)
    return [logits[span] for span in spans]


class _Layer:
    """The tensors of one layer by their short names."""

    def __init__(self, checkpoint: Checkpoint, layer: int) -> None:
        self._tensors = checkpoint.tensors
        self._prefix = f"layers.{layer}."

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._tensors

    def __getitem__(self, name: str) -> Floats:
        return self._tensors[self._prefix + name].read()

    def linear(self, name: str, x: Floats) -> Floats:
        y: Floats = x @ self[name].T
        return y + self[f"{name}_bias"] if f"{name}_bias" in self else y


def _embed(checkpoint: Checkpoint, ids: TokenIds) -> Floats:
    embed = checkpoint.tensors["embed"]
    rows, where = np.unique(ids, return_inverse=True)
    return np.concatenate([embed.rows(int(row), int(row) + 1) for row in rows])[where]


def _output_layer(checkpoint: Checkpoint, x: Floats) -> Floats:
    """A few thousand rows of the table at a time: it is the largest tensor of a small model."""
    table = checkpoint.tensors["embed" if checkpoint.spec.tied_embeddings else "lm_head"]
    logits = np.empty((len(x), table.shape[0]), np.float32)
    for start in range(0, table.shape[0], 8192):
        stop = min(start + 8192, table.shape[0])
        logits[:, start:stop] = x @ table.rows(start, stop).T
    return logits


def _rms_norm(x: Floats, weight: Floats, epsilon: float) -> Floats:
    mean_square = np.mean(np.square(x, dtype=np.float64), axis=-1, keepdims=True)
    normed: Floats = (x / np.sqrt(mean_square + epsilon) * weight).astype(np.float32)
    return normed


def _silu(x: Floats) -> Floats:
    return (x / (1.0 + np.exp(-x.astype(np.float64)))).astype(np.float32)


def _heads(x: Floats, spec: DecoderSpec, weights: _Layer, norm: str) -> Floats:
    """[T, heads * D] -> [T, heads, D], each head normalized where the model does that."""
    heads = x.reshape(len(x), -1, spec.head_dim)
    return _rms_norm(heads, weights[norm], spec.norm_epsilon) if spec.qk_norm else heads


def _rotate(x: Floats, cos_sin: Floats) -> Floats:
    """Half-split rotation of x [T, heads, D] by cos_sin [T, D]: pairs are (d, d + D/2)."""
    cos, sin = np.split(cos_sin[:, None, :], 2, axis=-1)
    low, high = np.split(x, 2, axis=-1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def _attend(q: Floats, k: Floats, v: Floats, window: int) -> Floats:
    """Causal attention of one prompt: q [T, H, D], k and v [T, KV, D] -> [T, H * D]."""
    num_tokens, num_heads, head_dim = q.shape
    group = num_heads // k.shape[1]
    q = q.transpose(1, 0, 2)  # [H, T, D]
    k, v = (np.repeat(part.transpose(1, 0, 2), group, axis=0) for part in (k, v))
    scores = (q @ k.transpose(0, 2, 1)).astype(np.float64) / np.sqrt(head_dim)
    distance = np.arange(num_tokens)[:, None] - np.arange(num_tokens)
    is_seen = (distance >= 0) & ((distance < window) if window else True)
    scores = np.where(is_seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    attended: Floats = weights.astype(np.float32) @ v
    return attended.transpose(1, 0, 2).reshape(num_tokens, num_heads * head_dim)
