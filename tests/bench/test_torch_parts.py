"""What needs torch and transformers: the device's checkpoint writer, the float32 reference, the peer (on the CPU)."""

from __future__ import annotations

import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from bench.gpu.checkpoint import write_on_device
from bench.gpu.peer_process import PeerProcess, ask_reference
from bench.gpu.peer_terms import CONFIGURATIONS
from bench.random_model import SHAPES, write_checkpoint
from model_store.checkpoint import open_checkpoint
from model_store.parity import relative_errors
from model_store.reference import reference_logits

pytestmark = [pytest.mark.torch]


@pytest.mark.parametrize("shards", [1, 3])
def test_the_devices_writer_and_numpys_agree_in_all_but_the_numbers(tmp_path: Path, shards: int) -> None:
    pytest.importorskip("torch")
    config = {**SHAPES["tiny"], "tie_word_embeddings": False}
    write_checkpoint(tmp_path / "numpy", config)
    write_on_device(tmp_path / "torch", config, device="cpu", shard_bytes=(1 << 30) if shards == 1 else 70_000)
    assert (len(list((tmp_path / "torch").glob("*.safetensors"))) > 1) == (shards > 1)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "torch" / name).read_bytes() == (tmp_path / "numpy" / name).read_bytes()
    with open_checkpoint(tmp_path / "numpy") as ours, open_checkpoint(tmp_path / "torch") as theirs:
        assert list(ours.tensors) == list(theirs.tensors)
        for name, tensor in ours.tensors.items():
            other = theirs.tensors[name]
            assert (other.shape, other.dtype) == (tensor.shape, tensor.dtype)
            assert other.read().std() == pytest.approx(tensor.read().std(), rel=0.2, abs=0.03)
            assert other.read().mean() == pytest.approx(tensor.read().mean(), abs=0.05)


def test_a_tensors_numbers_do_not_depend_on_the_shards(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    for name, shard_bytes in (("a", 1 << 30), ("b", 50_000)):
        write_on_device(tmp_path / name, SHAPES["tiny"], device="cpu", shard_bytes=shard_bytes)
    with open_checkpoint(tmp_path / "a") as a, open_checkpoint(tmp_path / "b") as b:
        assert all(np.array_equal(a.tensors[name].read(), b.tensors[name].read()) for name in a.tensors)


def test_the_peer_gives_float32_logits_and_every_configuration_gives_all_tokens(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    source = tmp_path / "tiny"
    write_on_device(source, SHAPES["tiny"], device="cpu")
    prompts = [np.arange(length, dtype=np.int64) % 320 for length in (1, 17)]
    peer = PeerProcess("cpu")
    try:
        logits = peer.reference(source, prompts, timeout_s=120)
        with open_checkpoint(source) as checkpoint:
            expected = reference_logits(checkpoint, prompts)
        assert max(relative_errors(a, b).max() for a, b in zip(expected, logits, strict=True)) < 2e-5
        sizes = {"vocab_size": 320, "prompt_tokens": 12, "new_tokens": 6, "count": 3, "rounds": 2}
        for name in CONFIGURATIONS:
            found = peer.generate(source, 120, configuration=name, **sizes)
            assert [each["generated_tokens_per_s"] > 0 for each in found["passes"]] == [True, True]
            assert "settings_not_known" not in found
            assert ("decode_step_ms" in found["passes"][0]) == (name != "static")
    finally:
        peer.close()


def test_after_the_reference_nothing_holds_the_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from bench.gpu.peer import Peer

    class Watched(Peer):
        """Whether a model is still alive when it should have been given back."""

        def _open(self, checkpoint: str, device: str, dtype: str, attention: str) -> object:
            model = super()._open(checkpoint, device, dtype, attention)
            self.seen = weakref.ref(model)
            return model

        def release(self) -> dict[str, object]:
            super().release()
            self.is_alive = hasattr(self, "seen") and self.seen() is not None
            return {}

    source, peer = tmp_path / "tiny", Watched()
    write_on_device(source, SHAPES["tiny"], device="cpu")
    ask_reference(source, [np.arange(5)], partial(peer.reference, device="cpu"))
    assert peer.seen() is None
    assert not peer.is_alive
