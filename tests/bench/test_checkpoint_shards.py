"""The parts of the device's checkpoint writer that need no torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.gpu.checkpoint import split_shards, weight_bytes
from bench.random_model import SHAPES, write_checkpoint
from model_store.architectures import read_spec
from model_store.checkpoint import open_checkpoint
from model_store.config import Config


def test_shards_keep_the_order_and_a_tensor_over_the_limit_is_alone() -> None:
    sizes = {"a": 4, "b": 4, "c": 2, "d": 30, "e": 1}
    assert split_shards(sizes, 9) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert split_shards(sizes, 1000) == [list(sizes)]


@pytest.mark.parametrize("tied", [True, False])
def test_weight_bytes_are_those_that_are_written(tmp_path: Path, tied: bool) -> None:
    config = {**SHAPES["tiny"], "tie_word_embeddings": tied}
    write_checkpoint(tmp_path, config)
    with open_checkpoint(tmp_path) as checkpoint:
        written = sum(tensor.read().nbytes // 2 for tensor in checkpoint.tensors.values())
    assert weight_bytes(config) == written


# As published; the context is cut to 8,192 (bench/random_model.py says why).
@pytest.mark.parametrize(
    ("shape", "parameters"),
    [("llama-3.2-1b", 1_235_814_400), ("llama-3.1-8b", 8_030_261_248), ("qwen3-0.6b", 596_049_920)],
)
def test_the_shapes_have_the_published_numbers_of_parameters(shape: str, parameters: int) -> None:
    assert weight_bytes(SHAPES[shape]) == 2 * parameters


@pytest.mark.parametrize(("shape", "factor"), [("llama-3.2-1b", 32.0), ("llama-3.1-8b", 8.0)])
def test_long_wavelengths_are_stretched_by_the_published_factor(shape: str, factor: float) -> None:
    spec, _ = read_spec(Config(dict(SHAPES[shape])))
    plain, _ = read_spec(Config({**SHAPES[shape], "rope_scaling": None}))
    assert plain.rope.frequencies[-1] / spec.rope.frequencies[-1] == pytest.approx(factor)
    assert spec.rope.frequencies[0] == plain.rope.frequencies[0] == 1.0
