"""Logits of a checkpoint by transformers in float32: the measure of everything in model_store."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def open_transformers(directory: Path) -> Callable[[NDArray[np.int64]], NDArray[np.float32]]:
    """What computes logits [T, V] for token ids [T]. Fails if a tensor was missing, left over or of another shape."""
    # By name, so that type checking does not depend on whether the parity extra is installed.
    torch: Any = import_module("torch")
    transformers: Any = import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Eager attention: the plain definition, with nothing fused or reordered.
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, trust_remote_code=False
    )
    problems = {kind: found for kind, found in loading.items() if found}
    if problems:
        raise ValueError(f"transformers did not load {directory.name} whole: {problems}")
    model.eval()

    def logits(token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        with torch.no_grad():
            output = model(torch.from_numpy(token_ids)[None], use_cache=False)
        values: NDArray[np.float32] = output.logits[0].numpy()
        return values

    return logits
