"""Small models in every scheme of the target, each within its scheme's bound: what an import proves, figures kept."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import msgspec
import numpy as np
from numpy.typing import NDArray

from bench.gpu.run import Results, Run
from bench.random_model import SHAPES, write_checkpoint
from model_store.importing import import_model
from model_store.manifest import ModelManifest
from model_store.parity import Reference
from model_store.store import Store
from model_store.targets import TARGETS
from services.loading import artifact_logits

# Small shapes that between them use what the operators do; the context covers several KV blocks.
BASE: dict[str, object] = {
    **SHAPES["tiny"], "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 2048, "max_position_embeddings": 2048,
}  # fmt: skip
PARITY_SHAPES: dict[str, dict[str, object]] = {
    "llama": BASE,
    "qwen3": {**BASE, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128},
    "qwen2": {**BASE, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "mistral": {**BASE, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 20},
    "tiny": SHAPES["tiny"],
}
DEFAULT_SHAPES = ("llama", "qwen3", "qwen2", "mistral")


def calibration(vocab_size: int) -> Sequence[NDArray[np.int64]]:
    """Token ids to measure ranges on. Random like the prompts; text would mean nothing to random weights."""
    return [np.random.default_rng(seed).integers(0, vocab_size, 256) for seed in (1, 2)]


def pairs(target: str, shapes: Sequence[str]) -> list[tuple[str, str]]:
    """(shape, scheme): every shape in the target's first scheme, the first shape in every scheme.

    Shapes with wide heads are proved with an int8 KV cache too: its block is another size.
    """
    first, *others = TARGETS[target]
    chosen = [(shape, first) for shape in shapes] + [(shape, scheme) for shape in shapes[:1] for scheme in others]
    if "qwen3" in shapes[1:] and "bf16-kv-int8" in others:
        chosen.append(("qwen3", "bf16-kv-int8"))
    return chosen


def prove_small(run: Run, shape: str, scheme: str, target: str) -> Results:
    """An artifact of `scheme` against the CPU's fp32 artifact of the same checkpoint (that one: against numpy)."""
    source = run.scratch / f"parity-{shape}"
    if not source.exists():
        write_checkpoint(source, PARITY_SHAPES[shape])
    store, cpu_name = Store(run.settings.store), f"{shape}-cpu"
    prove = partial(artifact_logits, run.settings)
    cpu = import_model(source, store, cpu_name, scheme="fp32", candidate_factory=prove, progress=quiet)

    def reference(prompts: Sequence[NDArray[np.int64]]) -> list[NDArray[np.float32]]:
        with artifact_logits(run.settings, store.resolve(cpu_name), cpu) as logits:
            return [logits(prompt) for prompt in prompts]

    against: Reference | None = None if target == "cpu" and scheme == "fp32" else reference
    stored = import_model(
        source,
        store,
        shape,
        scheme=scheme,
        target=target,
        candidate_factory=prove,
        progress=quiet,
        calibration_ids=calibration(int(str(PARITY_SHAPES[shape]["vocab_size"]))),
        reference=against,
    )
    return figures(stored)


def figures(manifest: ModelManifest) -> Results:
    """What the import measured."""
    found = msgspec.to_builtins(manifest.parity)
    if not isinstance(found, dict):
        raise TypeError("the import measured no parity: this is a bug")
    return found


def quiet(what: str, done: int, total: int) -> None:
    """No progress lines between the figures."""
