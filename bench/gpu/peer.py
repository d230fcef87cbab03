"""transformers, in a process of its own: the float32 reference for parity, and the peer in speed.

    python -m bench.gpu.peer

Reads one JSON command a line and answers each with one line (peer_process.py is the other end). A process of its own
because a configuration that hangs can be ended, because its imports (ten seconds) happen while the first steps run, and
because what it leaves on the device goes with it.

How a configuration is timed: requests are added to a running manager; building it, its cache and its CUDA graphs, and
taking it down, are not counted (as Millrace's opening of a model is not). The clock runs from handing over the prompts
to the last token's own timestamp.
"""

from __future__ import annotations

import gc
import inspect
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
import transformers

from bench.gpu.peer_terms import Values, accepted, batching_settings, timed


class Peer:
    """One model at a time, kept from one configuration to the next."""

    def __init__(self) -> None:
        self._model: Any = None
        self._loaded: tuple[str, ...] = ()

    def reference(self, checkpoint: str, device: str, prompts: str, out: str) -> Values:
        """Logits [T, V] in float32 of the prompts in one .npz file, into another."""
        model = self._open(checkpoint, device, "float32", "sdpa")
        logits: dict[str, Any] = {}
        with np.load(prompts) as stored, torch.inference_mode():
            for name in stored.files:
                ids = torch.from_numpy(stored[name])[None].to(device)
                logits[name] = model(ids).logits[0].float().cpu().numpy()
        np.savez(out, **logits)
        del model  # what a name still holds is not given back
        return self.release()

    def generate(self, checkpoint: str, device: str, new_tokens: int, rounds: int, **settings: Any) -> Values:
        """Greedy answers of `new_tokens` each to random prompts, `rounds` times over; see `timed`."""
        configuration, count = str(settings["configuration"]), int(settings["count"])
        random = np.random.default_rng(0)
        prompts: list[list[int]] = random.integers(
            0, int(settings["vocab_size"]), (count, int(settings["prompt_tokens"]))
        ).tolist()
        if configuration == "static":
            model = self._open(checkpoint, device, "bfloat16", "sdpa")
            run, unknown, close = _static(model, prompts, device), list[str](), _nothing
        else:
            model = self._open(checkpoint, device, "bfloat16", "paged|sdpa")
            wanted = batching_settings(configuration, count, len(prompts[0]) + new_tokens)
            run, unknown, close = _continuous(model, prompts, new_tokens, wanted)
        try:
            # Graphs are captured when a size is first met: a whole pass meets them all.
            run(new_tokens if configuration == "graphs" else min(8, new_tokens))
            passes = [run(new_tokens) for _ in range(rounds)]
        finally:
            close()
        figures: Values = {"passes": passes, "concurrency": count}
        return figures | ({"settings_not_known": unknown} if unknown else {})

    def release(self) -> Values:
        """Give back what the device's memory holds: Millrace's KV cache takes what is left."""
        self._model, self._loaded = None, ()
        gc.collect()  # models and managers hold each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return {}

    def _open(self, checkpoint: str, device: str, dtype: str, attention: str) -> Any:
        if self._loaded != (checkpoint, device, dtype, attention):
            self.release()
            # Straight to the GPU; device_map asks for accelerate, which a processor's run does not need.
            placed: Values = {} if device == "cpu" else {"device_map": device}
            self._model = transformers.AutoModelForCausalLM.from_pretrained(
                checkpoint, dtype=getattr(torch, dtype), attn_implementation=attention, **placed
            )
            self._loaded = (checkpoint, device, dtype, attention)
        return self._model


def _continuous(
    model: Any, prompts: list[list[int]], new_tokens: int, wanted: Mapping[str, Any]
) -> tuple[Callable[[int], Values], list[str], Callable[[], None]]:
    """A running manager: what answers all prompts once, the settings this version does not know, and what ends it.

    Not generate_batch: that builds (or at the least empties) cache, mask and graphs inside the call.
    """
    kind = transformers.ContinuousBatchingConfig
    known, unknown = accepted(wanted, [field.name for field in fields(kind)])
    manager = model.init_continuous_batching(
        generation_config=_greedy(new_tokens), continuous_batching_config=kind(**known)
    )
    if hasattr(manager, "warmup"):
        manager.warmup()
    manager.start()
    extra, missing = accepted({"record_timestamps": True}, list(inspect.signature(manager.add_requests).parameters))

    def run(count_of_tokens: int) -> Values:
        start = time.perf_counter()
        manager.add_requests(prompts, max_new_tokens=count_of_tokens, **extra)
        answers: list[Any] = []
        while len(answers) < len(prompts):
            answer = manager.get_result(timeout=1)
            if answer is None and not manager.is_running():
                raise RuntimeError("the peer's generation thread ended")
            if answer is not None and answer.is_finished():
                answers.append(answer)
        seconds = time.perf_counter() - start
        if errors := [answer.error for answer in answers if answer.error]:
            raise RuntimeError(f"the peer failed {len(errors)} requests: {errors[0]}")
        lengths = [len(answer.generated_tokens) for answer in answers]
        stamps = [getattr(answer, "timestamps", None) for answer in answers]
        return timed(start, seconds, lengths, stamps, len(prompts), count_of_tokens)

    def close() -> None:
        manager.stop(block=True, timeout=10)
        getattr(manager, "destroy", _nothing)()

    return run, [*unknown, *missing], close


def _static(model: Any, prompts: list[list[int]], device: str) -> Callable[[int], Values]:
    """One batch of equal lengths by generate(): no scheduler, no paged cache, nothing joins or leaves."""
    ids = torch.tensor(prompts, device=device)

    def run(new_tokens: int) -> Values:
        start = time.perf_counter()
        with torch.inference_mode():
            answers = model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=_greedy(new_tokens)
            ).tolist()  # reading waits for the device
        seconds = time.perf_counter() - start
        lengths = [len(answer) - ids.shape[1] for answer in answers]
        return timed(start, seconds, lengths, [None], len(prompts), new_tokens)

    return run


def _nothing() -> None:
    """Nothing to end."""


def _greedy(new_tokens: int) -> Any:
    """No token ends an answer: -1 is none."""
    kind: Any = transformers.GenerationConfig  # its constructor has no types
    return kind(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)


def main() -> int:
    # Libraries print: the answers keep the real standard output to themselves.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    peer = Peer()
    known: dict[str, Callable[..., Values]] = {
        "reference": peer.reference,
        "generate": peer.generate,
        "release": peer.release,
    }
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = known[command.pop("do")](**command)
        except Exception:  # the other end records it; the next command may fare better
            answer = {"error": traceback.format_exc()[-1500:]}
        if "error" in answer:
            peer.release()  # only here: while it is handled, the exception's frames hold the model
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
