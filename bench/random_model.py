"""Write a checkpoint of any shape with random weights, in Hugging Face layout: what speed and parity are measured on.

    python -m bench.random_model --shape smollm2-135m --out /tmp/smollm2
    python -m bench.random_model --shape tiny --set num_hidden_layers=3 --set attention_bias=true --out /tmp/tiny

Speed depends on a model's shape, not on what it learned. Every tensor has its own generator, keyed by seed and name,
so the same arguments give the same bytes on every machine and a test needs no stored weights.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model_store.architectures import expected_shapes, read_spec, source_name
from model_store.config import Config
from model_store.spec import DecoderSpec

Values = dict[str, object]

LLAMA3_ROPE: Values = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES: Mapping[str, Values] = {
    "smollm2-135m": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    # The context of the next three is cut to 8,192 here: the tables of cosines and sines grow with it, speed does not.
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {**LLAMA3_ROPE, "factor": 32.0},
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {**LLAMA3_ROPE, "factor": 8.0},
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": 320,
        "tie_word_embeddings": True,
    },
}
COMMON: Values = {"hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 0}
END = "<|end|>"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{{ 'assistant: ' }}"
)


def write_checkpoint(
    directory: Path, config: Mapping[str, object], *, seed: int = 0, dtype: str = "bfloat16", num_shards: int = 1
) -> DecoderSpec:
    """A checkpoint of the model that `config` describes. dtype: bfloat16, float16 or float32."""
    values = {**COMMON, **config, "dtype": dtype}
    spec, architecture = read_spec(Config(values))
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        source_name(architecture, name): as_stored(random_tensor(spec, name, shape, seed), dtype)
        for name, shape in expected_shapes(spec).items()
    }
    write_json(directory / "config.json", values)
    _write_weights(directory, tensors, num_shards)
    write_tokenizer(directory, spec.vocab_size)
    return spec


def random_tensor(spec: DecoderSpec, name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """The canonical tensor `name`, scaled so that activations stay near 1 and logits spread over a few units."""
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    mean, deviation = distribution(spec, name, shape)
    values = random.standard_normal(shape, dtype=np.float32)
    values *= deviation
    return mean + values if mean else values


def distribution(spec: DecoderSpec, name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of the canonical tensor `name`."""
    role = name.rpartition(".")[2]
    if role.endswith("norm"):
        return 1.0, 0.1
    if role.endswith("bias"):
        return 0.0, 0.1
    gain = {"embed": 2.0, "lm_head": 2.0, "gate": 1.4, "q": 1.4, "k": 1.4}.get(role, 1.0)
    if role in {"output", "down"}:  # all additions to the residual together are about as large as the embedding
        gain = 4.0 / math.sqrt(2 * spec.num_layers * spec.hidden_size)
    return 0.0, gain / math.sqrt(shape[-1])


def as_stored(values: NDArray[np.float32], dtype: str) -> NDArray[np.generic]:
    """`values` rounded to what the file holds."""
    if dtype == "bfloat16":
        import ml_dtypes

        return values.astype(ml_dtypes.bfloat16)
    return values.astype(np.dtype(dtype))


def _write_weights(directory: Path, tensors: Mapping[str, NDArray[np.generic]], num_shards: int) -> None:
    from safetensors.numpy import save_file

    if num_shards == 1:
        save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[shard::num_shards]}
        save_file(part, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    size_bytes = sum(tensor.nbytes for tensor in tensors.values())
    write_json(
        directory / "model.safetensors.index.json", {"metadata": {"total_size": size_bytes}, "weight_map": weight_map}
    )


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """A byte-level tokenizer without merges: any text encodes to its bytes, and every id decodes to something."""
    alphabet = _byte_alphabet()
    if vocab_size < len(alphabet) + 1:
        raise ValueError(f"vocab_size is {vocab_size}; a byte-level tokenizer needs at least {len(alphabet) + 1}")
    tokens = [END, *alphabet, *(f"Ġw{number}" for number in range(vocab_size - len(alphabet) - 1))]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    special = {"id": 0, "content": END, "single_word": False, "lstrip": False, "rstrip": False}
    tokenizer: Values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**special, "normalized": False, "special": True}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {token: number for number, token in enumerate(tokens)}, "merges": []},
    }
    write_json(directory / "tokenizer.json", tokenizer)
    settings: Values = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
    write_json(directory / "tokenizer_config.json", {**settings, "chat_template": TEMPLATE})


def _byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE (GPT-2's table): printable ones for themselves."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def write_json(path: Path, values: Mapping[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.random_model", description="Write a random checkpoint.")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--out", type=Path, required=True, help="directory to write; created if missing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="a key of config.json; repeat")
    options = parser.parse_args(arguments)
    changes = {key: json.loads(value) for key, _, value in (item.partition("=") for item in options.set)}
    config = {**SHAPES[options.shape], **changes}
    write_checkpoint(options.out, config, seed=options.seed, dtype=options.dtype, num_shards=options.shards)
    print(f"{options.out}: {config['architectures']}, {options.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
