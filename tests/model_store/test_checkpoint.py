"""Directories that are not what they should be: each is refused with one sentence that names what is wrong."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from model_store.checkpoint import open_checkpoint
from model_store.errors import BadCheckpoint
from model_store.importing import revision_of_source
from tests.model_store.checkpoints import CASES

Tensors = dict[str, NDArray[np.generic]]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    CASES["llama"].write(tmp_path / "source")
    return tmp_path / "source"


def refusal(source: Path) -> str:
    """What opening the checkpoint and reading its weights says."""
    with pytest.raises(BadCheckpoint) as caught:
        read_all(source)
    return caught.value.message


def read_all(source: Path) -> None:
    with open_checkpoint(source) as checkpoint:
        for tensor in checkpoint.tensors.values():
            tensor.read()


def change(source: Path, edit: Callable[[Tensors], None]) -> None:
    path = source / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def rewrite(source: Path, name: str, **values: object) -> None:
    path = source / name
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**old, **values}))


def shard(source: Path, name: str) -> None:
    """Put an index in place of the single file, naming `name`."""
    os.rename(source / "model.safetensors", source / "one.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))


def truncate(source: Path) -> None:
    path = source / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def huge_header(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])


def large_header(source: Path) -> None:
    header = b'{"__metadata__":{"x":"' + b" " * (17 << 20) + b'"}}'
    (source / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


def pickle_only(source: Path) -> None:
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))


def link_outside(source: Path) -> None:
    (source.parent / "secret.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").symlink_to(source.parent / "secret.safetensors")


def index_without_names(source: Path) -> None:
    shard(source, "x")
    rewrite(source, "model.safetensors.index.json", weight_map=[1])


def config_directory(source: Path) -> None:
    (source / "config.json").unlink()
    (source / "config.json").mkdir()


def set_tensor(name: str, value: NDArray[np.generic]) -> Callable[[Path], None]:
    return lambda source: change(source, lambda tensors: tensors.update({name: value}))


def with_nan(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = np.full_like(tensors["model.layers.1.mlp.up_proj.weight"], np.nan)


def two_wrong(tensors: Tensors) -> None:
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    tensors["model.norm.weight"] = np.ones(5, np.float32)
    tensors["model.layers.0.self_attn.q_proj.weight_scale"] = np.ones(1, np.float32)


BROKEN: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    # what is done to the directory, and what the message says
    "truncated": (truncate, ["model.safetensors is not a safetensors file"]),
    "huge header": (huge_header, ["claims a header of 1,152,921,504,606,846,976"]),
    "header over the limit": (large_header, ["limit is 16,777,216"]),
    "empty file": (lambda s: (s / "model.safetensors").write_bytes(b""), ["has 0 bytes"]),
    "not safetensors": (
        lambda s: (s / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"\x80\x04K\x01" * 9),
        ["not a safetensors file"],
    ),
    "only a pickle": (pickle_only, ["neither model.safetensors", "pytorch_model.bin", "never read"]),
    "several wrong tensors": (
        lambda s: change(s, two_wrong),
        [
            "model.layers.0.self_attn.q_proj.weight [64, 64] is missing",
            "model.norm.weight has shape [5], expected [64]",
            "q_proj.weight_scale [1] is unexpected",
        ],
    ),
    "not a number": (lambda s: change(s, with_nan), ["model.layers.1.mlp.up_proj.weight", "not finite"]),
    "integers": (set_tensor("model.norm.weight", np.ones(64, np.int32)), ["model.norm.weight is I32", "BF16"]),
    "another tied layer": (set_tensor("lm_head.weight", np.ones((320, 64), np.float32)), ["values differ"]),
    "another layer count": (lambda s: rewrite(s, "config.json", num_hidden_layers=3), ["layers.2", "and 1 more"]),
    "link outside": (link_outside, ["link out of source"]),
    "shard in the parent": (
        lambda s: shard(s, "../one.safetensors"),
        ["'../one.safetensors' is not a plain file name"],
    ),
    "shard by absolute path": (lambda s: shard(s, "/etc/x.safetensors"), ["'/etc/x.safetensors' is not a plain"]),
    "shard that is a pickle": (lambda s: shard(s, "one.bin"), ["'one.bin'", "expected a .safetensors file"]),
    "shard that is missing": (lambda s: shard(s, "two.safetensors"), ["source has no two.safetensors"]),
    "index without names": (
        index_without_names,
        ["weight_map is [1]"],
    ),
    "no config": (lambda s: (s / "config.json").unlink(), ["source has no config.json"]),
    "config is no JSON": (lambda s: (s / "config.json").write_text("{'a': 1}"), ["config.json is not JSON"]),
    "config is a list": (lambda s: (s / "config.json").write_text("[]"), ["config.json holds a list"]),
    "config is nested": (lambda s: (s / "config.json").write_text("[" * 100_000), ["config.json is not JSON"]),
    "config is huge": (lambda s: (s / "config.json").write_text(" " * (1 << 21)), ["limit is 1,048,576"]),
    "config is a directory": (
        config_directory,
        ["config.json is not a regular file"],
    ),
    "no tokenizer": (lambda s: (s / "tokenizer.json").unlink(), ["source has no tokenizer.json"]),
    "no tokenizer model": (lambda s: (s / "tokenizer.json").write_text("{}"), ["tokenizer.json has no model"]),
    "token outside the model": (
        lambda s: rewrite(s, "tokenizer.json", added_tokens=[{"id": 320, "content": "<|new|>"}]),
        ["'<|new|>' has id 320", "320 rows"],
    ),
    "token without a number": (
        lambda s: rewrite(s, "tokenizer.json", added_tokens=[{"id": "1", "content": "<|new|>"}]),
        ["'<|new|>' has id '1'"],
    ),
    "end token outside the model": (lambda s: rewrite(s, "generation_config.json", eos_token_id=[0, 320]), ["320"]),
    "negative end token": (lambda s: rewrite(s, "config.json", eos_token_id=-1), ["eos_token_id is -1"]),
    "chat template is a number": (
        lambda s: rewrite(s, "tokenizer_config.json", chat_template=1),
        ["chat_template is 1"],
    ),
    "chat template is huge": (
        lambda s: (s / "chat_template.jinja").write_text("x" * (1 << 19)),
        ["at most 262,144 characters"],
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_malformed_directory_is_refused_by_name(source: Path, what: str) -> None:
    spoil, words = BROKEN[what]
    spoil(source)
    message = refusal(source)
    for word in words:
        assert word in message


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "is not a directory" in refusal(tmp_path / "nothing")


def test_the_hub_cache_may_link_to_its_blobs(source: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in source.iterdir():
        os.rename(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    with open_checkpoint(snapshot) as checkpoint:
        assert checkpoint.tensors["final_norm"].read().shape == (64,)


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_read_whole_and_by_rows_as_it_was_written(tmp_path: Path, name: str) -> None:
    CASES[name].write(tmp_path)
    stored: Tensors = {}
    for path in tmp_path.glob("*.safetensors"):
        stored |= load_file(path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert len(stored) == len(checkpoint.tensors)
        for tensor in checkpoint.tensors.values():
            expected = stored[tensor.name].astype(np.float32)
            np.testing.assert_array_equal(tensor.read(), expected)
            np.testing.assert_array_equal(tensor.rows(3, 9), expected[3:9])


def test_derived_tables_and_an_equal_tied_layer_are_no_surprise(source: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)

    change(source, add)
    with open_checkpoint(source) as checkpoint:
        assert "lm_head" not in checkpoint.tensors


def test_end_tokens_come_from_generation_config_config_and_tokenizer(source: Path) -> None:
    def eos() -> tuple[int, ...]:
        with open_checkpoint(source) as checkpoint:
            return checkpoint.tokenizer.eos_token_ids

    assert eos() == (0,)
    rewrite(source, "config.json", eos_token_id=5)
    assert eos() == (5, 0)  # the tokenizer's <|end|> ends a turn too
    rewrite(source, "generation_config.json", eos_token_id=[7, 5])
    assert eos() == (7, 5, 0)
    rewrite(source, "tokenizer_config.json", eos_token={"content": "Ġw3"})
    assert eos() == (7, 5, 260)


def test_the_template_file_wins_over_the_tokenizer_config(source: Path) -> None:
    def template() -> str | None:
        with open_checkpoint(source) as checkpoint:
            return checkpoint.tokenizer.chat_template

    assert "assistant" in (template() or "")
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    rewrite(source, "tokenizer_config.json", chat_template=named)
    assert template() == "yes"
    (source / "chat_template.jinja").write_text("from the file")
    assert template() == "from the file"


def test_bfloat16_is_read_in_a_process_that_imported_nothing_else(tmp_path: Path) -> None:
    """numpy knows bfloat16 only once ml_dtypes is loaded; onnx happens to load it, a reference alone does not."""
    CASES["qwen3-tied-bfloat16"].write(tmp_path)
    script = (
        "import sys, pathlib; from model_store.checkpoint import open_checkpoint\n"
        "with open_checkpoint(pathlib.Path(sys.argv[1])) as c: print(c.tensors['final_norm'].read().dtype)"
    )
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "float32"


def test_the_revision_follows_every_file_that_matters_and_no_other(source: Path) -> None:
    def revision(scheme: str = "w8a8") -> str:
        return revision_of_source(source, scheme)

    first = revision()
    assert re.fullmatch("[0-9a-f]{12}", first)
    (source / "README.md").write_text("about this model")
    assert revision() == first
    seen = {first, revision("fp32"), revision_of_source(source, "w8a8", "cuda")}
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "config.json",
    ):
        with (source / name).open("a") as file:
            file.write("\n")
        seen.add(revision())
    change(source, lambda tensors: tensors.update({"model.norm.weight": np.ones(64, np.float32)}))
    assert len(seen | {revision()}) == 9
