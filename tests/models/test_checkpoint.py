"""The stored weights, read from the safetensors header alone: size, parameters, and the configured tensors."""

import json
import struct
from math import prod
from pathlib import Path

import pytest

MILLPOND = Path(__file__).parents[2] / "models" / "millpond"


@pytest.fixture(scope="module")
def shapes() -> dict[str, tuple[int, ...]]:
    with (MILLPOND / "model.safetensors").open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


def expected_shapes() -> dict[str, tuple[int, ...]]:
    """What a tied Llama checkpoint of this configuration holds."""
    config = json.loads((MILLPOND / "config.json").read_text(encoding="utf-8"))
    width, hidden = config["hidden_size"], config["intermediate_size"]
    q, kv = config["num_attention_heads"] * config["head_dim"], config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (config["vocab_size"], width), "norm": (width,)}
    for layer in range(config["num_hidden_layers"]):
        inside = {
            "self_attn.q_proj": (q, width), "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width),
            "self_attn.o_proj": (width, q), "mlp.gate_proj": (hidden, width), "mlp.up_proj": (hidden, width),
            "mlp.down_proj": (width, hidden), "input_layernorm": (width,), "post_attention_layernorm": (width,),
        }  # fmt: skip
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in inside.items()}
    return {f"model.{name}.weight": shape for name, shape in shapes.items()}


def test_stored_tensors_are_those_of_the_configuration(shapes: dict[str, tuple[int, ...]]) -> None:
    assert shapes == expected_shapes()


def test_model_has_between_one_and_four_million_parameters(shapes: dict[str, tuple[int, ...]]) -> None:
    assert 1_000_000 <= sum(prod(shape) for shape in shapes.values()) <= 4_000_000


def test_weights_are_smaller_than_eight_megabytes() -> None:
    assert (MILLPOND / "model.safetensors").stat().st_size < 8_000_000


def test_context_length_is_1024_everywhere() -> None:
    config = json.loads((MILLPOND / "config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((MILLPOND / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["max_position_embeddings"] == tokenizer["model_max_length"] == 1024
