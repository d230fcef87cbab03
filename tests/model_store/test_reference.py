"""The NumPy decoder against transformers' stored logits: the ground that parity stands on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from model_store.checkpoint import open_checkpoint
from model_store.parity import relative_errors
from model_store.reference import reference_logits
from tests.model_store.checkpoints import CASES, digest, load_reference, prompts


@pytest.mark.parametrize("name", CASES)
def test_reference_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    spec = CASES[name].write(tmp_path)
    stored = load_reference(name)
    assert digest(tmp_path) == stored.digest, "the generator gives other weights: run python -m scripts.make_references"
    with open_checkpoint(tmp_path) as checkpoint:
        computed = reference_logits(checkpoint, prompts(spec.vocab_size))
    errors = [
        relative_errors(theirs, ours[-len(theirs) :]).max()
        for theirs, ours in zip(stored.logits, computed, strict=True)
    ]
    print(f"{name}: relative error {max(errors):.2e}")
    assert max(errors) < 1e-5


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("mistral-window", {"sliding_window": None}),
        ("qwen2-window", {"use_sliding_window": False}),
        ("llama-rope-llama3", {"rope_scaling": None}),
        ("llama-rope-linear", {"rope_scaling": None}),
        ("qwen2-rope-yarn", {"rope_parameters": None}),
    ],
)
def test_the_stored_logits_notice_the_feature_their_case_is_for(
    tmp_path: Path, name: str, plain: dict[str, object]
) -> None:
    """Without it the long prompt's logits differ, so a decoder that ignored the key could not pass the test above."""
    from bench.random_model import write_checkpoint

    case = CASES[name]
    spec = write_checkpoint(tmp_path, {**case.config, **plain}, seed=7, dtype=case.dtype)
    with open_checkpoint(tmp_path) as checkpoint:
        computed = reference_logits(checkpoint, prompts(spec.vocab_size)[-1:])[0]
    stored = load_reference(name).logits[-1]
    assert relative_errors(stored, computed[-len(stored) :]).min() > 1e-3


def test_prompts_do_not_see_each_other(tmp_path: Path) -> None:
    CASES["qwen3"].write(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        together = reference_logits(checkpoint, prompts(320))
        alone = [reference_logits(checkpoint, [prompt])[0] for prompt in prompts(320)]
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
