"""The random checkpoints that benches and tests stand on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from bench.random_model import SHAPES, main, write_checkpoint
from model_store.checkpoint import open_checkpoint
from model_store.reference import reference_logits


def test_equal_arguments_give_equal_bytes_and_another_seed_other_weights(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_checkpoint(tmp_path / name, SHAPES["tiny"], seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert len(a) == len(c)
    assert a != c


def test_any_text_survives_the_tokenizer_and_every_id_decodes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SHAPES["tiny"])
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "A pond,\n\ta mill & 12 ducks: Grüße, 水車 🦆"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("ab<|end|>").ids[-1] == 0
    assert tokenizer.get_vocab_size() == 320
    assert all(tokenizer.decode([token]) for token in range(1, 320))


def test_keys_can_be_set_from_the_command_line(tmp_path: Path) -> None:
    arguments = ["--shape", "tiny", "--set", "num_hidden_layers=3", "--set", "rope_theta=5000.0", "--dtype", "float16"]
    assert main([*arguments, "--shards", "2", "--out", str(tmp_path)]) == 0
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.spec.num_layers == 3
        assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"F16"}
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_a_vocabulary_too_small_for_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size is 100"):
        write_checkpoint(tmp_path, {**SHAPES["tiny"], "vocab_size": 100})


@pytest.mark.parametrize("num_layers", [1, 8, 32])
def test_logits_stay_within_a_few_units_whatever_the_depth(tmp_path: Path, num_layers: int) -> None:
    spec = write_checkpoint(tmp_path, {**SHAPES["tiny"], "num_hidden_layers": num_layers})
    with open_checkpoint(tmp_path) as checkpoint:
        (logits,) = reference_logits(checkpoint, [np.arange(40) % spec.vocab_size])
    assert 1.0 < logits.std() < 4.0
