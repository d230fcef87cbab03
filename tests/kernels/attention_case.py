"""Sequences for attention tests, and the kernel behind them, run through ctypes in any form.

Apart from the tests because a batch has many parts that must agree: a `Pool` holds the cache and who owns which block;
`Pool.step` packs the next tokens of some sequences, runs the kernel and hands back their rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kernels.loader import isa_active, load, set_isa
from tests.kernels.guarded import before_a_guard
from tests.kernels.reference import BLOCK, AttentionBatch, AttentionConfig, Cache, CacheType, Floats, keys_of, values_of

TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)
_RUN = ctypes.CFUNCTYPE(None, ctypes.c_void_p, TASK, ctypes.c_size_t, ctypes.c_void_p)


class Parallel(ctypes.Structure):
    """struct mr_parallel."""

    _fields_ = (("run", _RUN), ("context", ctypes.c_void_p), ("threads", ctypes.c_size_t))


def parallel(threads: int) -> Parallel:
    """A loop over iterations on that many threads of Python's, the last iteration first."""

    def run(_: int, task: Callable[[int, int], None], count: int, user: int) -> None:
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(task, user, index) for index in reversed(range(count))]:
                done.result()

    return Parallel(_RUN(run), None, threads)


@contextmanager
def form(name: str | None) -> Iterator[None]:
    """Use the kernels of form `name` meanwhile."""
    before = isa_active()
    set_isa(name)
    try:
        yield
    finally:
        set_isa(before)


_SIZES = (
    *("num_tokens", "num_seqs", "table_width", "num_blocks"),
    *("num_heads", "kv_num_heads", "head_dim", "rotary_dim", "window"),
)
_POINTERS = (
    *("qkv", "cache", "positions", "cu_seqlens", "past_lens", "block_table", "slot_mapping"),
    *("cos_sin", "q_norm", "k_norm", "sinks", "out"),
)
_PLAN_SIZES = ("num_tiles", "max_tile_rows", "score_floats", "slot_bytes", "num_workers", "unit_heads")


class _Attention(ctypes.Structure):
    """struct mr_attention."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in _SIZES),
        *((name, ctypes.c_float) for name in ("scale", "softcap", "norm_epsilon")),
        ("cache_is_half", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_size_t) for name in _PLAN_SIZES),
        ("tiles", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
    )


def scratch_of(num_bytes: int) -> NDArray[np.uint8]:
    """64-byte aligned scratch, all NaN."""
    memory = np.full(num_bytes + 64, 0xFF, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + num_bytes]


def run_attention(config: AttentionConfig, batch: AttentionBatch, cache: Cache, threads: int = 1) -> Floats:
    """The kernel of the active form; writes `cache` [L, 2, blocks, KV, 16 Dp] in place and returns [T, H D].

    Every other tensor ends where memory ends.
    """
    out = before_a_guard(np.full((len(batch.qkv), config.num_heads * config.head_dim), np.nan, np.float32))
    read: dict[str, NDArray[np.generic] | None] = {
        "qkv": batch.qkv,
        "positions": batch.positions,
        "cu_seqlens": batch.cu_seqlens,
        "past_lens": batch.past_lens,
        "block_table": batch.block_table,
        "slot_mapping": batch.slot_mapping,
        "cos_sin": config.cos_sin,
        "q_norm": config.q_norm,
        "k_norm": config.k_norm,
        "sinks": config.sinks,
    }
    arrays: dict[str, NDArray[np.generic]] = {
        name: before_a_guard(array) for name, array in read.items() if array is not None
    }
    arrays |= {"cache": cache[config.layer], "out": out}
    arguments = _Attention(
        num_tokens=len(batch.qkv),
        num_seqs=len(batch.past_lens),
        table_width=batch.block_table.shape[1],
        num_blocks=cache.shape[2],
        num_heads=config.num_heads,
        kv_num_heads=config.kv_num_heads,
        head_dim=config.head_dim,
        rotary_dim=config.cos_sin.shape[1],
        window=config.window,
        scale=config.scale,
        softcap=config.softcap,
        norm_epsilon=config.norm_epsilon,
        cache_is_half=cache.dtype == np.float16,
        **{name: array.ctypes.data for name, array in arrays.items()},
    )
    library, loop = load(), parallel(threads)
    library.millrace_attention_plan.restype = ctypes.c_size_t
    scratch = scratch_of(library.millrace_attention_plan(ctypes.byref(arguments), ctypes.c_size_t(threads)))
    library.millrace_attention_run(ctypes.byref(arguments), ctypes.c_void_p(scratch.ctypes.data), ctypes.byref(loop))
    return out


@dataclass(slots=True)
class Pool:
    """A cache and the blocks of some sequences. Slots that nobody wrote hold NaN."""

    config: AttentionConfig
    cache: Cache
    free: list[int]
    tables: dict[str, list[int]] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    threads: int = 1

    @classmethod
    def empty(cls, config: AttentionConfig, num_blocks: int, dtype: CacheType, seed: int = 0, threads: int = 1) -> Pool:
        shape = config.layer + 2, 2, num_blocks, config.kv_num_heads, BLOCK * config.padded_dim
        order = np.random.default_rng(seed).permutation(num_blocks).tolist()
        cache: Cache = np.full(shape, np.nan, dtype)
        return cls(config, cache, order, threads=threads)

    def pack(self, parts: Sequence[tuple[str, Floats]]) -> AttentionBatch:
        """The next tokens of some sequences (name, qkv rows) as one batch; blocks are taken as needed."""
        positions, slots, pasts, counts = [], [], [], []
        for name, rows in parts:
            past, table = self.lengths.setdefault(name, 0), self.tables.setdefault(name, [])
            at = np.arange(past, past + len(rows))
            while len(table) * BLOCK < past + len(rows):
                table.append(self.free.pop())
            positions.append(at)
            slots.append(np.array(table)[at // BLOCK] * BLOCK + at % BLOCK)
            pasts.append(past)
            counts.append(len(rows))
            self.lengths[name] = past + len(rows)
        width = max(len(self.tables[name]) for name, _ in parts) + 1
        tables = [self.tables[name] + [-7] * (width - len(self.tables[name])) for name, _ in parts]
        return AttentionBatch(
            qkv=np.concatenate([rows for _, rows in parts]),
            positions=np.concatenate(positions).astype(np.int64),
            cu_seqlens=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
            past_lens=np.array(pasts, np.int32),
            block_table=np.array(tables, np.int32),
            slot_mapping=np.concatenate(slots).astype(np.int32),
        )

    def step(self, parts: Sequence[tuple[str, Floats]]) -> dict[str, Floats]:
        """Run the next tokens of some sequences: the output rows of each."""
        batch = self.pack(parts)
        out = run_attention(self.config, batch, self.cache, self.threads)
        return dict(zip((name for name, _ in parts), np.split(out, batch.cu_seqlens[1:-1]), strict=True))

    def fill_past(self, name: str, count: int, rng: np.random.Generator) -> None:
        """Give a sequence `count` tokens that some earlier step wrote."""
        table = self.tables.setdefault(name, [])
        while len(table) * BLOCK < count:
            table.append(self.free.pop())
        at = np.arange(count)
        where = np.array(table, np.int64)[at // BLOCK], slice(None), at % BLOCK
        for part in (keys_of(self.config, self.cache), values_of(self.config, self.cache)):
            rows = rng.standard_normal((count, self.config.kv_num_heads, self.config.padded_dim))
            rows[..., self.config.head_dim :] = 0
            part[where] = rows
        self.lengths[name] = count


def cos_sin_table(max_len: int, rotary_dim: int) -> Floats:
    """The usual rotation: [max_len, R], R/2 cosines then R/2 sines."""
    half = rotary_dim // 2
    angles = np.arange(max_len)[:, None] / 10000.0 ** (np.arange(half) / max(half, 1))
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def random_qkv(config: AttentionConfig, count: int, rng: np.random.Generator) -> Floats:
    """Projected tokens [count, (H + 2 KV) D]."""
    heads = config.num_heads + 2 * config.kv_num_heads
    return rng.standard_normal((count, heads * config.head_dim), dtype=np.float32)
