"""Measure Millrace on a bare GPU machine with PyTorch: `python -m bench.gpu --out DIR`.

Random models are made on the device, imported, proved, and run at several concurrencies beside the device's own limits
and beside transformers on the same weights, all in one run. Results are written after every step (DIR/gpu.json); the
last output is a report (DIR/gpu.md). Nothing is downloaded. To try the whole run without a GPU:

    python -m bench.gpu --out DIR --target cpu --scheme w8a8 --models tiny --parity-models tiny --concurrency 1,4
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
from collections.abc import Collection, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from bench.gpu.facts import facts
from bench.gpu.limits import DeviceLimits, measure_cpu, measure_cuda
from bench.gpu.model import measure_model
from bench.gpu.parity import DEFAULT_SHAPES, PARITY_SHAPES, pairs, prove_small
from bench.gpu.peer_process import PeerProcess
from bench.gpu.run import Run
from bench.random_model import SHAPES
from model_store.targets import TARGETS
from services.loading import find_model, step_limits

MEMORY_FILES = Path("/dev/shm")
SCRATCH_BYTES = 48 << 30  # a checkpoint of 8B parameters in 16 bits, its artifact, and the artifact being built


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = read_options(given)
    with tempfile.TemporaryDirectory(prefix="millrace-gpu-", dir=options.scratch or _scratch()) as scratch:
        run = Run(options.out, Path(scratch), options.budget_s, given)
        peer = _start_peer(run, options)
        try:
            run.step("facts", run.results, "facts", partial(facts, options.target))
            limits = _limits(run, options)
            _prove_small(run, options)
            for shape in options.models:
                measure_model(run, shape, options, limits, peer)
        finally:
            if peer:
                peer.close()
            run.finish(as_json=options.json)
    return 0


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True, help="directory for gpu.json and gpu.md")
    parser.add_argument("--models", default="llama-3.2-1b,llama-3.1-8b", help=f"any of {', '.join(SHAPES)}; or none")
    parser.add_argument("--parity-models", default=",".join(DEFAULT_SHAPES), help="small models proved first; or none")
    parser.add_argument("--target", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--scheme", help="of the models (default: the target's first)")
    parser.add_argument("--concurrency", default="1,8,32,128,256")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-concurrency", type=int, default=128, help="0 = no peer")
    parser.add_argument("--peer-rounds", type=int, default=2)
    parser.add_argument("--budget-s", type=float, default=420, help="steps that would not fit are left out")
    parser.add_argument("--scratch", type=Path, help="directory for the models (default: memory, if it has room)")
    parser.add_argument("--json", action="store_true", help="print the results instead of the report")
    options = parser.parse_args(arguments)
    options.models = _names(parser, "--models", options.models, SHAPES)
    options.parity_models = _names(parser, "--parity-models", options.parity_models, PARITY_SHAPES)
    options.scheme = options.scheme or next(iter(TARGETS[options.target]))
    if options.scheme not in TARGETS[options.target]:
        parser.error(f"--scheme {options.scheme}: target {options.target} has {', '.join(TARGETS[options.target])}")
    try:
        options.concurrency = tuple(int(part) for part in options.concurrency.split(","))
    except ValueError:
        parser.error(f"--concurrency {options.concurrency}: expected numbers, comma separated")
    counts = (*options.concurrency, options.prompt_tokens, options.new_tokens, options.rounds, options.peer_rounds)
    if min(counts) < 1 or options.peer_concurrency < 0:
        parser.error("concurrencies, tokens and rounds are at least 1")
    for shape in options.models:
        tokens, context = options.prompt_tokens + options.new_tokens, int(str(SHAPES[shape]["max_position_embeddings"]))
        if tokens > context:
            parser.error(f"{tokens} tokens a request; {shape} accepts {context}")
    return options


def _names(parser: argparse.ArgumentParser, flag: str, text: str, known: Collection[str]) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name and name != "none")
    for name in names:
        if name not in known:
            parser.error(f"{flag}: unknown {name!r}; known are {', '.join(known)}")
    return names


def _scratch() -> Path | None:
    """A file system in memory with room, or None for the usual place."""
    has_room = MEMORY_FILES.is_dir() and shutil.disk_usage(MEMORY_FILES).free >= SCRATCH_BYTES
    return MEMORY_FILES if has_room else None


def _start_peer(run: Run, options: argparse.Namespace) -> PeerProcess | None:
    """transformers, if it is there. On a GPU it also gives parity its reference, with or without --peer-concurrency."""
    if not options.models or (options.target == "cpu" and not options.peer_concurrency):
        return None
    if find_spec("torch") is None or find_spec("transformers") is None:
        run.note("torch or transformers is not installed: no peer, and parity is measured against numpy")
        return None
    return PeerProcess(options.target)


def _limits(run: Run, options: argparse.Namespace) -> DeviceLimits | None:
    found: list[DeviceLimits] = []

    def measure() -> dict[str, object]:
        threads = step_limits(run.settings).threads
        is_integer = options.scheme != "fp32"
        found.append(measure_cuda() if options.target == "cuda" else measure_cpu(threads, integer=is_integer))
        return found[0].as_shown()

    run.step("limits", run.results, "limits", measure)
    return found[0] if found else None


def _prove_small(run: Run, options: argparse.Namespace) -> None:
    rows = run.results.setdefault("parity", {})
    for shape, scheme in pairs(options.target, options.parity_models):
        work = partial(prove_small, run, shape, scheme, options.target)
        run.step(f"parity {shape} {scheme}", rows, f"{shape} {scheme}", work)
    if options.target == "cuda" and "llama" in options.parity_models:

        def capture() -> object:
            from bench.gpu.capture import ort_capture

            return ort_capture(find_model(run.settings, "llama"))

        run.step("capture", run.results, "ort_capture", capture)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # `timeout` ends a run: it still reports what it has
    sys.exit(main())
