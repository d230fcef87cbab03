"""What a stored model is: the facts a server needs before it opens the model, and the SHA-256 of every file.

Standard library and msgspec only, because the gateway reads manifests too. Written once by build.py, never changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

MANIFEST_VERSION: Final = 1
MANIFEST_FILE: Final = "manifest.json"
GRAPH_FILE: Final = "model.onnx"
WEIGHTS_FILE: Final = "weights.bin"
TOKENIZER_FILE: Final = "tokenizer.json"

# Standard numpy knows neither bfloat16 nor the 8-bit floats; readers of manifests need only their sizes.
DTYPE_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "float8_e4m3fn": 1}

Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Meta(ge=1, le=2**31)]


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of an artifact."""

    sha256: Sha256
    size_bytes: Annotated[int, Meta(ge=0)]


class Geometry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The numbers of a decoder-only transformer."""

    num_layers: Count
    hidden_size: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    intermediate_size: Count
    vocab_size: Count
    max_model_len: Count  # context length in tokens


class KvCache(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The KV pool a graph expects: [num_layers, 2, num_blocks, *block_shape] of `dtype`.

    It is one input `kv_cache`, or, where `is_split`, inputs `key_cache.N` and `value_cache.N` for each layer N.
    """

    dtype: str  # numpy name
    block_size: Count  # tokens in a block
    block_shape: tuple[Count, ...]  # of one layer's keys (or values) in one block
    is_split: bool = False

    @property
    def elements_per_block(self) -> int:
        """Elements of one layer's keys (or values) in one block."""
        count = 1
        for extent in self.block_shape:
            count *= extent
        return count

    @property
    def block_bytes(self) -> int:
        """Bytes of one layer's keys (or values) in one block."""
        return self.elements_per_block * DTYPE_BYTES[self.dtype]


class Parity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far the artifact's logits are from the checkpoint's in float32, measured before it was stored."""

    prompts: int
    tokens: int
    max_relative_error: float  # largest over rows of |a - b|_2 / |b|_2
    mean_relative_error: float
    top1_agreement: float  # share of rows with the same greedy token
    bound: float  # the limit it was held to


class ModelManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One immutable artifact of the store."""

    manifest_version: int
    name: str
    revision: str  # first 12 hex digits of the SHA-256 over builder version, scheme, target and the source's files
    architecture: str  # Hugging Face name, e.g. "LlamaForCausalLM"
    scheme: str  # how weights are stored: "w8a8", "bf16" ...; the rows of targets.py
    target: str  # where it runs: "cpu", "cuda" ...
    geometry: Geometry
    kv_cache: KvCache
    bos_token_id: int | None
    eos_token_ids: list[int]
    num_parameters: int
    chat_template: str | None  # Jinja text; rendered only in a sandbox
    special_tokens: dict[str, str]  # bos_token, eos_token ... as the template may name them
    files: dict[str, FileEntry]
    parity: Parity | None = None
    activations: str = "float32"  # numpy name of what linear layers and attention read and write

    @property
    def model_id(self) -> str:
        return f"{self.name}@{self.revision}"


def read_manifest(directory: Path) -> ModelManifest:
    """The manifest of the artifact in `directory`. Raises FileNotFoundError, or ValueError with the reason."""
    raw = (directory / MANIFEST_FILE).read_bytes()
    try:
        manifest = msgspec.json.decode(raw, type=ModelManifest)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{directory / MANIFEST_FILE} is not a manifest: {error}") from error
    if manifest.manifest_version != MANIFEST_VERSION:
        raise ValueError(
            f"{directory.name} has manifest version {manifest.manifest_version}; this build reads {MANIFEST_VERSION}"
        )
    return manifest


def write_manifest(directory: Path, manifest: ModelManifest) -> None:
    """Write the manifest as readable JSON."""
    raw = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    (directory / MANIFEST_FILE).write_bytes(raw + b"\n")
