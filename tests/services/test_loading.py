"""Every target in the table can be opened; what a machine lacks for one is said in words, before anything is loaded."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import onnxruntime as ort
import pytest

from batcher.backend import BackendError
from model_store.targets import TARGETS
from services import loading
from services.cli import main
from services.loading import StoredModel, artifact_logits, describe, open_backend, step_limits
from services.machine import inspect_machine
from services.settings import Settings
from wire.errors import MillraceError


def of_target(model: StoredModel, target: str) -> StoredModel:
    """The shipped model as if it had been imported for `target`: only what is looked at before loading fits."""
    return StoredModel(model.directory, msgspec.structs.replace(model.manifest, target=target))


def test_every_target_has_a_way_to_open_and_to_prove() -> None:
    assert set(loading._OPENERS) == set(loading._PROVERS) == set(TARGETS)


def test_the_command_line_names_every_target_and_scheme(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes them out, because the table brings onnx with it, which servers do without."""
    monkeypatch.setenv("COLUMNS", "500")  # no word is broken
    with pytest.raises(SystemExit):
        main(["models", "import", "--help"])
    words = set(re.findall(r"[\w-]+", capsys.readouterr().out))
    assert words >= set(TARGETS) | {scheme for choices in TARGETS.values() for scheme in choices}


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="this machine may have a GPU")
@pytest.mark.parametrize("target", sorted(set(TARGETS) - {"cpu"}))
def test_a_machine_without_a_gpu_says_what_is_missing(target: str, shipped: StoredModel, tmp_path: Path) -> None:
    settings, model = Settings(store=tmp_path / "store"), of_target(shipped, target)
    for attempt in (
        lambda: open_backend(settings, model),
        lambda: artifact_logits(settings, model.directory, model.manifest).__enter__(),
    ):
        with pytest.raises((BackendError, MillraceError), match=r"GPU|onnxruntime-gpu"):
            attempt()


def test_doctor_leaves_open_what_only_the_gpu_knows(shipped: StoredModel) -> None:
    machine = inspect_machine()
    on_cpu = describe(Settings(), shipped, machine)
    on_gpu = describe(Settings(), of_target(shipped, "cuda"), machine)
    assert on_cpu["target"] == "cpu"
    assert on_cpu["kv_blocks"]
    assert on_gpu["target"] == "cuda"
    assert on_gpu["kv_blocks"] is None
    assert on_gpu["kv_memory_bytes"] is None
    assert on_gpu["max_batch_tokens"] == loading.GPU_BATCH_TOKENS
    sized = describe(Settings(kv_memory_bytes=1 << 30), of_target(shipped, "cuda"), machine)
    assert sized["kv_blocks"]
    assert sized["kv_tokens"]


@pytest.mark.parametrize(
    ("spin", "models", "shares"),
    [("auto", "a", False), ("auto", "a,b", True), ("no", "a", True), ("yes", "a,b", False)],
)
def test_threads_spin_between_steps_where_nobody_else_needs_the_cores(spin: str, models: str, shares: bool) -> None:
    assert step_limits(Settings(spin=spin, models=models)).shares_cores is shares
