"""The store: whole revisions or nothing, whatever else happens at the same time."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from model_store.artifact_check import check_artifact
from model_store.errors import BadArtifact
from model_store.manifest import FileEntry, Geometry, KvCache, ModelManifest, read_manifest, write_manifest
from model_store.store import Store
from wire.errors import BadRequest, Conflict, UnknownModel

MANIFEST = ModelManifest(
    manifest_version=1,
    name="pond",
    revision="0123456789ab",
    architecture="LlamaForCausalLM",
    scheme="fp32",
    target="cpu",
    geometry=Geometry(
        num_layers=1,
        hidden_size=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        intermediate_size=1,
        vocab_size=1,
        max_model_len=1,
    ),
    kv_cache=KvCache(dtype="float32", block_size=16, block_shape=(1, 256)),
    bos_token_id=None,
    eos_token_ids=[],
    num_parameters=1,
    chat_template=None,
    special_tokens={},
    files={},
)


def fill(directory: Path, name: str = "pond", revision: str = "0123456789ab", weights: bytes = b"weights") -> None:
    """An artifact whose graph is empty: enough for everything but running it."""
    contents = {"model.onnx": b"", "weights.bin": weights, "tokenizer.json": b"{}"}
    files = {}
    for file_name, raw in contents.items():
        (directory / file_name).write_bytes(raw)
        files[file_name] = FileEntry(hashlib.sha256(raw).hexdigest(), len(raw))
    write_manifest(directory, msgspec.structs.replace(MANIFEST, name=name, revision=revision, files=files))


def put(store: Store, name: str = "pond", revision: str = "0123456789ab", weights: bytes = b"weights") -> ModelManifest:
    with store.workspace() as directory:
        fill(directory, name, revision, weights)
        return store.put(directory)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_what_was_put_is_found_by_name_revision_and_prefix(store: Store, tmp_path: Path) -> None:
    manifest = put(store)
    directory = tmp_path / "store" / "pond" / "0123456789ab"
    for reference in ("pond", "pond@0123456789ab", "pond@0123"):
        assert store.resolve(reference) == directory
        assert store.show(reference) == manifest
    assert store.verify("pond") == manifest
    assert [model.model_id for model in store.list()] == ["pond@0123456789ab"]


def test_the_newest_import_is_what_the_name_means_and_older_ones_stay(store: Store) -> None:
    put(store, revision="a" * 12)
    put(store, revision="b" * 12, weights=b"other")
    assert store.show("pond").revision == "b" * 12
    assert store.show("pond@aaaa").revision == "a" * 12
    assert store.make_live("pond@aaaa").revision == store.show("pond").revision == "a" * 12
    put(store, revision="b" * 12, weights=b"other")
    assert store.show("pond").revision == "b" * 12


@pytest.mark.parametrize(
    ("reference", "word"),
    [
        ("lake", "nothing of that name"),
        ("pond@ffff", "pond@aaaabbbbcccc, pond@aaaaddddeeee"),
        ("pond@aaaa", "matches several"),
        ("pond@", "expected a name"),
        ("pond@a/../..", "expected a name"),
        ("../pond", "expected a name"),
        ("", "expected a name"),
        (".incoming", "expected a name"),
    ],
)
def test_what_is_not_there_is_unknown_and_says_what_is(store: Store, reference: str, word: str) -> None:
    put(store, revision="aaaabbbbcccc")
    put(store, revision="aaaaddddeeee")
    with pytest.raises(UnknownModel, match=word.replace(".", r"\.")):
        store.resolve(reference)


@pytest.mark.parametrize(
    "name", ["", "Pond", "-pond", ".pond", "a" * 65, "pond/x", "../pond", "pond\n", "tümpel", "a b"]
)
def test_a_name_that_is_not_a_plain_word_is_refused(store: Store, name: str) -> None:
    with pytest.raises(BadRequest, match="model name"):
        put(store, name=name)
    assert store.list() == []


@pytest.mark.parametrize("revision", ["", "0123", "0123456789aB", "../../../../x", "0123456789ab\n"])
def test_a_revision_that_is_not_a_digest_is_refused(store: Store, revision: str) -> None:
    with pytest.raises(BadArtifact, match="revision"):
        put(store, revision=revision)


def test_the_same_revision_again_is_kept_and_another_under_its_name_is_a_conflict(store: Store) -> None:
    put(store)
    before = (store.resolve("pond") / "weights.bin").stat().st_ino
    put(store)
    assert (store.resolve("pond") / "weights.bin").stat().st_ino == before
    with pytest.raises(Conflict, match="pond@0123456789ab"):
        put(store, weights=b"changed")
    assert (store.resolve("pond") / "weights.bin").read_bytes() == b"weights"


def test_a_failed_build_leaves_nothing(store: Store, tmp_path: Path) -> None:
    def build() -> None:
        with store.workspace() as directory:
            (directory / "weights.bin").write_bytes(b"half")
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        build()
    assert store.list() == []
    assert list((tmp_path / "store" / ".incoming").iterdir()) == []


def test_an_artifact_without_its_manifest_or_a_file_does_not_enter(store: Store) -> None:
    with store.workspace() as directory, pytest.raises(BadArtifact, match="no usable manifest"):
        store.put(directory)
    with store.workspace() as directory:
        fill(directory)
        (directory / "tokenizer.json").unlink()
        with pytest.raises(BadArtifact, match=r"tokenizer\.json is missing"):
            store.put(directory)
    assert store.list() == []


BUILDER = """
import os, pathlib, sys
from model_store.store import Store
with Store(pathlib.Path(sys.argv[1])).workspace() as directory:
    (directory / "weights.bin").write_bytes(b"half")
    print(directory, flush=True)
    sys.stdin.readline()
    os._exit(9)
"""


def test_what_a_killed_builder_left_is_swept_and_a_living_one_is_not_touched(store: Store, tmp_path: Path) -> None:
    command = [sys.executable, "-c", BUILDER, str(tmp_path / "store")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as builder:
        assert builder.stdout is not None
        left = Path(builder.stdout.readline().strip())
        put(store)
        assert left.is_dir()
        builder.communicate("die\n")
    assert left.is_dir()
    put(store)
    assert not left.exists()


def test_many_puts_at_once_leave_one_whole_revision_each(store: Store) -> None:
    start = threading.Barrier(8)

    def one(number: int) -> None:
        start.wait()
        put(store, revision=f"{number % 4:012x}", weights=b"w" * (number % 4))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(one, range(8)))
    assert [model.revision for model in store.list()] == [f"{number:012x}" for number in range(4)]
    for model in store.list():
        assert store.verify(model.model_id) == model
    assert store.show("pond").revision in {model.revision for model in store.list()}


def test_readers_see_a_whole_model_while_its_name_moves(store: Store) -> None:
    put(store, revision="a" * 12)
    put(store, revision="b" * 12)
    stop = threading.Event()

    def move() -> None:
        while not stop.is_set():
            store.make_live("pond@aaaa")
            store.make_live("pond@bbbb")

    mover = threading.Thread(target=move)
    mover.start()
    try:
        assert {store.show("pond").revision for _ in range(300)} <= {"a" * 12, "b" * 12}
    finally:
        stop.set()
        mover.join()


def test_removing_the_live_revision_leaves_the_newest_of_the_others(store: Store, tmp_path: Path) -> None:
    for number, letter in enumerate("cab"):
        put(store, revision=letter * 12)
        os.utime(store.resolve(f"pond@{letter * 12}"), (number, number))
    store.remove("pond")
    assert store.show("pond").revision == "a" * 12
    store.remove("pond@cccc")
    assert store.show("pond").revision == "a" * 12
    store.remove("pond")
    assert not (tmp_path / "store" / "pond").exists()
    with pytest.raises(UnknownModel):
        store.remove("pond")


def flip(directory: Path) -> None:
    raw = bytearray((directory / "weights.bin").read_bytes())
    raw[3] ^= 1
    (directory / "weights.bin").write_bytes(raw)


def link(directory: Path) -> None:
    os.rename(directory / "weights.bin", directory.parent / "elsewhere")
    (directory / "weights.bin").symlink_to(directory.parent / "elsewhere")


def link_directory(directory: Path) -> None:
    os.rename(directory, directory.with_name("moved"))
    directory.symlink_to(directory.with_name("moved"))


def directory_for_file(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.json").mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (flip, "weights.bin has changed"),
    "a longer file": (lambda d: (d / "weights.bin").write_bytes(b"weights!"), "has 8 bytes; the manifest says 7"),
    "a missing file": (lambda d: (d / "weights.bin").unlink(), "weights.bin is missing"),
    "a further file": (lambda d: (d / "extra.bin").write_bytes(b""), "extra.bin is not in the manifest"),
    "a symbolic link": (link, "weights.bin is a link"),
    "a hard link": (lambda d: os.link(d / "weights.bin", d.parent / "other"), "weights.bin is a link"),
    "a directory": (
        directory_for_file,
        "tokenizer.json is a link or not a regular file",
    ),
    "another name": (
        lambda d: write_manifest(d, msgspec.structs.replace(read_manifest(d), name="lake")),
        "holds the manifest of lake@0123456789ab",
    ),
    "a manifest that is none": (lambda d: (d / "manifest.json").write_text("{}"), "no usable manifest"),
    "a newer manifest": (
        lambda d: write_manifest(d, msgspec.structs.replace(read_manifest(d), manifest_version=99)),
        "manifest version 99",
    ),
    "a manifest without the graph": (
        lambda d: write_manifest(d, msgspec.structs.replace(read_manifest(d), files={})),
        "does not list model.onnx",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_verify_names_what_is_wrong(store: Store, what: str) -> None:
    put(store)
    spoil, message = DAMAGE[what]
    spoil(store.resolve("pond"))
    with pytest.raises(BadArtifact, match=message):
        store.verify("pond")


def test_a_revision_that_is_a_link_is_not_in_the_store(store: Store) -> None:
    put(store)
    link_directory(store.resolve("pond"))
    with pytest.raises(UnknownModel):
        store.resolve("pond")


def test_an_artifact_directory_that_is_a_link_is_refused(store: Store) -> None:
    manifest = put(store)
    directory = store.resolve("pond")
    link_directory(directory)
    with pytest.raises(BadArtifact, match="not a directory of its own"):
        check_artifact(directory, manifest)


def test_a_store_that_does_not_exist_is_empty_and_stays_so(store: Store, tmp_path: Path) -> None:
    assert store.list() == []
    with pytest.raises(UnknownModel):
        store.resolve("pond")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("model_store.store, model_store.manifest", {"onnx", "numpy", "safetensors", "ml_dtypes", "torch"}),
        ("model_store.importing", {"onnx", "safetensors", "torch"}),  # a server's start asks it for a revision
    ],
)
def test_looking_things_up_loads_no_heavy_module(modules: str, heavy: set[str]) -> None:
    script = f"import sys, {modules}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not heavy & set(loaded)
