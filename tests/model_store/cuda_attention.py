"""What com.microsoft:PagedAttention means, in NumPy: one call on a packed step, with the caches written in place.

Rounding is that of ONNX Runtime 1.31's CUDA kernels: heads are rounded after their norm, each product and sum of the
rotation is, what a cache gives back is, and the weights of the softmax are before they meet the values. `Refused` is
raised for what paged_attention_helper.h refuses, and for the reads and writes outside of tables and caches that the
device does not see: whoever makes such a call has a bug.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tests.model_store.cuda_arithmetic import Array, Floats, require, rms_norm, widened

Int32s = NDArray[np.int32]
Pair = tuple[Array | None, Array | None]

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
CODES = {np.dtype(np.int8): (-128.0, 127.0), FLOAT8: (-448.0, 448.0)}  # what a quantized cache holds at most


@dataclass(frozen=True, slots=True)
class Attention:
    """The node's attributes, with the schema's defaults."""

    num_heads: int
    kv_num_heads: int
    scale: float = 0.0  # 0: 1 / sqrt(head size)
    softcap: float = 0.0
    local_window_size: int = -1
    do_rotary: int = 0
    rotary_interleaved: int = 0
    qk_norm_epsilon: float = 1e-6
    k_quant_type: str = "NONE"
    v_quant_type: str = "NONE"


def attend(
    node: Attention,
    query: Array,  # [T, (H + 2 KV) * D]
    *,
    caches: tuple[Array, Array],  # [num_blocks, block_size, KV, D] of keys and of values
    cu_seqlens: Int32s,  # [B + 1]
    past_lens: Int32s,  # [B]
    block_table: Int32s,  # [B, M]
    rotation: tuple[Array, Array],  # cos and sin [P, D / 2]
    slot_mapping: Int32s,  # [T]
    head_norms: Pair,  # gains [D] of q and of k
    scales: Pair,  # float32 [KV, 1, D] of keys and of values
    metadata: Int32s,  # [2] or [3]
) -> Array:
    """[T, H * D] in the dtype of `query`. Raises Refused."""
    _check_lengths(query, cu_seqlens, past_lens, block_table, metadata)
    num_heads, kv_heads = node.num_heads, node.kv_num_heads
    heads = query.reshape(len(query), num_heads + 2 * kv_heads, -1)
    _check_caches(node, heads, caches, scales)
    spans = [slice(start, stop) for start, stop in pairwise(cu_seqlens.tolist())]
    positions = np.concatenate(
        [past + np.arange(span.stop - span.start) for past, span in zip(past_lens, spans, strict=True)]
    )
    parts = np.split(heads, [num_heads, num_heads + kv_heads], axis=1)
    q, k = (_prepared(node, x, positions, rotation, gain) for x, gain in zip(parts[:2], head_norms, strict=True))
    for cache, x, scale in zip(caches, (k, parts[2]), scales, strict=True):
        _store(cache, x, scale, slot_mapping)
    out = np.empty(q.shape, query.dtype)
    for span, past, row in zip(spans, past_lens.tolist(), block_table, strict=True):
        if span.start < span.stop:
            length = past + span.stop - span.start
            keys, values = (
                _load(cache, scale, row, length, query.dtype) for cache, scale in zip(caches, scales, strict=True)
            )
            out[span] = _softmax_over(node, q[span], keys, values)
    return out.reshape(len(query), -1)


def _check_lengths(query: Array, cu_seqlens: Int32s, past_lens: Int32s, table: Int32s, metadata: Int32s) -> None:
    lengths = np.diff(cu_seqlens)
    is_packed = cu_seqlens[0] == 0 and (lengths >= 0).all() and cu_seqlens[-1] == len(query)
    require(bool(is_packed), f"cu_seqlens {cu_seqlens.tolist()} do not cut {len(query)} tokens")
    require(len(past_lens) == len(table) == len(lengths), f"{len(lengths)} sequences, {len(table)} rows of blocks")
    require(bool((past_lens >= 0).all()), f"past_lens {past_lens.tolist()}")
    require(metadata.dtype == np.int32 and metadata.shape in ((2,), (3,)), f"metadata is {metadata.shape}")
    most_new, longest = int(lengths.max()), int((past_lens + lengths).max())
    bounds = dict(zip(("query", "kv", "lower"), metadata.tolist(), strict=False))  # of each, 0 is unknown
    require(min(bounds.values()) >= 0, f"metadata {metadata.tolist()}")
    require(not bounds["query"] or most_new <= bounds["query"], f"{most_new} new tokens, bound {bounds['query']}")
    require(not bounds["kv"] or longest <= bounds["kv"], f"{longest} tokens in a sequence, bound {bounds['kv']}")
    lower = bounds.get("lower", 0)
    require(lower <= longest, f"the longest sequence has {longest} tokens, lower bound {lower}")


def _check_caches(node: Attention, heads: Array, caches: tuple[Array, Array], scales: Pair) -> None:
    head_dim = heads.shape[2]
    require(head_dim % 16 == 0, f"the head size is {head_dim}; rotation takes multiples of 16")
    require(node.num_heads % node.kv_num_heads == 0, f"{node.num_heads} heads over {node.kv_num_heads}")
    for cache, scale, granularity in zip(caches, scales, (node.k_quant_type, node.v_quant_type), strict=True):
        block_size = cache.shape[1]
        require(cache.shape[2:] == (node.kv_num_heads, head_dim), f"the cache is {cache.shape}")
        require(block_size >= 16 and block_size & (block_size - 1) == 0, f"the block size is {block_size}")
        require(cache.shape == caches[0].shape and cache.dtype == caches[0].dtype, "the caches are not alike")
        if cache.dtype in CODES:
            require(granularity == "PER_CHANNEL" and scale is not None, f"a cache of {cache.dtype} without scales")
            is_fitting = (
                scale is not None and scale.dtype == np.float32 and scale.shape == (cache.shape[2], 1, head_dim)
            )
            require(is_fitting, "the scales are not float32 [KV, 1, D]")
        else:
            require(cache.dtype == heads.dtype, f"the cache is {cache.dtype}, attention {heads.dtype}")
            require(granularity == "NONE" and scale is None, f"a cache of {cache.dtype} takes no scales")


def _prepared(
    node: Attention, x: Array, positions: NDArray[np.int64], rotation: tuple[Array, Array], gain: Array | None
) -> Array:
    """Heads x [T, heads, D], normalized where there is a gain, then rotated: pairs are (d, d + D / 2)."""
    require(node.do_rotary == 1 and node.rotary_interleaved == 0, "only the half-split rotation is known here")
    head_dim = x.shape[2]
    if gain is not None:
        require(gain.dtype == x.dtype and gain.shape == (head_dim,), f"the gain is {gain.dtype}{gain.shape}")
        x = (rms_norm(widened(x), node.qk_norm_epsilon) * widened(gain)).astype(x.dtype)
    for table in rotation:
        is_fitting = table.dtype == x.dtype and table.shape[1] == head_dim // 2 and positions.max() < len(table)
        require(is_fitting, f"the rotation is {table.dtype}{table.shape}, a position {positions.max()}")
    cos, sin = (table[positions][:, None, :] for table in rotation)
    low, high = np.split(x, 2, axis=2)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=2)


def _store(cache: Array, x: Array, scale: Array | None, slots: Int32s) -> None:
    """Write x [T, KV, D] of every token whose slot is not -1."""
    require(slots.shape == (len(x),), f"{len(x)} tokens, slots {slots.shape}")
    written = slots >= 0
    flat = cache.reshape(-1, *cache.shape[2:])
    require(np.shares_memory(flat, cache) and flat.flags.writeable, "the cache cannot be written in place")
    require(bool((slots >= -1).all() and (slots < len(flat)).all()), f"slots {slots.tolist()} of {len(flat)}")
    require(len(np.unique(slots[written])) == written.sum(), "two tokens are written to one slot")
    if scale is not None:
        lowest, highest = CODES[cache.dtype]
        steps = widened(x) * (np.float32(1) / scale[:, 0])
        x = np.clip(np.rint(steps) if cache.dtype == np.int8 else steps, lowest, highest)
    flat[slots[written]] = x[written].astype(cache.dtype)


def _load(cache: Array, scale: Array | None, blocks: Int32s, length: int, dtype: np.dtype[np.generic]) -> Array:
    """The first `length` tokens of a sequence, in the dtype of attention: [length, KV, D]."""
    used = blocks[: -(-length // cache.shape[1])]
    require(len(used) * cache.shape[1] >= length, f"{length} tokens, {len(blocks)} blocks of {cache.shape[1]}")
    require(bool(((used >= 0) & (used < len(cache))).all()), f"blocks {used.tolist()} of {len(cache)}")
    rows = cache[used].reshape(-1, *cache.shape[2:])[:length]
    return rows if scale is None else (widened(rows) * scale[:, 0]).astype(dtype)


def _softmax_over(node: Attention, q: Array, k: Array, v: Array) -> Array:
    """q [n, H, D], the last n tokens of a sequence of L, over k and v [L, KV, D]: [n, H, D]."""
    group = node.num_heads // node.kv_num_heads
    keys, values = (np.repeat(widened(x), group, axis=1).transpose(1, 0, 2) for x in (k, v))  # [H, L, D]
    scale = np.float32(node.scale or q.shape[2] ** -0.5)
    out = np.empty(q.shape, q.dtype)
    for row, query in enumerate(widened(q)):
        end = len(k) - len(q) + row + 1
        seen = slice(max(0, end - node.local_window_size) if node.local_window_size > 0 else 0, end)
        scores: Floats = (keys[:, seen] @ query[:, :, None])[..., 0] * scale
        if node.softcap:
            scores = np.float32(node.softcap) * np.tanh(scores / np.float32(node.softcap))
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        attended = (widened(weights.astype(q.dtype))[:, None] @ values[:, seen])[:, 0]
        out[row] = attended / weights.sum(axis=-1, keepdims=True, dtype=np.float32)
    return out
