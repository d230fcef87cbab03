"""What config.json says becomes a DecoderSpec, or a refusal that names the key."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from bench.random_model import SHAPES
from model_store.architectures import ARCHITECTURES, expected_shapes, read_spec, source_name
from model_store.config import Config
from model_store.errors import BadCheckpoint
from model_store.spec import DecoderSpec

TINY = SHAPES["tiny"]


def spec_of(architecture: str, changes: Mapping[str, object]) -> DecoderSpec:
    """The spec of the tiny shape with `changes`; the value "absent" takes a key out."""
    values = {**TINY, "architectures": [architecture], **changes}
    return read_spec(Config({key: value for key, value in values.items() if value != "absent"}))[0]


REFUSED = [
    # key, value, a word of the message
    ("num_hidden_layers", 0, "1 to 1,024"),
    ("num_hidden_layers", -3, "-3"),
    ("num_hidden_layers", 10**9, "1000000000"),
    ("num_hidden_layers", "two", "'two'"),
    ("num_hidden_layers", 2.0, "2.0"),
    ("num_hidden_layers", True, "True"),
    ("num_hidden_layers", "absent", "missing"),
    ("hidden_size", 2**40, "hidden_size"),
    ("hidden_size", 66, "multiple of num_attention_heads"),
    ("vocab_size", [320], "[320]"),
    ("intermediate_size", None, "None"),
    ("max_position_embeddings", 10**12, "max_position_embeddings"),
    ("num_key_value_heads", 3, "divisor"),
    ("head_dim", 15, "even"),
    ("head_dim", 1 << 20, "1,024"),
    ("rms_norm_eps", 0.0, "rms_norm_eps"),
    ("rms_norm_eps", "1e-5", "1e-5"),
    ("rope_theta", -1.0, "rope_theta"),
    ("tie_word_embeddings", "yes", "true or false"),
    ("attention_bias", 1, "attention_bias"),
    ("hidden_act", "gelu", "gelu"),
    ("architectures", ["MambaForCausalLM"], "MambaForCausalLM"),
    ("architectures", "LlamaForCausalLM", "list of strings"),
    ("architectures", [], "LlamaForCausalLM, MistralForCausalLM"),
    ("quantization_config", {"quant_method": "gptq"}, "quantization_config"),
    ("auto_map", {"AutoModelForCausalLM": "modeling_evil.Model"}, "auto_map"),
    ("partial_rotary_factor", 0.5, "partial_rotary_factor"),
    ("num_local_experts", 8, "num_local_experts"),
    ("rope_scaling", "linear", "an object"),
    ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0}, "'dynamic' is not supported"),
    ("rope_scaling", {"rope_type": "longrope", "factor": 2.0}, "'longrope' is not supported"),
    ("rope_scaling", {"rope_type": "linear"}, "factor is missing"),
    ("rope_scaling", {"rope_type": "linear", "factor": 0.5}, "0.5"),
    ("rope_scaling", {"rope_type": "linear", "factor": float("nan")}, "nan"),
    ("rope_scaling", {"rope_type": "default", "mrope_section": [8, 4, 4]}, "mrope_section"),
    ("rope_scaling", {"rope_type": "yarn", "factor": 1e6, "original_max_position_embeddings": 512}, "512,000,000"),
    (
        "rope_scaling",
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0},
        "low_freq",
    ),
]


@pytest.mark.parametrize(("key", "value", "word"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_bad_value_is_refused_with_its_key_and_what_was_expected(key: str, value: object, word: str) -> None:
    with pytest.raises(BadCheckpoint) as caught:
        spec_of("LlamaForCausalLM", {key: value})
    assert word in caught.value.message
    assert caught.value.http_status == 400
    assert caught.value.param is not None


ACCEPTED = [
    # what the config says, and what it means; missing keys take transformers' defaults
    ("LlamaForCausalLM", {"num_key_value_heads": "absent"}, {"num_kv_heads": 4}),
    ("LlamaForCausalLM", {"num_key_value_heads": None}, {"num_kv_heads": 4}),
    ("LlamaForCausalLM", {"tie_word_embeddings": "absent"}, {"tied_embeddings": False}),
    ("LlamaForCausalLM", {"sliding_window": 16}, {"windows": (0, 0)}),  # not a key of LlamaConfig
    ("LlamaForCausalLM", {"attention_bias": True}, {"qkv_bias": True, "output_bias": True, "mlp_bias": False}),
    ("LlamaForCausalLM", {"rms_norm_eps": "absent"}, {"norm_epsilon": 1e-6}),
    ("LlamaForCausalLM", {"head_dim": None}, {"head_dim": 16}),
    ("MistralForCausalLM", {}, {"windows": (4096, 4096)}),
    ("MistralForCausalLM", {"sliding_window": None}, {"windows": (0, 0)}),
    (
        "MistralForCausalLM",
        {"num_key_value_heads": "absent", "num_attention_heads": 16},
        {"num_kv_heads": 8, "head_dim": 4},
    ),
    ("Qwen2ForCausalLM", {}, {"qkv_bias": True, "output_bias": False, "windows": (0, 0)}),
    ("Qwen2ForCausalLM", {"sliding_window": 16, "use_sliding_window": False}, {"windows": (0, 0)}),
    (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
        {"windows": (0, 9)},
    ),
    (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]},
        {"windows": (9, 0)},
    ),
    ("Qwen3ForCausalLM", {"head_dim": "absent"}, {"qk_norm": True, "head_dim": 128, "qkv_bias": False}),
    ("Qwen3ForCausalLM", {"attention_bias": True}, {"qkv_bias": True, "output_bias": True}),
]


@pytest.mark.parametrize(("architecture", "changes", "meaning"), ACCEPTED, ids=str)
def test_a_config_means_what_transformers_takes_it_for(
    architecture: str, changes: dict[str, object], meaning: dict[str, object]
) -> None:
    spec = spec_of(architecture, changes)
    assert {key: getattr(spec, key) for key in meaning} == meaning


def test_layer_types_of_another_length_are_refused() -> None:
    with pytest.raises(BadCheckpoint, match="layer_types"):
        spec_of("Qwen2ForCausalLM", {"layer_types": ["full_attention"]})


def test_yarn_stretches_the_context_to_original_times_factor() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert spec_of("LlamaForCausalLM", {"rope_scaling": scaling}).max_model_len == 2048


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_has_a_name_in_the_checkpoint_and_no_two_share_one(architecture: str) -> None:
    spec = spec_of(architecture, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False})
    names = [source_name(ARCHITECTURES[architecture], name) for name in expected_shapes(spec)]
    assert len(set(names)) == len(names)
    assert not any("{" in name for name in names)
