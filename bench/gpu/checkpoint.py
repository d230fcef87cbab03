"""A random checkpoint made on the device: the shape of bench/random_model.py, written in seconds instead of minutes.

The numbers are torch's, not numpy's, so the bytes differ from random_model's; the distributions are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file

from bench.random_model import COMMON, SHAPES, Values, distribution, write_json, write_tokenizer
from model_store.architectures import expected_shapes, read_spec, source_name
from model_store.config import Config

SHARD_BYTES: Final = 2 << 30


def write_on_device(directory: Path, shape: str, changes: Mapping[str, object], seed: int = 0) -> Values:
    """Write the checkpoint of SHAPES[shape] in bfloat16; returns its config."""
    values = {**COMMON, **SHAPES[shape], **changes, "dtype": "bfloat16"}
    spec, architecture = read_spec(Config(values))
    directory.mkdir(parents=True, exist_ok=True)
    random = torch.Generator("cuda").manual_seed(seed)
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, dims in expected_shapes(spec).items():
        mean, deviation = distribution(spec, name, dims)
        tensor = torch.randn(dims, generator=random, device="cuda").mul_(deviation).add_(mean).to(torch.bfloat16).cpu()
        if size + tensor.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][source_name(architecture, name)] = tensor
        size += tensor.nbytes
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    )
    with ThreadPoolExecutor(8) as threads:
        list(
            threads.map(
                lambda pair: save_file(pair[0], pair[1], metadata={"format": "pt"}),
                [(shard, str(directory / name)) for shard, name in zip(shards, names, strict=True)],
            )
        )
    if len(shards) > 1:
        weight_map = {tensor: name for shard, name in zip(shards, names, strict=True) for tensor in shard}
        write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(directory / "config.json", values)
    write_tokenizer(directory, spec.vocab_size)
    torch.cuda.empty_cache()
    return values
