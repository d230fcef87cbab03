"""The arithmetic that the operators of the CUDA target share, and how they say no.

Every row is computed on its own, in an order that depends on nothing but its length, as kernels must that promise
results independent of the batch: tests can then ask for equal bits where a step is cut in another way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]  # of the dtypes that the operator's schema allows
Floats = NDArray[np.float32]


class Refused(ValueError):
    """The operator would refuse these inputs on the device, or read or write what is not there."""


def require(holds: bool, why: str) -> None:
    """Raises Refused with `why` unless `holds`."""
    if not holds:
        raise Refused(why)


def widened(x: Array) -> Floats:
    """`x` in float32, which holds every value of the narrower types."""
    return x.astype(np.float32)


def row_by_row(x: Floats, weight: Floats) -> Floats:
    """x [T, K] @ weight [N, K]^T, each row in a product of its own: [T, N]."""
    product: Floats = np.matmul(x[:, None, :], weight.T)[:, 0]
    return product


def rms_norm(x: Floats, epsilon: float) -> Floats:
    """Every row of x [..., K] divided by the root of its mean square."""
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True, dtype=np.float32)
    return (x / np.sqrt(mean_square + np.float32(epsilon))).astype(np.float32)


def silu(x: Floats, alpha: float = 1.0) -> Floats:
    """x * sigmoid(alpha * x)."""
    return (x / (1.0 + np.exp(-np.float64(alpha) * x))).astype(np.float32)
