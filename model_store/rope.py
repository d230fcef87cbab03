"""Rotary position embedding: the table of cosines and sines that PagedAttention reads.

Apart from the decoder because only this arithmetic differs between context-extension methods. The table is computed in
float64 and rounded once: in float32 the angle of position 30,000 would already be off by a thousandth of a radian.

Sources: Su et al. 2021 (RoPE); Chen et al. 2023 (linear: position interpolation); Peng et al. 2023 (YaRN, sections
3.2-3.4); Llama 3.1's frequency smoothing. Parameters and defaults are those of transformers 5, modeling_rope_utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model_store.config import Config
from model_store.errors import BadCheckpoint

Frequencies = NDArray[np.float64]  # [R / 2], radians a token

MAX_POSITIONS = 1 << 21
KNOWN_KEYS = frozenset(
    {
        *("type", "rope_type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
        *("low_freq_factor", "high_freq_factor"),  # llama3
        *("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"),  # yarn
    }
)


@dataclass(frozen=True, slots=True)
class Rope:
    """One model's rotation: `frequencies` in radians a token; cosines and sines are multiplied by `magnitude`."""

    frequencies: tuple[float, ...]  # [R / 2]
    magnitude: float
    max_positions: int

    def table(self) -> NDArray[np.float32]:
        """cos_sin [max_positions, R]: row p is R/2 cosines, then R/2 sines."""
        half = len(self.frequencies)
        table = np.empty((self.max_positions, 2 * half), np.float32)
        frequencies = np.asarray(self.frequencies, np.float64)
        for start in range(0, self.max_positions, 4096):  # bounded float64 scratch for long contexts
            rows = slice(start, start + 4096)
            angles = np.arange(start, min(start + 4096, self.max_positions))[:, None] * frequencies
            table[rows, :half] = np.cos(angles) * self.magnitude
            table[rows, half:] = np.sin(angles) * self.magnitude
        return table


def read_rope(config: Config, head_dim: int, max_position_embeddings: int) -> Rope:
    """The rotary embedding that `config` describes, in the old (rope_scaling) or the new (rope_parameters) spelling."""
    scaling = config.section("rope_scaling") or config.section("rope_parameters") or Config({})
    for key in sorted(scaling.keys() - KNOWN_KEYS):
        raise scaling.refusal(key, f"only {', '.join(sorted(KNOWN_KEYS))}", scaling.value(key))
    base = scaling.number(
        "rope_theta", 1.0001, 1e12, default=config.number("rope_theta", 1.0001, 1e12, default=10_000.0)
    )
    if scaling.number("partial_rotary_factor", 0.0, 1.0, default=1.0) != 1.0:
        raise scaling.refusal("partial_rotary_factor", "1", scaling.value("partial_rotary_factor"))
    kind = scaling.text("rope_type", default=scaling.text("type", default="default"))
    if kind not in ROPE_TYPES:
        raise BadCheckpoint(
            f"config.json: rope type {kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}",
            param="rope_type",
        )
    default = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    frequencies, magnitude, max_positions = ROPE_TYPES[kind](scaling, default, base, max_position_embeddings)
    if max_positions > MAX_POSITIONS:
        raise BadCheckpoint(
            f"config.json: a context of {max_positions:,} positions; the limit is {MAX_POSITIONS:,}",
            param="rope_scaling",
        )
    return Rope(tuple(frequencies.tolist()), magnitude, max_positions)


def _unscaled(_: Config, default: Frequencies, __: float, max_positions: int) -> tuple[Frequencies, float, int]:
    return default, 1.0, max_positions


def _linear(scaling: Config, default: Frequencies, _: float, max_positions: int) -> tuple[Frequencies, float, int]:
    return default / scaling.number("factor", 1.0, 1e6), 1.0, max_positions


def _llama3(scaling: Config, default: Frequencies, _: float, max_positions: int) -> tuple[Frequencies, float, int]:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    factor = scaling.number("factor", 1.0, 1e6)
    low = scaling.number("low_freq_factor", 1e-6, 1e6)
    high = scaling.number("high_freq_factor", 1e-6, 1e6)
    if high <= low:
        raise scaling.refusal("high_freq_factor", f"more than low_freq_factor ({low:g})", high)
    original = scaling.integer("original_max_position_embeddings", 1, MAX_POSITIONS, default=max_positions)
    turns = original * default / (2 * math.pi)  # rotations within the original context
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - kept) * default / factor + kept * default, 1.0, max_positions


def _yarn(scaling: Config, default: Frequencies, base: float, max_positions: int) -> tuple[Frequencies, float, int]:
    """Frequencies that turn often are kept, those that turn rarely are interpolated, a linear ramp between."""
    factor = scaling.number("factor", 1.0, 1e6)
    original = scaling.integer("original_max_position_embeddings", 1, MAX_POSITIONS, default=max_positions)
    dim = 2 * len(default)

    def dimension_of(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = dimension_of(scaling.number("beta_fast", 1e-6, 1e6, default=32.0))
    high = dimension_of(scaling.number("beta_slow", 1e-6, 1e6, default=1.0))
    if scaling.flag("truncate", default=True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    interpolated = np.clip((np.arange(dim // 2) - low) / ((high - low) or 0.001), 0.0, 1.0)
    frequencies = default / factor * interpolated + default * (1 - interpolated)
    # Checkpoints name either the stretched context or the original one; the rotation is valid for both.
    return frequencies, _yarn_magnitude(scaling, factor), max(max_positions, int(original * factor))


def _yarn_magnitude(scaling: Config, factor: float) -> float:
    """What cosines and sines are multiplied by, so that attention stays as sharp as before (YaRN, section 3.4)."""

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0

    if scaling.value("attention_factor") is not None:
        return scaling.number("attention_factor", 1e-6, 1e6)
    mscale = scaling.number("mscale", 0.0, 1e6, default=0.0)
    mscale_all_dim = scaling.number("mscale_all_dim", 0.0, 1e6, default=0.0)
    if mscale and mscale_all_dim:
        return magnitude(mscale) / magnitude(mscale_all_dim)
    return magnitude(1.0)


ROPE_TYPES: dict[str, Callable[[Config, Frequencies, float, int], tuple[Frequencies, float, int]]] = {
    "default": _unscaled,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
