"""A backend without a model: tokens are a function of the whole context, read back through its own paged KV pool.

Ships because it is the one backend that needs nothing: load tests, fault drills and demonstrations of a cluster run
on it, and the batcher is proved against it. Every slot of the pool keeps a token, its position and a 64-bit state
that depends, as keys and values do, on everything before it in the sequence. A step reads the past through the block
table, writes at slot_mapping and then draws its logits from a hash of all states it reads back. So a wrong slot, a
stale or foreign block, a prefix shared too eagerly or a lost token changes the tokens that come out; and whatever
contradicts the contract of ModelInput raises ValueError.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from batcher.backend import BackendError, BackendErrorKind, BackendLimits, ModelInput, SamplingInput, StepOutput
from batcher.sampling import sample

_MASK: Final = 2**64 - 1
_FAVOURED: Final = 16  # tokens of a row with a logit above the common 0

_EXPECTED_DTYPES: Final = {
    "input_ids": np.int64,
    "positions": np.int64,
    "cu_seqlens": np.int32,
    "past_lens": np.int32,
    "block_table": np.int32,
    "slot_mapping": np.int32,
    "logits_rows": np.int32,
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "seed": np.int64,
    "position": np.int64,
}


class ScriptedBackend:
    """Deterministic tokens at a chosen speed, with chosen faults."""

    def __init__(
        self,
        limits: BackendLimits,
        *,
        step_s: float = 0.0,
        token_s: float = 0.0,
        fault: Callable[[int], BackendErrorKind | None] = lambda forward: None,
        poison_token: int | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """A forward takes `step_s` plus `token_s` for each token. `fault` is asked before each, by its number from 0
        on; a forward that fails scribbles over its slots first, as one that died half-way would. A sequence that
        contains `poison_token` has no finite logits.
        """
        self._limits = limits
        self._step_s = step_s
        self._token_s = token_s
        self._fault = fault
        self._poison_token = poison_token
        self._sleep = sleep
        self._forwards = 0
        slots = limits.num_blocks * limits.block_size
        self._tokens = np.full(slots, -1, np.int64)
        self._positions = np.full(slots, -1, np.int64)
        self._states = np.zeros(slots, np.uint64)
        # Odd weights: the sum of weight * state over the context changes with every state, wherever it is.
        self._weights = _mix_all(np.arange(limits.max_model_len, dtype=np.uint64)) | np.uint64(1)

    @property
    def limits(self) -> BackendLimits:
        return self._limits

    def forward(self, batch: ModelInput, sampling: SamplingInput, *, keeps_logits: bool = False) -> StepOutput:
        """As the protocol says; raises ValueError where `batch` or `sampling` break it: a bug of the batcher."""
        check_model_input(batch, sampling, self._limits)
        number, self._forwards = self._forwards, self._forwards + 1
        if self._step_s or self._token_s:
            self._sleep(self._step_s + self._token_s * len(batch.input_ids))
        kind = self._fault(number)
        if kind is not None:
            self._tokens[batch.slot_mapping] = self._positions[batch.slot_mapping] = -1
            self._states[batch.slot_mapping] = number
            raise BackendError(kind, f"scripted fault at forward {number}")
        self._write(batch)
        logits = self._logits(batch)
        return StepOutput(sample(logits, sampling), lambda: logits)

    def close(self) -> None:
        """Forget everything."""
        self._positions.fill(-1)
        self._tokens.fill(-1)

    def _write(self, batch: ModelInput) -> None:
        """Compute the state of every new token from all states before it, then store them all at once."""
        states: list[int] = []
        bounds = batch.cu_seqlens.tolist()
        for row, past in enumerate(batch.past_lens.tolist()):
            context = self._read(self._slots(batch.block_table[row], past))
            positions = range(past, past + bounds[row + 1] - bounds[row])
            weights = self._weights[past : positions.stop].tolist()
            token_ids = batch.input_ids[bounds[row] : bounds[row + 1]].tolist()
            for token_id, position, weight in zip(token_ids, positions, weights, strict=True):
                state = _mix(context + token_id * 0xD6E8FEB86659FD93 + position)
                states.append(state)
                context = (context + weight * state) & _MASK
        slots = batch.slot_mapping
        self._tokens[slots] = batch.input_ids
        self._positions[slots] = batch.positions
        self._states[slots] = np.array(states, np.uint64)

    def _read(self, slots: NDArray[np.int64]) -> int:
        """The hash of what lies in the slots of positions 0, 1, 2, ..."""
        if not np.array_equal(self._positions[slots], np.arange(len(slots))):
            raise ValueError("the block table leads to slots that hold other positions: a bug of the batcher")
        return int((self._states[slots] * self._weights[: len(slots)]).sum(dtype=np.uint64))

    def _slots(self, block_row: NDArray[np.int32], length: int) -> NDArray[np.int64]:
        size = self._limits.block_size
        blocks = block_row[: -(-length // size)].astype(np.int64)
        return (blocks[:, None] * size + np.arange(size)).reshape(-1)[:length]

    def _logits(self, batch: ModelInput) -> NDArray[np.float32]:
        """[R, V]: 0, but for a few favoured tokens between 1 and 9; NaN for a poisoned sequence."""
        logits = np.zeros((len(batch.logits_rows), self._limits.vocab_size), np.float32)
        contexts = np.zeros((len(logits), 1), np.uint64)
        is_poisoned = np.zeros(len(logits), np.bool_)
        sequences = np.searchsorted(batch.cu_seqlens, batch.logits_rows, side="right") - 1
        lengths = batch.positions[batch.logits_rows] + 1
        for r, (sequence, length) in enumerate(zip(sequences.tolist(), lengths.tolist(), strict=True)):
            slots = self._slots(batch.block_table[sequence], length)
            contexts[r] = _mix(self._read(slots))
            if self._poison_token is not None:
                is_poisoned[r] = (self._tokens[slots] == self._poison_token).any()
        draws = _mix_all(np.add(contexts, np.arange(_FAVOURED, dtype=np.uint64)))  # [R, favoured]
        favoured = (draws % np.uint64(self._limits.vocab_size)).astype(np.int64)
        values = 1.0 + 8.0 * (draws >> np.uint64(40)).astype(np.float32) / 2.0**24
        np.put_along_axis(logits, favoured, values, axis=1)
        logits[is_poisoned] = np.nan
        return logits


def check_model_input(batch: ModelInput, sampling: SamplingInput, limits: BackendLimits) -> None:
    """Every promise of ModelInput and SamplingInput, checked; raises ValueError, naming the broken one."""
    _check_arrays(batch, sampling)
    counts = np.diff(batch.cu_seqlens)
    num_tokens, num_rows = len(batch.input_ids), len(counts)
    _claim(0 < num_rows <= limits.max_batch_seqs, f"{num_rows} sequences")
    _claim(0 < num_tokens <= limits.max_batch_tokens, f"{num_tokens} tokens")
    _claim(batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == num_tokens, "cu_seqlens does not span the tokens")
    _claim(bool((counts > 0).all()), "a sequence without tokens")
    _claim(len(batch.past_lens) == num_rows == len(batch.block_table), "rows of past_lens or block_table")
    _claim(len(batch.positions) == len(batch.slot_mapping) == num_tokens, "length of positions or slot_mapping")
    ends = batch.past_lens + counts  # tokens in the cache after the step
    _claim(bool((batch.past_lens >= 0).all()) and bool((ends <= limits.max_model_len).all()), "past_lens")
    _claim(
        bool(((batch.input_ids >= 0) & (batch.input_ids < limits.vocab_size)).all()), "a token not in the vocabulary"
    )
    rows = np.repeat(np.arange(num_rows), counts)
    positions = np.arange(num_tokens) + (batch.past_lens - batch.cu_seqlens[:-1])[rows]
    _claim(np.array_equal(batch.positions, positions), "positions do not follow past_lens")
    _check_blocks(batch, rows, ends, limits)
    _check_sampling(batch, sampling, rows)


def _check_arrays(batch: ModelInput, sampling: SamplingInput) -> None:
    for name, dtype in _EXPECTED_DTYPES.items():
        values: NDArray[np.generic] = getattr(batch, name) if hasattr(batch, name) else getattr(sampling, name)
        _claim(values.dtype == dtype, f"{name} is {values.dtype}")
        _claim(values.ndim == (2 if name == "block_table" else 1), f"{name} has {values.ndim} dimensions")
        _claim(values.flags.c_contiguous, f"{name} is not contiguous")


def _check_blocks(batch: ModelInput, rows: NDArray[np.int64], ends: NDArray[np.int32], limits: BackendLimits) -> None:
    size, table = limits.block_size, batch.block_table
    used = -(-ends // size)
    _claim(bool((used <= table.shape[1]).all()), "the block table is too narrow")
    is_used = np.arange(table.shape[1]) < used[:, None]
    _claim(not table[~is_used].any(), "a row of the block table is longer than its sequence, or not padded with 0")
    named = table[is_used]
    _claim(bool(((named >= 0) & (named < limits.num_blocks)).all()), "a block that does not exist")
    in_row = np.sort(np.where(is_used, table, -1 - np.arange(table.shape[1], dtype=np.int32)), axis=1)
    _claim(not (np.diff(in_row, axis=1) == 0).any(), "a sequence names a block twice")
    slots = table[rows, batch.positions // size] * size + batch.positions % size
    _claim(np.array_equal(batch.slot_mapping, slots), "slot_mapping does not follow the block table")
    users = np.bincount(named, minlength=limits.num_blocks)
    _claim(bool((users[slots // size] == 1).all()), "a write into a block that another sequence reads")


def _check_sampling(batch: ModelInput, sampling: SamplingInput, rows: NDArray[np.int64]) -> None:
    wanted = batch.logits_rows
    _claim(bool(((wanted >= 0) & (wanted < len(rows))).all()), "a logits row outside the tokens")
    _claim(bool((np.diff(rows[wanted]) > 0).all()), "logits_rows are not ascending, or two of one sequence")
    columns = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.seed, sampling.position)
    _claim(all(len(column) == len(wanted) for column in columns), "rows of the sampling input")
    _claim(bool((sampling.temperature >= 0).all()), "temperature")
    _claim(bool((sampling.top_k >= 0).all() and (sampling.seed >= 0).all()), "top_k or seed")
    _claim(bool(((sampling.top_p > 0) & (sampling.top_p <= 1)).all()), "top_p")
    _claim(bool(((sampling.min_p >= 0) & (sampling.min_p <= 1)).all()), "min_p")
    _claim(np.array_equal(sampling.position, batch.positions[wanted] + 1), "a sampled position does not follow its row")


def _claim(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"bad model input: {what}: a bug of the batcher")


# The finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), as a hash of one word.


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _mix_all(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed
