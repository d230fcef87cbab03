"""Names to models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gateway.limits import GatewayLimits
from gateway.models import Models, ServedModel
from model_store.manifest import FileEntry, Geometry, KvCache, ModelManifest, write_manifest
from tests.gateway.support import MILLPOND, served_model
from wire.errors import UnknownModel

OLD = served_model(revision="aaaaaaaaaaaa")
NEW = served_model(revision="bbbbbbbbbbbb")
OTHER = served_model(name="other")


def test_the_only_model_needs_no_name() -> None:
    assert Models([OLD]).resolve(None) is OLD


def test_a_name_is_the_first_given_and_a_revision_is_exact() -> None:
    models = Models([NEW, OLD, OTHER])
    assert models.resolve("millpond") is NEW
    assert models.resolve("millpond@aaaaaaaaaaaa") is OLD
    assert models.resolve("other") is OTHER


@pytest.mark.parametrize("name", [None, "nobody", "millpond@", "millpond@cccccccccccc", "../millpond", "Millpond"])
def test_an_unknown_name_is_answered_with_those_that_are_served(name: str | None) -> None:
    with pytest.raises(UnknownModel, match="served: millpond@bbbbbbbbbbbb, other@0123456789ab"):
        Models([NEW, OTHER]).resolve(name)


def test_the_same_revision_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="given twice"):
        Models([OLD, OLD])


def test_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one model"):
        Models([])


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A stored model, as far as a gateway reads it."""
    shutil.copy(MILLPOND / "tokenizer.json", tmp_path)
    config = json.loads((MILLPOND / "tokenizer_config.json").read_text())
    manifest = ModelManifest(
        manifest_version=1,
        name="millpond",
        revision="0123456789ab",
        architecture="LlamaForCausalLM",
        scheme="fp32",
        target="cpu",
        geometry=Geometry(6, 192, 6, 2, 32, 512, vocab_size=2_048, max_model_len=1_024),
        kv_cache=KvCache("float16", 16, (2, 16, 32)),
        bos_token_id=0,
        eos_token_ids=[1],
        num_parameters=2_755_008,
        chat_template=config["chat_template"],
        special_tokens={"bos_token": "<|bos|>"},
        files={"tokenizer.json": FileEntry("0" * 64, 1)},
    )
    write_manifest(tmp_path, manifest)
    return tmp_path


def test_a_model_is_read_from_its_manifest(artifact: Path) -> None:
    model = ServedModel.load(artifact, GatewayLimits())
    assert (model.model_id, model.max_model_len, model.vocab_size) == ("millpond@0123456789ab", 1_024, 2_048)
    assert model.eos_token_ids == (1,)
    assert model.chat is not None
    assert model.tokenizer.decode([1], skip_special_tokens=False) == "<|end|>"


def test_limits_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="keep_alive_s is 0"):
        GatewayLimits(keep_alive_s=0)
    assert GatewayLimits(cancel_grace_s=0).cancel_grace_s == 0
