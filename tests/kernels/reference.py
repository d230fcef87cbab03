"""What PagedAttention and Sample mean, in plain numpy and float64: written from kernels/README.md, not from the C.

Apart from the tests so that the meaning can be read in one place. Attention reads the cache that the kernel left behind
(its keys and values are checked on their own), so that a key rounded to half the other way blurs no comparison.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK = 16

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
CacheType = type[np.float16] | type[np.float32]
Cache = NDArray[np.float16 | np.float32]


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """The node's attributes, and its constant inputs."""

    num_heads: int
    kv_num_heads: int
    head_dim: int
    cos_sin: Floats  # [max_len, R]
    scale: float = 0.125
    softcap: float = 0.0
    window: int = 0
    layer: int = 0
    norm_epsilon: float = 1e-5
    q_norm: Floats | None = None  # [D]
    k_norm: Floats | None = None  # [D]
    sinks: Floats | None = None  # [H]

    @property
    def padded_dim(self) -> int:
        return -(-self.head_dim // 16) * 16

    @property
    def group(self) -> int:
        return self.num_heads // self.kv_num_heads


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """One step's packed tokens."""

    qkv: Floats  # [T, (H + 2 KV) D]
    positions: NDArray[np.int64]  # [T]
    cu_seqlens: NDArray[np.int32]  # [B + 1]
    past_lens: NDArray[np.int32]  # [B]
    block_table: NDArray[np.int32]  # [B, M]
    slot_mapping: NDArray[np.int32]  # [T]


def split_heads(config: AttentionConfig, batch: AttentionBatch) -> tuple[Doubles, Doubles, Doubles]:
    """q [T, H, D], k and v [T, KV, D] of the packed projection, after norm and rotation, before scaling."""
    H, KV, D = config.num_heads, config.kv_num_heads, config.head_dim  # noqa: N806
    heads = batch.qkv.astype(np.float64).reshape(-1, H + 2 * KV, D)
    q, k, v = np.split(heads, [H, H + KV], axis=1)
    return _place(config, batch, q, config.q_norm), _place(config, batch, k, config.k_norm), v


def _place(config: AttentionConfig, batch: AttentionBatch, x: Doubles, norm: Floats | None) -> Doubles:
    if norm is not None:
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + config.norm_epsilon) * norm
    half = config.cos_sin.shape[1] // 2
    if half == 0:
        return x
    angles = config.cos_sin[batch.positions].astype(np.float64)[:, None, :]
    cos, sin = angles[..., :half], angles[..., half:]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def keys_of(config: AttentionConfig, cache: Cache) -> Cache:
    """A layer's keys as [blocks, KV, 16, Dp]: a view."""
    blocks: Cache = cache[config.layer, 0].reshape(-1, config.kv_num_heads, config.padded_dim, BLOCK)
    return blocks.swapaxes(2, 3)


def values_of(config: AttentionConfig, cache: Cache) -> Cache:
    """A layer's values as [blocks, KV, 16, Dp]: a view."""
    blocks: Cache = cache[config.layer, 1].reshape(-1, config.kv_num_heads, BLOCK, config.padded_dim)
    return blocks


def attention(config: AttentionConfig, batch: AttentionBatch, cache: Cache) -> Doubles:
    """[T, H D] from the cache as it is after the step. Reads only what each token may see."""
    queries = split_heads(config, batch)[0] * float(np.float32(config.scale))
    keys, values = keys_of(config, cache), values_of(config, cache)
    out = np.zeros((len(batch.qkv), config.num_heads, config.head_dim))
    for b, past in enumerate(batch.past_lens):
        for t in range(batch.cu_seqlens[b], batch.cu_seqlens[b + 1]):
            position = int(past) + t - int(batch.cu_seqlens[b])
            first = max(0, position + 1 - config.window) if config.window else 0
            seen = np.arange(first, position + 1)
            where = batch.block_table[b][seen // BLOCK], slice(None), seen % BLOCK
            k = keys[where][..., : config.head_dim].astype(np.float64)
            v = values[where][..., : config.head_dim].astype(np.float64)
            for head in range(config.num_heads):
                kv_head = head // config.group
                weights = _softmax(config, k[:, kv_head] @ queries[t, head], head)
                out[t, head] = weights @ v[:, kv_head]
    return out.reshape(len(out), -1)


def _softmax(config: AttentionConfig, scores: Doubles, head: int) -> Doubles:
    if config.softcap:
        scores = config.softcap * np.tanh(scores / config.softcap)
    top = scores.max()
    weights: Doubles = np.exp(scores - top)
    sink = np.exp(float(config.sinks[head]) - top) if config.sinks is not None else 0.0
    weights /= weights.sum() + sink
    return weights


# ---- sampling ----


@dataclass(frozen=True, slots=True)
class Draw:
    """A row's token, and whether float noise could have decided it."""

    token: int
    is_ambiguous: bool


def philox(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox4x32-10 (Salmon et al., SC 2011): counters [..., 4] to words [..., 4], 32 bits each."""
    x0, x1, x2, x3 = np.moveaxis(counter, -1, 0)
    low, k0, k1 = np.uint64(0xFFFFFFFF), key[0], key[1]
    for _ in range(10):
        p0, p1 = x0 * np.uint64(0xD2511F53), x2 * np.uint64(0xCD9E8D57)
        x0, x1 = (p1 >> np.uint64(32)) ^ x1 ^ np.uint64(k0), p1 & low
        x2, x3 = (p0 >> np.uint64(32)) ^ x3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3], axis=-1)


def gumbel(tokens: NDArray[np.int64], seed: int, position: int) -> Doubles:
    """The noise of each token: a function of (seed, position, token)."""
    counter = np.zeros((len(tokens), 4), np.uint64)
    counter[:, 0] = tokens // 4
    counter[:, 1] = position % 2**32
    counter[:, 2] = position % 2**64 >> 32
    words = philox(counter, (seed % 2**32, seed % 2**64 >> 32))[np.arange(len(tokens)), tokens % 4]
    noise: Doubles = -np.log(-np.log((words + 0.5) / 2.0**32))
    return noise


def sample_row(
    logits: Floats,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    position: int,
    noise: float = 1e-4,
) -> Draw:
    """One row; -1 without a finite logit. Ambiguous: another token, kept or at a filter's edge, is within `noise`."""
    if not np.isfinite(logits).any():
        return Draw(-1, False)
    usable = np.where(np.isnan(logits), -np.inf, np.minimum(logits, np.finfo(np.float32).max)).astype(np.float64)
    if temperature == 0:
        return Draw(int(usable.argmax()), False)
    order = np.argsort(-usable, kind="stable")
    order = order[: top_k or None]
    z = (usable[order] - usable[order[0]]) / temperature
    weights = np.exp(z)
    before = np.concatenate([[0.0], np.cumsum(weights / weights.sum())[:-1]])
    is_kept = (weights >= min_p) & ((before < top_p) | (top_p >= 1))
    is_edge = np.zeros(len(order), bool)
    if 0 < top_p < 1:
        is_edge |= np.abs(before - top_p) < noise * 1e-2
    if min_p > 0:
        is_edge |= (z < 0) & (np.abs(z - np.log(min_p)) < noise * 1e-1)  # z = 0 is a weight of 1 without noise
    is_kept[0], is_edge[0] = True, False
    scores = z + gumbel(order, seed, position)
    best = int(np.where(is_kept, scores, -np.inf).argmax())
    rivals = (is_kept | is_edge) & (scores > scores[best] - noise)
    return Draw(int(order[best]), bool(is_edge[best]) or int(rivals.sum()) > 1)
