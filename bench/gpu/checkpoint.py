"""A random checkpoint made by torch on the device: a shape of bench/random_model.py, in seconds instead of minutes.

The numbers are torch's, not numpy's, so the bytes differ from random_model's; names, shapes and distributions are the
same. Each tensor has its own seed, so that its values do not depend on what was made before it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

from bench.random_model import COMMON, Values, distribution, write_json, write_tokenizer
from model_store.architectures import expected_shapes, read_spec, source_name
from model_store.config import Config

SHARD_BYTES: Final = 2 << 30


def weight_bytes(config: Mapping[str, object]) -> int:
    """Of the checkpoint in bfloat16."""
    spec, _ = read_spec(Config({**COMMON, **config, "dtype": "bfloat16"}))
    return sum(2 * math.prod(shape) for shape in expected_shapes(spec).values())


def write_on_device(
    directory: Path,
    config: Mapping[str, object],
    *,
    device: str = "cuda",
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> Values:
    """Write the checkpoint that `config` describes in bfloat16; returns its config.json.

    A shard is written by a thread of its own while the next is made. Host memory holds all of them for a moment.
    """
    import torch
    from safetensors.torch import save_file

    values = {**COMMON, **config, "dtype": "bfloat16"}
    spec, architecture = read_spec(Config(values))
    shapes = expected_shapes(spec)
    shards = split_shards({name: 2 * math.prod(shape) for name, shape in shapes.items()}, shard_bytes)
    directory.mkdir(parents=True, exist_ok=True)
    random = torch.Generator(device)
    writes: list[Future[None]] = []
    weight_map: dict[str, str] = {}
    with ThreadPoolExecutor(8) as threads:
        for number, names in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            shard: dict[str, torch.Tensor] = {}
            for name in names:
                mean, deviation = distribution(spec, name, shapes[name])
                random.manual_seed(seed << 32 | zlib.crc32(name.encode()))
                tensor = torch.randn(shapes[name], generator=random, device=device).mul_(deviation).add_(mean)
                shard[source_name(architecture, name)] = tensor.to(torch.bfloat16).cpu()
            weight_map |= dict.fromkeys(shard, file)
            writes.append(threads.submit(save_file, shard, str(directory / file), metadata={"format": "pt"}))
        for write in writes:
            write.result()
    if len(shards) > 1:
        write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(directory / "config.json", values)
    write_tokenizer(directory, spec.vocab_size)
    if device == "cuda":
        torch.cuda.empty_cache()
    return values


def split_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in their order, in shards of at most `limit` bytes (a larger tensor is a shard alone)."""
    shards: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not shards or filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
