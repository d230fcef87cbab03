"""What sampling means: the reference that every backend's sampling is tested against.

A token is a function of its logits, its request's SamplingParams and its position; there is no generator state to
lose, so a preempted, resumed or re-batched request draws the same tokens. Steps, per row:

1. NaN counts as -inf, +inf as the largest float32. A row without a finite logit gives -1: its request fails alone.
2. temperature 0: the largest logit, the lowest id on a tie. Otherwise z = logit / temperature, ordered by z descending,
   ties by lower id.
3. top_k keeps the first k (0 = all). top_p keeps, of the softmax over what is left, the smallest prefix whose
   cumulative probability reaches top_p (at least one; 1 = all). min_p keeps p >= min_p * the largest p.
4. Of the kept, the largest z + g wins, g = -log(-log(u)): the Gumbel-max draw from the softmax.

u = (w + 0.5) / 2^32 with w = word (token mod 4) of Philox4x32-10 under key (seed low, seed high) and counter (token
div 4, position low, position high, 0). The last counter word is the choice, for several completions of one prompt;
those are separate requests with their own seeds today, so it is 0. Everything is float64, from float32 logits and
parameters.

Philox: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3, and the
Random123 test vectors.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from batcher.backend import SamplingInput

_MULTIPLIERS: Final = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS: Final = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))  # golden ratio, sqrt(3) - 1
_LOW: Final = np.uint64(0xFFFFFFFF)
_HIGH: Final = np.uint64(32)
_ROUNDS: Final = 10


def philox4x32(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Philox4x32-10 of `counter` [n, 4] under `key` (two 32-bit words): [n, 4] random words."""
    c0, c1, c2, c3 = (counter[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = np.array(key, np.uint64)[:, None]
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _HIGH) ^ c1 ^ k0, p1 & _LOW, (p0 >> _HIGH) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def uniforms(vocab_size: int, seed: int, position: int) -> NDArray[np.float64]:
    """u [V], each in (0, 1): one number for every token that could take `position` under `seed`."""
    counter = np.zeros((-(-vocab_size // 4), 4), np.uint32)
    counter[:, 0] = np.arange(len(counter))
    counter[:, 1], counter[:, 2] = position & 0xFFFFFFFF, position >> 32
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)).reshape(-1)[:vocab_size]
    u: NDArray[np.float64] = (words.astype(np.float64) + 0.5) / 2.0**32
    return u


def sample(logits: NDArray[np.float32], sampling: SamplingInput) -> NDArray[np.int64]:
    """The next token of each row: logits [R, V] -> token ids [R], -1 where a row has no finite logit."""
    largest = np.finfo(np.float32).max
    usable = np.where(np.isnan(logits), -np.inf, np.minimum(logits, largest)).astype(np.float32)
    token_ids: NDArray[np.int64] = np.argmax(usable, axis=1).astype(np.int64)  # the first of equals: the lowest id
    for r in np.flatnonzero(sampling.temperature > 0):
        token_ids[r] = _draw(usable[r], sampling, int(r))
    token_ids[~np.isfinite(logits).any(axis=1)] = -1
    return token_ids


def kept(
    logits: NDArray[np.float32], temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens [K] that the filters leave, best first, and their z. No NaN or +inf in `logits` [V]."""
    order = np.argsort(-logits, kind="stable")
    if top_k:
        order = order[:top_k]
    z = logits[order].astype(np.float64) / temperature
    weights = np.exp(z - z[0])  # in proportion to p, the largest is 1
    keep = weights >= min_p
    if top_p < 1.0:
        p = weights / weights.sum()
        keep &= np.cumsum(p) - p < top_p  # what precedes a token has not reached top_p yet
    keep[0] = True
    return order[keep], z[keep]


def _draw(logits: NDArray[np.float32], sampling: SamplingInput, r: int) -> int:
    if not np.isfinite(logits).any():
        return -1
    token_ids, z = kept(
        logits,
        float(sampling.temperature[r]),
        int(sampling.top_k[r]),
        float(sampling.top_p[r]),
        float(sampling.min_p[r]),
    )
    u = uniforms(len(logits), int(sampling.seed[r]), int(sampling.position[r]))[token_ids]
    score = z - np.log(-np.log(u))
    best = token_ids[score == score.max()]
    return int(best.min())  # two scores that round to the same number: the lower id
