"""Which Hugging Face architectures we import: a table of what differs, and where their tensors lie.

A new architecture of the usual shape is one row. Keys that are missing from config.json take the default of
transformers' configuration class, because save_pretrained leaves out what equals it (a Mistral without
`sliding_window` has one of 4096).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from model_store.config import Config
from model_store.errors import BadCheckpoint
from model_store.rope import read_rope
from model_store.spec import DecoderSpec

# Canonical name -> name in the checkpoint; {layer} stands for the layer's number. "weight" is always [outputs, inputs].
LLAMA_NAMES: Mapping[str, str] = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
    "layers.{layer}.attention_norm": "model.layers.{layer}.input_layernorm.weight",
    "layers.{layer}.q": "model.layers.{layer}.self_attn.q_proj.weight",
    "layers.{layer}.k": "model.layers.{layer}.self_attn.k_proj.weight",
    "layers.{layer}.v": "model.layers.{layer}.self_attn.v_proj.weight",
    "layers.{layer}.q_bias": "model.layers.{layer}.self_attn.q_proj.bias",
    "layers.{layer}.k_bias": "model.layers.{layer}.self_attn.k_proj.bias",
    "layers.{layer}.v_bias": "model.layers.{layer}.self_attn.v_proj.bias",
    "layers.{layer}.q_norm": "model.layers.{layer}.self_attn.q_norm.weight",
    "layers.{layer}.k_norm": "model.layers.{layer}.self_attn.k_norm.weight",
    "layers.{layer}.output": "model.layers.{layer}.self_attn.o_proj.weight",
    "layers.{layer}.output_bias": "model.layers.{layer}.self_attn.o_proj.bias",
    "layers.{layer}.mlp_norm": "model.layers.{layer}.post_attention_layernorm.weight",
    "layers.{layer}.gate": "model.layers.{layer}.mlp.gate_proj.weight",
    "layers.{layer}.up": "model.layers.{layer}.mlp.up_proj.weight",
    "layers.{layer}.down": "model.layers.{layer}.mlp.down_proj.weight",
    "layers.{layer}.gate_bias": "model.layers.{layer}.mlp.gate_proj.bias",
    "layers.{layer}.up_bias": "model.layers.{layer}.mlp.up_proj.bias",
    "layers.{layer}.down_bias": "model.layers.{layer}.mlp.down_proj.bias",
}

Windows = Callable[[Config, int], tuple[int, ...]]  # (config, layers) -> one window a layer, 0 = none


def no_windows(_: Config, num_layers: int) -> tuple[int, ...]:
    return (0,) * num_layers


def mistral_windows(config: Config, num_layers: int) -> tuple[int, ...]:
    """Every layer, unless config.json says null."""
    if "sliding_window" in config and config.value("sliding_window") is None:
        return (0,) * num_layers
    return (config.integer("sliding_window", 1, 1 << 31, default=4096),) * num_layers


def qwen_windows(config: Config, num_layers: int) -> tuple[int, ...]:
    """The layers that `layer_types` names, or those from max_window_layers on where use_sliding_window is on."""
    layer_types = config.texts("layer_types")
    is_on = config.flag("use_sliding_window", default=False)
    first = config.integer("max_window_layers", 0, 1 << 20, default=28)
    if layer_types is None:
        layer_types = ["sliding_attention" if is_on and i >= first else "full_attention" for i in range(num_layers)]
    if len(layer_types) != num_layers or set(layer_types) - {"sliding_attention", "full_attention"}:
        raise config.refusal("layer_types", f"{num_layers} of sliding_attention or full_attention", layer_types)
    if "sliding_attention" not in layer_types:
        return (0,) * num_layers
    if not is_on:
        raise config.refusal("use_sliding_window", "true, since layer_types has sliding_attention", is_on)
    window = config.integer("sliding_window", 1, 1 << 31, default=4096)
    return tuple(window if kind == "sliding_attention" else 0 for kind in layer_types)


@dataclass(frozen=True, slots=True)
class Architecture:
    """What sets one architecture apart. A bias is there (True), not there (False), or where a config key says so."""

    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    windows: Windows = no_windows
    default_kv_heads: int | None = None  # if the key is missing; None = as many as query heads
    default_head_dim: int | None = None  # if the key is missing; None = hidden_size / num_attention_heads
    names: Mapping[str, str] = field(default_factory=lambda: LLAMA_NAMES)


ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture(qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"),
    "MistralForCausalLM": Architecture(windows=mistral_windows, default_kv_heads=8),
    "Qwen2ForCausalLM": Architecture(qkv_bias=True, windows=qwen_windows, default_kv_heads=32),
    "Qwen3ForCausalLM": Architecture(
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm=True,
        windows=qwen_windows,
        default_kv_heads=32,
        default_head_dim=128,
    ),
}

# Keys that change the arithmetic of models we do not build: only these values leave it as it is.
NEUTRAL_VALUES: Mapping[str, tuple[object, ...]] = {
    "hidden_act": (None, "silu", "swish"),
    "is_encoder_decoder": (None, False),
    "quantization_config": (None,),
    "auto_map": (None,),  # the directory wants its own Python code run: never
    "rope_interleaved": (None, False),
    "partial_rotary_factor": (None, 1, 1.0),
    "original_max_position_embeddings": (None,),  # beside rope_scaling; belongs inside
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1, 1.0),
    "num_local_experts": (None, 0),
    "num_experts": (None, 0),
}


def read_spec(config: Config) -> tuple[DecoderSpec, Architecture]:
    """The decoder that config.json describes. Raises BadCheckpoint naming the key, its value and what we accept."""
    names = config.texts("architectures") or []
    if len(names) != 1 or names[0] not in ARCHITECTURES:
        raise BadCheckpoint(
            f"config.json: architectures is {names}; supported are {', '.join(ARCHITECTURES)}", param="architectures"
        )
    for key, neutral in NEUTRAL_VALUES.items():
        if config.value(key) not in neutral:
            raise config.refusal(
                key, f"{' or '.join(repr(value) for value in neutral[1:]) or 'nothing'}", config.value(key)
            )
    return _spec(names[0], ARCHITECTURES[names[0]], config), ARCHITECTURES[names[0]]


def _spec(name: str, architecture: Architecture, config: Config) -> DecoderSpec:
    num_layers = config.integer("num_hidden_layers", 1, 1024)
    hidden_size = config.integer("hidden_size", 1, 1 << 16)
    num_heads = config.integer("num_attention_heads", 1, 1024)
    num_kv_heads = _kv_heads(architecture, config, num_heads)
    head_dim = _head_dim(architecture, config, hidden_size, num_heads)
    max_position_embeddings = config.integer("max_position_embeddings", 1, 1 << 21)
    return DecoderSpec(
        architecture=name,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=config.integer("intermediate_size", 1, 1 << 20),
        vocab_size=config.integer("vocab_size", 1, 1 << 21),
        norm_epsilon=config.number("rms_norm_eps", 1e-12, 1.0, default=1e-6),
        rope=read_rope(config, head_dim, max_position_embeddings),
        windows=architecture.windows(config, num_layers),
        qkv_bias=_switch(architecture.qkv_bias, config),
        output_bias=_switch(architecture.output_bias, config),
        mlp_bias=_switch(architecture.mlp_bias, config),
        qk_norm=architecture.qk_norm,
        tied_embeddings=config.flag("tie_word_embeddings", default=False),
    )


def _kv_heads(architecture: Architecture, config: Config, num_heads: int) -> int:
    is_given = "num_key_value_heads" in config  # null means as many as query heads
    default = num_heads if is_given else architecture.default_kv_heads or num_heads
    num_kv_heads = config.integer("num_key_value_heads", 1, 1024, default=default)
    if num_heads % num_kv_heads:
        raise config.refusal("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})", num_kv_heads)
    return num_kv_heads


def _head_dim(architecture: Architecture, config: Config, hidden_size: int, num_heads: int) -> int:
    default = architecture.default_head_dim if "head_dim" not in config else None
    if default is None:
        if config.value("head_dim") is None and hidden_size % num_heads:
            raise config.refusal("hidden_size", f"a multiple of num_attention_heads ({num_heads})", hidden_size)
        default = hidden_size // num_heads
    head_dim = config.integer("head_dim", 2, 1024, default=default)
    if head_dim % 2:
        raise config.refusal("head_dim", "an even number (rotary pairs)", head_dim)
    return head_dim


def _switch(value: bool | str, config: Config) -> bool:
    return config.flag(value, default=False) if isinstance(value, str) else value


def expected_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor the decoder needs. A tied output layer is not listed."""
    layer = {
        "attention_norm": (spec.hidden_size,),
        "q": (spec.q_size, spec.hidden_size),
        "k": (spec.kv_size, spec.hidden_size),
        "v": (spec.kv_size, spec.hidden_size),
        "output": (spec.hidden_size, spec.q_size),
        "mlp_norm": (spec.hidden_size,),
        "gate": (spec.intermediate_size, spec.hidden_size),
        "up": (spec.intermediate_size, spec.hidden_size),
        "down": (spec.hidden_size, spec.intermediate_size),
    }
    biases = [(spec.qkv_bias, "q"), (spec.qkv_bias, "k"), (spec.qkv_bias, "v"), (spec.output_bias, "output")]
    biases += [(spec.mlp_bias, "gate"), (spec.mlp_bias, "up"), (spec.mlp_bias, "down")]
    layer |= {f"{name}_bias": layer[name][:1] for is_there, name in biases if is_there}
    if spec.qk_norm:
        layer |= {"q_norm": (spec.head_dim,), "k_norm": (spec.head_dim,)}
    shapes: dict[str, tuple[int, ...]] = {
        "embed": (spec.vocab_size, spec.hidden_size),
        "final_norm": (spec.hidden_size,),
    }
    shapes |= {f"layers.{i}.{name}": shape for i in range(spec.num_layers) for name, shape in layer.items()}
    if not spec.tied_embeddings:
        shapes["lm_head"] = (spec.vocab_size, spec.hidden_size)
    return shapes


def source_name(architecture: Architecture, canonical: str) -> str:
    """The checkpoint's name of a canonical one: layers.3.q -> model.layers.3.self_attn.q_proj.weight."""
    parts = canonical.split(".")
    if len(parts) == 1:
        return architecture.names[canonical]
    _, number, name = parts
    return architecture.names[f"layers.{{layer}}.{name}"].format(layer=number)
