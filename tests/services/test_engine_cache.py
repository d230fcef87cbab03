"""TensorRT engines: found only where everything they depend on is the same, built aside, and never while serving.

What ONNX Runtime does with a directory (write an engine for each stretch, or read what is there) is done here by a
machine of this file; the order of things and every word are the product's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from batcher.backend import Backend, BackendLimits, ModelInput, SamplingInput, StepOutput
from model_store.manifest import FileEntry, Geometry, KvCache, ModelManifest
from model_store.store import Store
from services.backends.engine_cache import (
    KEY_FILE,
    EngineCache,
    EngineChanged,
    EngineKey,
    EngineMissing,
    RuntimeVersions,
    Seal,
    StepTokens,
    engine_key,
    engines_root,
    provider_options,
)
from services.backends.scripted import ScriptedBackend, check_model_input
from services.backends.sizing import StepLimits, backend_limits
from services.backends.tensorrt import TensorRtMachine, TensorRtUnavailable, version_parts
from services.cli import main
from services.engine_commands import build_engines, list_engines, step_of
from services.settings import Settings
from tests.model_store.test_store import MANIFEST, put
from wire.errors import BadRequest

GEOMETRY = Geometry(
    num_layers=2,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=192,
    vocab_size=320,
    max_model_len=512,
)
VERSIONS = RuntimeVersions(onnxruntime="1.31.1", tensorrt="10.14.1")
TOKENS = StepTokens.up_to(4096)


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str = "NVIDIA H100 80GB HBM3"
    compute_capability: tuple[int, int] = (9, 0)
    driver: str = "580.95.05"


def manifest_of(weights: str = "b" * 64) -> ModelManifest:
    return msgspec.structs.replace(
        MANIFEST,
        target="tensorrt",
        scheme="int8",
        geometry=GEOMETRY,
        kv_cache=KvCache(dtype="float16", block_size=256, block_shape=(256, 2, 16), is_split=True),
        files={"model.onnx": FileEntry("a" * 64, 10), "weights.bin": FileEntry(weights, 10)},
    )


def key_of(**changes: object) -> EngineKey:
    return msgspec.structs.replace(engine_key(manifest_of(), VERSIONS, Gpu(), TOKENS), **changes)


def write_engines(directory: Path) -> None:
    """What the provider leaves behind."""
    (directory / "TensorrtExecutionProvider_TRTKernel_graph_1_0_sm90.engine").write_bytes(b"engine" * 100)
    (directory / "TensorrtExecutionProvider_TRTKernel_graph_1_0_sm90.profile").write_bytes(b"profile")
    (directory / "TensorrtExecutionProvider_cache_sm90.timing").write_bytes(b"timing")


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines")


def test_engines_are_found_by_all_that_they_were_built_for(cache: EngineCache, tmp_path: Path) -> None:
    key = key_of()
    built = cache.build(manifest_of(), key, write_engines)
    assert built == tmp_path / "engines" / "pond" / "0123456789ab" / key.digest
    assert cache.find(manifest_of(), key) == built
    assert sorted(path.name for path in built.parent.iterdir()) == [key.digest]
    (engines,) = cache.list(manifest_of())
    assert engines.key == key
    assert [file.name.rpartition(".")[2] for file in engines.files] == ["engine", "profile", "timing"]


DIFFERENCES: Mapping[str, tuple[Mapping[str, object], str]] = {
    "driver": ({"driver": "590.10"}, "built for driver 580.95.05, here it is 590.10"),
    "tensorrt": ({"tensorrt": "10.15.0"}, "built for tensorrt 10.14.1, here it is 10.15.0"),
    "onnxruntime": ({"onnxruntime": "1.32.0"}, "built for onnxruntime 1.31.1, here it is 1.32.0"),
    "gpu": (
        {"gpu": "NVIDIA H200", "compute_capability": "9.0"},
        "built for gpu NVIDIA H100 80GB HBM3, here it is NVIDIA H200",
    ),
    "architecture": ({"compute_capability": "10.0"}, "built for compute capability 9.0, here it is 10.0"),
    "weights": ({"weights": "c" * 64}, "built for weights bbbb"),
    "graph": ({"graph": "c" * 64}, "built for graph aaaa"),
    "an option": ({"options": {}}, "built with trt_op_types_to_exclude Gather,..., here it is unset"),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_foreign_engines_are_refused_with_the_difference_and_the_command(cache: EngineCache, what: str) -> None:
    changes, message = DIFFERENCES[what]
    cache.build(manifest_of(), key_of(), write_engines)
    with pytest.raises(EngineMissing) as caught:
        cache.find(manifest_of(), key_of(**changes))
    assert message in caught.value.message
    assert "millrace engines build pond@0123456789ab" in caught.value.message
    assert not caught.value.retryable


def test_the_nearest_engines_are_compared_with(cache: EngineCache) -> None:
    cache.build(manifest_of(), key_of(driver="1", tensorrt="1", gpu="1"), write_engines)
    cache.build(manifest_of(), key_of(driver="570.1"), write_engines)
    with pytest.raises(EngineMissing, match=r"nearest of 2 was built for driver 570\.1, here it is 580\.95\.05; build"):
        cache.find(manifest_of(), key_of())


def test_a_larger_step_is_named_as_such_and_not_as_a_list_of_shapes(cache: EngineCache) -> None:
    cache.build(manifest_of(), key_of(), write_engines)
    wanted = engine_key(manifest_of(), VERSIONS, Gpu(), StepTokens.up_to(8192))
    with pytest.raises(EngineMissing, match="built for max batch tokens 4096, here it is 8192; build"):
        cache.find(manifest_of(), wanted)


def test_without_any_engines_the_message_says_so(cache: EngineCache) -> None:
    with pytest.raises(EngineMissing, match=r"has no TensorRT engines in .*; build them on this machine: millrace"):
        cache.find(manifest_of(), key_of())


def test_a_build_that_fails_leaves_what_was_there(cache: EngineCache, tmp_path: Path) -> None:
    built = cache.build(manifest_of(), key_of(), write_engines)

    def fail(directory: Path) -> None:
        write_engines(directory)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        cache.build(manifest_of(), key_of(), fail)
    with pytest.raises(EngineMissing, match="left no engine"):
        cache.build(manifest_of(), key_of(), lambda _: None)
    assert cache.find(manifest_of(), key_of()) == built
    assert list(built.parent.iterdir()) == [built]


def test_a_second_build_replaces_the_first(cache: EngineCache) -> None:
    cache.build(manifest_of(), key_of(), write_engines)

    def other(directory: Path) -> None:
        (directory / "other.engine").write_bytes(b"newer")

    built = cache.build(manifest_of(), key_of(), other)
    assert sorted(path.name for path in built.iterdir()) == [KEY_FILE, "other.engine"]


def lose(directory: Path) -> None:
    next(directory.glob("*.engine")).unlink()


def cut(directory: Path) -> None:
    next(directory.glob("*.engine")).write_bytes(b"half")


def add(directory: Path) -> None:
    (directory / "another.engine").write_bytes(b"built while serving")


@pytest.mark.parametrize("harm", [lose, cut, add])
def test_a_directory_that_is_not_as_it_was_built_is_refused(cache: EngineCache, harm: Callable[[Path], None]) -> None:
    harm(cache.build(manifest_of(), key_of(), write_engines))
    with pytest.raises(EngineChanged, match=r"is not as it was built: .*\.engine; build the engines again"):
        cache.find(manifest_of(), key_of())


def test_what_has_no_key_is_no_engine(cache: EngineCache) -> None:
    built = cache.build(manifest_of(), key_of(), write_engines)
    (built / KEY_FILE).write_text("{}")
    assert cache.list(manifest_of()) == []
    (built / KEY_FILE).unlink()
    with pytest.raises(EngineMissing):
        cache.find(manifest_of(), key_of())


@pytest.mark.parametrize("harm", [lose, cut, add])
def test_a_seal_sees_every_change(cache: EngineCache, harm: Callable[[Path], None]) -> None:
    built = cache.build(manifest_of(), key_of(), write_engines)
    seal = Seal(built)
    for path in built.iterdir():
        path.read_bytes()
    seal.check()
    harm(built)
    with pytest.raises(EngineChanged, match=r"\.engine.*never while serving"):
        seal.check()


def test_a_seal_sees_an_engine_that_was_written_again_with_the_same_bytes(cache: EngineCache) -> None:
    built = cache.build(manifest_of(), key_of(), write_engines)
    seal = Seal(built)
    engine = next(built.glob("*.engine"))
    raw = engine.read_bytes()
    engine.unlink()
    engine.write_bytes(raw)
    with pytest.raises(EngineChanged):
        seal.check()


def test_every_dynamic_input_has_its_least_best_and_largest_shape() -> None:
    options = key_of().options
    shapes = {which: options[f"trt_profile_{which}_shapes"].split(",") for which in ("min", "opt", "max")}
    assert shapes["min"] == [
        "/embed.out:1x64",
        "/layers.0/attention.out:1x64",
        "/embed/float.out:1x64",
        "/layers.1/attention.out:1x64",
        "/layers.0/down/add.out:1x64",
    ]
    for which, rows in (("opt", 64), ("max", 4096)):
        assert shapes[which] == [shape.replace(":1x", f":{rows}x") for shape in shapes["min"]]


def test_the_provider_builds_only_when_it_may(tmp_path: Path) -> None:
    key = key_of()
    serving = provider_options(key, tmp_path, ordinal=1, stream=4096, may_build=False)
    building = provider_options(key, tmp_path, ordinal=1, stream=4096, may_build=True)
    assert key.options.items() < serving.items()
    assert (serving["device_id"], serving["user_compute_stream"]) == ("1", "4096")
    assert serving["trt_engine_cache_path"] == building["trt_engine_cache_path"] == str(tmp_path)
    assert serving["trt_timing_cache_enable"] == "False"
    assert "trt_timing_cache_path" not in serving
    assert building["trt_timing_cache_path"] == str(tmp_path)
    # With one of these the provider would build weakly typed networks, and a norm could become float16.
    assert not {"trt_fp16_enable", "trt_bf16_enable", "trt_int8_enable"} & serving.keys()


@pytest.mark.parametrize("count", [1, 64, 511, 512, 513, 4096])
def test_a_step_has_as_many_tokens_as_it_should(count: int) -> None:
    limits = backend_limits(manifest_of(), StepLimits(4096, 256, kv_memory_bytes=1 << 30, threads=1))
    batch, sampling = step_of(limits, count)
    check_model_input(batch, sampling, limits)
    assert len(batch.input_ids) == count


@dataclass(slots=True)
class Builder:
    """A machine whose sessions write engines when they open, as the provider does with explicit profiles."""

    builds_in_steps: bool = False
    steps: list[int] = field(default_factory=list)
    closed: int = 0

    def versions(self) -> RuntimeVersions:
        return VERSIONS

    def gpu(self) -> Gpu:
        return Gpu()

    def open(
        self,
        directory: Path,
        manifest: ModelManifest,
        limits: StepLimits,
        options: Callable[[int, int], Mapping[str, str]],
    ) -> Backend:
        place = Path(options(0, 4096)["trt_engine_cache_path"])
        assert (directory / "model.onnx").is_file()
        assert list(place.iterdir()) == []
        write_engines(place)
        return _Session(ScriptedBackend(backend_limits(manifest, limits)), self, place)


class _Session:
    def __init__(self, inner: ScriptedBackend, builder: Builder, place: Path) -> None:
        self._inner = inner
        self._builder = builder
        self._place = place

    @property
    def limits(self) -> BackendLimits:
        return self._inner.limits

    def forward(self, batch: ModelInput, sampling: SamplingInput, *, keeps_logits: bool = False) -> StepOutput:
        self._builder.steps.append(len(batch.input_ids))
        if self._builder.builds_in_steps:
            add(self._place)
        return self._inner.forward(batch, sampling, keeps_logits=keeps_logits)

    def close(self) -> None:
        self._builder.closed += 1
        self._inner.close()


def stored(tmp_path: Path, *, target: str = "tensorrt") -> Settings:
    """Settings of a store that holds `pond`."""
    settings = Settings(store=tmp_path / "store", max_batch_tokens=1024)
    manifest = put(Store(settings.store))
    changed = msgspec.structs.replace(manifest_of(), target=target, files=manifest.files)
    path = settings.store / "pond" / manifest.revision / "manifest.json"
    path.write_bytes(msgspec.json.encode(changed))
    return settings


def test_building_runs_every_size_of_step_and_keeps_the_engines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, builder = stored(tmp_path), Builder()
    assert build_engines(settings, "pond", builder, as_json=True) == 0
    answer = json.loads(capsys.readouterr().out)
    assert builder.steps == [1, 64, 1024]
    assert builder.closed == 1
    assert answer["engines"] == 1
    assert answer["max_batch_tokens"] == 1024
    assert Path(answer["directory"]).parent.parent.parent == engines_root(settings.store)
    assert list_engines(settings, "pond", as_json=False) == 0
    line = capsys.readouterr().out
    assert line.startswith(
        "NVIDIA H100 80GB HBM3 (9.0), driver 580.95.05, TensorRT 10.14.1, onnxruntime 1.31.1: 1 engines"
    )


def test_a_step_that_builds_an_engine_fails_the_build(tmp_path: Path) -> None:
    settings, builder = stored(tmp_path), Builder(builds_in_steps=True)
    with pytest.raises(EngineChanged, match=r"another\.engine"):
        build_engines(settings, "pond", builder, as_json=True)
    assert builder.closed == 1
    assert EngineCache(engines_root(settings.store)).list(manifest_of()) == []


def test_a_model_of_another_target_has_no_engines(tmp_path: Path) -> None:
    builder = Builder()
    with pytest.raises(BadRequest, match="was imported for target cuda; only those for tensorrt have engines"):
        build_engines(stored(tmp_path, target="cuda"), "pond", builder, as_json=True)
    assert builder.steps == []


def test_without_the_provider_the_command_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        TensorRtMachine().versions()
    except TensorRtUnavailable:
        pass
    else:
        pytest.skip("TensorRT is here")
    settings = stored(tmp_path)
    assert main(["engines", "build", "pond", "--store", str(settings.store)]) == 1
    assert "has no TensorRT provider: it is in onnxruntime-gpu" in capsys.readouterr().err
    assert main(["engines", "list", "pond", "--store", str(settings.store)]) == 0
    assert "pond@0123456789ab has no engines yet" in capsys.readouterr().err


def test_versions_of_tensorrt_are_told_apart() -> None:
    assert version_parts(101401) == (10, 14, 1)


def test_keys_differ_in_their_digest_whatever_differs() -> None:
    keys = [key_of(), *(key_of(**changes) for changes, _ in DIFFERENCES.values())]
    keys.append(engine_key(manifest_of(), VERSIONS, replace(Gpu(), compute_capability=(8, 9)), TOKENS))
    keys.append(engine_key(manifest_of("d" * 64), VERSIONS, Gpu(), TOKENS))
    assert len({key.digest for key in keys}) == len(keys)
    assert key_of().digest == key_of().digest
    assert np.all([len(key.digest) == 16 for key in keys])
