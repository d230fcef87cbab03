"""Whole imports: what ONNX Runtime computes from an artifact is what transformers computed from the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from model_store.errors import BadCheckpoint, ParityError
from model_store.importing import import_model
from model_store.manifest import ModelManifest
from model_store.parity import Candidate, relative_errors
from model_store.store import Store
from tests.model_store.checkpoints import CASES, load_reference, prompts
from tests.model_store.ort_session import Session, open_session
from wire.errors import BadRequest

# w8a8's errors on these checkpoints, with room for another processor's last bits; measured 0.03 to 0.07.
BOUNDS = {"fp32": 1e-4, "w8a8": 0.12}


def quiet(_: str, __: int, ___: int) -> None:
    """No progress."""


@contextmanager
def imported(tmp_path: Path, name: str, scheme: str) -> Iterator[Session]:
    CASES[name].write(tmp_path / "source")
    store = Store(tmp_path / "store")
    manifest = import_model(
        tmp_path / "source", store, name, scheme=scheme, candidate_factory=open_session, progress=quiet
    )
    with open_session(store.resolve(name), manifest) as session:
        yield session


@pytest.mark.parametrize("scheme", BOUNDS)
@pytest.mark.parametrize("name", CASES)
def test_an_artifact_computes_what_transformers_computed(tmp_path: Path, name: str, scheme: str) -> None:
    stored = load_reference(name)
    with imported(tmp_path, name, scheme) as session:
        logits = session.batch(prompts(session.manifest.geometry.vocab_size))
    errors = np.concatenate(
        [relative_errors(theirs, ours[-len(theirs) :]) for theirs, ours in zip(stored.logits, logits, strict=True)]
    )
    parity = session.manifest.parity
    assert parity is not None
    print(f"{name} {scheme}: {errors.max():.2e} from transformers, {parity.max_relative_error:.2e} on import")
    assert errors.max() < BOUNDS[scheme]
    assert parity.max_relative_error < BOUNDS[scheme]
    if scheme == "w8a8":
        assert errors.max() > 1e-3, "quantized weights cannot be this exact: is this the fp32 artifact?"


@pytest.mark.parametrize("scheme", BOUNDS)
@pytest.mark.parametrize("name", ["llama-odd-sizes", "mistral-window", "qwen3"])
def test_logits_do_not_depend_on_batch_or_chunks(tmp_path: Path, name: str, scheme: str) -> None:
    with imported(tmp_path, name, scheme) as session:
        sequences = prompts(session.manifest.geometry.vocab_size)
        alone = [session(sequence) for sequence in sequences]
        for chunk in (None, 1, 7, 16):
            for a, b in zip(alone, session.batch(sequences, chunk), strict=True):
                np.testing.assert_array_equal(a, b)


def test_the_graph_samples_the_largest_logit_at_temperature_zero(tmp_path: Path) -> None:
    with imported(tmp_path, "llama", "w8a8") as session:
        logits = session(prompts(320)[-1])
        np.testing.assert_array_equal(session.token_ids, logits.argmax(axis=-1))


def test_the_manifest_says_what_was_imported(tmp_path: Path) -> None:
    with imported(tmp_path, "mistral-window", "w8a8") as session:
        manifest = session.manifest
    assert (manifest.architecture, manifest.scheme, manifest.target) == ("MistralForCausalLM", "w8a8", "cpu")
    assert manifest.geometry.max_model_len == 512
    assert (manifest.kv_cache.dtype, manifest.kv_cache.block_size, manifest.kv_cache.block_shape) == (
        "float16",
        16,
        (2, 256),
    )
    assert (manifest.bos_token_id, manifest.eos_token_ids) == (0, [0])
    assert manifest.special_tokens == {"bos_token": "<|end|>", "eos_token": "<|end|>"}
    assert manifest.num_parameters == sum(
        [2 * 320 * 64, 64, 2 * (2 * 64 + 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 160)]
    )
    assert manifest.parity is not None
    assert manifest.parity.bound == 0.25
    store = Store(tmp_path / "store")
    assert store.verify("mistral-window") == manifest


def test_a_tied_table_is_stored_once(tmp_path: Path) -> None:
    def weights_bytes(name: str, changes: dict[str, object]) -> int:
        from bench.random_model import write_checkpoint

        write_checkpoint(tmp_path / name, {**CASES["llama"].config, **changes})
        store = Store(tmp_path / "store")
        manifest = import_model(
            tmp_path / name, store, name, scheme="w8a8", candidate_factory=open_session, progress=quiet
        )
        return manifest.files["weights.bin"].size_bytes

    tied = weights_bytes("tied", {"tie_word_embeddings": True})
    untied = weights_bytes("untied", {"tie_word_embeddings": False})
    assert 320 * 64 <= untied - tied < 320 * 64 * 1.5


def test_importing_again_builds_nothing_and_another_scheme_is_another_revision(tmp_path: Path) -> None:
    CASES["llama"].write(tmp_path / "source")
    store = Store(tmp_path / "store")
    steps: list[str] = []

    def run(scheme: str) -> ModelManifest:
        steps.clear()
        return import_model(
            tmp_path / "source",
            store,
            "pond",
            scheme=scheme,
            candidate_factory=open_session,
            progress=lambda what, done, total: steps.append(f"{what} {done}/{total}"),
        )

    first = run("w8a8")
    assert steps[:2] == ["packing 1/9", "packing 2/9"]
    assert steps[8:] == ["packing 9/9", "comparing 0/1", "comparing 1/1"]
    second = run("fp32")
    assert second.revision != first.revision
    assert store.show("pond") == second
    assert run("w8a8") == first
    assert steps == []
    assert store.show("pond") == first


def test_an_artifact_that_computes_something_else_does_not_enter_the_store(tmp_path: Path) -> None:
    CASES["llama"].write(tmp_path / "source")
    store = Store(tmp_path / "store")

    @contextmanager
    def wrong(directory: Path, manifest: ModelManifest) -> Iterator[Candidate]:
        with open_session(directory, manifest) as session:

            def candidate(token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
                return session(token_ids[::-1].copy())

            yield candidate

    with pytest.raises(ParityError, match=r"over the bound 0\.0001"):
        import_model(tmp_path / "source", store, "pond", scheme="fp32", candidate_factory=wrong, progress=quiet)
    assert store.list() == []
    assert list((tmp_path / "store" / ".incoming").iterdir()) == []


def test_a_weight_that_is_not_finite_stops_the_import_and_leaves_nothing(tmp_path: Path) -> None:
    CASES["llama"].write(tmp_path / "source")
    weights = tmp_path / "source" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.weight"][5, 6] = np.inf
    save_file(tensors, weights)
    store = Store(tmp_path / "store")
    with pytest.raises(BadCheckpoint, match=r"layers\.1\.mlp\.up_proj\.weight holds a value that is not finite"):
        import_model(tmp_path / "source", store, "pond", scheme="w8a8", candidate_factory=open_session, progress=quiet)
    assert list((tmp_path / "store" / ".incoming").iterdir()) == []
    assert store.list() == []


def test_the_bound_can_be_made_stricter_than_the_schemes(tmp_path: Path) -> None:
    CASES["llama"].write(tmp_path / "source")
    store = Store(tmp_path / "store")

    def run(bound: float | None) -> ModelManifest:
        return import_model(
            tmp_path / "source",
            store,
            "pond",
            scheme="w8a8",
            candidate_factory=open_session,
            progress=quiet,
            parity_bound=bound,
        )

    with pytest.raises(ParityError, match=r"over the bound 0\.001"):
        run(1e-3)
    assert store.list() == []
    stored = run(None)
    with pytest.raises(ParityError, match=r"is stored, but not within the bound 0\.001"):
        run(1e-3)
    assert store.list() == [stored]


@pytest.mark.parametrize(("key", "value"), [("scheme", "int3"), ("target", "abacus"), ("name", "../pond")])
def test_unknown_choices_are_refused_before_anything_is_read(tmp_path: Path, key: str, value: str) -> None:
    choices = {"scheme": "fp32", "target": "cpu", "name": "pond", key: value}
    with pytest.raises(BadRequest) as caught:
        import_model(
            tmp_path / "nothing",
            Store(tmp_path / "store"),
            choices["name"],
            scheme=choices["scheme"],
            target=choices["target"],
            candidate_factory=open_session,
            progress=quiet,
        )
    assert caught.value.param == key
