"""Measure Millrace on a bare GPU machine with PyTorch: `python -m bench.gpu --out DIR`.

Random models are made on the device, imported for target cuda, proved, and run at several concurrencies beside the
device's own limits and beside transformers' continuous batching, all in one run. Results are written after every step
(DIR/gpu.json), so a run that is cut off leaves what it had; the last output is a table (DIR/gpu.md).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.gpu.capture import ort_capture
from bench.gpu.engine import run_engine
from bench.gpu.report import table
from bench.random_model import SHAPES, write_checkpoint
from kernels.cuda.device import Device
from model_store.importing import import_model
from model_store.parity import Reference
from model_store.store import Store
from model_store.targets import TARGETS
from services.bench import Workload
from services.loading import artifact_logits, find_model, open_backend
from services.settings import Settings

# Small shapes that between them use what the operators do; the context covers several KV blocks.
PARITY_BASE: dict[str, object] = {
    **SHAPES["tiny"], "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 2048, "max_position_embeddings": 2048,
}  # fmt: skip
PARITY_SHAPES: dict[str, dict[str, object]] = {
    "llama": PARITY_BASE,
    "qwen3": {**PARITY_BASE, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128},
    "qwen2": {**PARITY_BASE, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "mistral": {**PARITY_BASE, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 20},
}
MEASURED_ONLY = 0.5  # the figure is the result: a run is not given up for it
CALIBRATION = [np.random.default_rng(seed).integers(0, 2048, 256) for seed in (1, 2)]


class Run:
    """One run: its results so far, and steps that may fail without ending it."""

    def __init__(self, out: Path, scratch: Path, budget_s: float) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.scratch = scratch
        self.settings = Settings(store=scratch / "store")
        self.results: dict[str, Any] = {"date": date.today().isoformat(), "command": sys.argv, "notes": []}
        self._out = out
        self._start = time.monotonic()
        self._budget_s = budget_s

    @property
    def left_s(self) -> float:
        return self._budget_s - (time.monotonic() - self._start)

    def step(
        self, what: str, into: dict[str, Any], key: str, work: Callable[[], object], *, needs_s: float = 0
    ) -> bool:
        """Do `work` and keep its result; whether it succeeded. Left out if the budget has less than `needs_s`."""
        begun = time.monotonic()
        if self.left_s < needs_s:
            self.results["notes"].append(f"{what}: left out, {self.left_s:.0f} s of the budget were left")
            print(f"{what}: left out", flush=True)
            return False
        try:
            into[key] = work()
            ok = True
        except Exception as error:  # one figure that cannot be had must not cost the others
            traceback.print_exc(limit=-4)
            into[key] = {"error": f"{type(error).__name__}: {error}"[:500]}
            ok = False
        print(f"[{time.monotonic() - self._start:6.1f}] {what}: {time.monotonic() - begun:.1f} s", flush=True)
        (self._out / "gpu.json").write_text(json.dumps(self.results, indent=1, default=str))
        return ok

    def finish(self) -> None:
        text = table(self.results)
        (self._out / "gpu.md").write_text(text + "\n")
        print(text)


def facts() -> dict[str, object]:
    device = Device().facts
    packages = {name: version(name) for name in ("torch", "transformers", "numpy", "onnx")}
    import onnxruntime

    return {"gpu": device.name, "driver": device.driver, "onnxruntime": onnxruntime.__version__, **packages}


def limits(found: dict[str, float]) -> dict[str, float]:
    from bench.gpu.limits import measure

    measured = measure()
    found["copy"], found["flops"] = measured.copy_bytes_per_s, measured.bf16_flops
    return {
        "copy_tb_per_s": round(measured.copy_bytes_per_s / 1e12, 2),
        "read_tb_per_s": round(measured.read_bytes_per_s / 1e12, 2),
        "bf16_tflops": round(measured.bf16_flops / 1e12, 0),
    }


def parity(run: Run, shape: str, scheme: str) -> dict[str, object]:
    """A small model's artifact of `scheme` against the CPU's fp32 artifact of the same checkpoint."""
    source = run.scratch / f"parity-{shape}"
    if not source.exists():
        write_checkpoint(source, PARITY_SHAPES[shape])
    store, cpu_name = Store(run.settings.store), f"{shape}-cpu"
    prove = partial(artifact_logits, run.settings)
    cpu = import_model(source, store, cpu_name, scheme="fp32", candidate_factory=prove, progress=_quiet)

    def reference(prompts: Sequence[NDArray[np.int64]]) -> list[NDArray[np.float32]]:
        with artifact_logits(run.settings, store.resolve(cpu_name), cpu) as logits:
            return [logits(prompt) for prompt in prompts]

    stored = import_model(
        source,
        store,
        shape,
        scheme=scheme,
        target="cuda",
        candidate_factory=prove,
        progress=_quiet,
        calibration_ids=CALIBRATION,
        reference=reference,
    )
    return _parity(stored.parity)


def import_large(run: Run, shape: str, scheme: str, reference: Reference) -> dict[str, object]:
    source = run.scratch / shape
    stored = import_model(
        source,
        Store(run.settings.store),
        shape,
        scheme=scheme,
        target="cuda",
        candidate_factory=partial(artifact_logits, run.settings),
        progress=_quiet,
        calibration_ids=CALIBRATION,
        reference=reference,
        parity_bound=MEASURED_ONLY,
    )
    return _parity(stored.parity)


def measure_model(run: Run, shape: str, options: argparse.Namespace, found: dict[str, float]) -> None:
    """One model from its making to its table."""
    from bench.gpu.checkpoint import write_on_device
    from bench.gpu.peer import Float32Reference, continuous_batching

    model = run.results.setdefault("models", {}).setdefault(shape, {"scheme": options.scheme})
    source, vocab_size = run.scratch / shape, int(str(SHAPES[shape]["vocab_size"]))
    large = shape == "llama-3.1-8b"
    needs_s = 90.0 if large else 40.0
    if not run.step(f"{shape}: make", model, "config", lambda: write_on_device(source, shape, {}), needs_s=needs_s):
        return
    reference = Float32Reference(source)
    if not run.step(
        f"{shape}: import and prove", model, "parity", lambda: import_large(run, shape, options.scheme, reference)
    ):
        return
    workload = Workload(options.prompt_tokens, options.new_tokens, options.concurrency, options.rounds)

    def engine() -> object:
        stored = find_model(run.settings, shape)
        backend = open_backend(run.settings, stored)
        try:
            return run_engine(backend, stored.manifest, workload, found["copy"], found["flops"])
        finally:
            backend.close()

    run.step(f"{shape}: engine", model, "engine", engine)
    if options.peer_concurrency:
        peer = partial(
            continuous_batching,
            source,
            vocab_size,
            prompt_tokens=options.prompt_tokens,
            new_tokens=options.new_tokens,
            count=options.peer_concurrency,
            rounds=options.peer_rounds,
        )
        run.step(f"{shape}: transformers", model, "peer", peer, needs_s=60 if large else 40)
    shutil.rmtree(source, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for gpu.json and gpu.md")
    parser.add_argument("--models", default="llama-3.2-1b,llama-3.1-8b", help="shapes of bench/random_model.py")
    parser.add_argument("--parity", default="all", choices=("all", "none"), help="small models in every scheme first")
    parser.add_argument("--scheme", default="bf16", choices=sorted(TARGETS["cuda"]))
    parser.add_argument("--concurrency", default="1,8,32,128,256", type=_integers)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-concurrency", type=int, default=128, help="0 = no peer")
    parser.add_argument("--peer-rounds", type=int, default=2)
    parser.add_argument("--budget-s", type=float, default=900, help="steps that would not fit are left out")
    parser.add_argument("--scratch", type=Path, help="a directory with room for the models (default: a temporary one)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="millrace-gpu-", dir=options.scratch) as scratch:
        run, found = Run(options.out, Path(scratch), options.budget_s), dict[str, float]()
        run.step("facts", run.results, "facts", facts)
        run.step("limits", run.results, "limits", partial(limits, found))
        if options.parity == "all":
            pairs = [(shape, "bf16") for shape in PARITY_SHAPES]
            pairs += [("llama", scheme) for scheme in TARGETS["cuda"] if scheme != "bf16"] + [("qwen3", "bf16-kv-int8")]
            for shape, scheme in pairs:
                rows = run.results.setdefault("parity", {})
                run.step(f"parity {shape} {scheme}", rows, f"{shape} {scheme}", partial(parity, run, shape, scheme))
            run.step("capture", run.results, "ort_capture", lambda: ort_capture(find_model(run.settings, "llama")))
        for shape in options.models.split(","):
            measure_model(run, shape, options, found)
        run.finish()
    return 0


def _parity(measured: object) -> dict[str, object]:
    import msgspec

    found = msgspec.to_builtins(measured)
    if not isinstance(found, dict):
        raise TypeError("the import measured no parity: this is a bug")
    return found


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _quiet(what: str, done: int, total: int) -> None:
    """No progress lines between the figures."""


if __name__ == "__main__":
    sys.exit(main())
