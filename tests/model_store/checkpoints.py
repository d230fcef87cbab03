"""Tiny checkpoints that between them use every field of DecoderSpec, and the prompts they are compared on.

Their weights follow from a seed, so what is stored (references/, by scripts/make_references.py) is only what
transformers computes from them in float32, for a few rows of each prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.random_model import SHAPES, write_checkpoint
from model_store.spec import DecoderSpec

REFERENCES = Path(__file__).with_name("references")
ROWS_KEPT = 6  # of each prompt: its last ones
PROMPT_LENGTHS = (1, 5, 33, 70)

Values = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Case:
    """A checkpoint to write: `changes` to the tiny Llama shape."""

    architecture: str
    changes: Values
    dtype: str = "float32"
    num_shards: int = 1

    @property
    def config(self) -> Values:
        model_type = self.architecture.removesuffix("ForCausalLM").lower()
        return {**SHAPES["tiny"], "architectures": [self.architecture], "model_type": model_type, **self.changes}

    def write(self, directory: Path) -> DecoderSpec:
        return write_checkpoint(directory, self.config, seed=7, dtype=self.dtype, num_shards=self.num_shards)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}

CASES: Mapping[str, Case] = {
    "llama": Case("LlamaForCausalLM", {}),
    "llama-bfloat16-sharded": Case("LlamaForCausalLM", {"num_hidden_layers": 3}, dtype="bfloat16", num_shards=3),
    "llama-untied-float16": Case("LlamaForCausalLM", {"tie_word_embeddings": False}, dtype="float16"),
    "llama-biases": Case("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-odd-sizes": Case(
        "LlamaForCausalLM",
        {"hidden_size": 72, "intermediate_size": 84, "head_dim": 20, "num_attention_heads": 6, "vocab_size": 301},
    ),
    "llama-rope-llama3": Case("LlamaForCausalLM", {"rope_scaling": LLAMA3}),
    "llama-rope-linear": Case("LlamaForCausalLM", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "mistral": Case("MistralForCausalLM", {"sliding_window": None, "num_key_value_heads": 1, "rope_theta": 1e6}),
    "mistral-window": Case("MistralForCausalLM", {"sliding_window": 20, "tie_word_embeddings": False}),
    "qwen2": Case("Qwen2ForCausalLM", {"num_key_value_heads": 4}),
    "qwen2-window": Case(
        "Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1}
    ),
    "qwen2-rope-yarn": Case("Qwen2ForCausalLM", {"rope_parameters": YARN}),
    "qwen3": Case("Qwen3ForCausalLM", {"head_dim": 32, "tie_word_embeddings": False}),
    "qwen3-tied-bfloat16": Case("Qwen3ForCausalLM", {"head_dim": 24, "attention_bias": True}, dtype="bfloat16"),
}


def prompts(vocab_size: int) -> list[NDArray[np.int64]]:
    """Token ids that depend on nothing but `vocab_size`."""
    return [(np.arange(length, dtype=np.int64) * 37 + 11 * length) % vocab_size for length in PROMPT_LENGTHS]


def digest(directory: Path) -> str:
    """SHA-256 of the weights: whether this machine's generator still gives what the references were made from."""
    total = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        total.update(path.read_bytes())
    return total.hexdigest()


@dataclass(frozen=True, slots=True)
class StoredReference:
    """What transformers computed: the last rows of logits of each prompt."""

    digest: str
    logits: list[NDArray[np.float32]]  # [rows, V] of each prompt, rows <= ROWS_KEPT


def load_reference(name: str) -> StoredReference:
    with np.load(REFERENCES / f"{name}.npz", allow_pickle=False) as stored:
        logits = [stored[f"logits_{i}"] for i in range(len(PROMPT_LENGTHS))]
        return StoredReference(str(stored["digest"]), logits)


def save_reference(name: str, reference: StoredReference) -> None:
    arrays: dict[str, Any] = {f"logits_{i}": logits for i, logits in enumerate(reference.logits)}
    np.savez_compressed(REFERENCES / f"{name}.npz", digest=np.array(reference.digest), **arrays)
