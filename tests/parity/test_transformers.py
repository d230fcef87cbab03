"""Live comparison with transformers in float32: all logits of a batch of prompts, for every architecture and scheme."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from model_store.checkpoint import open_checkpoint
from model_store.importing import import_model
from model_store.parity import relative_errors
from model_store.reference import reference_logits
from model_store.store import Store
from tests.model_store.checkpoints import CASES
from tests.model_store.ort_session import open_session

pytestmark = pytest.mark.torch

LENGTHS = (1, 2, 15, 16, 17, 31, 64, 100, 200)


@pytest.mark.parametrize("name", CASES)
def test_reference_and_artifacts_agree_with_transformers_on_every_row(tmp_path: Path, name: str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.parity.transformers_logits import open_transformers

    source, store = tmp_path / "source", Store(tmp_path / "store")
    spec = CASES[name].write(source)
    random = np.random.default_rng(5)
    prompts = [random.integers(0, spec.vocab_size, length, dtype=np.int64) for length in LENGTHS]
    theirs = [open_transformers(source)(prompt) for prompt in prompts]
    with open_checkpoint(source) as checkpoint:
        results = {"reference": reference_logits(checkpoint, prompts)}
    for scheme in ("fp32", "w8a8"):
        manifest = import_model(
            source, store, name, scheme=scheme, candidate_factory=open_session, progress=lambda *_: None
        )
        with open_session(store.resolve(name), manifest) as session:
            results[scheme] = session.batch(prompts)
    worst = {
        kind: max(relative_errors(a, b).max() for a, b in zip(theirs, ours, strict=True))
        for kind, ours in results.items()
    }
    print(name, {kind: f"{error:.2e}" for kind, error in worst.items()})
    assert worst["reference"] < 2e-5
    assert worst["fp32"] < 1e-4
    assert worst["w8a8"] < 0.15
