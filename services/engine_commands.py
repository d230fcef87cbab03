"""`millrace engines ...`: build TensorRT engines at release, on a machine like those that will serve; list them.

What builds is given from outside, so that the order of things (look first, build aside, prove that steps build nothing
more, then keep) can be tested without TensorRT.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from batcher.backend import Backend, BackendLimits, ModelInput, SamplingInput
from model_store.manifest import ModelManifest
from services.backends.engine_cache import (
    BuiltEngines,
    EngineCache,
    GpuFacts,
    RuntimeVersions,
    Seal,
    StepTokens,
    engine_key,
    engines_root,
    provider_options,
)
from services.backends.sizing import StepLimits, bytes_per_block
from services.loading import StoredModel, find_model, step_limits
from services.settings import Settings
from wire.errors import BadRequest

TARGET = "tensorrt"
OptionsOf = Callable[[int, int], Mapping[str, str]]  # the GPU's number, the stream's address -> the provider's options


class EngineMachine(Protocol):
    """Where engines are built (services/backends/tensorrt.py)."""

    def versions(self) -> RuntimeVersions:
        """The libraries there. Raises MillraceError with what is missing."""
        ...

    def gpu(self) -> GpuFacts:
        """The GPU there. Raises MillraceError if there is none."""
        ...

    def open(self, directory: Path, manifest: ModelManifest, limits: StepLimits, options: OptionsOf) -> Backend:
        """A backend whose session builds its engines, as `options` say."""
        ...


def build_engines(settings: Settings, name: str, machine: EngineMachine, *, as_json: bool) -> int:
    """Build the engines of a stored model for this machine and these settings, and print where they are."""
    model = _find(settings, name)
    limits = step_limits(settings, TARGET)
    tokens = StepTokens.up_to(limits.max_batch_tokens)
    key = engine_key(model.manifest, machine.versions(), machine.gpu(), tokens)

    def fill(directory: Path) -> None:
        def options(ordinal: int, stream: int) -> Mapping[str, str]:
            return provider_options(key, directory, ordinal=ordinal, stream=stream, may_build=True)

        backend = machine.open(model.directory, model.manifest, _least_memory(model.manifest, limits), options)
        try:
            seal = Seal(directory)
            for count in sorted({tokens.least, tokens.tuned, tokens.most}):
                backend.forward(*step_of(backend.limits, count))
            seal.check()  # a step that builds here would build while serving
        finally:
            backend.close()

    if not as_json:
        print(f"building engines of {model.manifest.model_id} for {key.gpu}: this takes minutes", file=sys.stderr)
    cache = EngineCache(engines_root(settings.store))
    directory = cache.build(model.manifest, key, fill)
    built = next(each for each in cache.list(model.manifest) if each.key == key)
    print(json.dumps(_summary(built) | {"directory": str(directory)}) if as_json else f"{_line(built)}\n{directory}")
    return 0


def list_engines(settings: Settings, name: str, *, as_json: bool) -> int:
    """One line for each machine that the model has engines for."""
    model = _find(settings, name)
    built = EngineCache(engines_root(settings.store)).list(model.manifest)
    if as_json:
        print(json.dumps([_summary(each) for each in built]))
    else:
        for each in built:
            print(_line(each))
        if not built:
            print(f"{model.manifest.model_id} has no engines yet", file=sys.stderr)
    return 0


def step_of(limits: BackendLimits, num_tokens: int) -> tuple[ModelInput, SamplingInput]:
    """A step of `num_tokens`, or as many as fit: the beginnings of as few prompts as possible, all of token 0."""
    longest = min(limits.max_model_len, limits.num_blocks * limits.block_size)
    blocks_each = -(-longest // limits.block_size)
    most = min(limits.max_batch_seqs, limits.num_blocks // blocks_each)
    count = min(num_tokens, most * longest)
    lengths = np.full(-(-count // longest), longest)
    lengths[-1] -= lengths.sum() - count
    positions = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
    ends = np.cumsum(lengths)
    rows = len(lengths)
    columns = np.arange(-(-lengths[0] // limits.block_size))
    table = np.arange(rows)[:, None] * blocks_each + columns
    first_slots = np.repeat(table[:, 0] * limits.block_size, lengths)
    table[columns * limits.block_size >= lengths[:, None]] = 0
    batch = ModelInput(
        input_ids=np.zeros(count, np.int64),
        positions=positions,
        cu_seqlens=np.concatenate([[0], ends]).astype(np.int32),
        past_lens=np.zeros(rows, np.int32),
        block_table=table.astype(np.int32),
        slot_mapping=(first_slots + positions).astype(np.int32),
        logits_rows=(ends - 1).astype(np.int32),
    )
    greedy = SamplingInput(
        temperature=np.zeros(rows, np.float32),
        top_k=np.zeros(rows, np.int32),
        top_p=np.ones(rows, np.float32),
        min_p=np.zeros(rows, np.float32),
        seed=np.zeros(rows, np.int64),
        position=lengths.astype(np.int64),
    )
    return batch, greedy


def _find(settings: Settings, name: str) -> StoredModel:
    model = find_model(settings, name)
    if model.manifest.target != TARGET:
        raise BadRequest(
            f"{model.manifest.model_id} was imported for target {model.manifest.target}; only those for {TARGET} have"
            " engines",
            param="model",
        )
    return model


def _least_memory(manifest: ModelManifest, limits: StepLimits) -> StepLimits:
    """`limits` with a KV pool that holds the largest step and no more: the rest is the builder's."""
    blocks = -(-limits.max_batch_tokens // manifest.kv_cache.block_size) + limits.max_batch_seqs
    return replace(limits, kv_memory_bytes=blocks * bytes_per_block(manifest))


def _summary(built: BuiltEngines) -> dict[str, object]:
    key = built.key
    return {
        "gpu": key.gpu,
        "compute_capability": key.compute_capability,
        "driver": key.driver,
        "tensorrt": key.tensorrt,
        "onnxruntime": key.onnxruntime,
        "max_batch_tokens": key.max_batch_tokens,
        "engines": sum(file.name.endswith(".engine") for file in built.files),
        "size_bytes": sum(file.size_bytes for file in built.files),
    }


def _line(built: BuiltEngines) -> str:
    row = _summary(built)
    return (
        f"{row['gpu']} ({row['compute_capability']}), driver {row['driver']}, TensorRT {row['tensorrt']}, onnxruntime"
        f" {row['onnxruntime']}: {row['engines']} engines for steps of up to {row['max_batch_tokens']:,} tokens,"
        f" {row['size_bytes']:,} bytes"
    )
