"""transformers on the same weights: the float32 reference for parity, and continuous batching as the peer in speed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig


class Float32Reference:
    """Logits [T, V] of prompts by transformers in float32 on the device (a model_store.parity.Reference)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __call__(self, prompts: Sequence[NDArray[np.int64]]) -> list[NDArray[np.float32]]:
        model = AutoModelForCausalLM.from_pretrained(str(self._directory), dtype=torch.float32, device_map="cuda")
        with torch.inference_mode():
            logits = [
                model(torch.from_numpy(prompt)[None].cuda()).logits[0].float().cpu().numpy() for prompt in prompts
            ]
        del model
        torch.cuda.empty_cache()
        return logits


def continuous_batching(
    directory: Path, vocab_size: int, *, prompt_tokens: int, new_tokens: int, count: int, rounds: int
) -> dict[str, object]:
    """New tokens a second of `count` greedy requests at once, bfloat16, prefill included; every round is listed."""
    model = AutoModelForCausalLM.from_pretrained(
        str(directory), dtype=torch.bfloat16, device_map="cuda", attn_implementation="paged|sdpa"
    )
    random = np.random.default_rng(0)
    prompts = [random.integers(0, vocab_size, prompt_tokens).tolist() for _ in range(count)]
    # Other prompts each round would be fairer still, but blocks are not shared, so none is found again.
    batching = ContinuousBatchingConfig(allow_block_sharing=False)
    _generate(model, prompts[:8], 8, batching)
    speeds, elapsed = [], []
    for _ in range(rounds):
        seconds, tokens = _generate(model, prompts, new_tokens, batching)
        speeds.append(round(tokens / seconds, 1))
        elapsed.append(round(seconds, 2))
    del model
    torch.cuda.empty_cache()
    return {"concurrency": count, "generated_tokens_per_s": speeds, "elapsed_s": elapsed, "attention": "paged|sdpa"}


def _generate(
    model: Any, prompts: list[list[int]], new_tokens: int, batching: ContinuousBatchingConfig
) -> tuple[float, int]:
    settings = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    start = time.perf_counter()
    answers = model.generate_batch(prompts, generation_config=settings, continuous_batching_config=batching)
    seconds = time.perf_counter() - start
    tokens = sum(len(answer.generated_tokens) for answer in answers.values())
    if tokens != len(prompts) * new_tokens:
        raise RuntimeError(f"the peer gave {tokens} tokens; expected {len(prompts) * new_tokens}")
    return seconds, tokens
