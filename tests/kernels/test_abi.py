"""Every operator inside the installed ONNX Runtime: its function table, optional inputs, refusals with numbers."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from kernels.loader import KernelsUnavailable, isa_active, isa_available, set_isa, set_threads, threads
from model_store.packing import pack_float, pack_int8
from tests.kernels.attention_case import form
from tests.kernels.linear_case import Layer, packed, random_layer, run_layer
from tests.kernels.one_node import OneNode, Tensor, failure, open_session, run

CONSTANTS = frozenset({"weight", "scale", "colsum", "bias", "norm"})


def linear_node(layer: Layer) -> OneNode:
    """The layer as a node."""
    tensors = packed(layer)
    names = ("weight", "bias", "norm") if layer.scale is None else ("weight", "scale", "colsum", "bias", "norm")
    inputs: dict[str, Tensor | None] = {"x": layer.x, **{name: tensors.get(name) for name in names}}
    attributes: dict[str, int | float | str] = {"N": layer.outputs, "norm_epsilon": layer.norm_epsilon}
    if layer.silu_mul:
        attributes["activation"] = "silu_mul"
    operator = "Linear" if layer.scale is None else "QLinear"
    return OneNode(operator, {**inputs, "residual": layer.residual}, CONSTANTS, attributes)


def embed_node(quantized: bool) -> OneNode:
    """A table of 100 rows of 10, and seven ids."""
    rng = np.random.default_rng(0)
    table = rng.integers(-127, 128, (100, 10), dtype=np.int8)
    ids: dict[str, Tensor | None] = {"ids": np.array([0, 99, 5, 5, 64, 63, 1])}
    if not quantized:
        inputs = {**ids, "weight": pack_float(table.astype(np.float32))}
        return OneNode("Embed", inputs, CONSTANTS, {"N": 100, "K": 10})
    inputs = {**ids, "weight": pack_int8(table), "scale": np.full(128, 0.5, np.float32)}
    return OneNode("QEmbed", inputs, CONSTANTS, {"N": 100, "K": 10})


def attention_node(cache_type: type[np.float16] | type[np.float32] = np.float16) -> OneNode:
    """Two sequences, three and one new tokens, in a pool of four blocks."""
    angles = np.arange(32)[:, None] * np.array([1.0, 0.1, 0.01, 0.001])
    inputs: dict[str, Tensor | None] = {
        "qkv": np.random.default_rng(1).standard_normal((4, (4 + 2 * 2) * 8), dtype=np.float32),
        "kv_cache": np.zeros((1, 2, 4, 2, 16 * 16), cache_type),
        "positions": np.array([0, 1, 2, 5]),
        "cu_seqlens": np.array([0, 3, 4], np.int32),
        "past_lens": np.array([0, 5], np.int32),
        "block_table": np.array([[0, 1], [2, 3]], np.int32),
        "slot_mapping": np.array([0, 1, 2, 37], np.int32),
        "cos_sin": np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32),
    }
    attributes: dict[str, int | float | str] = {"layer": 0, "num_heads": 4, "kv_num_heads": 2, "scale": 0.3}
    return OneNode("PagedAttention", inputs, frozenset({"cos_sin"}), attributes)


def sample_node() -> OneNode:
    """Three greedy rows over a vocabulary of fifty."""
    logits = np.zeros((3, 50), np.float32)
    logits[[0, 1, 2], [7, 0, 49]] = 5
    inputs: dict[str, Tensor | None] = {
        "logits": logits,
        "temperature": np.zeros(3, np.float32),
        "top_k": np.zeros(3, np.int32),
        "top_p": np.ones(3, np.float32),
        "min_p": np.zeros(3, np.float32),
        "seed": np.arange(3),
        "position": np.arange(3),
    }
    return OneNode("Sample", inputs, output=np.int64)


QLINEAR = linear_node(random_layer(0, 5, 30, 70, quantized=True, extras="bias norm residual"))
LINEAR = linear_node(random_layer(0, 5, 30, 70, quantized=False, extras="bias norm residual"))


# ---- it runs ----


@pytest.mark.parametrize("quantized", [True, False], ids=["QLinear", "Linear"])
@pytest.mark.parametrize("silu_mul", [False, True])
@pytest.mark.parametrize(
    "extras", ["", "bias", "norm", "residual", "bias residual", "norm residual", "bias norm residual"]
)
def test_a_layer_has_the_same_bits_in_the_runtime_and_alone(quantized: bool, silu_mul: bool, extras: str) -> None:
    """Also every way to leave out an optional input in front of one that is there."""
    for rows in (1, 40):
        layer = random_layer(9, rows, 130, 200, quantized=quantized, silu_mul=silu_mul, extras=extras)
        np.testing.assert_array_equal(run(linear_node(layer)), run_layer(layer))


@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_threads_of_the_runtime_change_no_bit(num_threads: int) -> None:
    layer = random_layer(10, 70, 400, 900, quantized=True, extras="norm")
    np.testing.assert_array_equal(run(linear_node(layer), num_threads), run_layer(layer))


@pytest.mark.parametrize("quantized", [True, False], ids=["QEmbed", "Embed"])
def test_embeddings_come_out_of_the_packed_table(quantized: bool) -> None:
    table = np.random.default_rng(0).integers(-127, 128, (100, 10), dtype=np.int8).astype(np.float32)
    node = embed_node(quantized)
    ids = node.inputs["ids"]
    assert ids is not None
    np.testing.assert_array_equal(run(node), table[ids] * (0.5 if quantized else 1))


@pytest.mark.parametrize("cache_type", [np.float16, np.float32])
def test_attention_writes_its_keys_in_place(cache_type: type[np.float16] | type[np.float32]) -> None:
    node = attention_node(cache_type)
    y, cache = run(node), node.inputs["kv_cache"]
    assert y.shape == (4, 32)
    assert np.isfinite(y).all()
    assert cache is not None
    slots = cache.reshape(2, 4, 2, 256)
    written = slots[0].reshape(4, 2, 16, 16).any(axis=(1, 2))  # [block, slot]: keys lie side by side
    assert set(np.flatnonzero(written)) == {0, 1, 2, 37}


def test_greedy_sampling_takes_the_largest_logit() -> None:
    np.testing.assert_array_equal(run(sample_node()), [7, 0, 49])


@pytest.mark.parametrize("name", isa_available())
def test_every_form_runs_in_the_runtime(name: str) -> None:
    with form(name):
        assert isa_active() == name
        assert np.isfinite(run(QLINEAR)).all()


@pytest.mark.parametrize("node", [QLINEAR, LINEAR], ids=["QLinear", "Linear"])
def test_no_rows_are_no_rows(node: OneNode) -> None:
    empty = node.replaced("x", np.zeros((0, 30), np.float32)).replaced("residual", np.zeros((0, 70), np.float32))
    assert run(empty).shape == (0, 70)


def test_no_ids_are_no_rows() -> None:
    assert run(embed_node(True).replaced("ids", np.zeros(0, np.int64))).shape == (0, 10)


def test_one_session_may_run_on_many_threads_at_once() -> None:
    """Scratch memory is lent to one run at a time."""
    layers = [random_layer(11, rows, 130, 200, quantized=True, extras="norm") for rows in range(1, 13)]
    session = open_session(linear_node(layers[0]))
    results: dict[int, Tensor] = {}

    def work(index: int) -> None:
        for _ in range(20):
            results[index] = session.run(["y"], {"x": layers[index].x})[0]

    workers = [threading.Thread(target=work, args=[index]) for index in range(len(layers))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for index, layer in enumerate(layers):
        weights = linear_node(layers[0])  # all sessions' layers share the first one's weights
        np.testing.assert_array_equal(results[index], run(weights.replaced("x", layer.x)))


# ---- it refuses ----

X5 = np.zeros((5, 30), np.float32)
WEIGHT = QLINEAR.inputs["weight"]
assert WEIGHT is not None

# what is wrong, the node, what the message must say
REFUSALS: list[tuple[str, OneNode, str]] = [
    (
        "too many inputs",
        QLINEAR.replaced("x", np.zeros((5, 33), np.float32)),
        "x has shape [5,33], the weight takes 29..32",
    ),
    (
        "not the norm's K",
        QLINEAR.replaced("x", np.zeros((5, 31), np.float32)),
        "x has shape [5,31], norm has 30 elements",
    ),
    ("not a matrix", QLINEAR.replaced("x", np.zeros(30, np.float32)), "x has shape [30], expected [?,?]"),
    ("x of doubles", QLINEAR.replaced("x", X5.astype(np.float64)), "Type 'tensor(double)'"),
    (
        "short residual",
        QLINEAR.replaced("residual", np.zeros((4, 70), np.float32)),
        "residual has shape [4,70], expected [5,70]",
    ),
    (
        "narrow residual",
        QLINEAR.replaced("residual", np.zeros((5, 64), np.float32)),
        "residual has shape [5,64], expected [5,70]",
    ),
    ("short scale", QLINEAR.replaced("scale", np.ones(64, np.float32)), "scale has shape [64], expected [128]"),
    ("short colsum", QLINEAR.replaced("colsum", np.ones(70, np.int32)), "colsum has shape [70], expected [128]"),
    ("long bias", QLINEAR.replaced("bias", np.ones(192, np.float32)), "bias has shape [192], expected [128]"),
    ("short norm", QLINEAR.replaced("norm", np.ones(28, np.float32)), "length of norm is 28, must be in 29..32"),
    (
        "weight not packed",
        QLINEAR.replaced("weight", np.zeros((70, 30), np.int8)),
        "weight has shape [70,30], expected [2,?,64,4]",
    ),
    ("weight of floats", QLINEAR.replaced("weight", WEIGHT.astype(np.float32)), "Type 'tensor(float)'"),
    ("too few blocks", QLINEAR.with_attributes(N=200), "weight has shape [2,8,64,4], expected [4,?,64,4]"),
    (
        "too wide",
        QLINEAR.replaced("weight", np.zeros((2, 16385, 64, 4), np.int8)),
        "padded K of weight is 65540, must be in 4..65536",
    ),
    ("no outputs", QLINEAR.with_attributes(N=0), "N is 0, must be in 1..2147483647"),
    ("N not given", QLINEAR.with_attributes(N=None), "attribute N is missing"),
    (
        "unknown activation",
        QLINEAR.with_attributes(activation="gelu"),
        "activation is 'gelu', known are none and silu_mul",
    ),
    ("long activation", QLINEAR.with_attributes(activation="g" * 40), "activation has 40 characters, at most 15"),
    ("computed weights", QLINEAR.all_computed(), "weight must be an initializer"),
    ("scale is missing", QLINEAR.replaced("scale", None), "input 2 is marked single"),
    ("wrong K", LINEAR.replaced("x", np.zeros((5, 29), np.float32)), "x has shape [5,29], the weight takes 30..30"),
    ("wrong norm", LINEAR.replaced("norm", np.ones(31, np.float32)), "length of norm is 31, must be in 30..30"),
    ("wrong bias", LINEAR.replaced("bias", np.ones(70, np.float32)), "bias has shape [70], expected [128]"),
    ("silu halves N", LINEAR.with_attributes(activation="silu_mul"), "weight has shape [2,30,64], expected [3,?,64]"),
    ("id too large", embed_node(True).replaced("ids", np.array([3, 100])), "ids[1] is 100, the table has rows 0..99"),
    ("id negative", embed_node(False).replaced("ids", np.array([-1])), "ids[0] is -1, the table has rows 0..99"),
    ("ids of int32", embed_node(True).replaced("ids", np.array([3], np.int32)), "Type 'tensor(int32)'"),
    ("ids not a vector", embed_node(True).replaced("ids", np.array([[3]])), "ids has shape [1,1], expected [?]"),
    ("table too short", embed_node(True).with_attributes(N=129), "weight has shape [2,3,64,4], expected [3,3,64,4]"),
    ("table too narrow", embed_node(False).with_attributes(K=11), "weight has shape [2,10,64], expected [2,11,64]"),
    (
        "scale too short",
        embed_node(True).replaced("scale", np.ones(100, np.float32)),
        "scale has shape [100], expected [128]",
    ),
    ("K not given", embed_node(True).with_attributes(K=None), "attribute K is missing"),
]


@pytest.mark.parametrize(("node", "message"), [row[1:] for row in REFUSALS], ids=[row[0] for row in REFUSALS])
def test_what_does_not_fit_is_refused_with_its_numbers(node: OneNode, message: str) -> None:
    assert message in failure(node)


def attention_with(name: str, values: list[int] | list[list[int]]) -> OneNode:
    """attention_node() with other index values of the same type."""
    node = attention_node()
    before = node.inputs[name]
    assert before is not None
    return node.replaced(name, np.array(values, before.dtype))


# input, its values, a number that the message must hold
STRAY_INDEXES: list[tuple[str, list[int] | list[list[int]], str]] = [
    ("slot_mapping", [0, 1, 2, 64], "64"),
    ("slot_mapping", [0, 1, 2, -2], "-2"),
    ("block_table", [[0, 1], [4, 3]], "4"),
    ("block_table", [[0, 1], [-1, 3]], "-1"),
    ("positions", [0, 1, 2, 32], "32"),
    ("positions", [0, 1, 2, -5], "-5"),
    ("cu_seqlens", [0, 3, 5], "5"),
    ("cu_seqlens", [0, 5, 4], "4"),
    ("past_lens", [0, 32], "32"),
    ("past_lens", [0, -1], "-1"),
    ("past_lens", [0], "[2]"),
]


@pytest.mark.parametrize(("name", "values", "number"), STRAY_INDEXES)
def test_attention_refuses_stray_indexes(name: str, values: list[int] | list[list[int]], number: str) -> None:
    message = failure(attention_with(name, values))
    assert "PagedAttention: " in message
    assert number in message.split("PagedAttention: ")[1]


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p", "seed", "position"])
def test_sample_refuses_parameters_for_another_number_of_rows(name: str) -> None:
    node = sample_node()
    tensor = node.inputs[name]
    assert tensor is not None
    assert f"Sample: {name} has shape [2], expected [3]" in failure(node.replaced(name, tensor[:2]))


# ---- controls ----


def test_an_unknown_form_is_refused_by_name() -> None:
    before = isa_active()
    with pytest.raises(KernelsUnavailable, match="no kernels 'avx1024'"):
        set_isa("avx1024")
    assert isa_active() == before


def test_the_widest_form_is_the_default() -> None:
    with form(None):
        assert isa_active() == isa_available()[-1]


def test_the_number_of_threads_is_a_hint_that_can_be_set() -> None:
    before = threads()
    try:
        set_threads(5)
        assert threads() == 5
        set_threads(0)
        assert threads() >= 1
    finally:
        set_threads(before)
    with pytest.raises(ValueError, match="-1 threads"):
        set_threads(-1)
